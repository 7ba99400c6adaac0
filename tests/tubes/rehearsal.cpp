// Stands for tubes_cuda.cu: what every warp of a launch does, walked through on the CPU lane by lane.
#include "tubes_warp.h"

namespace mirasol {
namespace {

template <class In, class Out, bool packed>
void walk_token(const Launch& launch, uint32_t token) {
  for_runs(launch, token, [&](const Task& task, const Run& run) {
    alignas(32) In stage[kRunElements];
    // Neither number format reads all ones as a pixel that a test would expect.
    std::memset(static_cast<void*>(stage), 0xff, sizeof(stage));
    for (int lane = 0; lane < kLanes; ++lane) stage_run<In, packed>(launch, task, run, lane, stage);
    for (int lane = 0; lane < kLanes; ++lane) emit_run<In, Out>(launch, task, run, lane, stage);
  });
}

}  // namespace

void extract_cuda(const Launch& launch, void*) {
  with_gpu_float(launch.element, [&](auto element) {
    with_gpu_pixel(launch.pixel, [&](auto pixel) {
      using In = decltype(pixel);
      using Out = decltype(element);
      const auto walk = launch.packed ? walk_token<In, Out, true> : walk_token<In, Out, false>;
      for (uint32_t token = 0; token < launch.tokens; ++token) walk(launch, token);
    });
  });
}

void scatter_cuda(const Launch& launch, void*) {
  const uint32_t rows = gradient_rows(launch);
  alignas(16) float sums[kRunElements];
  with_gpu_float(launch.element, [&](auto element) {
    with_gpu_float(launch.pixel, [&](auto pixel) {
      for (uint32_t row = 0; row < rows; ++row) {
        for (int lane = 0; lane < kLanes; ++lane) {
          gather_row<decltype(element), decltype(pixel)>(launch, row, lane, sums);
        }
      }
    });
  });
}

}  // namespace mirasol
