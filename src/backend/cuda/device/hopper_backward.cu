// hopper_backward.cu: the Hopper backward kernels, in this order on a stream: hopper_backward_prepare_<dtype>, then in
// any order hopper_dq_<columns>_<dtype> and hopper_dkv_<columns>_<dtype>, which is hopper_dkv_shared_ for 192 and 256
// columns. They know visibility (causal, window, lengths) and sinks; hopper_backward_modified.cu has those that know
// everything.
#include "hopper_backward_instantiate.cuh"
#include "hopper_backward_prepare.cuh"

#define MFA_HOPPER_PREPARE(NAME, TYPE)                                                                               \
  extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ mfa::cuda::BackwardParams params) { \
    mfa::cuda::hopper::prepare<TYPE>(params);                                                                        \
  }

MFA_HOPPER_PREPARE(hopper_backward_prepare_bf16, __nv_bfloat16)
MFA_HOPPER_PREPARE(hopper_backward_prepare_f16, __half)
MFA_HOPPER_BACKWARDS(hopper_dq, 64, dq, false, 0)
MFA_HOPPER_BACKWARDS(hopper_dq, 96, dq, false, 1)
MFA_HOPPER_BACKWARDS(hopper_dq, 128, dq, false, 2)
MFA_HOPPER_BACKWARDS(hopper_dq, 192, dq, false, 3)
MFA_HOPPER_BACKWARDS(hopper_dq, 256, dq, false, 4)
MFA_HOPPER_BACKWARDS(hopper_dkv, 64, dkv, false, 0)
MFA_HOPPER_BACKWARDS(hopper_dkv, 96, dkv, false, 1)
MFA_HOPPER_BACKWARDS(hopper_dkv, 128, dkv, false, 2)
MFA_HOPPER_BACKWARDS(hopper_dkv_shared, 192, dkv_shared, false, 0)
MFA_HOPPER_BACKWARDS(hopper_dkv_shared, 256, dkv_shared, false, 1)
