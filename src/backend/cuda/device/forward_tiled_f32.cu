// The tiled forward and the merge of its splits, f32.
#include "backend/cuda/device/forward_tiled.cuh"
#include "backend/cuda/device/instantiate.cuh"
#include "backend/cuda/device/merge_splits.cuh"

using mfa::cuda::ForwardParams;

MFA_FORWARD_KERNELS(f32, float, 32)
// Smaller head dims of the other types are forward_decode's.
MFA_FORWARD_KERNEL(forward_few_rows_f32, float, kForwardFewRows32, 0, 64)
MFA_FORWARD_KERNEL(forward_few_rows_f32, float, kForwardFewRows32, 1, 128)
MFA_FORWARD_KERNEL(forward_few_rows_f32, float, kForwardFewRows32, 2, 256)
