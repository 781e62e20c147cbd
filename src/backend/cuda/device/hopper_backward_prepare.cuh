// hopper_backward_prepare.cuh: what the backward kernels need of each query row.
#pragma once

#include "hopper_softmax.cuh"

namespace mfa::cuda::hopper {

// delta = sum_d o d_o - dlse and the base-2 lse, rows padded to Nq_padded. One warp a row.
template <class T>
__device__ __forceinline__ void prepare(const BackwardParams& params) {
  const Problem& p = params.p;
  const int64_t at = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (at >= int64_t{p.B} * p.Hq * params.Nq_padded) return;
  const int i = at % params.Nq_padded, h = at / params.Nq_padded % p.Hq, b = at / params.Nq_padded / p.Hq;
  float delta = 0.f, lse = INFINITY;
  if (i < p.Nq) {
    const T* o = static_cast<const T*>(params.o.data) + b * params.o.stride[0] + h * params.o.stride[1] +
                 i * params.o.stride[2];
    const T* d_o = static_cast<const T*>(params.d_o.data) + b * params.d_o.stride[0] + h * params.d_o.stride[1] +
                   i * params.d_o.stride[2];
    for (int d = lane * 8; d < p.Dv; d += 256) {
      T a[8], c[8];
      *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(o + d);
      *reinterpret_cast<uint4*>(c) = *reinterpret_cast<const uint4*>(d_o + d);
#pragma unroll
      for (int e = 0; e < 8; ++e) delta = fmaf(static_cast<float>(a[e]), static_cast<float>(c[e]), delta);
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    const int64_t row = (int64_t{b} * p.Hq + h) * p.Nq + i;
    if (params.dlse) delta -= params.dlse[row];
    lse = params.lse[row];
    lse = lse == -INFINITY ? INFINITY : params.lse_base2 ? lse : lse * log2_e;
  }
  if (lane == 0) {
    params.delta[at] = delta;
    params.lse2[at] = lse;
  }
}

}  // namespace mfa::cuda::hopper
