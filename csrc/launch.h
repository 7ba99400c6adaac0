// From a call to one launch on a GPU: how tokens are cut into runs, and how wide the accesses may be.
#pragma once

#include <algorithm>

#include "call.h"

namespace mirasol {

constexpr int kLanes = 32;
constexpr uint32_t kRunPixels = 256;
constexpr uint32_t kRunElements = kRunPixels * kChannels;
constexpr int kMaxTasks = 16;

struct Task {  // one tube of a launch
  Tube tube;
  void* tokens;
  uint32_t first_token;  // among those of the launch
  uint32_t run;          // pixels at once; the last run of a token may be shorter
  uint8_t load_bytes;    // of one load
  bool wide_stores;      // whether 16-byte stores are aligned
};

struct Launch {
  Clip clip;
  void* video;
  Dtype pixel, element;
  bool packed;      // the channels of a pixel, and the pixels of a row, lie side by side
  bool by_fours;    // in every row of a dense clip the tokens begin and end at multiples of four elements, all aligned
  int32_t step[3];  // the clip's strides t, h, w once more
  float scale[kChannels], shift[kChannels];
  Divider by_height, by_frames;
  uint32_t tasks, tokens;
  Task task[kMaxTasks];
};

inline Task make_task(const Call& call, const Tube& tube, void* tokens, bool packed) {
  const int size = element_bytes(call.pixel);
  const int64_t* stride = call.clip.stride;
  Task task{};
  task.tube = tube;
  task.tokens = tokens;
  const uint32_t pixels = tube.pixels(), runs = (pixels + kRunPixels - 1) / kRunPixels;
  task.run = ((pixels + runs - 1) / runs + 15) / 16 * 16;
  // The lowest bit is the largest power of two that divides the clip's address and every step within a row and between.
  const int64_t steps = stride[0] | stride[1] | stride[2] | (packed ? 0 : stride[4]) | tube.kernel[2] | tube.stride[2] |
                        tube.offset[2] | 16;
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(call.video)) | steps * size | 16;
  task.load_bytes = static_cast<uint8_t>(packed || stride[3] == 1 ? all & -all : size);
  task.wide_stores =
      reinterpret_cast<uintptr_t>(tokens) % 16 == 0 && int64_t{tube.elements()} * element_bytes(call.element) % 16 == 0;
  return task;
}

inline Launch make_launch(const Call& call) {
  require(call.pixel != Dtype::kFloat64 && call.element != Dtype::kFloat64, "the CUDA kernels do not serve float64");
  require(call.tubes.size() <= kMaxTasks, "tubes: a launch holds at most 16");
  Launch launch{};
  launch.clip = call.clip;
  launch.video = call.video;
  launch.pixel = call.pixel;
  launch.element = call.element;
  launch.packed = call.clip.stride[4] == 1 && call.clip.stride[3] == kChannels;
  launch.by_height = Divider(static_cast<uint32_t>(call.clip.size[2]));
  launch.by_frames = Divider(static_cast<uint32_t>(call.clip.size[1]));
  for (int axis = 0; axis < 3; ++axis) {
    launch.step[axis] = static_cast<int32_t>(call.clip.stride[axis + 1]);
    require(launch.step[axis] == call.clip.stride[axis + 1], "strides along frames, H and W must be less than 2^31");
  }
  for (int c = 0; c < kChannels; ++c) {
    launch.scale[c] = static_cast<float>(call.scale[c]);
    launch.shift[c] = static_cast<float>(call.shift[c]);
  }
  int64_t tokens = 0, borders = call.clip.size[3];
  uintptr_t addresses = reinterpret_cast<uintptr_t>(call.video);
  for (const Tube& tube : call.tubes) {
    Task& task = launch.task[launch.tasks];
    task = make_task(call, tube, call.tokens[launch.tasks++], launch.packed);
    borders |= tube.kernel[2] | tube.stride[2] | tube.offset[2];
    addresses |= reinterpret_cast<uintptr_t>(task.tokens);
    task.first_token = static_cast<uint32_t>(tokens);
    tokens += call.clip.size[0] * tube.tokens();
    require(tokens < kIndexLimit, "tubes: a call must yield fewer than 2^31 tokens; split the batch");
  }
  launch.tokens = static_cast<uint32_t>(tokens);
  launch.by_fours = borders % 4 == 0 && addresses % 16 == 0;
  return launch;
}

// Rows of the clip's gradient, for each of which a launch has a warp.
inline uint32_t gradient_rows(const Launch& launch) {
  const int64_t* size = launch.clip.size;
  const bool few = size[0] * size[1] < kIndexLimit && size[0] * size[1] * size[2] < kIndexLimit;
  require(few && size[3] < kIndexLimit / kChannels, "tubes: the clip has 2^31 rows or more, or elements a row");
  return static_cast<uint32_t>(size[0] * size[1] * size[2]);
}

// On the current device; both throw std::runtime_error with CUDA's own words where a launch is refused.
void extract_cuda(const Launch& launch, void* stream);
void scatter_cuda(const Launch& launch, void* stream);

}  // namespace mirasol
