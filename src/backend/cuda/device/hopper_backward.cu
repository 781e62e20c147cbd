// hopper_backward.cu: the Hopper backward kernels, in this order on a stream: hopper_backward_prepare_<dtype>, then in any
// order hopper_dq_<columns>_<dtype> and hopper_dkv_<columns>_<dtype>; for 192 and 256 columns, where dk and dv do not fit
// the registers together, hopper_dk_ and hopper_dv_. They know visibility (causal, window, lengths) and sinks.
#include "hopper_backward.cuh"

namespace {
using namespace mfa::cuda;
using namespace mfa::cuda::hopper;
}  // namespace

#define MFA_HOPPER_PREPARE(NAME, TYPE)                                                                       \
  extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ BackwardParams params) {    \
    prepare<TYPE>(params);                                                                                   \
  }
#define MFA_HOPPER_BACKWARD(NAME, TYPE, GRADIENT, CHOICE)                                                           \
  extern "C" __global__ void __launch_bounds__((BackwardTile<TYPE, Gradient::GRADIENT, CHOICE>::threads), 1)        \
      NAME(const __grid_constant__ BackwardParams params, const __grid_constant__ HopperSchedule schedule,          \
           const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,                                \
           const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o) {                            \
    using Tile = BackwardTile<TYPE, Gradient::GRADIENT, CHOICE>;                                                    \
    backward<Tile>(params, schedule,                                                                                \
                   Tile::keeps_queries ? BackwardMaps{&q, &d_o, &k, &v} : BackwardMaps{&k, &v, &q, &d_o});          \
  }
#define MFA_HOPPER_BACKWARDS(COLUMNS, CHOICE)                                                \
  MFA_HOPPER_BACKWARD(hopper_dq_##COLUMNS##_bf16, __nv_bfloat16, dq, CHOICE)                 \
  MFA_HOPPER_BACKWARD(hopper_dq_##COLUMNS##_f16, __half, dq, CHOICE)                         \
  MFA_HOPPER_BACKWARD(hopper_dkv_##COLUMNS##_bf16, __nv_bfloat16, dkv, CHOICE)               \
  MFA_HOPPER_BACKWARD(hopper_dkv_##COLUMNS##_f16, __half, dkv, CHOICE)
#define MFA_HOPPER_BACKWARDS_WIDE(COLUMNS, CHOICE)                                           \
  MFA_HOPPER_BACKWARD(hopper_dq_##COLUMNS##_bf16, __nv_bfloat16, dq, CHOICE)                 \
  MFA_HOPPER_BACKWARD(hopper_dq_##COLUMNS##_f16, __half, dq, CHOICE)                         \
  MFA_HOPPER_BACKWARD(hopper_dk_##COLUMNS##_bf16, __nv_bfloat16, dk, CHOICE)                 \
  MFA_HOPPER_BACKWARD(hopper_dk_##COLUMNS##_f16, __half, dk, CHOICE)                         \
  MFA_HOPPER_BACKWARD(hopper_dv_##COLUMNS##_bf16, __nv_bfloat16, dv, CHOICE)                 \
  MFA_HOPPER_BACKWARD(hopper_dv_##COLUMNS##_f16, __half, dv, CHOICE)

MFA_HOPPER_PREPARE(hopper_backward_prepare_bf16, __nv_bfloat16)
MFA_HOPPER_PREPARE(hopper_backward_prepare_f16, __half)
MFA_HOPPER_BACKWARDS(64, 0)
MFA_HOPPER_BACKWARDS(96, 1)
MFA_HOPPER_BACKWARDS(128, 2)
MFA_HOPPER_BACKWARDS_WIDE(192, 3)
MFA_HOPPER_BACKWARDS_WIDE(256, 4)
