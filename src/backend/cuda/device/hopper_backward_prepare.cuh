// hopper_backward_prepare.cuh: what the backward kernels need of each query row.
#pragma once

#include "hopper_softmax.cuh"

namespace mfa::cuda::hopper {

// delta = sum_d o d_o - dlse and the base-2 lse, rows padded to Nq_padded. A NaN or infinity in a row of d_o makes its
// lse NaN, so that keys that the row sees get NaN though the kernels clean it from tiles. Grid: Hq * ceil(Nq_padded /
// prepare_rows(Dv)), B blocks of 256: the heads of a row are neighbours in memory if [B, N, H, D] is dense.
template <class T>
__device__ __forceinline__ void prepare(const BackwardParams& params) {
  constexpr int rows_a_lane = 4;
  const Problem& p = params.p;
  const int lanes = prepare_lanes(p.Dv), lane = threadIdx.x % lanes, h = blockIdx.x % p.Hq, b = blockIdx.y;
  const int row0 = blockIdx.x / p.Hq * prepare_rows(p.Dv) + threadIdx.x / lanes, step = 256 / lanes;
  const int64_t head = int64_t{b} * p.Hq + h;
  // One of the first lanes finishes each row; what it needs is on its way with the row.
  const int own = row0 + lane * step;
  const bool finishes = lane < rows_a_lane && own < params.Nq_padded;
  const float lse = finishes && own < p.Nq ? params.lse[head * p.Nq + own] : -INFINITY;
  const float dlse = finishes && own < p.Nq && params.dlse ? params.dlse[head * p.Nq + own] : 0.f;
  const T* o_head = static_cast<const T*>(params.o.data) + b * params.o.stride[0] + h * params.o.stride[1] + lane * 8;
  const T* d_o_head =
      static_cast<const T*>(params.d_o.data) + b * params.d_o.stride[0] + h * params.d_o.stride[1] + lane * 8;
  uint4 o[rows_a_lane], d_o[rows_a_lane];
#pragma unroll
  for (int r = 0; r < rows_a_lane; ++r) {
    const int i = row0 + r * step;
    o[r] = d_o[r] = {0, 0, 0, 0};
    if (i >= p.Nq || lane * 8 >= p.Dv) continue;
    o[r] = *reinterpret_cast<const uint4*>(o_head + i * params.o.stride[2]);
    d_o[r] = *reinterpret_cast<const uint4*>(d_o_head + i * params.d_o.stride[2]);
  }
  float own_delta = 0.f, own_spoil = 0.f;
#pragma unroll
  for (int r = 0; r < rows_a_lane; ++r) {
    const T* x = reinterpret_cast<const T*>(&o[r]);
    const T* y = reinterpret_cast<const T*>(&d_o[r]);
    float delta = 0.f, spoil = 0.f;  // 0, or NaN
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      delta = fmaf(static_cast<float>(x[e]), static_cast<float>(y[e]), delta);
      spoil = fmaf(0.f, static_cast<float>(y[e]), spoil);
    }
    for (int distance = lanes / 2; distance; distance /= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, distance);
      spoil += __shfl_xor_sync(0xffffffffu, spoil, distance);
    }
    if (lane == r) own_delta = delta, own_spoil = spoil;
  }
  if (!finishes) return;
  if (params.dq_turns && own % fused_tile == 0)
    params.dq_turns[head * (params.Nq_padded / fused_tile) + own / fused_tile] = 0;
  params.delta[head * params.Nq_padded + own] = own_delta - dlse;
  params.lse2[head * params.Nq_padded + own] =
      lse == -INFINITY ? INFINITY : (params.lse_base2 ? lse : lse * log2_e) + own_spoil;
}

}  // namespace mfa::cuda::hopper
