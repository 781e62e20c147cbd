// hopper_backward_prepare.cuh: what the backward kernels need of each query row.
#pragma once

#include "hopper_softmax.cuh"

namespace mfa::cuda::hopper {

// delta = sum_d o d_o - dlse and the base-2 lse, rows padded to Nq_padded. Grid: prepare_rows(Dv) rows a block of 256.
template <class T>
__device__ __forceinline__ void prepare(const BackwardParams& params) {
  constexpr int rows_a_lane = 4;
  const Problem& p = params.p;
  const int lanes = prepare_lanes(p.Dv), lane = threadIdx.x % lanes;
  const int64_t rows = int64_t{p.B} * p.Hq * params.Nq_padded;
  const int64_t row0 = int64_t{blockIdx.x} * prepare_rows(p.Dv) + threadIdx.x / lanes;
  uint4 o[rows_a_lane], d_o[rows_a_lane];
#pragma unroll
  for (int r = 0; r < rows_a_lane; ++r) {
    const int64_t at = row0 + r * (256 / lanes);
    const int i = at % params.Nq_padded, h = at / params.Nq_padded % p.Hq, b = at / params.Nq_padded / p.Hq;
    o[r] = d_o[r] = {0, 0, 0, 0};
    if (at >= rows || i >= p.Nq || lane * 8 >= p.Dv) continue;
    o[r] = *reinterpret_cast<const uint4*>(static_cast<const T*>(params.o.data) + b * params.o.stride[0] +
                                           h * params.o.stride[1] + i * params.o.stride[2] + lane * 8);
    d_o[r] = *reinterpret_cast<const uint4*>(static_cast<const T*>(params.d_o.data) + b * params.d_o.stride[0] +
                                             h * params.d_o.stride[1] + i * params.d_o.stride[2] + lane * 8);
  }
#pragma unroll
  for (int r = 0; r < rows_a_lane; ++r) {
    const T* a = reinterpret_cast<const T*>(&o[r]);
    const T* c = reinterpret_cast<const T*>(&d_o[r]);
    float delta = 0.f;
#pragma unroll
    for (int e = 0; e < 8; ++e) delta = fmaf(static_cast<float>(a[e]), static_cast<float>(c[e]), delta);
    for (int distance = lanes / 2; distance; distance /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    const int64_t at = row0 + r * (256 / lanes);
    if (at >= rows || lane != 0) continue;
    const int i = at % params.Nq_padded;
    float lse = INFINITY;
    if (i < p.Nq) {
      const int64_t row = at / params.Nq_padded * p.Nq + i;
      if (params.dlse) delta -= params.dlse[row];
      lse = params.lse[row];
      lse = lse == -INFINITY ? INFINITY : params.lse_base2 ? lse : lse * log2_e;
    }
    params.delta[at] = delta;
    params.lse2[at] = lse;
  }
}

}  // namespace mfa::cuda::hopper
