// hopper_forward_split.cu: the Hopper forward kernels for float32, by name: hopper_forward_<columns>_f32, which know
// visibility and sinks and need scale > 0, hopper_forward_modified_<columns>_f32, which know everything but a softcap,
// and what splits their inputs, hopper_split_<columns>_f32. <columns> hold the wider of D and Dv.
#include "hopper_forward_split.cuh"

#define MFA_HOPPER_SPLIT(COLUMNS)                                                               \
  extern "C" __global__ void __launch_bounds__(256)                                             \
      hopper_split_##COLUMNS##_f32(const __grid_constant__ mfa::cuda::ForwardParams params,     \
                                   const __grid_constant__ mfa::cuda::SplitOperands operands) { \
    mfa::cuda::hopper::split<COLUMNS>(params.p, operands);                                      \
  }
#define MFA_HOPPER_FORWARD_SPLIT(NAME, ...)                                                                            \
  extern "C" __global__ void __launch_bounds__((mfa::cuda::hopper::SplitTile<__VA_ARGS__>::threads), 1)                \
      NAME(const __grid_constant__ mfa::cuda::ForwardParams params,                                                    \
           const __grid_constant__ mfa::cuda::SplitOperands operands,                                                  \
           const __grid_constant__ mfa::cuda::HopperSchedule schedule, const __grid_constant__ mfa::cuda::TensorMap q, \
           const __grid_constant__ mfa::cuda::TensorMap k, const __grid_constant__ mfa::cuda::TensorMap v) {           \
    mfa::cuda::hopper::forward_split<mfa::cuda::hopper::SplitTile<__VA_ARGS__>>(params, operands, schedule, &q, &k,    \
                                                                                &v);                                   \
  }

MFA_HOPPER_SPLIT(64)
MFA_HOPPER_SPLIT(128)
MFA_HOPPER_FORWARD_SPLIT(hopper_forward_64_f32, 0, false)
MFA_HOPPER_FORWARD_SPLIT(hopper_forward_128_f32, 1, false)
MFA_HOPPER_FORWARD_SPLIT(hopper_forward_modified_64_f32, 0, true)
MFA_HOPPER_FORWARD_SPLIT(hopper_forward_modified_128_f32, 1, true)
