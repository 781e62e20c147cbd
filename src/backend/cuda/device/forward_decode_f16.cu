// Decode, f16.
#include "backend/cuda/device/forward_decode.cuh"
#include "backend/cuda/device/instantiate.cuh"

using mfa::cuda::ForwardParams;

MFA_DECODE_KERNELS(f16, mfa::cuda::f16)
