// hopper_backward_instantiate.cuh: the Hopper backward kernels by name, STEM_<columns>_<dtype>.
#pragma once

#include "hopper_backward_shared.cuh"

#define MFA_HOPPER_BACKWARD(NAME, ...)                                                                                 \
  extern "C" __global__ void __launch_bounds__((mfa::cuda::hopper::BackwardTile<__VA_ARGS__>::threads), 1)             \
      NAME(const __grid_constant__ mfa::cuda::BackwardParams params,                                                   \
           const __grid_constant__ mfa::cuda::HopperSchedule schedule, const __grid_constant__ mfa::cuda::TensorMap q, \
           const __grid_constant__ mfa::cuda::TensorMap k, const __grid_constant__ mfa::cuda::TensorMap v,             \
           const __grid_constant__ mfa::cuda::TensorMap d_o) {                                                         \
    using namespace mfa::cuda::hopper;                                                                                 \
    using Tile = BackwardTile<__VA_ARGS__>;                                                                            \
    backward<Tile>(params, schedule,                                                                                   \
                   Tile::keeps_queries ? BackwardMaps{&q, &d_o, &k, &v} : BackwardMaps{&k, &v, &q, &d_o});             \
  }
#define MFA_HOPPER_BACKWARDS(STEM, COLUMNS, GRADIENT, MODIFIED, CHOICE)                                                \
  MFA_HOPPER_BACKWARD(STEM##_##COLUMNS##_bf16, __nv_bfloat16, mfa::cuda::hopper::Gradient::GRADIENT, MODIFIED, CHOICE) \
  MFA_HOPPER_BACKWARD(STEM##_##COLUMNS##_f16, __half, mfa::cuda::hopper::Gradient::GRADIENT, MODIFIED, CHOICE)
