// Extraction and its gradient on the CPU. Instantiated once per instruction set: see tubes_cpu.cpp.
#pragma once

#include <vector>

#include "tubes.h"

namespace mirasol {

using ExtractCpu = void (*)(const Clip&, const std::vector<Tube>&, const Affine&, const void* video, Dtype from,
                            void* const* tokens, Dtype to, int threads);
using ScatterCpu = void (*)(const Clip&, const std::vector<Tube>&, const Affine&, const void* const* tokens, Dtype from,
                            void* video, Dtype to, int threads);

}  // namespace mirasol
