// hopper_forward_instantiate.cuh: the Hopper forward kernels by name, STEM_<columns>_<dtype>.
#pragma once

#include "hopper_forward_wide.cuh"

#define MFA_HOPPER_FORWARD(NAME, ...)                                                                                  \
  extern "C" __global__ void __launch_bounds__((mfa::cuda::hopper::ForwardTile<__VA_ARGS__>::threads), 1)              \
      NAME(const __grid_constant__ mfa::cuda::ForwardParams params,                                                    \
           const __grid_constant__ mfa::cuda::HopperSchedule schedule, const __grid_constant__ mfa::cuda::TensorMap q, \
           const __grid_constant__ mfa::cuda::TensorMap k, const __grid_constant__ mfa::cuda::TensorMap v) {           \
    mfa::cuda::hopper::forward<mfa::cuda::hopper::ForwardTile<__VA_ARGS__>>(params, schedule, &q, &k, &v);             \
  }
#define MFA_HOPPER_FORWARDS(STEM, COLUMNS, MODIFIERS, CHOICE)                                                 \
  MFA_HOPPER_FORWARD(STEM##_##COLUMNS##_bf16, __nv_bfloat16, mfa::cuda::hopper::Modifiers::MODIFIERS, CHOICE) \
  MFA_HOPPER_FORWARD(STEM##_##COLUMNS##_f16, __half, mfa::cuda::hopper::Modifiers::MODIFIERS, CHOICE)
