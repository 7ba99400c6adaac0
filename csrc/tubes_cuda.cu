// The CUDA path: one warp per item of a launch, as many blocks as the device holds at once.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tubes_cuda.h"

namespace mirasol {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocks = 3;  // that a processor holds at least: 80 registers a thread, with which no kernel spills

template <class In, class Out, bool packed>
__global__ void __launch_bounds__(kThreads, kBlocks) tubes_extract_kernel(const __grid_constant__ Launch launch) {
  __shared__ alignas(32) In stages[kWarps][kRunElements];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  In* stage = stages[warp];
  const Factors3 by(launch, lane * kWide<Out>);
  for (uint32_t item = blockIdx.x * kWarps + warp; item < launch.items; item += gridDim.x * kWarps) {
    const Task& task = find_task(launch, item);
    Run run = find_run(launch.clip, task, item);
    do {
      stage_run<In, packed>(launch, task, run, lane, stage);
      __syncwarp();
      emit_run<In, Out>(launch, task, run, by, lane, stage);
      __syncwarp();
    } while (next_run(task, run));
  }
}

// One warp per row of the clip. `rows` may exceed 2^31, the place within a row may not.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads, kBlocks)
    tubes_scatter_kernel(const __grid_constant__ Launch launch, Out* __restrict__ video) {
  const int lane = threadIdx.x % kLanes;
  const int64_t rows = launch.clip.size[0] * launch.clip.size[1] * launch.clip.size[2];
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
  for (int64_t row = first; row < rows; row += int64_t{gridDim.x} * kWarps) {
    const int64_t frame = row / launch.clip.size[2], b = frame / launch.clip.size[1];
    Place at;
    at.h = static_cast<uint32_t>(row - frame * launch.clip.size[2]);
    at.t = static_cast<uint32_t>(frame - b * launch.clip.size[1]);
    Out* out = video + row * launch.clip.size[3] * kChannels;
    for (at.w = lane; at.w < launch.clip.size[3]; at.w += kLanes) {
      float sum[kChannels];
      gather_pixel<In>(launch, static_cast<uint32_t>(b), at, sum);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        out[int64_t{at.w} * kChannels + c] = convert<Out>(sum[c] * launch.scale[c]);
      }
    }
  }
}

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
  }
}

// Makes the tensors' device the current one for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

template <class Kernel>
int blocks_at_once(Kernel kernel, int device, int64_t needed) {
  int processors = 0, each = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0));
  const int64_t held = int64_t{processors} * each;
  return static_cast<int>(needed < held ? needed : held);
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

void extract_cuda(const Launch& launch, Dtype from, Dtype to, int device, void* stream) {
  const OnDevice current(device);
  if (launch.items == 0) return;
  const auto run = [&](auto pixel, auto element) {
    using In = decltype(pixel);
    using Out = decltype(element);
    const auto kernel = launch.packed ? tubes_extract_kernel<In, Out, true> : tubes_extract_kernel<In, Out, false>;
    const int blocks = blocks_at_once(kernel, device, (int64_t{launch.items} + kWarps - 1) / kWarps);
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    check(cudaGetLastError());
  };
  with_float(to, [&](auto element) {
    if (from == Dtype::kUint8) return run(uint8_t{}, element);
    with_float(from, [&](auto pixel) { run(pixel, element); });
  });
}

void scatter_cuda(const Launch& launch, Dtype from, void* video, Dtype to, int device, void* stream) {
  const OnDevice current(device);
  const int64_t rows = launch.clip.size[0] * launch.clip.size[1] * launch.clip.size[2];
  if (rows == 0) return;
  with_float(from, [&](auto element) {
    with_float(to, [&](auto pixel) {
      using Out = decltype(pixel);
      const auto kernel = tubes_scatter_kernel<decltype(element), Out>;
      const int blocks = blocks_at_once(kernel, device, (rows + kWarps - 1) / kWarps);
      kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch, static_cast<Out*>(video));
      check(cudaGetLastError());
    });
  });
}

}  // namespace mirasol
