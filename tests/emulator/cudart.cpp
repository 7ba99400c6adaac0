// Stands in for libcudart below the host code of csrc/tubes_cuda.cu: every launch goes to a callback, not to a GPU.
//
// A program that nvcc compiled registers its kernels when it is loaded, each by the address of a host function, and
// launches them by that address. Of CUDA's functions only those stand here that such a program may call.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

// Runs a launch to its end; `name` is the entry of the PTX, `arguments` point at the values of its parameters.
using OnLaunch = cudaError_t (*)(const char* name, const dim3* grid, unsigned threads, void** arguments, size_t shared);

OnLaunch on_launch = nullptr;
cudaError_t last_error = cudaSuccess;

struct Configuration {  // what stands between <<< and >>>, until the kernel's host function asks for it
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;

std::map<const void*, std::string>& names() {  // in a function: kernels register before a variable here would exist
  static std::map<const void*, std::string> registered;
  return registered;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void emulate(OnLaunch callback) { on_launch = callback; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  if (on_launch == nullptr) return last_error = cudaErrorNoDevice;
  if (block.y != 1 || block.z != 1) return last_error = cudaErrorInvalidConfiguration;
  return last_error = on_launch(names().at(host).c_str(), &grid, block.x, arguments, shared);
}

// CUDA 13 launches by a handle, here the same address.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel(kernel, grid, block, args, shared, s);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorNoDevice ? "no device" : "launch failure"; }
const char* cudaGetErrorString(cudaError_t) { return "the emulator did not run the kernel"; }

}  // extern "C"
