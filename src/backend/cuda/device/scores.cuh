// scores.cuh: from products q . k to scores in base-2 units, for a warp's block of a score tile. docs/semantics.md.
#pragma once

#include <type_traits>

#include "backend/cuda/device/tile.cuh"

namespace mfa::cuda {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.693147180559945309417f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- visibility -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ int key_count(const Problem& p, int b) {
  return p.kv_lengths ? min(max(p.kv_lengths[b], 0), p.Nk) : p.Nk;
}

// The keys that query i may see are begin(i) <= j < end(i); both grow with i. The mask cuts further inside.
struct Visibility {
  int keys;    // of the batch entry
  int offset;  // pos(i) - i
  int reach;   // keys past pos(i) that are visible, or a number past all
  int left;    // keys before pos(i), likewise

  __device__ __forceinline__ Visibility(const Problem& p, int b) : keys(key_count(p, b)), offset(max(0, keys - p.Nq)) {
    const int open = p.Nq + p.Nk;  // further than any key from any position
    reach = p.window_right >= 0 ? p.window_right : open;
    left = p.window_left >= 0 ? p.window_left : open;
  }
  __device__ __forceinline__ int begin(int i) const { return max(0, i + offset - left); }
  __device__ __forceinline__ int end(int i) const {
    return static_cast<int>(min(static_cast<int64_t>(keys), static_cast<int64_t>(i) + offset + reach + 1));
  }
  // The first query that sees key j or a later one, and one past the last that sees key j or an earlier one.
  __device__ __forceinline__ int first_query(int j) const {
    return static_cast<int>(max(static_cast<int64_t>(0), static_cast<int64_t>(j) - offset - reach));
  }
  __device__ __forceinline__ int end_query(int j, int Nq) const {
    return static_cast<int>(min(static_cast<int64_t>(Nq), static_cast<int64_t>(j) - offset + left + 1));
  }
};

// ---- dropout --------------------------------------------------------------------------------------------------------

// Philox4x32-10, as common/philox.h.
__device__ __forceinline__ uint4 philox(uint4 counter, uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a_low = 0xD2511F53u * counter.x, a_high = __umulhi(0xD2511F53u, counter.x);
    const uint32_t b_low = 0xCD9E8D57u * counter.z, b_high = __umulhi(0xCD9E8D57u, counter.z);
    counter = {b_high ^ counter.y ^ k0, b_low, a_high ^ counter.w ^ k1, a_low};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// ---- a warp's block -------------------------------------------------------------------------------------------------

// Where the rows of a warp's block lie: row n of the thread (n = 2 mi + e) is query i[n] of head h[n], if it is real.
template <int MI>
struct BlockRows {
  int b;
  int i[2 * MI], h[2 * MI];
  bool real[2 * MI];

  // `r0`: the packed row of the warp's first; heads first_head + r % G.
  __device__ __forceinline__ BlockRows(int batch, int first_head, int r0, int G, int rows) : b(batch) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n) {
      const int r = r0 + 8 * n + g;
      real[n] = r < rows;
      i[n] = G == 1 ? r : r / G;
      h[n] = first_head + (G == 1 ? 0 : r - i[n] * G);
    }
  }
};

// tanh with float32's accuracy where T has it, else with an error far below T's.
template <typename T>
__device__ __forceinline__ float tanh_of(float x) {
  if constexpr (sizeof(T) == 4) {
    return tanhf(x);
  } else {
    return 1.f - __fdividef(2.f, 1.f + exp2f(2.f * kLog2e * x));
  }
}

// 2^x within an ulp, where exp2f() may be two off: a Taylor series of 2^f for f in [-1/2, 1/2], whose remainder is
// 5e-9.
__device__ __forceinline__ float exp2_accurate(float x) {
  x = x < -200.f ? -200.f : x > 200.f ? 200.f : x;  // NaN stays
  const float n = rintf(x), f = x - n;
  float y = 1.52527338e-5f;
  y = fmaf(y, f, 1.54035304e-4f);
  y = fmaf(y, f, 1.33335581e-3f);
  y = fmaf(y, f, 9.61812911e-3f);
  y = fmaf(y, f, 5.55041087e-2f);
  y = fmaf(y, f, 2.40226507e-1f);
  y = fmaf(y, f, 6.93147181e-1f);
  y = fmaf(y, f, 1.f);
  // In two steps, because 2^n may be subnormal or past the largest number where the result is not.
  const int half = static_cast<int>(n) / 2, rest = static_cast<int>(n) - half;
  return y * __int_as_float((half + 127) << 23) * __int_as_float((rest + 127) << 23);
}

// 2^x, by the special function unit where T's rounding hides its error and that it flushes subnormals.
template <typename T>
__device__ __forceinline__ float exp2_of(float x) {
  if constexpr (sizeof(T) == 4) {
    return exp2_accurate(x);
  } else {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
}

// 2^(s * factor - shift). Float32 rounds the product as the row's maximum was rounded, so that the largest weight is 1.
template <typename T>
__device__ __forceinline__ float weight_of(float s, float factor, float shift) {
  if constexpr (sizeof(T) == 4) {
    return exp2_of<T>(__fsub_rn(__fmul_rn(s, factor), shift));
  } else {
    return exp2_of<T>(fmaf(s, factor, -shift));
  }
}

// Whether scores can stay products until the exponential, exp2(scale_log2 * product - shift) in one rounding.
__device__ __forceinline__ bool defers_scale(const Problem& p) {
  return p.softcap == 0.f && !p.alibi_slopes && !p.bias.data && p.scale_log2 > 0.f;
}

// Products to scaled, capped scores; with `gradient`, that becomes the gradient with respect to the product's scale.
template <typename T, int MI, int NI>
__device__ __forceinline__ void scale_scores(const Problem& p, float (&s)[MI][NI][4],
                                             std::type_identity_t<float (*)[NI][4]> gradient) {
  if (p.softcap > 0.f) {
#pragma unroll
    for (int mi = 0; mi < MI; ++mi)
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float t = tanh_of<T>(s[mi][ni][e] * p.scale_over_softcap);
          s[mi][ni][e] = p.softcap_log2 * t;
          if (gradient) gradient[mi][ni][e] *= 1.f - t * t;
        }
  } else {
#pragma unroll
    for (int mi = 0; mi < MI; ++mi)
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mi][ni][e] *= p.scale_log2;
  }
}

// `keys`: those behind it have no bias to read.
template <typename E, int MI, int NI>
__device__ __forceinline__ void add_bias(const Problem& p, int keys, float (&s)[MI][NI][4], const BlockRows<MI>& rows,
                                         int j0) {
  const Bias& bias = p.bias;
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    const E* const row = static_cast<const E*>(bias.data) + rows.b * bias.stride[0] + rows.h[n] * bias.stride[1] +
                         rows.i[n] * bias.stride[2];
    const int end = rows.real[n] ? keys : 0;
    if (bias.stride[3] == 1 && reinterpret_cast<uintptr_t>(row) % (2 * sizeof(E)) == 0 && j0 + 8 * NI <= end) {
#pragma unroll
      for (int ni = 0; ni < NI; ++ni) {
        const float2 x = load_pair(row + j0 + 8 * ni);
        float (&to)[4] = s[n / 2][ni];
        to[2 * (n % 2)] = with_bias(to[2 * (n % 2)], x.x);
        to[2 * (n % 2) + 1] = with_bias(to[2 * (n % 2) + 1], x.y);
      }
    } else {
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = j0 + 8 * ni + c;
          float& to = s[n / 2][ni][2 * (n % 2) + c];
          if (j < end) to = with_bias(to, to_float(row[j * bias.stride[3]]));
        }
    }
  }
}

// Adds ALiBi and the bias. `j0`: the key of the thread's first column.
template <int MI, int NI>
__device__ __forceinline__ void add_terms(const Problem& p, const Visibility& seen, float (&s)[MI][NI][4],
                                          const BlockRows<MI>& rows, int j0) {
  if (p.alibi_slopes) {
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n) {
      const float slope = rows.real[n] ? p.alibi_slopes[rows.h[n]] * kLog2e : 0.f;
      const int distance = j0 - (rows.i[n] + seen.offset);
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          s[n / 2][ni][2 * (n % 2) + c] = fmaf(slope, float(distance + 8 * ni + c), s[n / 2][ni][2 * (n % 2) + c]);
    }
  }
  switch (p.bias.data ? p.bias.dtype : Element{-1}) {
    case Element::f32:
      return add_bias<float>(p, seen.keys, s, rows, j0);
    case Element::f16:
      return add_bias<f16>(p, seen.keys, s, rows, j0);
    case Element::bf16:
      return add_bias<bf16>(p, seen.keys, s, rows, j0);
  }
}

// The boolean mask of a tile of BQ packed rows and BK keys, as bits in shared memory: bit j of the row's bits.
template <int BQ, int BK>
struct MaskTile {
  static constexpr int kWords = BK / 16;
  uint16_t* bits;  // [BQ][kWords], in shared memory
  bool same_rows;  // all rows have those of row 0

  // Reads the tile; answers whether it shows any key. For all threads of the block: ends with a barrier.
  template <int THREADS>
  __device__ __forceinline__ bool load(const Problem& p, int b, int first_head, int G, int r0, int rows, int k0) {
    const Mask& mask = p.mask;
    const uint8_t* const data = mask.data + b * mask.stride[0] + first_head * mask.stride[1];
    same_rows = mask.stride[2] == 0 && (G == 1 || mask.stride[1] == 0);
    const int count = same_rows ? 1 : min(BQ, rows - r0);
    uint32_t any = 0;
    for (int n = threadIdx.x; n < count * kWords; n += THREADS) {
      const int r = r0 + n / kWords, j = k0 + n % kWords * 16, i = G == 1 ? r : r / G;
      const uint8_t* from = data + (r - i * G) * mask.stride[1] + i * mask.stride[2] + j * mask.stride[3];
      uint32_t word = 0;
      if (mask.stride[3] == 1 && j + 16 <= p.Nk && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const uint4 x = *reinterpret_cast<const uint4*>(from);
        word = four_bits(x.x) | four_bits(x.y) << 4 | four_bits(x.z) << 8 | four_bits(x.w) << 12;
      } else {
        for (int c = 0; c < 16 && j + c < p.Nk; ++c) word |= uint32_t(from[c * mask.stride[3]] != 0) << c;
      }
      bits[n] = uint16_t(word);
      any |= word;
    }
    return __syncthreads_or(any != 0);
  }
  // Bit b of the result: whether byte b of x is not 0.
  static __device__ __forceinline__ uint32_t four_bits(uint32_t x) {
    return ((__vcmpne4(x, 0) & 0x01010101u) * 0x01020408u >> 24) & 15u;  // each byte's bit to its place in byte 3
  }
  // The two bits from column `c`, which is even.
  __device__ __forceinline__ uint32_t pair(int row, int c) const {
    return bits[(same_rows ? 0 : row) * kWords + c / 16] >> c % 16 & 3u;
  }
};

// Bit (2 ni + c) of visible[n]: whether row n sees the thread's column c of block ni, by its range of keys. Unreal rows
// see nothing.
template <int MI, int NI>
__device__ __forceinline__ void visible_bits(const Visibility& seen, const BlockRows<MI>& rows, int j0,
                                             uint32_t (&visible)[2 * MI]) {
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    const int begin = seen.begin(rows.i[n]), end = rows.real[n] ? seen.end(rows.i[n]) : 0;
    visible[n] = 0;
#pragma unroll
    for (int ni = 0; ni < NI; ++ni)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = j0 + 8 * ni + c;
        visible[n] |= uint32_t(j >= begin && j < end) << (2 * ni + c);
      }
  }
}

// The mask's part of those bits. `row`, `column`: the thread's first in the tile.
template <int MI, int NI, int BQ, int BK>
__device__ __forceinline__ void mask_bits(const MaskTile<BQ, BK>& mask, int row, int column,
                                          uint32_t (&visible)[2 * MI]) {
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    uint32_t shown = 0;
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) shown |= mask.pair(row + 8 * n, column + 8 * ni) << (2 * ni);
    visible[n] &= shown;
  }
}

// Bit (2 ni + c) of kept[n]: whether dropout keeps that element. The loop over blocks stays one: unrolled, it would
// hold registers that the accumulators need.
template <int MI, int NI>
__device__ __forceinline__ void kept_bits(const Problem& p, const BlockRows<MI>& rows, int j0,
                                          uint32_t (&kept)[2 * MI]) {
  const uint32_t k0 = p.dropout_seed[0], k1 = p.dropout_seed[1];
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    kept[n] = 0;
#pragma unroll 1
    for (int ni = 0; ni < NI; ++ni) {
      const uint32_t j = j0 + 8 * ni;  // even: both columns are of one group of four keys
      const uint4 words =
          philox({j >> 2, uint32_t(rows.i[n]), uint32_t(rows.b) * p.Hq + uint32_t(rows.h[n]), 0u}, k0, k1);
      const uint32_t first = j & 2 ? words.z : words.x, second = j & 2 ? words.w : words.y;
      kept[n] |= uint32_t(first >= p.dropout_threshold) << (2 * ni);
      kept[n] |= uint32_t(second >= p.dropout_threshold) << (2 * ni + 1);
    }
  }
}

// Multiplies by the dropout factors that the bits stand for.
template <int MI, int NI>
__device__ __forceinline__ void drop(const Problem& p, const uint32_t (&kept)[2 * MI], float (&x)[MI][NI][4]) {
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n)
#pragma unroll
    for (int ni = 0; ni < NI; ++ni)
#pragma unroll
      for (int c = 0; c < 2; ++c) x[n / 2][ni][2 * (n % 2) + c] *= kept[n] >> (2 * ni + c) & 1 ? p.dropout_scale : 0.f;
}

}  // namespace mfa::cuda
