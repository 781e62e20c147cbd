// hopper_forward.cu: the Hopper forward kernels. Names: hopper_forward_[mask_,modified_]<columns>_<dtype>. The plain
// ones know visibility (causal, window, lengths) and sinks, the mask ones also a boolean mask whose rows of bytes are
// aligned to 16; both need scale > 0. The modified ones know everything. <columns> hold the wider of D and Dv; 192x128
// is for D up to 192 with Dv up to 128.
#include "hopper_forward.cuh"

namespace {
using namespace mfa::cuda;
using namespace mfa::cuda::hopper;
}  // namespace

#define MFA_HOPPER_FORWARD(NAME, TYPE, MODIFIERS, CHOICE)                                                              \
  extern "C" __global__ void __launch_bounds__((ForwardTile<TYPE, Modifiers::MODIFIERS, CHOICE>::threads), 1) NAME(    \
      const __grid_constant__ ForwardParams params, const __grid_constant__ HopperSchedule schedule,                   \
      const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v) { \
    forward<ForwardTile<TYPE, Modifiers::MODIFIERS, CHOICE>>(params, schedule, &q, &k, &v);                            \
  }
#define MFA_HOPPER_FORWARDS(COLUMNS, CHOICE)                                               \
  MFA_HOPPER_FORWARD(hopper_forward_##COLUMNS##_bf16, __nv_bfloat16, none, CHOICE)         \
  MFA_HOPPER_FORWARD(hopper_forward_##COLUMNS##_f16, __half, none, CHOICE)                 \
  MFA_HOPPER_FORWARD(hopper_forward_mask_##COLUMNS##_bf16, __nv_bfloat16, mask, CHOICE)    \
  MFA_HOPPER_FORWARD(hopper_forward_mask_##COLUMNS##_f16, __half, mask, CHOICE)            \
  MFA_HOPPER_FORWARD(hopper_forward_modified_##COLUMNS##_bf16, __nv_bfloat16, all, CHOICE) \
  MFA_HOPPER_FORWARD(hopper_forward_modified_##COLUMNS##_f16, __half, all, CHOICE)

MFA_HOPPER_FORWARDS(64, 0)
MFA_HOPPER_FORWARDS(96, 1)
MFA_HOPPER_FORWARDS(128, 2)
MFA_HOPPER_FORWARDS(192, 3)
MFA_HOPPER_FORWARDS(256, 4)
MFA_HOPPER_FORWARD(hopper_forward_192x128_bf16, __nv_bfloat16, none, 5)
MFA_HOPPER_FORWARD(hopper_forward_192x128_f16, __half, none, 5)
