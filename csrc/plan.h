// From the numbers that Python hands over to clips and tubes; bad ones are refused here, for both modules.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tubes.h"

namespace mirasol {

constexpr int64_t kIndexLimit = int64_t{1} << 31;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline Dtype make_dtype(int code) {
  require(code >= 0 && code <= 4, "dtype must be a code from 0 to 4, was " + std::to_string(code));
  return static_cast<Dtype>(code);
}

// sizes: B, frames, H, W. strides: the same and the channel's, in elements.
inline Clip make_clip(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  require(sizes.size() == 4, "sizes must be B, frames, H, W");
  require(strides.size() == 5, "strides must be those of B, frames, H, W and channel");
  Clip clip;
  for (int i = 0; i < 4; ++i) {
    require(sizes[i] >= (i == 0 ? 0 : 1) && sizes[i] < kIndexLimit, "sizes must lie in [1, 2^31)");
    clip.size[i] = sizes[i];
  }
  for (int i = 0; i < 5; ++i) clip.stride[i] = strides[i];
  return clip;
}

inline Clip make_contiguous_clip(const std::vector<int64_t>& sizes) {
  require(sizes.size() == 4, "sizes must be B, frames, H, W");
  const int64_t row = sizes[3] * kChannels, frame = sizes[2] * row;
  return make_clip(sizes, {sizes[1] * frame, frame, row, kChannels, 1});
}

// numbers: kernel, stride and offset, each (t, h, w).
inline Tube make_tube(const int64_t* numbers, const Clip& clip) {
  Tube tube;
  int64_t tokens = clip.size[0], pixels = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t kernel = numbers[axis], stride = numbers[3 + axis], offset = numbers[6 + axis];
    require(kernel >= 1 && stride >= 1 && offset >= 0 && stride < kIndexLimit, "tube: kernel, stride >= 1, offset >= 0");
    require(kernel < kIndexLimit && offset < kIndexLimit && offset + kernel <= clip.size[axis + 1],
            "tube yields no token: offset + kernel = " + std::to_string(offset + kernel) + " exceeds the clip's " +
                std::to_string(clip.size[axis + 1]) + " along axis " + std::to_string(axis));
    const int64_t grid = (clip.size[axis + 1] - offset - kernel) / stride + 1;
    tube.kernel[axis] = static_cast<uint32_t>(kernel);
    tube.stride[axis] = static_cast<uint32_t>(stride);
    tube.offset[axis] = static_cast<uint32_t>(offset);
    tube.grid[axis] = static_cast<uint32_t>(grid);
    pixels *= kernel;
    require(pixels < kIndexLimit / kChannels, "tube: a token must hold fewer than 2^31 elements");
    tokens *= grid;
    require(tokens < kIndexLimit, "tube: a call must yield fewer than 2^31 tokens; split the batch");
  }
  tube.by_row = Divider(tube.kernel[2]);
  tube.by_plane = Divider(tube.kernel[1]);
  tube.by_elements = Divider(tube.kernel[2] * kChannels);
  tube.by_width = Divider(tube.grid[2]);
  tube.by_height = Divider(tube.grid[1]);
  tube.by_time = Divider(tube.grid[0]);
  for (int axis = 0; axis < 3; ++axis) tube.by_stride[axis] = Divider(tube.stride[axis]);
  return tube;
}

inline std::vector<Tube> make_tubes(const std::vector<int64_t>& numbers, const Clip& clip) {
  require(!numbers.empty() && numbers.size() % 9 == 0, "tubes must be nine numbers each");
  std::vector<Tube> tubes;
  for (size_t i = 0; i < numbers.size(); i += 9) tubes.push_back(make_tube(numbers.data() + i, clip));
  return tubes;
}

inline Affine make_affine(const std::vector<double>& scale, const std::vector<double>& shift) {
  require(scale.size() == kChannels && shift.size() == kChannels, "scale and shift must hold three numbers");
  Affine affine;
  for (int c = 0; c < kChannels; ++c) {
    affine.scale[c] = scale[c];
    affine.shift[c] = shift[c];
  }
  return affine;
}

// Addresses as pointers, refused where a call with work to do would follow a null one.
template <class Pointer>
std::vector<Pointer> make_pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<Pointer> pointers;
  for (uintptr_t address : addresses) pointers.push_back(reinterpret_cast<Pointer>(address));
  return pointers;
}

inline void require_pointers(const Clip& clip, uintptr_t video, const std::vector<uintptr_t>& tokens, size_t tubes) {
  require(tokens.size() == tubes, "one token buffer is needed per tube");
  if (clip.size[0] == 0) return;
  require(video != 0, "video must not be a null pointer");
  for (uintptr_t pointer : tokens) require(pointer != 0, "tokens must not be a null pointer");
}

}  // namespace mirasol
