// The rows' terms and dQ of the tiled backward, f16.
#include "backend/cuda/device/backward_tiled.cuh"
#include "backend/cuda/device/instantiate.cuh"

using mfa::cuda::BackwardParams;

extern "C" __global__ void __launch_bounds__(mfa::cuda::kRowThreads)
    backward_rows_f16(const __grid_constant__ BackwardParams params) {
  mfa::cuda::backward_rows<mfa::cuda::f16>(params);
}
MFA_BACKWARD_KERNELS(backward_queries, f16, mfa::cuda::f16, 16)
