// From clips and tubes to launches: how tokens are cut into runs, and how wide the accesses may be.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "plan.h"
#include "tubes_warp.h"

namespace mirasol {

// The widest load, in bytes, that divides every number given.
inline int widest(int least, std::initializer_list<int64_t> multiples) {
  for (int bytes = 16; bytes > least; bytes /= 2) {
    bool divides = true;
    for (int64_t multiple : multiples) divides = divides && multiple % bytes == 0;
    if (divides) return bytes;
  }
  return least;
}

inline int load_width(const Clip& clip, const Tube& tube, uint32_t run, bool packed, int64_t video, int size) {
  const int64_t step = packed ? kChannels : 1;
  if (!packed && clip.stride[3] != 1) return size;
  const int bytes = widest(size, {video, clip.stride[0] * size, clip.stride[1] * size, clip.stride[2] * size,
                                  packed ? 0 : clip.stride[4] * size, tube.kernel[2] * step * size,
                                  tube.stride[2] * step * size, tube.offset[2] * step * size, run * step * size});
  return bytes == 2 && size == 1 ? 1 : bytes;
}

inline Task make_task(const Clip& clip, const Tube& tube, bool packed, uintptr_t video, int size, void* tokens,
                      int token_size) {
  Task task{};
  task.tube = tube;
  task.tokens = tokens;
  const uint32_t pixels = tube.pixels(), parts = (pixels + kRunPixels - 1) / kRunPixels;
  task.run = ((pixels + parts - 1) / parts + 15) / 16 * 16;
  task.load_bytes = static_cast<uint8_t>(load_width(clip, tube, task.run, packed, static_cast<int64_t>(video), size));
  task.wide_stores = reinterpret_cast<uintptr_t>(tokens) % 16 == 0 && int64_t{tube.elements()} * token_size % 16 == 0;
  return task;
}

// Elements of the clip between the first and the last pixel of a token, of one channel.
inline int64_t span(const Clip& clip, const Tube& tube) {
  int64_t elements = 0;
  for (int axis = 0; axis < 3; ++axis) elements += (tube.kernel[axis] - 1) * std::abs(clip.stride[axis + 1]);
  return elements;
}

inline Launch make_launch(const Clip& clip, const std::vector<Tube>& tubes, const Affine& affine, uintptr_t video,
                          Dtype from, const std::vector<void*>& tokens, Dtype to) {
  require(tubes.size() <= kMaxTasks, "tubes: a launch holds at most 16");
  Launch launch{};
  launch.clip = clip;
  launch.video = reinterpret_cast<const void*>(video);
  launch.packed = clip.stride[4] == 1 && clip.stride[3] == kChannels;
  for (int axis = 0; axis < 3; ++axis) launch.step[axis] = static_cast<int32_t>(clip.stride[axis + 1]);
  for (int c = 0; c < kChannels; ++c) {
    launch.scale[c] = static_cast<float>(affine.scale[c]);
    launch.shift[c] = static_cast<float>(affine.shift[c]);
  }
  for (const Tube& tube : tubes) {
    require(span(clip, tube) + kChannels < kIndexLimit, "tubes: a token must span fewer than 2^31 elements of the clip");
    Task& task = launch.task[launch.tasks];
    task = make_task(clip, tube, launch.packed, video, element_bytes(from), tokens[launch.tasks], element_bytes(to));
    task.first_item = launch.items;
    const int64_t items = clip.size[0] * tube.tokens() + launch.items;
    require(items < kIndexLimit, "tubes: a call must yield fewer than 2^31 tokens; split the batch");
    launch.items = static_cast<uint32_t>(items);
    ++launch.tasks;
  }
  return launch;
}

}  // namespace mirasol
