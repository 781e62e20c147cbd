// hopper_forward.cu: the Hopper forward kernels. Names: hopper_forward_[mask_,modified_]<columns>_<dtype>. The plain
// ones know visibility (causal, window, lengths) and sinks, the mask ones also a boolean mask whose rows of bytes are
// aligned to 16; both need scale > 0. The modified ones know everything. <columns> hold the wider of D and Dv; 192x128
// is for D up to 192 with Dv up to 128.
#include "hopper_forward_instantiate.cuh"
#include "hopper_mask_tiles.cuh"

// On a stream before the kernels that read a mask, where ForwardParams::shown is given.
extern "C" __global__ void __launch_bounds__(1024)
    hopper_mask_tiles(const __grid_constant__ mfa::cuda::ForwardParams params) {
  mfa::cuda::hopper::find_shown_tiles(params);
}

MFA_HOPPER_FORWARDS(hopper_forward, 64, none, 0)
MFA_HOPPER_FORWARDS(hopper_forward, 96, none, 1)
MFA_HOPPER_FORWARDS(hopper_forward, 128, none, 2)
MFA_HOPPER_FORWARDS(hopper_forward, 192, none, 3)
MFA_HOPPER_FORWARDS(hopper_forward, 256, none, 4)
MFA_HOPPER_FORWARDS(hopper_forward, 192x128, none, 7)
MFA_HOPPER_FORWARDS(hopper_forward_mask, 64, mask, 0)
MFA_HOPPER_FORWARDS(hopper_forward_mask, 96, mask, 1)
MFA_HOPPER_FORWARDS(hopper_forward_mask, 128, mask, 2)
MFA_HOPPER_FORWARDS(hopper_forward_mask, 192, mask, 3)
MFA_HOPPER_FORWARDS(hopper_forward_mask, 256, mask, 4)
MFA_HOPPER_FORWARDS(hopper_forward_modified, 64, all, 0)
MFA_HOPPER_FORWARDS(hopper_forward_modified, 96, all, 1)
MFA_HOPPER_FORWARDS(hopper_forward_modified, 128, all, 2)
MFA_HOPPER_FORWARDS(hopper_forward_modified, 192, all, 3)
MFA_HOPPER_FORWARDS(hopper_forward_modified, 256, all, 4)
