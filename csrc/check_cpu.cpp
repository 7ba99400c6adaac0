// A program for the sanitizers: many small clips in buffers that end where their data ends, through the CPU path and the
// rehearsed launch of the GPU, which must agree to the bit. Exits with 1 at the first difference.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "launch.h"
#include "tubes_cpu.h"
#include "tubes_rehearse.h"

namespace mirasol {
namespace MIRASOL_ISA {
void extract(const Clip&, const std::vector<Tube>&, const Affine&, const void*, Dtype, void* const*, Dtype, int);
void scatter(const Clip&, const std::vector<Tube>&, const Affine&, const void* const*, Dtype, void*, Dtype, int);
}  // namespace MIRASOL_ISA
}  // namespace mirasol

namespace {

using namespace mirasol;
using Buffer = std::unique_ptr<unsigned char[]>;

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

Buffer exactly(int64_t bytes) { return Buffer(new unsigned char[bytes]); }

// Numbers that every format holds.
void fill(unsigned char* data, int64_t elements, Dtype dtype) {
  for (int64_t i = 0; i < elements; ++i) {
    const float value = static_cast<float>(draw(-8, 8));
    switch (dtype) {
      case Dtype::kUint8: data[i] = static_cast<unsigned char>(draw(0, 255)); break;
      case Dtype::kFloat16: reinterpret_cast<Half*>(data)[i] = convert<Half>(value); break;
      case Dtype::kBfloat16: reinterpret_cast<Bfloat*>(data)[i] = convert<Bfloat>(value); break;
      case Dtype::kFloat64: reinterpret_cast<double*>(data)[i] = value; break;
      default: reinterpret_cast<float*>(data)[i] = value;
    }
  }
}

std::vector<int64_t> draw_tubes(const std::vector<int64_t>& size, int count) {
  std::vector<int64_t> numbers;
  for (int i = 0; i < count; ++i) {
    int64_t kernel[3], stride[3], offset[3];
    for (int axis = 0; axis < 3; ++axis) {
      kernel[axis] = axis == 2 && draw(0, 1) ? 4 * draw(1, size[3] / 4) : draw(1, size[axis + 1]);
      offset[axis] = draw(0, size[axis + 1] - kernel[axis]);
      stride[axis] = draw(1, 9);
    }
    for (const auto* triple : {kernel, stride, offset}) numbers.insert(numbers.end(), triple, triple + 3);
  }
  return numbers;
}

// The strides of a clip whose dimensions lie in memory in an order that is drawn.
std::vector<int64_t> draw_strides(const std::vector<int64_t>& size) {
  const std::vector<int64_t> sizes = {size[0], size[1], size[2], size[3], kChannels};
  const std::vector<std::vector<int>> orders = {{0, 1, 2, 3, 4}, {0, 4, 1, 2, 3}, {0, 1, 4, 2, 3}, {4, 3, 2, 1, 0}};
  const std::vector<int>& order = orders[draw(0, 3)];
  std::vector<int64_t> strides(5);
  int64_t step = 1;
  for (int i = 4; i >= 0; --i) {
    strides[order[i]] = step;
    step *= sizes[order[i]];
  }
  return strides;
}

bool run_once() {
  const std::vector<int64_t> size = {draw(0, 2), draw(1, 6), draw(1, 14), draw(4, 40)};
  const std::vector<int64_t> numbers = draw_tubes(size, static_cast<int>(draw(1, 3)));
  const Clip clip = make_clip(size, draw_strides(size)), dense = make_contiguous_clip(size);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  const Affine affine = make_affine({0.5, 2, 4}, {1, -2, 3});
  const Dtype from = static_cast<Dtype>(draw(0, 4)), to = static_cast<Dtype>(draw(1, 4));
  const int64_t pixels = size[0] * size[1] * size[2] * size[3] * kChannels;
  const Buffer video = exactly(pixels * element_bytes(from));
  fill(video.get(), pixels, from);
  std::vector<Buffer> buffers;
  std::vector<void*> ours, rehearsed;
  std::vector<const void*> gradients;
  std::vector<int64_t> bytes;
  for (const Tube& tube : tubes) {
    bytes.push_back(size[0] * tube.tokens() * tube.elements() * element_bytes(to));
    for (auto* pointers : {&ours, &rehearsed}) {
      buffers.push_back(exactly(bytes.back()));
      pointers->push_back(buffers.back().get());
    }
    gradients.push_back(ours.back());
  }
  MIRASOL_ISA::extract(clip, tubes, affine, video.get(), from, ours.data(), to, static_cast<int>(draw(1, 3)));
  const bool on_gpu = from != Dtype::kFloat64 && to != Dtype::kFloat64;
  if (on_gpu) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(video.get());
    rehearse_extract(make_launch(clip, tubes, affine, address, from, rehearsed, to), from, to);
    for (size_t i = 0; i < tubes.size(); ++i) {
      if (std::memcmp(ours[i], rehearsed[i], bytes[i]) != 0) return false;
    }
  }
  const Buffer gradient = exactly(pixels * element_bytes(to)), again = exactly(pixels * element_bytes(to));
  MIRASOL_ISA::scatter(dense, tubes, affine, gradients.data(), to, gradient.get(), to, static_cast<int>(draw(1, 3)));
  if (!on_gpu) return true;
  rehearse_scatter(make_launch(dense, tubes, affine, 0, to, ours, to), to, again.get(), to);
  return std::memcmp(gradient.get(), again.get(), pixels * element_bytes(to)) == 0;
}

}  // namespace

int main() {
  constexpr int runs = 3000;
  for (int i = 0; i < runs; ++i) {
    if (!run_once()) {
      std::printf("run %d: the CPU and the rehearsed launch differ\n", i);
      return 1;
    }
  }
  std::printf("%d runs agree\n", runs);
  return 0;
}
