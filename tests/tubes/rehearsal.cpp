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

template <class In, class Out>
void walk_clip(const Launch& launch) {
  const int64_t* size = launch.clip.size;
  Out* out = static_cast<Out*>(launch.video);
  Place at;
  for (int64_t b = 0; b < size[0]; ++b) {
    for (at.t = 0; at.t < size[1]; ++at.t) {
      for (at.h = 0; at.h < size[2]; ++at.h) {
        for (at.w = 0; at.w < size[3]; ++at.w, out += kChannels) {
          gather_pixel<In>(launch, static_cast<uint32_t>(b), at, out);
        }
      }
    }
  }
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
  with_gpu_float(launch.element, [&](auto element) {
    with_gpu_float(launch.pixel, [&](auto pixel) { walk_clip<decltype(element), decltype(pixel)>(launch); });
  });
}

}  // namespace mirasol
