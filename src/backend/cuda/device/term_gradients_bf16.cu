// The gradients of bias, ALiBi slopes and sinks, bf16.
#include "backend/cuda/device/instantiate.cuh"
#include "backend/cuda/device/term_gradients.cuh"

using mfa::cuda::BackwardParams;

extern "C" __global__ void __launch_bounds__(mfa::cuda::kHeadThreads, 1)
    head_gradients_bf16(const __grid_constant__ BackwardParams params) {
  mfa::cuda::head_gradients(params);
}
MFA_BACKWARD_KERNELS(bias_gradient, bf16, mfa::cuda::bf16, 16)
MFA_BACKWARD_KERNELS(slope_rows, bf16, mfa::cuda::bf16, 16)
