// dK and dV of the tiled backward, bf16.
#include "backend/cuda/device/backward_tiled.cuh"
#include "backend/cuda/device/instantiate.cuh"

using mfa::cuda::BackwardParams;

MFA_BACKWARD_KERNELS(backward_keys, bf16, mfa::cuda::bf16, 16)
