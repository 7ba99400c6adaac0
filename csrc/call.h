// From the numbers that Python hands over to a call; bad ones are refused here, for both modules.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "tubes.h"

namespace mirasol {

constexpr int64_t kIndexLimit = int64_t{1} << 31;

// video, its dtype, sizes (B, frames, H, W), strides (the same and the channel's, in elements), tubes (kernel, stride and
// offset, each t, h, w), scale, shift, tokens, their dtype. Pointers come as integers: no header of PyTorch is needed.
using Numbers = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>,
                           std::vector<double>, std::vector<double>, std::vector<uintptr_t>, int>;

struct Call {    // extract reads video and writes tokens, scatter the reverse
  void* video;   // of the strides in clip; contiguous for scatter
  Dtype pixel, element;  // of video and of tokens
  Clip clip;
  std::vector<Tube> tubes;
  std::vector<void*> tokens;                    // contiguous, one buffer per tube
  double scale[kChannels], shift[kChannels];  // element = pixel * scale + shift
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline Dtype make_dtype(int code) {
  require(code >= 0 && code <= 4, "dtype must be a code from 0 to 4, was " + std::to_string(code));
  return static_cast<Dtype>(code);
}

inline Tube make_tube(const int64_t* numbers, const Clip& clip) {
  Tube tube;
  int64_t tokens = clip.size[0], pixels = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t kernel = numbers[axis], stride = numbers[3 + axis], offset = numbers[6 + axis];
    const int64_t size = clip.size[axis + 1];
    require(kernel >= 1 && stride >= 1 && offset >= 0 && stride < kIndexLimit, "tube: kernel, stride >= 1, offset >= 0");
    require(kernel <= size && offset <= size - kernel, "tube yields no token along axis " + std::to_string(axis));
    const int64_t grid = (size - offset - kernel) / stride + 1;
    tube.kernel[axis] = static_cast<uint32_t>(kernel);
    tube.stride[axis] = static_cast<uint32_t>(stride);
    tube.offset[axis] = static_cast<uint32_t>(offset);
    tube.grid[axis] = static_cast<uint32_t>(grid);
    tube.by_kernel[axis] = Divider(tube.kernel[axis]);
    tube.by_stride[axis] = Divider(tube.stride[axis]);
    tube.by_grid[axis] = Divider(tube.grid[axis]);
    pixels *= kernel;
    require(pixels < kIndexLimit / kChannels, "tube: a token must hold fewer than 2^31 elements");
    tokens *= grid;
    require(tokens < kIndexLimit, "tube: a call must yield fewer than 2^31 tokens; split the batch");
  }
  return tube;
}

inline Call make_call(const Numbers& numbers) {
  const auto& [video, pixel, sizes, strides, tubes, scale, shift, tokens, element] = numbers;
  Call call;
  call.pixel = make_dtype(pixel);
  call.element = make_dtype(element);
  require(call.element != Dtype::kUint8, "tokens must be floating");
  require(sizes.size() == 4 && strides.size() == 5, "sizes must be B, frames, H, W; strides have the channel's too");
  for (int i = 0; i < 4; ++i) {
    require(sizes[i] >= (i == 0 ? 0 : 1) && sizes[i] < kIndexLimit, "sizes must lie in [1, 2^31)");
    call.clip.size[i] = sizes[i];
  }
  for (int i = 0; i < 5; ++i) call.clip.stride[i] = strides[i];
  require(!tubes.empty() && tubes.size() % 9 == 0, "tubes must be nine numbers each");
  for (size_t i = 0; i < tubes.size(); i += 9) call.tubes.push_back(make_tube(tubes.data() + i, call.clip));
  require(scale.size() == kChannels && shift.size() == kChannels, "scale and shift must hold three numbers");
  for (int c = 0; c < kChannels; ++c) {
    call.scale[c] = scale[c];
    call.shift[c] = shift[c];
  }
  require(tokens.size() == call.tubes.size(), "one token buffer is needed per tube");
  require(video != 0 || sizes[0] == 0, "video must not be a null pointer");
  call.video = reinterpret_cast<void*>(video);
  for (uintptr_t pointer : tokens) {
    require(pointer != 0 || sizes[0] == 0, "tokens must not be a null pointer");
    call.tokens.push_back(reinterpret_cast<void*>(pointer));
  }
  return call;
}

}  // namespace mirasol
