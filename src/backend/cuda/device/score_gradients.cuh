// score_gradients.cuh: what the kernels of the backward share: the tiles Q, dO, K, V in shared memory, and from them
// the probabilities and the gradients of the scores, recomputed from the stored log-sum-exp.
//
//   p = exp2(s2 - lse2),  ds = p (z dO.v - delta),  delta = sum_d o dO - dlse
#pragma once

#include "backend/cuda/device/scores.cuh"
#include "backend/cuda/tiles.h"

namespace mfa::cuda {

template <typename T, const BackwardTile& Tile>
struct GradientTiles {
  static constexpr int DP = Tile.DP, BQ = Tile.BQ, BK = Tile.BK, kThreads = Tile.threads();
  static constexpr int MI = BQ / 16 / Tile.SM, NI = BK / 8 / Tile.SN;  // of a warp's block of scores
  static constexpr int pitch = kPitch<T, DP>, p_pitch = kPitch<T, BK>;
  static_assert(MI * 16 * Tile.SM == BQ && NI * 8 * Tile.SN == BK && NI <= 16);
  using Block = float[MI][NI][4];

  const BackwardParams& f;
  const Problem& p;
  T *q, *d_o, *k, *v, *weights, *d_s;  // tiles
  MaskTile<BQ, BK> mask;
  int warp, row0, key0;  // of the warp's block in the tile
  bool active;           // whether the warp has one
  int depth_qk, depth_v;

  __device__ __forceinline__ GradientTiles(const BackwardParams& params, void* shared) : f(params), p(params.p) {
    q = static_cast<T*>(shared);
    d_o = q + BQ * pitch;
    k = d_o + BQ * pitch;
    v = k + BK * pitch;
    weights = v + BK * pitch;
    d_s = weights + BQ * p_pitch;
    mask.bits = reinterpret_cast<uint16_t*>(d_s + BQ * p_pitch);
    warp = threadIdx.x / 32;
    row0 = warp / Tile.SN * MI * 16;
    key0 = warp % Tile.SN * NI * 8;
    active = warp < Tile.SM * Tile.SN;
    depth_qk = round_up(p.D, 16);
    depth_v = round_up(p.Dv, 16);
  }

  // Rows of heads first_head + r % G.
  __device__ __forceinline__ void load_queries(int b, int first_head, int G, int r0, int rows) {
    const Rows<T> from_q = shift(p.q, b, first_head, G), from_do = shift(f.d_o, b, first_head, G);
    load_rows<BQ, DP, kThreads>(q, from_q, r0, rows, p.D, from_q.is_vector(p.D));
    load_rows<BQ, DP, kThreads>(d_o, from_do, r0, rows, p.Dv, from_do.is_vector(p.Dv));
  }
  __device__ __forceinline__ void load_keys(int b, int hkv, int k0, int keys) {
    const Rows<T> from_k = rows_of<T>(p.k, b, hkv, 1), from_v = rows_of<T>(p.v, b, hkv, 1);
    load_rows<BK, DP, kThreads>(k, from_k, k0, keys, p.D, from_k.is_vector(p.D));
    load_rows<BK, DP, kThreads>(v, from_v, k0, keys, p.Dv, from_v.is_vector(p.Dv));
  }
  static __device__ __forceinline__ Rows<T> shift(const Tensor& x, int b, int first_head, int G) {
    return {static_cast<const T*>(x.data) + b * x.stride[0] + first_head * x.stride[1], x.stride[2], x.stride[1], G};
  }

  // The base-2 lse and delta of the thread's rows; p = 0 for rows that are not there.
  __device__ __forceinline__ void row_terms(const BlockRows<MI>& rows, float (&lse2)[2 * MI],
                                            float (&delta)[2 * MI]) const {
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n) {
      const int64_t row = (int64_t(rows.b) * p.Hq + rows.h[n]) * f.Nq_padded + rows.i[n];
      lse2[n] = rows.real[n] ? f.lse2[row] : infinity();
      delta[n] = rows.real[n] ? f.delta[row] : 0.f;
    }
  }

  // The products of the warp's block: s = Q K^T, d = dO V^T.
  __device__ __forceinline__ void products(Block& s, Block& d) const {
    multiply_scores(s, q + row0 * pitch, pitch, k + key0 * pitch, pitch, depth_qk, BK);
    clear(d);
    multiply<T, A::rows, B::columns>(d, d_o + row0 * pitch, pitch, v + key0 * pitch, pitch, depth_v, BK);
  }

  // From the products to s = p and d = ds. `Damped`: ds is that of the scaled product, before the softcap. `Weights`:
  // s = p z, by which dO contributes to dV.
  template <bool Damped, bool Weights>
  __device__ __forceinline__ void gradients(const Visibility& seen, const BlockRows<MI>& rows, int j0, bool partial,
                                            const float (&lse2)[2 * MI], const float (&delta)[2 * MI], Block& s,
                                            Block& d) const {
    uint32_t kept[2 * MI];
    if (p.dropout_seed) {
      kept_bits<MI, NI>(p, rows, j0, kept);
      drop(p, kept, d);
    }
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n)
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c) d[n / 2][ni][2 * (n % 2) + c] -= delta[n];
    const bool deferred = defers_scale(p);
    const float factor = deferred ? p.scale_log2 : 1.f;
    if (!deferred) {
      scale_scores<T>(p, s, Damped ? d : nullptr);
      add_terms(p, seen, s, rows, j0);
    }
    uint32_t visible[2 * MI];
    if (partial) {
      const int lane = threadIdx.x % 32;
      visible_bits<MI, NI>(seen, rows, j0, visible);
      if (p.mask.data) mask_bits<MI, NI>(mask, row0 + lane / 4, key0 + 2 * (lane % 4), visible);
    }
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n)
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float &x = s[n / 2][ni][2 * (n % 2) + c], &y = d[n / 2][ni][2 * (n % 2) + c];
          x = weight_of<T>(x, factor, lse2[n]);
          if (partial && !(visible[n] >> (2 * ni + c) & 1)) x = 0.f;
          y = x == 0.f ? 0.f : x * y;  // what has no weight gives no gradient, whatever its value
        }
    if (Weights && p.dropout_seed) drop(p, kept, s);
  }

  // Whether the tile of queries i_first..i_last and keys from k0 may have pairs that are hidden.
  __device__ __forceinline__ bool is_partial(const Visibility& seen, int i_first, int i_last, int k0) const {
    return p.mask.data || p.bias.data || seen.begin(i_last) > k0 || seen.end(i_first) < k0 + BK;
  }
  // Whether it may have one that is not. For all threads of the block.
  __device__ __forceinline__ bool is_used(int b, int first_head, int G, int r0, int rows, int k0) {
    return !p.mask.data || mask.template load<kThreads>(p, b, first_head, G, r0, rows, k0);
  }
};

}  // namespace mfa::cuda
