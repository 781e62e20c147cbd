// The gradients of bias, ALiBi slopes and sinks, f32.
#include "backend/cuda/device/instantiate.cuh"
#include "backend/cuda/device/term_gradients.cuh"

using mfa::cuda::BackwardParams;

extern "C" __global__ void __launch_bounds__(mfa::cuda::kHeadThreads, 1)
    head_gradients_f32(const __grid_constant__ BackwardParams params) {
  mfa::cuda::head_gradients(params);
}
MFA_BACKWARD_KERNELS(bias_gradient, f32, float, 32)
MFA_BACKWARD_KERNELS(slope_rows, f32, float, 32)
