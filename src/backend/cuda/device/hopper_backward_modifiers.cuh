// hopper_backward_modifiers.cuh: softcap, ALiBi, bias, boolean mask and dropout in the backward. A fragment's rows are
// queries and its columns keys, or the transpose. As in the forward, each modifier is one pass behind one uniform
// branch.
//
//   u = cap tanh(scale q k / cap) + alibi + bias,  P = exp(u - lse) where seen,  Z = dropout factors
//   dS = P (Z dP - delta) (1 - tanh^2),  dV = (Z P)^T dO
#pragma once

#include "hopper_modifiers.cuh"

namespace mfa::cuda::hopper {

template <int BN, bool transposed>
struct GradientTile {
  const Problem& p;
  int b, h;          // of the queries
  int row, column;   // the lane's first
  int lane, offset;  // offset: pos(i) - i

  __device__ __forceinline__ int query(int r, int c) const { return transposed ? column + c : row + 8 * r; }
  __device__ __forceinline__ int key(int r, int c) const { return transposed ? row + 8 * r : column + c; }

  // Products x become base-2 scores; y takes the softcap's derivative.
  __device__ __forceinline__ void scores(float (&x)[BN / 2], float (&y)[BN / 2]) const {
    if (p.softcap > 0.f) {
      // tanh(x) = 1 - 2 u and its derivative is 4 u (1 - u), u = 1 / (1 + exp(2 x)).
      const float twice = p.scale_over_softcap * (2.f * log2_e), cap = p.softcap_log2;
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) {
        const float u = reciprocal_fast(1.f + exp2_fast(x[i] * twice));
        x[i] = fmaf(-2.f * cap, u, cap);
        y[i] *= fmaf(-4.f * u, u, 4.f * u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) x[i] *= p.scale_log2;
    }
    if (p.alibi_slopes) {
      const float slope = p.alibi_slopes[h] * log2_e, at = static_cast<float>(key(0, 0) - query(0, 0) - offset);
      each_score<BN>(x, [&](float& s, int r, int c) { s = fmaf(slope, at + (transposed ? 8 * r - c : c - 8 * r), s); });
    }
    if (p.bias.data) {
      if constexpr (!transposed) {
        BiasTile<BN> bias;
        bias.load(p, b, h, row, column - 2 * (lane % 4), lane);
        bias.add(x, p.bias.dtype);
      } else if (p.bias.dtype == Element::f32) {
        add_bias<float>(x);
      } else if (p.bias.dtype == Element::f16) {
        add_bias<__half>(x);
      } else {
        add_bias<__nv_bfloat16>(x);
      }
    }
  }

  // What the lane reads of a mask that can be read by words.
  struct MaskBits {
    uint32_t own[transposed ? 1 : 2];
  };
  __device__ __forceinline__ MaskBits mask_bits() const {
    if (!mask_has_words(p)) return {};
    if constexpr (transposed) {
      return {keys_bits()};
    } else {
      MaskTile<BN> mask;
      mask.load(p, b, h, row, column - 2 * (lane % 4), lane);
      return {mask.own_bits(0), mask.own_bits(1)};
    }
  }
  // Probabilities that the mask hides become zero.
  __device__ __forceinline__ void hide(float (&x)[BN / 2], const MaskBits& bits) const {
    if (!mask_has_words(p)) {
      each_score<BN>(x, [&](float& s, int r, int c) {
        if (query(r, c) >= p.Nq || key(r, c) >= p.Nk || !mask_shows(p, b, h, query(r, c), key(r, c))) s = 0.f;
      });
    } else if constexpr (transposed) {
      hide_by_bits(x, bits.own[0]);
    } else {
      MaskTile<BN>::apply(x, bits.own, 0.f, lane);
    }
  }

  // y takes the factors of dropout. Returns which elements were kept, if asked: bit i is element i.
  template <bool asked>
  __device__ __forceinline__ uint32_t drop(float (&y)[BN / 2]) const {
    static_assert(!asked || BN <= 64);
    uint32_t kept = 0;
    each_words([&](int i, const uint32_t (&word)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool keep = word[k] >= p.dropout_threshold;
        y[i + k] *= keep ? p.dropout_scale : 0.f;
        if (asked && keep) kept |= 1u << (i + k);
      }
    });
    return kept;
  }

  // The elements of `mark` that dropout drops get a sign.
  __device__ __forceinline__ void mark_dropped(float (&mark)[BN / 2]) const {
    each_words([&](int i, const uint32_t (&word)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (word[k] < p.dropout_threshold) mark[i + k] = -mark[i + k];
    });
  }

 private:
  // f(first element, its and the next three's words of Philox).
  template <class F>
  __device__ __forceinline__ void each_words(const F& f) const {
    const uint32_t row_head = b * p.Hq + h;
    if constexpr (!transposed) {
      each_dropout_words<BN>(p, row_head, row, column - 2 * (lane % 4), lane, f);
    } else {
      // Four lanes, 4 apart, need the words of the same four keys for two columns and two rows: each computes one call.
      const int mine = lane / 4 % 4;
      const uint32_t group = (row + 8 * (mine / 2)) >> 2, seed0 = p.dropout_seed[0], seed1 = p.dropout_seed[1];
#pragma unroll
      for (int i = 0; i < BN / 8; ++i) {
        const uint4 w = philox({group, static_cast<uint32_t>(column + 8 * i + mine % 2), row_head, 0u}, seed0, seed1);
        uint32_t word[4] = {w.x, w.y, w.z, w.w};
        transpose_quad<4>(word, lane);
        f(4 * i, word);
      }
    }
  }

  template <class B>
  __device__ __forceinline__ void add_bias(float (&x)[BN / 2]) const {
    const B* from = static_cast<const B*>(p.bias.data) + b * p.bias.stride[0] + h * p.bias.stride[1] +
                    query(0, 0) * p.bias.stride[2] + key(0, 0) * p.bias.stride[3];
    each_score<BN>(x, [&](float& s, int r, int c) {
      const bool inside = query(r, c) < p.Nq && key(r, c) < p.Nk;
      // A query past the last sees nothing, not even a NaN.
      const float bias = inside ? static_cast<float>(from[c * p.bias.stride[2] + 8 * r * p.bias.stride[3]]) : -INFINITY;
      s = with_bias(s, bias);
    });
  }

  // The 16 keys of a warp are one group of bytes of each query: lane l reads those of columns l and l + 32. Bit
  // 16 half + i: key i.
  __device__ __forceinline__ uint32_t keys_bits() const {
    static_assert(BN <= 64);
    const int key0 = row - lane / 4, column0 = column - 2 * (lane % 4);
    uint32_t own = 0;
#pragma unroll
    for (int half = 1; half >= 0; --half) {
      const int from = 32 * half + lane;
      const bool inside = from < BN && column0 + from < p.Nq && key0 < p.Nk;
      const uint8_t* at =
          p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1] + (column0 + from) * p.mask.stride[2] + key0;
      own = append_bits(inside ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{0, 0, 0, 0}, own);
    }
    return own;
  }
  __device__ __forceinline__ void hide_by_bits(float (&x)[BN / 2], uint32_t own) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t bits = __shfl_sync(0xffffffffu, own, 8 * i + 2 * (lane % 4) + e) >> lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (i + 4 * half < BN / 8 && !(bits & 1u << (16 * half + 8 * r))) x[4 * (i + 4 * half) + 2 * r + e] = 0.f;
      }
  }
};

// Drops the elements of x whose mark is negative and scales the others. Dropped NaN stays NaN.
template <int BN>
__device__ __forceinline__ void drop_marked(float (&x)[BN / 2], const float (&mark)[BN / 2], float scale) {
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) x[i] *= __float_as_int(mark[i]) < 0 ? 0.f : scale;
}

// Probabilities as an operand, with the factors of dropout.
template <class T, int BN>
__device__ __forceinline__ void pack_kept(const float (&x)[BN / 2], uint32_t kept, float scale,
                                          uint32_t (&to)[BN / 4]) {
#pragma unroll
  for (int i = 0; i < BN / 4; ++i)
    to[i] =
        pack<T>(x[2 * i] * (kept >> 2 * i & 1 ? scale : 0.f), x[2 * i + 1] * (kept >> (2 * i + 1) & 1 ? scale : 0.f));
}

}  // namespace mfa::cuda::hopper
