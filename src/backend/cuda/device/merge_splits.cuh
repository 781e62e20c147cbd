// merge_splits.cuh: merges the partial results of split keys into the rows of the output.
// o_part [splits, rows, Dv] normalised; lse_part [splits, rows] base 2, -inf where a split saw no key.
// Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
#pragma once

#include "backend/cuda/device/scores.cuh"

namespace mfa::cuda {

inline constexpr int kMergeThreads = 128;  // a warp a row

// Grid: rows / 4, rounded up.
template <typename T>
__device__ __forceinline__ void merge_splits(const ForwardParams& f) {
  const Problem& p = f.p;
  const int64_t rows = int64_t(p.B) * p.Hq * p.Nq, row = int64_t(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const int i = row % p.Nq, h = row / p.Nq % p.Hq, b = row / p.Nq / p.Hq;

  const float sink = p.sinks ? p.sinks[h] * kLog2e : -infinity();
  float m = sink;
  for (int s = lane; s < f.splits; s += 32) m = fmaxf(m, f.lse_part[s * rows + row]);
#pragma unroll
  for (int x = 16; x > 0; x /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, x));
  const float shift = m == -infinity() ? 0.f : m;  // every split empty: avoid (-inf) - (-inf)
  float l = 0.f;
  for (int s = lane; s < f.splits; s += 32) l += exp2f(f.lse_part[s * rows + row] - shift);
#pragma unroll
  for (int x = 16; x > 0; x /= 2) l += __shfl_xor_sync(~0u, l, x);
  l += exp2f(sink - shift);

  const float scale = l == 0.f ? 0.f : 1.f / l;
  T* to = static_cast<T*>(f.o.data) + b * f.o.stride[0] + h * f.o.stride[1] + i * f.o.stride[2];
  constexpr int kChannels = 4;  // of a lane, 32 apart
  for (int d0 = 0; d0 < p.Dv; d0 += 32 * kChannels) {
    float sum[kChannels] = {};
    for (int s0 = 0; s0 < f.splits; s0 += 32) {
      const int own = s0 + lane, count = min(32, f.splits - s0);
      const float weight = own < f.splits ? exp2f(f.lse_part[own * rows + row] - shift) : 0.f;
#pragma unroll 4
      for (int s = 0; s < count; ++s) {
        const float w = __shfl_sync(~0u, weight, s);
        const float* from = f.o_part + ((s0 + s) * rows + row) * p.Dv + d0;
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          if (d0 + 32 * c + lane < p.Dv) sum[c] = fmaf(w, from[32 * c + lane], sum[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (d0 + 32 * c + lane < p.Dv) to[d0 + 32 * c + lane] = from_float<T>(sum[c] * scale);
  }
  if (f.lse && lane == 0) {
    const float lse2 = l == 0.f ? -infinity() : shift + log2f(l);
    f.lse[row] = f.lse_base2 ? lse2 : lse2 * kLn2;
  }
}

}  // namespace mfa::cuda
