// hopper_modifiers.cuh: what changes single scores: softcap, ALiBi, bias, boolean mask; and dropout. Fragments are
// those of hopper_softmax.cuh.
#pragma once

#include "element.cuh"
#include "hopper_softmax.cuh"

namespace mfa::cuda::hopper {

// f(element, row, constant part of the column) on a lane's part of a fragment.
template <int BK, class F>
__device__ __forceinline__ void each_score(float (&s)[BK / 2], const F& f) {
#pragma unroll
  for (int i = 0; i < BK / 8; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(s[4 * i + 2 * r + e], r, 8 * i + e);
}

// Shifts `bits` up by 16 and puts there whether bytes are not zero, byte 0 lowest.
__device__ __forceinline__ uint32_t append_bits(const uint4& bytes, uint32_t bits) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    // The top bit of each byte that is not zero; the product gathers the four at the top.
    const uint32_t set = (((words[i] & 0x7f7f7f7fu) + 0x7f7f7f7fu) | words[i]) & 0x80808080u;
    bits = __funnelshift_l(set * 0x00204081u, bits, 4);
  }
  return bits;
}

// Whether the mask can be read by 16 keys at a time.
__device__ __forceinline__ bool mask_has_words(const Problem& p) {
  const uint64_t at = reinterpret_cast<uint64_t>(p.mask.data) | p.mask.stride[0] | p.mask.stride[1] | p.mask.stride[2];
  return p.mask.stride[3] == 1 && (at | p.Nk) % 16 == 0;
}
__device__ __forceinline__ bool mask_shows(const Problem& p, int b, int h, int query, int key) {
  return p.mask.data[b * p.mask.stride[0] + h * p.mask.stride[1] + query * p.mask.stride[2] + key * p.mask.stride[3]];
}

// Which keys of a tile a boolean mask lets the lane's two rows see. The mask's bytes are read in place: a quad shares
// its rows' bytes, a lane reads every fourth group of 16, and shares them as bits. Needs groups of 16 bytes that are
// aligned and do not straddle the row end.
template <int BK>
struct MaskTile {
  static constexpr int groups = BK / 16;
  static_assert(BK % 16 == 0 && groups <= 8);
  uint4 bytes[2][2];

  __device__ __forceinline__ void load(const Problem& p, int b, int h, int query, int k0, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* row =
          p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1] + (query + 8 * r) * p.mask.stride[2] + k0;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int group = lane % 4 + 4 * s;
        const bool inside = query + 8 * r < p.Nq && group < groups && k0 + 16 * group < p.Nk;
        bytes[r][s] = inside ? __ldg(reinterpret_cast<const uint4*>(row + 16 * group)) : uint4{0, 0, 0, 0};
      }
    }
  }
  // Of a row, bit 16 g + i: byte i of group g.
  __device__ __forceinline__ uint32_t own_bits(int r) const {
    return append_bits(bytes[r][0], append_bits(bytes[r][1], 0));
  }
  __device__ __forceinline__ void apply(float (&s)[BK / 2], int lane) const {
    apply(s, {own_bits(0), own_bits(1)}, -INFINITY, lane);
  }
  // What is not seen becomes `hidden`.
  static __device__ __forceinline__ void apply(float (&s)[BK / 2], const uint32_t (&own)[2], float hidden, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t bits = 0;  // of this lane's columns: bit 8 from + 4 g + 2 (i % 2) + e, i = 2 (from + 4 g) + i % 2
#pragma unroll
      for (int from = 3; from >= 0; --from) {
        const uint32_t pairs = __shfl_sync(0xffffffffu, own[r], from, 4) >> 2 * (lane % 4) & 0x03030303u;
        bits = __funnelshift_l(pairs * 0x01041040u, bits, 8);
      }
#pragma unroll
      for (int i = 0; i < BK / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int bit = i / 2 % 4 * 8 + i / 8 * 4 + i % 2 * 2 + e;
          if (!(bits & 1u << bit)) s[4 * i + 2 * r + e] = hidden;
        }
    }
  }
};

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

// Whether the bias takes the key from the row, whatever its score.
__device__ __forceinline__ bool bias_hides(const Problem& p, int b, int h, int query, int key) {
  if (!p.bias.data) return false;
  const int64_t at = b * p.bias.stride[0] + h * p.bias.stride[1] + query * p.bias.stride[2] + key * p.bias.stride[3];
  return (p.bias.dtype == Element::f32 ? static_cast<const float*>(p.bias.data)[at]
          : p.bias.dtype == Element::f16
              ? static_cast<float>(static_cast<const __half*>(p.bias.data)[at])
              : static_cast<float>(static_cast<const __nv_bfloat16*>(p.bias.data)[at])) == -INFINITY;
}

// The bias of a tile, read while the products that it is added to are computed. Columns of a lane come in pairs.
template <int BK>
struct BiasTile {
  uint2 pairs[BK / 8][2];  // as float32, or in x as two 16-bit elements

  __device__ __forceinline__ void load(const Problem& p, int b, int h, int query, int k0, int lane) {
    if (p.bias.dtype == Element::f32)
      load_as<uint32_t>(p, b, h, query, k0, lane);
    else
      load_as<uint16_t>(p, b, h, query, k0, lane);
  }
  // base-2 scores s += bias
  __device__ __forceinline__ void add(float (&s)[BK / 2], Element dtype) const {
    if (dtype == Element::f32)
      add_as(s, [](uint2 x) { return float2{__uint_as_float(x.x), __uint_as_float(x.y)}; });
    else if (dtype == Element::f16)
      add_as(s, [](uint2 x) { return __half22float2(*reinterpret_cast<const __half2*>(&x.x)); });
    else
      add_as(s, [](uint2 x) { return float2{__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u)}; });
  }

 private:
  // Reads stay inside the bias: rows past the last repeat it, keys past the last count as zero.
  template <class B>
  __device__ __forceinline__ void load_as(const Problem& p, int b, int h, int query, int k0, int lane) {
    constexpr bool wide = sizeof(B) == 4;
    const int64_t step = p.bias.stride[3];
    const int column = k0 + 2 * (lane % 4);
    const B* row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      row[r] = static_cast<const B*>(p.bias.data) + b * p.bias.stride[0] + h * p.bias.stride[1] +
               min(query + 8 * r, p.Nq - 1) * p.bias.stride[2] + column * step;
    const uint64_t low_bits = reinterpret_cast<uint64_t>(row[0]) | reinterpret_cast<uint64_t>(row[1]);
    const bool together = step == 1 && k0 + BK <= p.Nk && low_bits % (2 * sizeof(B)) == 0;
    if (__all_sync(0xffffffffu, together)) {
#pragma unroll
      for (int i = 0; i < BK / 8; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if constexpr (wide)
            pairs[i][r] = __ldg(reinterpret_cast<const uint2*>(row[r] + 8 * i));
          else
            pairs[i][r].x = __ldg(reinterpret_cast<const uint32_t*>(row[r] + 8 * i));
    } else {
#pragma unroll
      for (int i = 0; i < BK / 8; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t x = column + 8 * i < p.Nk ? row[r][8 * i * step] : 0;
          const uint32_t y = column + 8 * i + 1 < p.Nk ? row[r][(8 * i + 1) * step] : 0;
          if constexpr (wide)
            pairs[i][r] = {x, y};
          else
            pairs[i][r].x = x | y << 16;
        }
    }
  }
  template <class Convert>
  __device__ __forceinline__ void add_as(float (&s)[BK / 2], const Convert& convert) const {
#pragma unroll
    for (int i = 0; i < BK / 8; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 x = convert(pairs[i][r]);
        s[4 * i + 2 * r] = with_bias(s[4 * i + 2 * r], x.x);
        s[4 * i + 2 * r + 1] = with_bias(s[4 * i + 2 * r + 1], x.y);
      }
  }
};

// The modifiers of scores of one head's tile, in the order of the formula. Each is one pass over the fragment behind
// one uniform branch, so that absent ones cost nothing.
template <int BK>
struct ScoreTile {
  const Problem& p;
  int b, h, query, k0, lane;  // query: the lane's first row
  int offset;                 // pos(i) - i

  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }

  // Products of q and k become base-2 scores.
  __device__ __forceinline__ void scale(float (&s)[BK / 2]) const {
    if (p.softcap > 0.f) {
      // tanh(x) = 1 - 2 / (1 + exp(2 x)): its error is absolute, a few units of the last place of the cap.
      const float twice = p.scale_over_softcap * (2.f * log2_e), cap = p.softcap_log2;
      each_score<BK>(
          s, [&](float& x, int, int) { x = fmaf(-2.f * cap, reciprocal_fast(1.f + exp2_fast(x * twice)), cap); });
    } else {
      each_score<BK>(s, [&](float& x, int, int) { x *= p.scale_log2; });
    }
  }
  __device__ __forceinline__ void alibi(float (&s)[BK / 2]) const {
    const float slope = p.alibi_slopes[h] * log2_e;
    const float at[2] = {static_cast<float>(k0 + column() - query - offset),
                         static_cast<float>(k0 + column() - query - 8 - offset)};
    each_score<BK>(s, [&](float& x, int r, int c) { x = fmaf(slope, at[r] + c, x); });
  }

  __device__ __forceinline__ void mask(float (&s)[BK / 2]) const {
    if (mask_has_words(p)) {
      MaskTile<BK> tile;
      tile.load(p, b, h, query, k0, lane);
      tile.apply(s, lane);
    } else {
      each_score<BK>(s, [&](float& x, int r, int c) {
        const int key = k0 + column() + c;
        if (key >= p.Nk || query + 8 * r >= p.Nq || !mask_shows(p, b, h, query + 8 * r, key)) x = -INFINITY;
      });
    }
  }

  // `rows` gives the keys that rows see; not asked for where the tile is seen in full.
  template <class Rows>
  __device__ __forceinline__ void apply(float (&s)[BK / 2], const BiasTile<BK>& bias, bool full,
                                        const Rows& rows) const {
    scale(s);
    if (p.alibi_slopes) alibi(s);
    if (p.bias.data) bias.add(s, p.bias.dtype);
    if (p.mask.data) mask(s);
    if (!full) mask_scores<BK>(s, rows(), k0, lane);
  }
};

// f(first element, its and the next three's words of Philox). A call serves four keys, so lanes of a quad pair up: the
// even one computes row 0's words for both, the odd one row 1's.
template <int BK, class F>
__device__ __forceinline__ void each_dropout_words(const Problem& p, uint32_t row_head, int query, int k0, int lane,
                                                   const F& f) {
  const uint32_t seed0 = p.dropout_seed[0], seed1 = p.dropout_seed[1];
  const bool odd = lane & 1;
#pragma unroll
  for (int i = 0; i < BK / 8; ++i) {
    const uint32_t group = (k0 + 8 * i + 2 * (lane % 4)) >> 2;
    const uint4 w = philox({group, static_cast<uint32_t>(odd ? query + 8 : query), row_head, 0u}, seed0, seed1);
    // Row 0 needs from the even lane: x, y for itself and z, w for the odd lane; row 1 the same from the odd lane.
    const uint32_t got0 = __shfl_xor_sync(0xffffffffu, odd ? w.x : w.z, 1);
    const uint32_t got1 = __shfl_xor_sync(0xffffffffu, odd ? w.y : w.w, 1);
    const uint32_t word[4] = {odd ? got0 : w.x, odd ? got1 : w.y, odd ? w.z : got0, odd ? w.w : got1};
    f(4 * i, word);
  }
}

// Zeroes dropped probabilities and scales the kept.
template <int BK>
__device__ __forceinline__ void drop(float (&s)[BK / 2], const Problem& p, uint32_t row_head, int query, int k0,
                                     int lane) {
  each_dropout_words<BK>(p, row_head, query, k0, lane, [&](int i, const uint32_t (&word)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) s[i + k] = word[k] >= p.dropout_threshold ? s[i + k] * p.dropout_scale : 0.f;
  });
}

}  // namespace mfa::cuda::hopper
