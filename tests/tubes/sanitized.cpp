// A program for the sanitizers: many small clips in buffers that end where their data ends, through the CPU path and the
// rehearsed launch of the GPU, which must agree to the bit. Exits with 1 at the first difference.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <tuple>

#include "launch.h"
#include "numbers.h"

namespace mirasol {
namespace MIRASOL_ISA {
void extract(const Call&, int threads);
void scatter(const Call&, int threads);
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
      const int64_t unit = axis == 2 && draw(0, 1) ? 4 : 1;
      kernel[axis] = unit * draw(1, size[axis + 1] / unit);
      offset[axis] = unit * draw(0, (size[axis + 1] - kernel[axis]) / unit);
      stride[axis] = unit * draw(1, 9);
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

struct Seen {
  std::set<std::tuple<bool, bool, int>> extracted;  // packed, wide stores, bytes of a load
  std::set<bool> scattered;                         // by fours
};

bool run_once(Seen& seen) {
  const std::vector<int64_t> size = {draw(0, 2), draw(1, 6), draw(1, 14), draw(0, 1) ? draw(4, 40) : 4 * draw(1, 10)};
  const int from = static_cast<int>(draw(0, 4)), to = static_cast<int>(draw(1, 4)), count = static_cast<int>(draw(1, 3));
  const std::vector<uintptr_t> later(count, 1);
  Call call = make_call({1, from, size, draw_strides(size), draw_tubes(size, count), {0.5, 2, 4},
                         {1, -2, 3}, later, to});
  const int64_t pixels = size[0] * size[1] * size[2] * size[3] * kChannels;
  const Buffer video = exactly(pixels * element_bytes(call.pixel));
  fill(video.get(), pixels, call.pixel);
  call.video = video.get();
  Call rehearsed = call;
  std::vector<Buffer> buffers;
  std::vector<int64_t> bytes;
  for (int i = 0; i < count; ++i) {
    bytes.push_back(size[0] * call.tubes[i].tokens() * call.tubes[i].elements() * element_bytes(call.element));
    for (Call* each : {&call, &rehearsed}) {
      buffers.push_back(exactly(bytes[i]));
      each->tokens[i] = buffers.back().get();
    }
  }
  MIRASOL_ISA::extract(call, static_cast<int>(draw(1, 3)));
  const bool on_gpu = call.pixel != Dtype::kFloat64 && call.element != Dtype::kFloat64;
  if (on_gpu) {
    const Launch launch = make_launch(rehearsed);
    extract_cuda(launch, nullptr);
    for (int i = 0; i < count; ++i) {
      if (std::memcmp(call.tokens[i], rehearsed.tokens[i], bytes[i]) != 0) return false;
      seen.extracted.emplace(launch.packed, launch.task[i].wide_stores, launch.task[i].load_bytes);
    }
  }
  const Buffer gradient = exactly(pixels * element_bytes(call.element)), again = exactly(pixels * element_bytes(call.element));
  call.pixel = rehearsed.pixel = call.element;
  call.video = gradient.get();
  rehearsed.video = again.get();
  MIRASOL_ISA::scatter(call, static_cast<int>(draw(1, 3)));
  if (!on_gpu) return true;
  const Launch launch = make_launch(rehearsed);
  seen.scattered.insert(launch.by_fours);
  scatter_cuda(launch, nullptr);
  return std::memcmp(gradient.get(), again.get(), pixels * element_bytes(call.element)) == 0;
}

// TubeViT's tubes, uint8: 24, 12, 36 and 48 bytes a row of packed pixels; 8, 4, 12 and 16 of one channel.
bool moves_widely(const std::vector<int64_t>& strides) {
  const std::vector<int64_t> tubes = {8, 8,  8,  16, 32, 32, 0, 0,  0,  16, 4, 4,  6,  32, 32, 4, 8, 8,
                                      4, 12, 12, 16, 32, 32, 0, 16, 16, 1,  16, 16, 32, 16, 16, 0, 0, 0};
  const uintptr_t aligned = 1 << 12;
  const Call call = make_call({aligned, 0, {1, 32, 224, 224}, strides, tubes, {1, 1, 1}, {0, 0, 0},
                               std::vector<uintptr_t>(4, aligned), static_cast<int>(Dtype::kBfloat16)});
  const Launch launch = make_launch(call);
  bool widely = launch.by_fours;
  for (int i = 0; i < 4; ++i) widely = widely && launch.task[i].load_bytes == (i == 0 ? 8 : i == 3 ? 16 : 4);
  return widely;
}

}  // namespace

int main() {
  constexpr int64_t frame = 224 * 224;
  if (!moves_widely({96 * frame, 3 * frame, 672, 3, 1}) || !moves_widely({96 * frame, frame, 224, 1, 32 * frame})) {
    std::printf("the published tubes are moved in narrower pieces than they could be\n");
    return 1;
  }
  constexpr int runs = 3000;
  Seen seen;
  for (int i = 0; i < runs; ++i) {
    if (!run_once(seen)) {
      std::printf("run %d: the CPU and the rehearsed launch differ\n", i);
      return 1;
    }
  }
  for (int bytes : {4, 8, 16}) {
    for (int kind = 0; kind < 4; ++kind) {
      if (seen.extracted.count({kind % 2, kind / 2, bytes})) continue;
      std::printf("no run loaded %d bytes with packed = %d, wide stores = %d\n", bytes, kind % 2, kind / 2);
      return 1;
    }
  }
  if (seen.scattered.size() != 2) {
    std::printf("gradients were gathered in pieces of one size alone\n");
    return 1;
  }
  std::printf("%d runs agree\n", runs);
  return 0;
}
