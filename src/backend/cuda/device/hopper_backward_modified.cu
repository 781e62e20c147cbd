// hopper_backward_modified.cu: hopper_backward.cu's kernels with every modifier of scores: softcap, ALiBi, bias,
// boolean mask, dropout.
#include "hopper_backward_instantiate.cuh"

MFA_HOPPER_BACKWARDS(hopper_dq_modified, 64, dq, true, 0)
MFA_HOPPER_BACKWARDS(hopper_dq_modified, 96, dq, true, 1)
MFA_HOPPER_BACKWARDS(hopper_dq_modified, 128, dq, true, 2)
MFA_HOPPER_BACKWARDS(hopper_dq_modified, 192, dq, true, 3)
MFA_HOPPER_BACKWARDS(hopper_dq_modified, 256, dq, true, 4)
MFA_HOPPER_BACKWARDS(hopper_dkv_modified, 64, dkv, true, 0)
MFA_HOPPER_BACKWARDS(hopper_dkv_modified, 96, dkv, true, 1)
MFA_HOPPER_BACKWARDS(hopper_dkv_modified, 128, dkv, true, 2)
MFA_HOPPER_BACKWARDS(hopper_dkv_shared_modified, 192, dkv_shared, true, 0)
MFA_HOPPER_BACKWARDS(hopper_dkv_shared_modified, 256, dkv_shared, true, 1)
