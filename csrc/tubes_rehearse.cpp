#include "tubes_rehearse.h"

#include <cstring>

namespace mirasol {
namespace {

template <class In, class Out, bool packed>
void walk_run(const Launch& launch, const Task& task, const Run& run) {
  alignas(32) In stage[kRunElements];
  // Neither number format reads all ones as a pixel that a test would expect.
  std::memset(static_cast<void*>(stage), 0xff, sizeof(stage));
  for (int lane = 0; lane < kLanes; ++lane) stage_run<In, packed>(launch, task, run, lane, stage);
  for (int lane = 0; lane < kLanes; ++lane) {
    emit_run<In, Out>(launch, task, run, Factors3(launch, lane * kWide<Out>), lane, stage);
  }
}

template <class In, class Out>
void walk_extract(const Launch& launch) {
  const auto walk = launch.packed ? walk_run<In, Out, true> : walk_run<In, Out, false>;
  for (uint32_t item = 0; item < launch.items; ++item) {
    const Task& task = find_task(launch, item);
    Run run = find_run(launch.clip, task, item);
    do {
      walk(launch, task, run);
    } while (next_run(task, run));
  }
}

template <class In, class Out>
void walk_scatter(const Launch& launch, Out* video) {
  Place at;
  for (int64_t b = 0; b < launch.clip.size[0]; ++b) {
    for (at.t = 0; at.t < launch.clip.size[1]; ++at.t) {
      for (at.h = 0; at.h < launch.clip.size[2]; ++at.h) {
        for (at.w = 0; at.w < launch.clip.size[3]; ++at.w) {
          float sum[kChannels];
          gather_pixel<In>(launch, static_cast<uint32_t>(b), at, sum);
          for (int c = 0; c < kChannels; ++c) *video++ = convert<Out>(sum[c] * launch.scale[c]);
        }
      }
    }
  }
}

template <class F>
void with_float(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat16: return f(Half{});
    case Dtype::kBfloat16: return f(Bfloat{});
    case Dtype::kFloat32: return f(float{});
    default: throw std::invalid_argument("the CUDA kernels serve float16, bfloat16 and float32 (and uint8 clips)");
  }
}

}  // namespace

void rehearse_extract(const Launch& launch, Dtype from, Dtype to) {
  with_float(to, [&](auto element) {
    using Out = decltype(element);
    if (from == Dtype::kUint8) return walk_extract<uint8_t, Out>(launch);
    with_float(from, [&](auto pixel) { walk_extract<decltype(pixel), Out>(launch); });
  });
}

void rehearse_scatter(const Launch& launch, Dtype from, void* video, Dtype to) {
  with_float(from, [&](auto element) {
    with_float(to, [&](auto pixel) {
      walk_scatter<decltype(element)>(launch, static_cast<decltype(pixel)*>(video));
    });
  });
}

}  // namespace mirasol
