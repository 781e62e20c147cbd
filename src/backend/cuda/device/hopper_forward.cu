// hopper_forward.cu: the Hopper forward kernels. Names: hopper_forward[_modified]_<columns>_<dtype>. The plain ones know
// visibility (causal, window, lengths) and sinks, and need scale > 0; the modified ones everything else as well.
#include "hopper_forward.cuh"

namespace {
using namespace mfa::cuda;
using namespace mfa::cuda::hopper;
}  // namespace

#define MFA_HOPPER_FORWARD(NAME, TYPE, COLUMNS, CHOICE, MODIFIED)                                                  \
  extern "C" __global__ void __launch_bounds__((ForwardTile<TYPE, COLUMNS, CHOICE>::threads), 1)                   \
      NAME(const __grid_constant__ ForwardParams params, const __grid_constant__ HopperSchedule schedule,          \
           const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,                               \
           const __grid_constant__ TensorMap v) {                                                                  \
    forward<ForwardTile<TYPE, COLUMNS, CHOICE>, MODIFIED>(params, schedule, &q, &k, &v);                           \
  }
#define MFA_HOPPER_FORWARDS(COLUMNS, CHOICE)                                                       \
  MFA_HOPPER_FORWARD(hopper_forward_##COLUMNS##_bf16, __nv_bfloat16, COLUMNS, CHOICE, false)       \
  MFA_HOPPER_FORWARD(hopper_forward_##COLUMNS##_f16, __half, COLUMNS, CHOICE, false)               \
  MFA_HOPPER_FORWARD(hopper_forward_modified_##COLUMNS##_bf16, __nv_bfloat16, COLUMNS, CHOICE, true) \
  MFA_HOPPER_FORWARD(hopper_forward_modified_##COLUMNS##_f16, __half, COLUMNS, CHOICE, true)

MFA_HOPPER_FORWARDS(64, 0)
MFA_HOPPER_FORWARDS(96, 1)
MFA_HOPPER_FORWARDS(128, 2)
MFA_HOPPER_FORWARDS(192, 3)
MFA_HOPPER_FORWARDS(256, 4)
