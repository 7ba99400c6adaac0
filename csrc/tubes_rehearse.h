// The GPU's program walked through on the CPU, lane after lane, so that its plan is tested where there is no GPU.
#pragma once

#include "launch.h"

namespace mirasol {

void rehearse_extract(const Launch& launch, Dtype from, Dtype to);
void rehearse_scatter(const Launch& launch, Dtype from, void* video, Dtype to);

}  // namespace mirasol
