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
  int keys;      // of the batch entry
  int offset;    // pos(i) - i
  int reach;     // keys past pos(i) that are visible, or a number past all
  int left;      // keys before pos(i), likewise

  __device__ __forceinline__ Visibility(const Problem& p, int b)
      : keys(key_count(p, b)), offset(max(0, keys - p.Nq)) {
    const int open = p.Nq + p.Nk;  // further than any key from any position
    reach = p.window_right >= 0 ? min(p.window_right, open) : open;
    if (p.causal) reach = 0;
    left = p.window_left >= 0 ? min(p.window_left, open) : open;
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
  if (p.bias.data) {
    const Bias& bias = p.bias;
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n) {
      const int64_t row = rows.b * bias.stride[0] + rows.h[n] * bias.stride[1] + rows.i[n] * bias.stride[2];
#pragma unroll
      for (int ni = 0; ni < NI; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = j0 + 8 * ni + c;
          if (rows.real[n] && j < seen.keys)
            s[n / 2][ni][2 * (n % 2) + c] += kLog2e * load_element(bias.data, bias.dtype, row + j * bias.stride[3]);
        }
    }
  }
}

// Whether the mask shows any key of [k0, k0 + BK) to any of the packed rows [r0, r0 + BQ). For all threads of the block.
template <int BQ, int BK, int THREADS>
__device__ __forceinline__ bool mask_shows_any(const Problem& p, int b, int first_head, int G, int r0, int rows,
                                               int k0) {
  constexpr int kChunk = 16, kChunks = BK / kChunk;
  const Mask& mask = p.mask;
  const uint8_t* const data = mask.data + b * mask.stride[0] + first_head * mask.stride[1];
  const bool same_rows = mask.stride[2] == 0 && (G == 1 || mask.stride[1] == 0);
  const int end = same_rows ? min(r0 + 1, rows) : min(r0 + BQ, rows);
  uint32_t any = 0;
  for (int n = threadIdx.x; n < BQ * kChunks && !any; n += THREADS) {
    const int r = r0 + n / kChunks, j = k0 + n % kChunks * kChunk;
    if (r >= end) break;
    const int i = G == 1 ? r : r / G;
    const uint8_t* from = data + (r - i * G) * mask.stride[1] + i * mask.stride[2] + j * mask.stride[3];
    if (mask.stride[3] == 1 && j + kChunk <= p.Nk && reinterpret_cast<uintptr_t>(from) % kChunk == 0) {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      any = x.x | x.y | x.z | x.w;
    } else {
      for (int c = 0; c < kChunk && j + c < p.Nk; ++c) any |= from[c * mask.stride[3]];
    }
  }
  return __syncthreads_or(any != 0);
}

// Bit (2 ni + c) of visible[n]: whether row n sees the thread's column c of block ni. Unreal rows see nothing. Loops
// over blocks stay loops here and below: unrolled, they would hold registers that the accumulators need.
template <int MI, int NI>
__device__ __forceinline__ void visible_bits(const Problem& p, const Visibility& seen, const BlockRows<MI>& rows,
                                             int j0, uint32_t (&visible)[2 * MI]) {
#pragma unroll
  for (int n = 0; n < 2 * MI; ++n) {
    const int begin = seen.begin(rows.i[n]), end = rows.real[n] ? seen.end(rows.i[n]) : 0;
    const uint8_t* row = p.mask.data;
    if (row) row += rows.b * p.mask.stride[0] + rows.h[n] * p.mask.stride[1] + rows.i[n] * p.mask.stride[2];
    visible[n] = 0;
#pragma unroll 1
    for (int ni = 0; ni < NI; ++ni)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = j0 + 8 * ni + c;
        const bool in_range = j >= begin && j < end;
        visible[n] |= uint32_t(in_range && (!row || row[j * p.mask.stride[3]])) << (2 * ni + c);
      }
  }
}

// Bit (2 ni + c) of kept[n]: whether dropout keeps that element.
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
      for (int c = 0; c < 2; ++c)
        x[n / 2][ni][2 * (n % 2) + c] *= kept[n] >> (2 * ni + c) & 1 ? p.dropout_scale : 0.f;
}

}  // namespace mfa::cuda
