// hopper_backward_prepare.cuh: what the backward kernels need of each query row.
#pragma once

#include "hopper_softmax.cuh"

namespace mfa::cuda::hopper {

// 0, or NaN where one of eight elements is not finite.
template <class T>
__device__ __forceinline__ float zero_or_nan(const uint4& row) {
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < 8; ++e) sum = fmaf(0.f, static_cast<float>(reinterpret_cast<const T*>(&row)[e]), sum);
  return sum;
}

// delta = sum_d o d_o - dlse and the base-2 lse, rows padded to Nq_padded. A NaN or infinity in a row of d_o makes its
// lse NaN, so that keys that the row sees get NaN though the kernels clean it from tiles. One in a row of q has made
// its lse NaN or infinite, unless a sink or the softcap kept it finite: then q is read here too. So a finite lse says
// that both rows are finite. Grid: Hq * ceil(Nq_padded / prepare_rows(Dv)), B blocks of 256: the heads of a row are
// neighbours in memory if [B, N, H, D] is dense.
template <class T>
__device__ __forceinline__ void prepare(const BackwardParams& params) {
  constexpr int rows_a_lane = 4;
  const Problem& p = params.p;
  const int lanes = prepare_lanes(p.Dv), lane = threadIdx.x % lanes, h = blockIdx.x % p.Hq, b = blockIdx.y;
  const int row0 = blockIdx.x / p.Hq * prepare_rows(p.Dv) + threadIdx.x / lanes, step = 256 / lanes;
  const int64_t head = int64_t{b} * p.Hq + h;
  const uint32_t lanes_of_row = (0xffffffffu >> (32 - lanes)) << (threadIdx.x % 32 / lanes * lanes);
  // One of the first lanes finishes each row.
  float own_delta = 0.f;
  bool spoilt = false;
  const auto spoil = [&](int r, float zero) {
    const uint32_t found = __ballot_sync(0xffffffffu, zero != 0.f) & lanes_of_row;
    if (lane == r && found) spoilt = true;
  };
  if (p.sinks || p.softcap > 0.f) {
    const T* q = static_cast<const T*>(p.q.data) + b * p.q.stride[0] + h * p.q.stride[1];
#pragma unroll 1
    for (int r = 0; r < rows_a_lane; ++r) {
      const int i = row0 + r * step;
      float zero = 0.f;
      for (int column = lane * 8; i < p.Nq && column < p.D; column += lanes * 8)
        zero += zero_or_nan<T>(*reinterpret_cast<const uint4*>(q + i * p.q.stride[2] + column));
      spoil(r, zero);
    }
  }
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
#pragma unroll
  for (int r = 0; r < rows_a_lane; ++r) {
    // A row at a time, for the sake of registers.
    asm volatile("" : "+r"(o[r].x), "+r"(o[r].y), "+r"(o[r].z), "+r"(o[r].w));
    asm volatile("" : "+r"(d_o[r].x), "+r"(d_o[r].y), "+r"(d_o[r].z), "+r"(d_o[r].w));
    const T* x = reinterpret_cast<const T*>(&o[r]);
    const T* y = reinterpret_cast<const T*>(&d_o[r]);
    float delta = 0.f;
#pragma unroll
    for (int e = 0; e < 8; ++e) delta = fmaf(static_cast<float>(x[e]), static_cast<float>(y[e]), delta);
    for (int distance = lanes / 2; distance; distance /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    if (lane == r) own_delta = delta;
    spoil(r, zero_or_nan<T>(d_o[r]));
  }
  const int own = row0 + lane * step;
  if (lane >= rows_a_lane || own >= params.Nq_padded) return;
  const float lse = own < p.Nq ? params.lse[head * p.Nq + own] : -INFINITY;
  if (params.dq_turns && own % fused_tile == 0 && own < p.Nq) {
    const int tiles = fused_query_tiles(p.Nq);
    params.dq_turns[head * tiles + own / fused_tile] = 0;
    if (head == 0 && own == 0) params.dq_turns[int64_t{p.B} * p.Hq * tiles] = 0;
  }
  params.delta[head * params.Nq_padded + own] =
      own_delta - (params.dlse && own < p.Nq ? params.dlse[head * p.Nq + own] : 0.f);
  constexpr float hidden = 1e30f;
  params.lse2[head * params.Nq_padded + own] = own >= p.Nq        ? hidden
                                               : lse == -INFINITY ? INFINITY
                                               : spoilt           ? NAN
                                               : params.lse_base2 ? lse
                                                                  : lse * log2_e;
}

}  // namespace mfa::cuda::hopper
