// hopper_softmax.cuh: streaming softmax over 64 x BK sum fragments.
//
// Of a 64 x BK fragment, lane t of warp w holds rows 16 w + t / 4 and 8 more, columns 8 i + 2 (t % 4) and the next:
// s[4 i + 2 r + e] is row r, column 8 i + 2 (t % 4) + e.
#pragma once

#include <cmath>

#include "hopper_pipeline.cuh"

namespace mfa::cuda::hopper {

constexpr float log2_e = 1.44269504088896341f;
constexpr float ln_2 = 0.693147180559945309f;

// Which of a lane's columns, two of every eight, lie before column `end`, counted from the lane's first. 128 at most.
__device__ __forceinline__ uint32_t columns_before(int end) {
  const int count = end <= 0 ? 0 : end / 8 * 2 + min(end % 8, 2);
  return count >= 32 ? ~0u : (1u << count) - 1;
}

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
  static_assert(BK <= 128);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int first = k0 + 2 * (lane % 4);
    const uint32_t seen = columns_before(rows.end[r] - first) & ~columns_before(rows.begin[r] - first);
#pragma unroll
    for (int i = 0; i < BK / 4; ++i)
      if (!(seen >> i & 1)) s[4 * (i / 2) + 2 * r + i % 2] = -INFINITY;
  }
}

// Rows whose keys are all in one fragment.
struct NotWider {
  __device__ __forceinline__ void operator()(float (&)[2]) const {}
};

// m and l are of rows; l is this lane's share of the row sum until `finish`.
struct Softmax {
  float m[2] = {-INFINITY, -INFINITY};
  float l[2] = {0.f, 0.f};
  float own[2];  // the greatest scores that this lane had in the last step

  // Turns scores into exp2(scale * (s - m)) and returns the factors for what was summed before. The reference point m
  // follows the row maximum only when that has grown by `slack` in base 2: any m near the maximum gives the same
  // result, and sums are then hardly ever rescaled. `widen` makes maxima those of a wider fragment. `exact`: a score of
  // m gives 1, not the rounding of its scaling; nor does anything give more than 4.
  template <int BK, bool exact = false, class Widen>
  __device__ __forceinline__ void step(float (&s)[BK / 2], float scale, float (&alpha)[2], const Widen& widen) {
    constexpr float slack = exact ? 2.f : 8.f;
    float top[2], base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
      for (int i = 1; i < BK / 8; ++i) top[r] = fmaxf(top[r], fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
      own[r] = top[r];
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
    }
    widen(top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool grown = (top[r] - m[r]) * scale > slack;  // false when both are -inf
      alpha[r] = grown ? exp2_fast((m[r] - top[r]) * scale) : 1.f;
      m[r] = grown ? top[r] : m[r];
      base[r] = m[r] == -INFINITY ? 0.f : exact ? m[r] : m[r] * scale;
    }
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < BK / 8; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * r + e];
          x = exp2_fast(exact ? (x - base[r]) * scale : fmaf(x, scale, -base[r]));
          sum[r][e] += x;
        }
#pragma unroll
    for (int r = 0; r < 2; ++r) l[r] = fmaf(l[r], alpha[r], sum[r][0] + sum[r][1]);
  }

  // Adds the sink's logit (base 2; -inf: none) and gives the weight of the rows' sums and their base-2 lse. `widen`
  // adds the sums of a wider fragment.
  template <class Widen>
  __device__ __forceinline__ void finish(float scale, float sink, float (&weight)[2], float (&lse)[2],
                                         const Widen& widen) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
      l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
    }
    widen(l);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m2 = m[r] == -INFINITY ? -INFINITY : m[r] * scale, factor = 1.f;
      if (sink != -INFINITY) {
        // log2(l) <= the gap between m2 and the true maximum, so either may lead.
        const float top = fmaxf(m2, sink);
        factor = exp2_fast(m2 - top);
        l[r] = l[r] * factor + exp2_fast(sink - top);
        m2 = top;
      }
      weight[r] = l[r] > 0.f ? factor / l[r] : l[r] == 0.f ? 0.f : l[r];  // NaN stays NaN
      // Rounded once, since gradients take it from scores that come close to it.
      lse[r] = l[r] == 0.f ? -INFINITY : sink == -INFINITY ? fmaf(m[r], scale, log2f(l[r])) : m2 + log2f(l[r]);
    }
  }
};

// Probabilities as the A operand of products over keys.
template <class T, int BK>
__device__ __forceinline__ void pack_fragment(const float (&s)[BK / 2], uint32_t (&p)[BK / 4]) {
#pragma unroll
  for (int i = 0; i < BK / 4; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
}

}  // namespace mfa::cuda::hopper
