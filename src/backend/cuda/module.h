// module.h: the kernels in this library, loaded into the driver when they are first used.
#pragma once

#include <cuda.h>

#include "backend/cuda/plan.h"

namespace mfa::cuda {

// Throws std::runtime_error that names what failed.
void check_driver(CUresult result, const char* what);

// The function of a launch, ready for its shared memory, in the current context, that of CUDA device `device`.
CUfunction function_of(const Launch& launch, int device);

}  // namespace mfa::cuda
