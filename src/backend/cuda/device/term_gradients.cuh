// term_gradients.cuh: the gradients of what is added to the scores: bias, ALiBi slopes, sinks. Sums in a fixed order.
#pragma once

#include "backend/cuda/device/score_gradients.cuh"

namespace mfa::cuda {

// dbias: a block owns a tile of it, [BQ, BK], or the whole of an axis that the bias is broadcast along, and walks all
// pairs of query and key that the entries of its tile are added to.
// Grid: the product over the axes of 1 where the axis is summed, else B, Hq, row tiles, key tiles.
template <typename T, const BackwardTile& Tile>
__device__ __forceinline__ void bias_gradient(const BackwardParams& f) {
  using Tiles = GradientTiles<T, Tile>;
  constexpr int BQ = Tile.BQ, BK = Tile.BK, MI = Tiles::MI, NI = Tiles::NI, kThreads = Tile.threads();
  constexpr int sum_pitch = BK + 1;
  static_assert(sizeof(float) * BQ * sum_pitch <= sizeof(T) * 2 * Tiles::pitch * (BQ + BK));
  extern __shared__ __align__(16) char shared[];
  Tiles tiles(f, shared);
  const Problem& p = f.p;
  const int64_t* stride = f.dbias_stride;
  const int row_tiles = (p.Nq + BQ - 1) / BQ, key_tiles = (p.Nk + BK - 1) / BK;
  // [first, end) of each axis, in batch entries, heads, row tiles, key tiles.
  int first[4], end[4], index = blockIdx.x;
  const int extent[4] = {p.B, p.Hq, row_tiles, key_tiles};
#pragma unroll
  for (int a = 3; a >= 0; --a) {
    first[a] = 0, end[a] = extent[a];
    if (stride[a] == 0) continue;
    first[a] = index % extent[a], end[a] = first[a] + 1;
    index /= extent[a];
  }

  float sum[MI][NI][4];
  clear(sum);
  for (int b = first[0]; b < end[0]; ++b) {
    const Visibility seen(p, b);
    for (int h = first[1]; h < end[1]; ++h)
      for (int rt = first[2]; rt < end[2]; ++rt) {
        const int r0 = rt * BQ, i_last = min(r0 + BQ, p.Nq) - 1;
        __syncthreads();
        tiles.load_queries(b, h, 1, r0, p.Nq);
        const BlockRows<MI> rows(b, h, tiles.active ? r0 + tiles.row0 : p.Nq, 1, p.Nq);
        float lse2[2 * MI], delta[2 * MI];
        tiles.row_terms(rows, lse2, delta);
        const int k_end = min(end[3] * BK, seen.end(i_last));
        for (int k0 = max(first[3] * BK, seen.begin(r0) / BK * BK); k0 < k_end; k0 += BK) {
          __syncthreads();
          tiles.load_keys(b, h / p.G, k0, seen.keys);
          const int j0 = k0 + tiles.key0 + 2 * (threadIdx.x % 4);
          const bool partial = tiles.is_partial(seen, r0, i_last, k0);
          const bool used = tiles.is_used(b, h, 1, r0, p.Nq, k0);
          drain_copies();
          __syncthreads();
          if (!used || !tiles.active) continue;
          typename Tiles::Block s, d;
          tiles.products(s, d);
          tiles.template gradients<false, false>(seen, rows, j0, partial, lse2, delta, s, d);
#pragma unroll
          for (int mi = 0; mi < MI; ++mi)
#pragma unroll
            for (int ni = 0; ni < NI; ++ni)
#pragma unroll
              for (int e = 0; e < 4; ++e) sum[mi][ni][e] += d[mi][ni][e];
        }
        drain_copies();
      }
  }

  // The tile, through shared memory, to sums of its rows or columns where those are wanted.
  __syncthreads();
  float* const all = reinterpret_cast<float*>(shared);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if (tiles.active) {
#pragma unroll
    for (int mi = 0; mi < MI; ++mi)
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          all[(tiles.row0 + 16 * mi + 8 * (e / 2) + g) * sum_pitch + tiles.key0 + 8 * ni + 2 * t + e % 2] =
              sum[mi][ni][e];
  }
  __syncthreads();
  float* const to = f.dbias + first[0] * stride[0] + first[1] * stride[1];
  const bool sums_rows = stride[2] == 0, sums_keys = stride[3] == 0;
  const int i0 = first[2] * BQ, k0 = first[3] * BK;
  if (sums_keys) {
    for (int r = threadIdx.x; r < BQ; r += kThreads) {
      float x = 0.f;
      for (int c = 0; c < BK; ++c) x += all[r * sum_pitch + c];
      all[r * sum_pitch] = x;
    }
    __syncthreads();
  }
  const int columns = sums_keys ? 1 : BK;
  if (sums_rows) {
    for (int c = threadIdx.x; c < columns; c += kThreads) {
      float x = 0.f;
      for (int r = 0; r < BQ; ++r) x += all[r * sum_pitch + c];
      if (sums_keys || k0 + c < p.Nk) to[(k0 + c) * stride[3]] = x;
    }
  } else {
    for (int n = threadIdx.x; n < BQ * columns; n += kThreads) {
      const int r = n / columns, c = n - r * columns;
      if (i0 + r < p.Nq && (sums_keys || k0 + c < p.Nk))
        to[(i0 + r) * stride[2] + (k0 + c) * stride[3]] = all[r * sum_pitch + c];
    }
  }
}

// dalibi_part: of each row, sum_j ds (j - pos). Grid: B * Hkv * row tiles.
template <typename T, const BackwardTile& Tile>
__device__ __forceinline__ void slope_rows(const BackwardParams& f) {
  using Tiles = GradientTiles<T, Tile>;
  constexpr int BQ = Tile.BQ, BK = Tile.BK, MI = Tiles::MI, NI = Tiles::NI;
  extern __shared__ __align__(16) char shared[];
  Tiles tiles(f, shared);
  const Problem& p = f.p;
  const int row_count = p.G * p.Nq, row_tiles = (row_count + BQ - 1) / BQ;
  const int head = blockIdx.x / row_tiles, b = head / p.Hkv, hkv = head - b * p.Hkv;
  const int r0 = (row_tiles - 1 - (blockIdx.x - head * row_tiles)) * BQ;
  const Visibility seen(p, b);
  const int i_first = r0 / p.G, i_last = (min(r0 + BQ, row_count) - 1) / p.G;
  const BlockRows<MI> rows(b, hkv * p.G, tiles.active ? r0 + tiles.row0 : row_count, p.G, row_count);
  float lse2[2 * MI], delta[2 * MI], sum[2 * MI];
  tiles.row_terms(rows, lse2, delta);
  tiles.load_queries(b, hkv * p.G, p.G, r0, row_count);
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) sum[n] = 0.f;

  const int k_end = seen.end(i_last);
  for (int k0 = seen.begin(i_first) / BK * BK; k0 < k_end; k0 += BK) {
    __syncthreads();
    tiles.load_keys(b, hkv, k0, seen.keys);
    const int j0 = k0 + tiles.key0 + 2 * (threadIdx.x % 4);
    const bool partial = tiles.is_partial(seen, i_first, i_last, k0);
    const bool used = tiles.is_used(b, hkv * p.G, p.G, r0, row_count, k0);
    drain_copies();
    __syncthreads();
    if (!used || !tiles.active) continue;
    typename Tiles::Block s, d;
    tiles.products(s, d);
    tiles.template gradients<false, false>(seen, rows, j0, partial, lse2, delta, s, d);
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n)
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          sum[n] = fmaf(d[n / 2][ni][2 * (n % 2) + c], float(j0 + 8 * ni + c - rows.i[n] - seen.offset), sum[n]);
  }
  drain_copies();
  __syncthreads();

  float* const parts = reinterpret_cast<float*>(shared);  // [SN][BQ]
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    sum[n] += __shfl_xor_sync(~0u, sum[n], 1);
    sum[n] += __shfl_xor_sync(~0u, sum[n], 2);
    if (tiles.active && threadIdx.x % 4 == 0)
      parts[tiles.warp % Tile.SN * BQ + tiles.row0 + 8 * n + threadIdx.x % 32 / 4] = sum[n];
  }
  __syncthreads();
  for (int r = threadIdx.x; r < BQ && r0 + r < row_count; r += Tile.threads()) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < Tile.SN; ++w) x += parts[w * BQ + r];
    const int i = (r0 + r) / p.G, h = hkv * p.G + (r0 + r) % p.G;
    f.dalibi_part[(int64_t(b) * p.Hq + h) * p.Nq + i] = x;
  }
}

inline constexpr int kHeadThreads = 256;

// dsinks and dalibi_slopes: of each head, the sum over its rows. Grid: Hq.
__device__ __forceinline__ void head_gradients(const BackwardParams& f) {
  const Problem& p = f.p;
  const int h = blockIdx.x;
  __shared__ double parts[2][kHeadThreads];
  double sink_sum = 0, slope_sum = 0;
  const float sink = f.dsinks ? p.sinks[h] * kLog2e : 0.f;
  const int64_t rows = int64_t(p.B) * p.Nq;
  for (int64_t n = threadIdx.x; n < rows; n += kHeadThreads) {
    const int64_t b = n / p.Nq, i = n - b * p.Nq, bh = b * p.Hq + h;
    if (f.dsinks) {
      const float weight = exp2f(sink - f.lse2[bh * f.Nq_padded + i]);
      if (weight != 0.f) sink_sum -= double(weight) * f.delta[bh * f.Nq_padded + i];
    }
    if (f.dalibi_slopes) slope_sum += f.dalibi_part[bh * p.Nq + i];
  }
  parts[0][threadIdx.x] = sink_sum;
  parts[1][threadIdx.x] = slope_sum;
  for (int x = kHeadThreads / 2; x > 0; x /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < x)
      for (int n = 0; n < 2; ++n) parts[n][threadIdx.x] += parts[n][threadIdx.x + x];
  }
  if (threadIdx.x == 0) {
    if (f.dsinks) f.dsinks[h] = float(parts[0][0]);
    if (f.dalibi_slopes) f.dalibi_slopes[h] = float(parts[1][0]);
  }
}

}  // namespace mfa::cuda
