// instantiate.cuh: kernels under the plain names by which the host finds them: <kernel>_<dtype>_<DP>.
#pragma once

#define MFA_FORWARD_KERNEL(name, type, table, index, DP)                                                            \
  extern "C" __global__ void __launch_bounds__(mfa::cuda::table[index].threads(), mfa::cuda::table[index].resident) \
      name##_##DP(const __grid_constant__ ForwardParams params) {                                                   \
    mfa::cuda::forward_tiled<type, mfa::cuda::table[index]>(params);                                                \
  }

#define MFA_FORWARD_KERNELS(dtype, type, bits)                                      \
  MFA_FORWARD_KERNEL(forward_tiled_##dtype, type, kForward##bits, 0, 64)            \
  MFA_FORWARD_KERNEL(forward_tiled_##dtype, type, kForward##bits, 1, 128)           \
  MFA_FORWARD_KERNEL(forward_tiled_##dtype, type, kForward##bits, 2, 256)           \
  MFA_FORWARD_KERNEL(forward_tiled_##dtype, type, kForward##bits, 3, 576)           \
  MFA_FORWARD_KERNEL(forward_few_rows_##dtype, type, kForwardFewRows##bits, 3, 576) \
  extern "C" __global__ void __launch_bounds__(mfa::cuda::kMergeThreads)            \
      merge_splits_##dtype(const __grid_constant__ ForwardParams params) {          \
    mfa::cuda::merge_splits<type>(params);                                          \
  }

#define MFA_BACKWARD_KERNEL(function, dtype, type, table, index, DP)                 \
  extern "C" __global__ void __launch_bounds__(mfa::cuda::table[index].threads(), 1) \
      function##_##dtype##_##DP(const __grid_constant__ BackwardParams params) {     \
    mfa::cuda::function<type, mfa::cuda::table[index]>(params);                      \
  }

#define MFA_BACKWARD_KERNELS(function, dtype, type, bits)             \
  MFA_BACKWARD_KERNEL(function, dtype, type, kBackward##bits, 0, 64)  \
  MFA_BACKWARD_KERNEL(function, dtype, type, kBackward##bits, 1, 128) \
  MFA_BACKWARD_KERNEL(function, dtype, type, kBackward##bits, 2, 256) \
  MFA_BACKWARD_KERNEL(function, dtype, type, kBackward##bits, 3, 576)

#define MFA_DECODE_KERNEL(dtype, type, index, DP)                                        \
  extern "C" __global__ void __launch_bounds__(mfa::cuda::kDecode16[index].threads(), 1) \
      forward_decode_##dtype##_##DP(const __grid_constant__ ForwardParams params) {      \
    mfa::cuda::forward_decode<type, mfa::cuda::kDecode16[index]>(params);                \
  }

#define MFA_DECODE_KERNELS(dtype, type)  \
  MFA_DECODE_KERNEL(dtype, type, 0, 64)  \
  MFA_DECODE_KERNEL(dtype, type, 1, 128) \
  MFA_DECODE_KERNEL(dtype, type, 2, 256)
