// forward_tiled.cuh: attention of any problem by a streaming softmax over key tiles (arXiv:2205.14135), on every card
// from sm_80. The query heads of a KV head are packed into the rows of a tile: row r is query r / G of head r % G.
#pragma once

#include "backend/cuda/device/scores.cuh"
#include "backend/cuda/tiles.h"

namespace mfa::cuda {

// Grid: x = B * Hkv * row tiles, z = splits of the keys.
template <typename T, const ForwardTile& Tile>
__device__ __forceinline__ void forward_tiled(const ForwardParams& f) {
  constexpr int DP = Tile.DP, BQ = Tile.BQ, BK = Tile.BK, WM = Tile.WM, WN = Tile.WN, kThreads = Tile.threads();
  constexpr int MI = BQ / 16 / WM, SN = BK / 8 / WN, ON = DP / 8 / WN;
  constexpr int pitch = kPitch<T, DP>, p_pitch = kPitch<T, BK>;
  static_assert(MI * 16 * WM == BQ && SN * 8 * WN == BK && ON * 8 * WN == DP && ON % 2 == 0 && SN <= 16);

  extern __shared__ __align__(16) char shared[];
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const k_tile = q_tile + BQ * pitch;
  T* const v_tile = k_tile + BK * pitch;
  T* const p_tile = v_tile + BK * pitch;
  float* const statistics = reinterpret_cast<float*>(p_tile + BQ * p_pitch);  // [WN][BQ]
  MaskTile<BQ, BK> mask{reinterpret_cast<uint16_t*>(statistics + WN * BQ), false};

  const Problem& p = f.p;
  const int row_count = p.G * p.Nq, row_tiles = (row_count + BQ - 1) / BQ;
  const int head = blockIdx.x / row_tiles, b = head / p.Hkv, hkv = head - b * p.Hkv;
  const int r0 = (row_tiles - 1 - (blockIdx.x - head * row_tiles)) * BQ;  // causal: the longest rows first
  const int warp = threadIdx.x / 32, wm = warp / WN, wn = warp % WN;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  const Visibility seen(p, b);
  const int i_first = r0 / p.G, i_last = (min(r0 + BQ, row_count) - 1) / p.G;
  const int split_begin = blockIdx.z * f.split_keys;
  const int k_begin = max(seen.begin(i_first), split_begin) / BK * BK;
  const int k_end = f.splits > 1 ? min(seen.end(i_last), split_begin + f.split_keys) : seen.end(i_last);

  const Rows<T> q = rows_of<T>(p.q, b, hkv, p.G), k = rows_of<T>(p.k, b, hkv, 1), v = rows_of<T>(p.v, b, hkv, 1);
  const bool q_vector = q.is_vector(p.D), k_vector = k.is_vector(p.D), v_vector = v.is_vector(p.Dv);
  const int depth = round_up(p.D, 16), columns = round_up(p.Dv, 16) - wn * ON * 8;
  const BlockRows<MI> rows(b, hkv * p.G, r0 + wm * MI * 16, p.G, row_count);

  const bool deferred = defers_scale(p);
  const float factor = deferred ? p.scale_log2 : 1.f;  // from what the tiles hold to scores

  float o[MI][ON][4], m[2 * MI], l[2 * MI];
  bool contain = false, hides = p.bias.data != nullptr;
  load_rows<BQ, DP, kThreads>(q_tile, q, r0, row_count, p.D, q_vector);
  while (true) {
    clear(o);
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n) m[n] = -infinity(), l[n] = 0.f;

    if (k_begin < k_end) load_rows<BK, DP, kThreads>(k_tile, k, k_begin, seen.keys, p.D, k_vector);
    for (int k0 = k_begin; k0 < k_end; k0 += BK) {
      drain_copies();
      __syncthreads();
      load_rows<BK, DP, kThreads>(v_tile, v, k0, seen.keys, p.Dv, v_vector);

      const int j0 = k0 + wn * SN * 8 + 2 * t;
      const bool partial = p.mask.data || seen.begin(i_last) > k0 || seen.end(i_first) < k0 + BK;
      hides = hides || partial;
      const bool used = !p.mask.data || mask.template load<kThreads>(p, b, hkv * p.G, p.G, r0, row_count, k0);
      if (used) {
        float s[MI][SN][4];
        multiply_scores(s, q_tile + wm * MI * 16 * pitch, pitch, k_tile + wn * SN * 8 * pitch, pitch, depth, BK);
        if (!deferred) {
          scale_scores<T>(p, s, nullptr);
          add_terms(p, seen, s, rows, j0);
        }
        if (partial) {
          uint32_t visible[2 * MI];
          visible_bits<MI, SN>(seen, rows, j0, visible);
          if (p.mask.data) mask_bits<MI, SN>(mask, wm * MI * 16 + g, wn * SN * 8 + 2 * t, visible);
#pragma unroll
          for (int n = 0; n < 2 * MI; ++n)
#pragma unroll
            for (int ni = 0; ni < SN; ++ni)
#pragma unroll
              for (int c = 0; c < 2; ++c)
                if (!(visible[n] >> (2 * ni + c) & 1)) s[n / 2][ni][2 * (n % 2) + c] = -infinity();
        }

        float row_max[2 * MI];
#pragma unroll
        for (int n = 0; n < 2 * MI; ++n) {
          row_max[n] = -infinity();
#pragma unroll
          for (int ni = 0; ni < SN; ++ni)
            row_max[n] = fmaxf(row_max[n], fmaxf(s[n / 2][ni][2 * (n % 2)], s[n / 2][ni][2 * (n % 2) + 1]));
          row_max[n] = fmaxf(row_max[n], __shfl_xor_sync(~0u, row_max[n], 1));
          row_max[n] = fmaxf(row_max[n], __shfl_xor_sync(~0u, row_max[n], 2));
        }
        if constexpr (WN > 1) {
#pragma unroll
          for (int n = 0; n < 2 * MI; ++n)
            if (t == 0) statistics[wn * BQ + wm * MI * 16 + 8 * n + g] = row_max[n];
          __syncthreads();
#pragma unroll
          for (int n = 0; n < 2 * MI; ++n)
#pragma unroll
            for (int w = 0; w < WN; ++w) row_max[n] = fmaxf(row_max[n], statistics[w * BQ + wm * MI * 16 + 8 * n + g]);
        }
#pragma unroll
        for (int n = 0; n < 2 * MI; ++n) {
          const int mi = n / 2, e = 2 * (n % 2);
          const float next = fmaxf(m[n], row_max[n] * factor);
          const float shift = next == -infinity() ? 0.f : next;  // nothing visible yet: avoid (-inf) - (-inf)
          const float alpha = exp2_of<T>(m[n] - shift);
          m[n] = next;
          float sum = 0.f;
#pragma unroll
          for (int ni = 0; ni < SN; ++ni)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float x = weight_of<T>(s[mi][ni][e + c], factor, shift);
              s[mi][ni][e + c] = x;
              sum += x;
            }
          l[n] = l[n] * alpha + sum;
#pragma unroll
          for (int ni = 0; ni < ON; ++ni) o[mi][ni][e] *= alpha, o[mi][ni][e + 1] *= alpha;
        }
        if (p.dropout_seed) {
          uint32_t kept[2 * MI];
          kept_bits<MI, SN>(p, rows, j0, kept);
          drop(p, kept, s);
        }
        store_block(p_tile + wm * MI * 16 * p_pitch + wn * SN * 8, p_pitch, s);
      }
      drain_copies();
      __syncthreads();
      if (k0 + BK < k_end) load_rows<BK, DP, kThreads>(k_tile, k, k0 + BK, seen.keys, p.D, k_vector);
      if (used) {
        const T* weights = p_tile + wm * MI * 16 * p_pitch;
        if (contain && (partial || p.bias.data))
          multiply_hiding<T, A::rows, BK, DP, kThreads>(o, weights, p_pitch, v_tile, wn * ON * 8, p.Dv);
        else
          multiply<T, A::rows, B::rows>(o, weights, p_pitch, v_tile + wn * ON * 8, pitch, BK, columns);
      }
    }
    // A NaN or an infinity may be that of a key that the row does not see: 0 * NaN. Then all again, with care.
    if (contain || !hides || !__syncthreads_or(any_nonfinite(o))) break;
    contain = true;
  }
  drain_copies();

  // Row sums over the quad and the warps of a row, the sink, and the results.
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    l[n] += __shfl_xor_sync(~0u, l[n], 1);
    l[n] += __shfl_xor_sync(~0u, l[n], 2);
  }
  if constexpr (WN > 1) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n)
      if (t == 0) statistics[wn * BQ + wm * MI * 16 + 8 * n + g] = l[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n) {
      l[n] = 0.f;
#pragma unroll
      for (int w = 0; w < WN; ++w) l[n] += statistics[w * BQ + wm * MI * 16 + 8 * n + g];
    }
  }
  const int real_columns = p.Dv - wn * ON * 8;
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    if (!rows.real[n]) continue;
    const int i = rows.i[n], h = rows.h[n];
    float shift = m[n] == -infinity() ? 0.f : m[n], total = l[n], weight = 1.f;
    if (p.sinks && f.splits == 1) {
      const float sink = p.sinks[h] * kLog2e, top = fmaxf(m[n], sink);
      if (top != -infinity()) {
        weight = exp2f(shift - top);
        if (m[n] == -infinity()) weight = 0.f;
        total = total * weight + exp2f(sink - top);
        shift = top;
      }
    }
    const float scale = total == 0.f ? 0.f : weight / total;
    const float lse2 = total == 0.f ? -infinity() : shift + log2f(total);
    const int64_t row = (int64_t(b) * p.Hq + h) * p.Nq + i;
    if (f.splits > 1) {
      const int64_t part = int64_t(blockIdx.z) * p.B * p.Hq * p.Nq + row;
      if (t == 0 && wn == 0) f.lse_part[part] = lse2;
      store_row(f.o_part + part * p.Dv + wn * ON * 8, o[n / 2], n % 2, scale, real_columns, p.Dv % 2 == 0);
    } else {
      if (f.lse && t == 0 && wn == 0) f.lse[row] = f.lse_base2 ? lse2 : lse2 * kLn2;
      T* to = static_cast<T*>(f.o.data) + b * f.o.stride[0] + h * f.o.stride[1] + i * f.o.stride[2];
      const bool pairs = p.Dv % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
      store_row(to + wn * ON * 8, o[n / 2], n % 2, scale, real_columns, pairs);
    }
  }
}

}  // namespace mfa::cuda
