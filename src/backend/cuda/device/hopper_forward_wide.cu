// hopper_forward_wide.cu: hopper_forward.cu's kernels for heads wider than 256: 512 columns, and 576x512 for D up to
// 576 with Dv up to 512. The modified ones take boolean masks too.
#include "hopper_forward_instantiate.cuh"

MFA_HOPPER_FORWARDS(hopper_forward, 512, none, 5)
MFA_HOPPER_FORWARDS(hopper_forward, 576x512, none, 6)
MFA_HOPPER_FORWARDS(hopper_forward_modified, 512, all, 5)
MFA_HOPPER_FORWARDS(hopper_forward_modified, 576x512, all, 6)
