// Extraction and its gradient on the GPU that owns the tensors, on a stream of the caller's.
#pragma once

#include "launch.h"

namespace mirasol {

// Both throw std::runtime_error with CUDA's own words if a launch is refused.
void extract_cuda(const Launch& launch, Dtype from, Dtype to, int device, void* stream);
void scatter_cuda(const Launch& launch, Dtype from, void* video, Dtype to, int device, void* stream);

}  // namespace mirasol
