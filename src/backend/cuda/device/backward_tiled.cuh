// backward_tiled.cuh: the gradients of attention of any problem, on every card from sm_80: one kernel for dQ, which
// walks the keys of a tile of queries, and one for dK and dV, which walks the queries of a tile of keys. No atomics:
// the order of all sums is fixed. Source: Dao et al., arXiv:2205.14135.
#pragma once

#include "backend/cuda/device/score_gradients.cuh"

namespace mfa::cuda {

inline constexpr int kRowThreads = 128;  // a warp a row

// delta and the base-2 lse of every row. Grid: B * Hq * Nq / 4, rounded up.
template <typename T>
__device__ __forceinline__ void backward_rows(const BackwardParams& f) {
  const Problem& p = f.p;
  const int64_t rows = int64_t(p.B) * p.Hq * p.Nq, row = int64_t(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const int64_t bh = row / p.Nq;
  const int i = row - bh * p.Nq, b = bh / p.Hq, h = bh - int64_t(b) * p.Hq;
  const T* o = static_cast<const T*>(f.o.data) + b * f.o.stride[0] + h * f.o.stride[1] + i * f.o.stride[2];
  const T* d_o = static_cast<const T*>(f.d_o.data) + b * f.d_o.stride[0] + h * f.d_o.stride[1] + i * f.d_o.stride[2];
  float sum = 0.f;
  for (int d = lane; d < p.Dv; d += 32) sum = fmaf(to_float(o[d]), to_float(d_o[d]), sum);
#pragma unroll
  for (int x = 16; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
  if (lane == 0) {
    const float lse2 = f.lse_base2 ? f.lse[row] : f.lse[row] * kLog2e;
    const int64_t to = bh * f.Nq_padded + i;
    f.delta[to] = f.dlse ? sum - f.dlse[row] : sum;
    f.lse2[to] = lse2 == -infinity() ? infinity() : lse2;
  }
}

// Grid: B * Hkv * row tiles.
template <typename T, const BackwardTile& Tile>
__device__ __forceinline__ void backward_queries(const BackwardParams& f) {
  using Tiles = GradientTiles<T, Tile>;
  constexpr int BQ = Tile.BQ, BK = Tile.BK, MI = BQ / 16 / Tile.WM, NI = Tile.DP / 8 / Tile.WN;
  static_assert(MI * 16 * Tile.WM == BQ && NI * 8 * Tile.WN == Tile.DP && (NI % 2 == 0 || sizeof(T) == 4));
  extern __shared__ __align__(16) char shared[];
  Tiles tiles(f, shared);
  const Problem& p = f.p;
  const int row_count = p.G * p.Nq, row_tiles = (row_count + BQ - 1) / BQ;
  const int head = blockIdx.x / row_tiles, b = head / p.Hkv, hkv = head - b * p.Hkv;
  const int r0 = (row_tiles - 1 - (blockIdx.x - head * row_tiles)) * BQ;

  const Visibility seen(p, b);
  const int i_first = r0 / p.G, i_last = (min(r0 + BQ, row_count) - 1) / p.G;
  const int k_begin = seen.begin(i_first) / BK * BK, k_end = seen.end(i_last);
  const BlockRows<Tiles::MI> rows(b, hkv * p.G, tiles.active ? r0 + tiles.row0 : row_count, p.G, row_count);
  float lse2[2 * Tiles::MI], delta[2 * Tiles::MI];
  tiles.row_terms(rows, lse2, delta);
  tiles.load_queries(b, hkv * p.G, p.G, r0, row_count);

  const int wm = tiles.warp / Tile.WN, wn = tiles.warp % Tile.WN;
  const int columns = round_up(p.D, 16) - wn * NI * 8;
  float dq[MI][NI][4];
  bool contain = false, hides = false;
  while (true) {
    clear(dq);
    for (int k0 = k_begin; k0 < k_end; k0 += BK) {
      __syncthreads();
      tiles.load_keys(b, hkv, k0, seen.keys);
      const int j0 = k0 + tiles.key0 + 2 * (threadIdx.x % 4);
      const bool partial = tiles.is_partial(seen, i_first, i_last, k0);
      const bool used = tiles.is_used(b, hkv * p.G, p.G, r0, row_count, k0);
      hides = hides || partial;
      drain_copies();
      __syncthreads();
      if (!used) continue;
      if (tiles.active) {
        typename Tiles::Block s, d;
        tiles.products(s, d);
        tiles.template gradients<true, false>(seen, rows, j0, partial, lse2, delta, s, d);
        store_block(tiles.d_s + tiles.row0 * Tiles::p_pitch + tiles.key0, Tiles::p_pitch, d);
      }
      __syncthreads();
      const T* d_s = tiles.d_s + wm * MI * 16 * Tiles::p_pitch;
      if (contain && partial)
        multiply_hiding<T, A::rows, BK, Tile.DP, Tile.threads()>(dq, d_s, Tiles::p_pitch, tiles.k, wn * NI * 8, p.D);
      else
        multiply<T, A::rows, B::rows>(dq, d_s, Tiles::p_pitch, tiles.k + wn * NI * 8, Tiles::pitch, BK, columns);
    }
    // As in the forward: a NaN may be that of a hidden key.
    if (contain || !hides || !__syncthreads_or(any_nonfinite(dq))) break;
    contain = true;
  }
  drain_copies();

  const BlockRows<MI> to_rows(b, hkv * p.G, r0 + wm * MI * 16, p.G, row_count);
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    if (!to_rows.real[n]) continue;
    T* to =
        static_cast<T*>(f.dq.data) + b * f.dq.stride[0] + to_rows.h[n] * f.dq.stride[1] + to_rows.i[n] * f.dq.stride[2];
    const bool pairs = p.D % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
    store_row(to + wn * NI * 8, dq[n / 2], n % 2, p.scale, p.D - wn * NI * 8, pairs);
  }
}

// Grid: B * Hkv * key tiles.
template <typename T, const BackwardTile& Tile>
__device__ __forceinline__ void backward_keys(const BackwardParams& f) {
  using Tiles = GradientTiles<T, Tile>;
  constexpr int BQ = Tile.BQ, BK = Tile.BK, MI = BK / 16 / Tile.KM, NI = Tile.DP / 8 / Tile.KN;
  static_assert(MI * 16 * Tile.KM == BK && NI * 8 * Tile.KN == Tile.DP && (NI % 2 == 0 || sizeof(T) == 4));
  extern __shared__ __align__(16) char shared[];
  Tiles tiles(f, shared);
  const Problem& p = f.p;
  const int key_tiles = (p.Nk + BK - 1) / BK, row_count = p.G * p.Nq;
  const int head = blockIdx.x / key_tiles, b = head / p.Hkv, hkv = head - b * p.Hkv;
  const int k0 = (blockIdx.x - head * key_tiles) * BK;

  const Visibility seen(p, b);
  const int i_begin = seen.first_query(k0), i_end = k0 < seen.keys ? seen.end_query(k0 + BK - 1, p.Nq) : 0;
  const int r_begin = int(int64_t(i_begin) * p.G < row_count ? i_begin * p.G : row_count) / BQ * BQ;
  const int r_end = i_end * p.G;
  const int j0 = k0 + tiles.key0 + 2 * (threadIdx.x % 4);
  tiles.load_keys(b, hkv, k0, seen.keys);

  const int km = tiles.warp / Tile.KN, kn = tiles.warp % Tile.KN;
  const int columns_k = round_up(p.D, 16) - kn * NI * 8, columns_v = round_up(p.Dv, 16) - kn * NI * 8;
  float dk[MI][NI][4], dv[MI][NI][4];
  bool contain = false, hides = false;
  while (true) {
    clear(dk);
    clear(dv);
    for (int r0 = r_begin; r0 < r_end; r0 += BQ) {
      __syncthreads();
      tiles.load_queries(b, hkv * p.G, p.G, r0, row_count);
      const BlockRows<Tiles::MI> rows(b, hkv * p.G, tiles.active ? r0 + tiles.row0 : row_count, p.G, row_count);
      const int i_first = r0 / p.G, i_last = (min(r0 + BQ, row_count) - 1) / p.G;
      const bool partial = tiles.is_partial(seen, i_first, i_last, k0);
      const bool used = tiles.is_used(b, hkv * p.G, p.G, r0, row_count, k0);
      hides = hides || partial;
      drain_copies();
      __syncthreads();
      if (!used) continue;
      if (tiles.active) {
        float lse2[2 * Tiles::MI], delta[2 * Tiles::MI];
        tiles.row_terms(rows, lse2, delta);
        typename Tiles::Block s, d;
        tiles.products(s, d);
        tiles.template gradients<true, true>(seen, rows, j0, partial, lse2, delta, s, d);
        const int at = tiles.row0 * Tiles::p_pitch + tiles.key0;
        store_block(tiles.weights + at, Tiles::p_pitch, s);
        store_block(tiles.d_s + at, Tiles::p_pitch, d);
      }
      __syncthreads();
      const T *weights = tiles.weights + km * MI * 16, *d_s = tiles.d_s + km * MI * 16;
      if (contain && partial) {
        multiply_hiding<T, A::columns, BQ, Tile.DP, Tile.threads()>(dv, weights, Tiles::p_pitch, tiles.d_o, kn * NI * 8,
                                                                    p.Dv);
        multiply_hiding<T, A::columns, BQ, Tile.DP, Tile.threads()>(dk, d_s, Tiles::p_pitch, tiles.q, kn * NI * 8, p.D);
      } else {
        multiply<T, A::columns, B::rows>(dv, weights, Tiles::p_pitch, tiles.d_o + kn * NI * 8, Tiles::pitch, BQ,
                                         columns_v);
        multiply<T, A::columns, B::rows>(dk, d_s, Tiles::p_pitch, tiles.q + kn * NI * 8, Tiles::pitch, BQ, columns_k);
      }
    }
    if (contain || !hides || !__syncthreads_or(any_nonfinite(dk) || any_nonfinite(dv))) break;
    contain = true;
  }
  drain_copies();

#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    const int j = k0 + km * MI * 16 + 8 * n + threadIdx.x % 32 / 4;
    if (j >= p.Nk) continue;
    auto row = [&](const MutableTensor& x) {
      return static_cast<T*>(x.data) + b * x.stride[0] + hkv * x.stride[1] + j * x.stride[2];
    };
    auto pairs = [](const T* to, int D) {
      return D % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
    };
    if (f.dk.data)
      store_row(row(f.dk) + kn * NI * 8, dk[n / 2], n % 2, p.scale, p.D - kn * NI * 8, pairs(row(f.dk), p.D));
    if (f.dv.data)
      store_row(row(f.dv) + kn * NI * 8, dv[n / 2], n % 2, 1.f, p.Dv - kn * NI * 8, pairs(row(f.dv), p.Dv));
  }
}

}  // namespace mfa::cuda
