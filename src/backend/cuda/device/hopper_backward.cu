// hopper_backward.cu: the Hopper backward kernels, in this order on a stream: hopper_backward_prepare_<dtype>, then in
// any order hopper_dq_<columns>_<dtype> and hopper_dkv_<columns>_<dtype>, which is hopper_dkv_shared_ for 192 and 256
// columns. They know visibility (causal, window, lengths) and sinks.
#include "hopper_backward_prepare.cuh"
#include "hopper_backward_shared.cuh"

namespace {
using namespace mfa::cuda;
using namespace mfa::cuda::hopper;
}  // namespace

#define MFA_HOPPER_PREPARE(NAME, TYPE)                                                                    \
  extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ BackwardParams params) { \
    prepare<TYPE>(params);                                                                                \
  }
#define MFA_HOPPER_BACKWARD(NAME, TYPE, GRADIENT, CHOICE)                                                    \
  extern "C" __global__ void __launch_bounds__((BackwardTile<TYPE, Gradient::GRADIENT, CHOICE>::threads), 1) \
      NAME(const __grid_constant__ BackwardParams params, const __grid_constant__ HopperSchedule schedule,   \
           const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,                         \
           const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o) {                     \
    using Tile = BackwardTile<TYPE, Gradient::GRADIENT, CHOICE>;                                             \
    backward<Tile>(params, schedule,                                                                         \
                   Tile::keeps_queries ? BackwardMaps{&q, &d_o, &k, &v} : BackwardMaps{&k, &v, &q, &d_o});   \
  }
#define MFA_HOPPER_BACKWARDS(GRADIENT, COLUMNS, CHOICE)                                      \
  MFA_HOPPER_BACKWARD(hopper_##GRADIENT##_##COLUMNS##_bf16, __nv_bfloat16, GRADIENT, CHOICE) \
  MFA_HOPPER_BACKWARD(hopper_##GRADIENT##_##COLUMNS##_f16, __half, GRADIENT, CHOICE)

MFA_HOPPER_PREPARE(hopper_backward_prepare_bf16, __nv_bfloat16)
MFA_HOPPER_PREPARE(hopper_backward_prepare_f16, __half)
MFA_HOPPER_BACKWARDS(dq, 64, 0)
MFA_HOPPER_BACKWARDS(dq, 96, 1)
MFA_HOPPER_BACKWARDS(dq, 128, 2)
MFA_HOPPER_BACKWARDS(dq, 192, 3)
MFA_HOPPER_BACKWARDS(dq, 256, 4)
MFA_HOPPER_BACKWARDS(dkv, 64, 0)
MFA_HOPPER_BACKWARDS(dkv, 96, 1)
MFA_HOPPER_BACKWARDS(dkv, 128, 2)
MFA_HOPPER_BACKWARDS(dkv_shared, 192, 0)
MFA_HOPPER_BACKWARDS(dkv_shared, 256, 1)
