// dK and dV of the tiled backward, f32.
#include "backend/cuda/device/backward_tiled.cuh"
#include "backend/cuda/device/instantiate.cuh"

using mfa::cuda::BackwardParams;

MFA_BACKWARD_KERNELS(backward_keys, f32, float, 32)
