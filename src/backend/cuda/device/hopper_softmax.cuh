// hopper_softmax.cuh: streaming softmax over 64 x BK sum fragments, and the modifiers of scores.
//
// Of a 64 x BK fragment, lane t of warp w holds rows 16 w + t / 4 and 8 more, columns 8 i + 2 (t % 4) and the next:
// s[4 i + 2 r + e] is row r, column 8 i + 2 (t % 4) + e.
#pragma once

#include <cmath>

#include "hopper_pipeline.cuh"

namespace mfa::cuda::hopper {

constexpr float log2_e = 1.44269504088896341f;
constexpr float ln_2 = 0.693147180559945309f;

// The keys that the two rows of a lane see: rows `query` and `query` + 8.
struct RowPair {
  int query;
  int begin[2], end[2];
};
__device__ __forceinline__ RowPair row_pair(const Visibility& see, int query, int Nq) {
  RowPair rows{query};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.begin[r] = see.begin(query + 8 * r);
    rows.end[r] = query + 8 * r < Nq ? see.end(query + 8 * r) : 0;
  }
  return rows;
}

// Scores of keys outside a row's range become -inf, whatever they were. k0: first key of the tile.
template <int BK>
__device__ __forceinline__ void mask_scores(float (&s)[BK / 2], const RowPair& rows, int k0, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = rows.begin[r] - k0 - 2 * (lane % 4);
    const uint32_t width = rows.end[r] > rows.begin[r] ? rows.end[r] - rows.begin[r] : 0;
#pragma unroll
    for (int i = 0; i < BK / 8; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (static_cast<uint32_t>(8 * i + e - begin) >= width) s[4 * i + 2 * r + e] = -INFINITY;
  }
}

// Which keys of a tile a boolean mask lets the lane's two rows see. The mask's bytes are read in place: a quad shares its
// rows' bytes, a lane reads every fourth group of 16, and shares them as bits. Needs groups of 16 bytes that are aligned
// and do not straddle the row end.
template <int BK>
struct MaskTile {
  static constexpr int groups = BK / 16;
  static_assert(BK % 16 == 0 && groups <= 8);
  uint4 bytes[2][2];

  __device__ __forceinline__ void load(const Problem& p, int b, int h, int query, int k0, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* row = p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1] + (query + 8 * r) * p.mask.stride[2] + k0;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int group = lane % 4 + 4 * s;
        const bool inside = query + 8 * r < p.Nq && group < groups && k0 + 16 * group < p.Nk;
        bytes[r][s] = inside ? __ldg(reinterpret_cast<const uint4*>(row + 16 * group)) : uint4{0, 0, 0, 0};
      }
    }
  }
  // Bit i of the result: byte i of the four is not zero.
  static __device__ __forceinline__ uint32_t bits_of(uint32_t four) {
    return (__vminu4(four, 0x01010101u) * 0x10204080u) >> 28;
  }
  __device__ __forceinline__ void apply(float (&s)[BK / 2], int lane) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t own = 0;
#pragma unroll
      for (int g = 0; g < 2; ++g)
        own |= (bits_of(bytes[r][g].x) | bits_of(bytes[r][g].y) << 4 | bits_of(bytes[r][g].z) << 8 |
                bits_of(bytes[r][g].w) << 12)
               << 16 * g;
#pragma unroll
      for (int from = 0; from < 4; ++from) {
        const uint32_t bits = __shfl_sync(0xffffffffu, own, from, 4) >> 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int g = j / 4, i = 2 * (from + 4 * g) + j / 2 % 2, e = j % 2;
          if (i < BK / 8 && !(bits & 1u << (16 * g + 8 * (i % 2) + e))) s[4 * i + 2 * r + e] = -INFINITY;
        }
      }
    }
  }
};

// m and l are of rows; l is this lane's share of the row sum until `finish`.
struct Softmax {
  float m[2] = {-INFINITY, -INFINITY};
  float l[2] = {0.f, 0.f};

  // Turns scores into exp2(scale * (s - m)) and returns the factors for what was summed before. The reference point m
  // follows the row maximum only when that has grown by `slack` in base 2: any m near the maximum gives the same
  // result, and sums are then hardly ever rescaled.
  template <int BK>
  __device__ __forceinline__ void step(float (&s)[BK / 2], float scale, float (&alpha)[2]) {
    constexpr float slack = 8.f;
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
      for (int i = 1; i < BK / 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const bool grown = (top - m[r]) * scale > slack;  // false when both are -inf
      alpha[r] = grown ? exp2_fast((m[r] - top) * scale) : 1.f;
      m[r] = grown ? top : m[r];
      base[r] = m[r] == -INFINITY ? 0.f : m[r] * scale;
    }
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < BK / 8; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * r + e];
          x = exp2_fast(fmaf(x, scale, -base[r]));
          sum[r][e] += x;
        }
#pragma unroll
    for (int r = 0; r < 2; ++r) l[r] = fmaf(l[r], alpha[r], sum[r][0] + sum[r][1]);
  }

  // Adds the sink's logit (base 2; -inf: none) and gives the weight of the rows' sums and their base-2 lse.
  __device__ __forceinline__ void finish(float scale, float sink, float (&weight)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
      l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
      float m2 = m[r] == -INFINITY ? -INFINITY : m[r] * scale, factor = 1.f;
      if (sink != -INFINITY) {
        // log2(l) <= the gap between m2 and the true maximum, so either may lead.
        const float top = fmaxf(m2, sink);
        factor = exp2_fast(m2 - top);
        l[r] = l[r] * factor + exp2_fast(sink - top);
        m2 = top;
      }
      weight[r] = l[r] > 0.f ? factor / l[r] : l[r] == 0.f ? 0.f : l[r];  // NaN stays NaN
      lse[r] = l[r] == 0.f ? -INFINITY : m2 + log2f(l[r]);
    }
  }
};

// Probabilities as the A operand of products over keys.
template <class T, int BK>
__device__ __forceinline__ void pack_fragment(const float (&s)[BK / 2], uint32_t (&p)[BK / 4]) {
#pragma unroll
  for (int i = 0; i < BK / 4; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
}

// Philox4x32-10; common/philox.h.
__device__ __forceinline__ uint4 philox(uint4 counter, uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a_high = __umulhi(0xD2511F53u, counter.x), a_low = 0xD2511F53u * counter.x;
    const uint32_t b_high = __umulhi(0xCD9E8D57u, counter.z), b_low = 0xCD9E8D57u * counter.z;
    counter = {b_high ^ counter.y ^ k0, b_low, a_high ^ counter.w ^ k1, a_low};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// The modifiers that change single scores, for one head.
struct ScoreModifiers {
  float scale_log2, softcap_log2, scale_over_softcap;  // softcap_log2 0: none
  float slope_log2;
  const unsigned char* bias;  // of this batch entry and head
  int64_t bias_row, bias_column;
  Element bias_dtype;
  const uint8_t* mask;
  int64_t mask_row, mask_column;
  int offset;

  __device__ __forceinline__ ScoreModifiers(const Problem& p, int b, int h, int position_offset)
      : scale_log2(p.scale_log2),
        softcap_log2(p.softcap > 0.f ? p.softcap_log2 : 0.f),
        scale_over_softcap(p.scale_over_softcap),
        slope_log2(p.alibi_slopes ? p.alibi_slopes[h] * log2_e : 0.f),
        bias(static_cast<const unsigned char*>(p.bias.data)),
        bias_row(p.bias.stride[2]),
        bias_column(p.bias.stride[3]),
        bias_dtype(p.bias.dtype),
        mask(p.mask.data ? p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1] : nullptr),
        mask_row(p.mask.stride[2]),
        mask_column(p.mask.stride[3]),
        offset(position_offset) {
    if (bias) bias += (b * p.bias.stride[0] + h * p.bias.stride[1]) * (bias_dtype == Element::f32 ? 4 : 2);
  }

  __device__ __forceinline__ bool visible(int query, int key) const {
    return !mask || mask[query * mask_row + key * mask_column] != 0;
  }
  __device__ __forceinline__ float bias_at(int query, int key) const {
    const int64_t at = query * bias_row + key * bias_column;
    if (bias_dtype == Element::f32) return reinterpret_cast<const float*>(bias)[at];
    if (bias_dtype == Element::f16) return __half2float(reinterpret_cast<const __half*>(bias)[at]);
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(bias)[at]);
  }

  // Products of q and k become base-2 scores; what a row does not see becomes -inf and is not read.
  template <int BK>
  __device__ __forceinline__ void apply(float (&s)[BK / 2], const RowPair& rows, int k0, int lane) const {
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      // Rows are swapped instead of indexed: register arrays take constant indices only.
#pragma unroll
      for (int i = 0; i < BK / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + e];
          const int key = k0 + 8 * i + 2 * (lane % 4) + e;
          const int query = rows.query + 8 * r;
          const bool seen = key >= (r ? rows.begin[1] : rows.begin[0]) && key < (r ? rows.end[1] : rows.end[0]) &&
                            visible(query, key);
          float y = softcap_log2 != 0.f ? softcap_log2 * tanhf(x * scale_over_softcap) : x * scale_log2;
          y = fmaf(slope_log2, static_cast<float>(key - query - offset), y);
          if (bias && seen) y = fmaf(bias_at(query, key), log2_e, y);
          x = s[4 * i + 2 + e];
          s[4 * i + 2 + e] = seen ? y : -INFINITY;
        }
    }
  }
};

// Zeroes dropped probabilities and scales the kept; `words` of Philox serve four keys, so lanes of a quad pair up: the
// even one computes row 0's words for both, the odd one row 1's.
template <int BK>
__device__ __forceinline__ void drop(float (&s)[BK / 2], const Problem& p, uint32_t row_head, int query, int k0,
                                     int lane) {
  const uint32_t seed0 = p.dropout_seed[0], seed1 = p.dropout_seed[1];
  const bool odd = lane & 1;
#pragma unroll
  for (int i = 0; i < BK / 8; ++i) {
    const uint32_t group = (k0 + 8 * i + 2 * (lane % 4)) >> 2;
    const uint4 w = philox({group, static_cast<uint32_t>(odd ? query + 8 : query), row_head, 0u}, seed0,
                           seed1);
    // Row 0 needs from the even lane: x, y for itself and z, w for the odd lane; row 1 the same from the odd lane.
    const uint32_t got0 = __shfl_xor_sync(0xffffffffu, odd ? w.x : w.z, 1);
    const uint32_t got1 = __shfl_xor_sync(0xffffffffu, odd ? w.y : w.w, 1);
    const uint32_t word[4] = {odd ? got0 : w.x, odd ? got1 : w.y, odd ? w.z : got0, odd ? w.w : got1};
#pragma unroll
    for (int k = 0; k < 4; ++k) s[4 * i + k] = word[k] >= p.dropout_threshold ? s[4 * i + k] * p.dropout_scale : 0.f;
  }
}

}  // namespace mfa::cuda::hopper
