// Where tubes lie in a clip: the index arithmetic of both paths, the CPU's and the GPU's.
//
// A clip is [B, frames, H, W, 3] with strides in elements (of any sign). A tube (kernel, stride, offset) yields a grid
// of tokens (nt, nh, nw); a token holds kt * kh * kw pixels in the order (t, h, w), three channels each.
#pragma once

#include <cstdint>

// Always inlined: a copy compiled for one instruction set must never be linked into the path of another.
#ifdef __CUDACC__
#define MIRASOL_HD __host__ __device__ __forceinline__
#else
#define MIRASOL_HD inline __attribute__((always_inline))
#endif

namespace mirasol {

constexpr int kChannels = 3;

enum class Dtype : int { kUint8 = 0, kFloat16 = 1, kBfloat16 = 2, kFloat32 = 3, kFloat64 = 4 };

MIRASOL_HD int element_bytes(Dtype dtype) {
  return dtype == Dtype::kUint8 ? 1 : dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kFloat64 ? 8 : 2;
}

// Division of n < 2^31 by a divisor in [1, 2^31), fixed beforehand: one high multiply, one shift.
struct Divider {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  MIRASOL_HD uint32_t quotient(uint32_t n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(n, magic);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{n} * magic) >> 32);
#endif
    return (high + n) >> shift;
  }

  // n becomes n / divisor; returns the remainder.
  MIRASOL_HD uint32_t split(uint32_t& n) const {
    const uint32_t whole = n;
    n = quotient(whole);
    return whole - n * divisor;
  }
};

struct Clip {
  int64_t size[4];    // B, frames, H, W
  int64_t stride[5];  // B, frames, H, W, channel; in elements
};

struct Place {  // of a pixel or a token along time, height and width
  uint32_t t, h, w;
};

struct Tube {
  uint32_t kernel[3], stride[3], offset[3], grid[3];  // t, h, w
  Divider by_kernel[3], by_stride[3], by_grid[3];

  MIRASOL_HD uint32_t tokens() const { return grid[0] * grid[1] * grid[2]; }  // of one clip
  MIRASOL_HD uint32_t pixels() const { return kernel[0] * kernel[1] * kernel[2]; }  // of one token
  MIRASOL_HD uint32_t elements() const { return pixels() * kChannels; }

  // Token `index` of the batch: its place in the grid; `index` becomes the clip that it belongs to.
  MIRASOL_HD Place token(uint32_t& index) const {
    Place at;
    at.w = by_grid[2].split(index);
    at.h = by_grid[1].split(index);
    at.t = by_grid[0].split(index);
    return at;
  }

  // Pixel `index` of a token: its place in the kernel.
  MIRASOL_HD Place pixel(uint32_t index) const {
    Place at;
    at.w = by_kernel[2].split(index);
    at.h = by_kernel[1].split(index);
    at.t = index;
    return at;
  }

  // Offset in elements of a token's first pixel from the clip's first.
  MIRASOL_HD int64_t origin(const Clip& clip, uint32_t b, Place at) const {
    return b * clip.stride[0] + (int64_t{offset[0]} + int64_t{at.t} * stride[0]) * clip.stride[1] +
           (int64_t{offset[1]} + int64_t{at.h} * stride[1]) * clip.stride[2] +
           (int64_t{offset[2]} + int64_t{at.w} * stride[2]) * clip.stride[3];
  }

  // Tokens [first, last) along one axis whose kernel holds position p of the clip.
  MIRASOL_HD void covering(int axis, uint32_t p, uint32_t& first, uint32_t& last) const {
    first = last = 0;
    if (p < offset[axis]) return;
    const uint32_t from = p - offset[axis];
    const uint32_t behind = by_stride[axis].quotient(from) + 1;
    first = from < kernel[axis] ? 0 : by_stride[axis].quotient(from - kernel[axis]) + 1;
    last = behind < grid[axis] ? behind : grid[axis];
    if (first > last) first = last;
  }
};

}  // namespace mirasol
