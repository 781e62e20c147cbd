// hopper_backward_fused.cu: dq, dk and dv in one pass, without modifiers of scores, for heads of up to 64 columns and
// from 104 to 128. On a stream: hopper_backward_prepare_<dtype>, hopper_backward_fused_<columns>_<dtype>.
#include "hopper_backward_fused.cuh"

#define MFA_HOPPER_FUSED(COLUMNS, CHOICE, SUFFIX, TYPE)                                                               \
  extern "C" __global__ void __launch_bounds__(mfa::cuda::hopper::FusedTile<TYPE, CHOICE>::threads, 1)                \
      hopper_backward_fused_##COLUMNS##_##SUFFIX(                                                                     \
          const __grid_constant__ mfa::cuda::BackwardParams params,                                                   \
          const __grid_constant__ mfa::cuda::HopperSchedule schedule, const __grid_constant__ mfa::cuda::TensorMap q, \
          const __grid_constant__ mfa::cuda::TensorMap k, const __grid_constant__ mfa::cuda::TensorMap v,             \
          const __grid_constant__ mfa::cuda::TensorMap d_o) {                                                         \
    mfa::cuda::hopper::backward_fused<mfa::cuda::hopper::FusedTile<TYPE, CHOICE>>(params, schedule,                   \
                                                                                  {&k, &v, &q, &d_o});                \
  }

MFA_HOPPER_FUSED(64, 0, bf16, __nv_bfloat16)
MFA_HOPPER_FUSED(64, 0, f16, __half)
MFA_HOPPER_FUSED(128, 1, bf16, __nv_bfloat16)
MFA_HOPPER_FUSED(128, 1, f16, __half)
