// The CUDA path: one warp per token, or per row of the clip's gradient.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tubes_warp.h"

namespace mirasol {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocks = 3;  // that a processor holds at least: 80 registers a thread, with which no kernel spills

template <class In, class Out, bool packed>
__global__ void __launch_bounds__(kThreads, kBlocks) tubes_extract_kernel(const __grid_constant__ Launch launch) {
  __shared__ alignas(32) In stages[kWarps][kRunElements];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t token = blockIdx.x * kWarps + warp;
  if (token >= launch.tokens) return;
  for_runs(launch, token, [&](const Task& task, const Run& run) {
    stage_run<In, packed>(launch, task, run, lane, stages[warp]);
    __syncwarp();
    emit_run<In, Out>(launch, task, run, lane, stages[warp]);
    __syncwarp();
  });
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, kBlocks) tubes_scatter_kernel(const __grid_constant__ Launch launch) {
  __shared__ alignas(16) float sums[kWarps][kRunElements];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  gather_row<In, Out>(launch, blockIdx.x * kWarps + warp, lane, sums[warp]);
}

template <class Kernel>
void launch_warps(Kernel kernel, uint32_t warps, const Launch& launch, void* stream) {
  const uint32_t blocks = (warps + kWarps - 1) / kWarps;
  if (blocks == 0) return;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
  }
}

}  // namespace

void extract_cuda(const Launch& launch, void* stream) {
  with_gpu_float(launch.element, [&](auto element) {
    with_gpu_pixel(launch.pixel, [&](auto pixel) {
      using In = decltype(pixel);
      using Out = decltype(element);
      const auto kernel = launch.packed ? tubes_extract_kernel<In, Out, true> : tubes_extract_kernel<In, Out, false>;
      launch_warps(kernel, launch.tokens, launch, stream);
    });
  });
}

void scatter_cuda(const Launch& launch, void* stream) {
  const uint32_t rows = gradient_rows(launch);
  with_gpu_float(launch.element, [&](auto element) {
    with_gpu_float(launch.pixel, [&](auto pixel) {
      launch_warps(tubes_scatter_kernel<decltype(element), decltype(pixel)>, rows, launch, stream);
    });
  });
}

}  // namespace mirasol
