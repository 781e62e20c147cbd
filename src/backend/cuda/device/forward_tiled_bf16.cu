// The tiled forward and the merge of its splits, bf16.
#include "backend/cuda/device/forward_tiled.cuh"
#include "backend/cuda/device/instantiate.cuh"
#include "backend/cuda/device/merge_splits.cuh"

using mfa::cuda::ForwardParams;

MFA_FORWARD_KERNELS(bf16, mfa::cuda::bf16, 16)
