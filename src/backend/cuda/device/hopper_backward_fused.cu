// hopper_backward_fused.cu: dq, dk and dv in one pass, for heads of up to 128 columns without modifiers of scores. On a
// stream: hopper_backward_prepare_<dtype>, hopper_backward_fused_128_<dtype>, hopper_backward_finish_128_<dtype>.
#include "hopper_backward_fused.cuh"

#define MFA_HOPPER_FUSED(SUFFIX, TYPE)                                                                                \
  extern "C" __global__ void __launch_bounds__(mfa::cuda::hopper::FusedTile<TYPE>::threads, 1)                        \
      hopper_backward_fused_128_##SUFFIX(                                                                             \
          const __grid_constant__ mfa::cuda::BackwardParams params,                                                   \
          const __grid_constant__ mfa::cuda::HopperSchedule schedule, const __grid_constant__ mfa::cuda::TensorMap q, \
          const __grid_constant__ mfa::cuda::TensorMap k, const __grid_constant__ mfa::cuda::TensorMap v,             \
          const __grid_constant__ mfa::cuda::TensorMap d_o) {                                                         \
    mfa::cuda::hopper::backward_fused<mfa::cuda::hopper::FusedTile<TYPE>>(params, schedule, {&k, &v, &q, &d_o});      \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                                   \
      hopper_backward_finish_128_##SUFFIX(const __grid_constant__ mfa::cuda::BackwardParams params) {                 \
    mfa::cuda::hopper::finish_queries<mfa::cuda::hopper::FusedTile<TYPE>>(params);                                    \
  }

MFA_HOPPER_FUSED(bf16, __nv_bfloat16)
MFA_HOPPER_FUSED(f16, __half)
