// forward_decode.cuh: attention of few query rows over many keys, at the speed of memory: the query heads of a KV head
// are the rows of one 16-row product, each warp streams its own tiles of 16 keys through a ring in shared memory and
// keeps its own softmax, and nothing waits for another warp before the end. Sixteen-bit types.
#pragma once

#include "backend/cuda/device/scores.cuh"
#include "backend/cuda/tiles.h"

namespace mfa::cuda {

template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
}

// A warp's copies of tiles of 16 rows, DP columns wide, that lie `step` elements apart.
template <typename T, int DP>
struct TileStream {
  static constexpr int kLanes = DP / kVector<T> < 32 ? DP / kVector<T> : 32;  // of a row
  static constexpr int kRowsAtOnce = 32 / kLanes, kCopies = DecodeTile::kKeys / kRowsAtOnce;
  static_assert(kLanes * kVector<T> == DP);
  const T* from;  // of this lane, in tile 0
  int64_t step, row_step;
  int to;  // of this lane, in a tile in shared memory
  bool inside;

  __device__ __forceinline__ TileStream(const Rows<T>& rows, int first, int stride, int D, int lane) {
    const int row = lane / kLanes, column = lane % kLanes * kVector<T>;
    inside = column < D;
    from = rows.at(first + row) + column;
    row_step = kRowsAtOnce * rows.row_stride;
    step = stride * rows.row_stride;
    to = row * kPitch<T, DP> + column;
  }
  __device__ __forceinline__ void load(T* tile, int n) const {
    if (!inside) return;
    const T* source = from + n * step;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_async(tile + to + i * kRowsAtOnce * kPitch<T, DP>, source + i * row_step, true);
  }
};

// Grid: x = B * Hkv, z = splits of the keys.
template <typename T, const DecodeTile& Tile>
__device__ __forceinline__ void forward_decode(const ForwardParams& f) {
  constexpr int DP = Tile.DP, kStages = Tile.stages, kWarps = Tile.warps, kRows = Tile.kRows, kKeys = Tile.kKeys;
  constexpr int pitch = kPitch<T, DP>, ON = DP / 8;
  extern __shared__ __align__(16) char shared[];
  T* const q_tile = reinterpret_cast<T*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  T* const ring = q_tile + kRows * pitch + warp * kStages * 2 * kKeys * pitch;

  const Problem& p = f.p;
  const int row_count = p.G * p.Nq, b = blockIdx.x / p.Hkv, hkv = blockIdx.x - b * p.Hkv;
  const Visibility seen(p, b);
  const int split_begin = blockIdx.z * f.split_keys;
  const int k_begin = max(seen.begin(0), split_begin) / kKeys * kKeys;
  int k_end = seen.end(p.Nq - 1);
  if (f.splits > 1) k_end = min(k_end, split_begin + f.split_keys);
  const int tiles = max(0, (k_end - k_begin + kKeys - 1) / kKeys);
  const int mine = (tiles - warp + kWarps - 1) / kWarps;  // tiles warp, warp + kWarps, ...

  const Rows<T> q = rows_of<T>(p.q, b, hkv, p.G), k = rows_of<T>(p.k, b, hkv, 1), v = rows_of<T>(p.v, b, hkv, 1);
  const bool k_vector = k.is_vector(p.D), v_vector = v.is_vector(p.Dv);
  const BlockRows<1> rows(b, hkv * p.G, 0, p.G, row_count);
  const int first_key = k_begin + warp * kKeys;
  const TileStream<T, DP> k_stream(k, first_key, kWarps * kKeys, p.D, lane);
  const TileStream<T, DP> v_stream(v, first_key, kWarps * kKeys, p.Dv, lane);

  auto key_of = [&](int n) { return first_key + n * kWarps * kKeys; };
  auto load = [&](int n) {
    if (n < mine) {
      T* const k_tile = ring + n % kStages * 2 * kKeys * pitch;
      T* const v_tile = k_tile + kKeys * pitch;
      const bool whole = key_of(n) + kKeys <= seen.keys;
      if (whole && k_vector)
        k_stream.load(k_tile, n);
      else
        load_rows<kKeys, DP, 32>(k_tile, k, key_of(n), seen.keys, p.D, k_vector, lane);
      if (whole && v_vector)
        v_stream.load(v_tile, n);
      else
        load_rows<kKeys, DP, 32>(v_tile, v, key_of(n), seen.keys, p.Dv, v_vector, lane);
    }
    commit_copies();
  };

  // Narrower heads are multiplied at full width: the columns behind them stay zero.
  if (p.D < DP || p.Dv < DP) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(shared);
    for (int n = threadIdx.x; n < Tile.shared_bytes(sizeof(T)) / 4; n += Tile.threads()) words[n] = 0;
    __syncthreads();
  }
  float o[1][ON][4], m[2], l[2];
  bool contain = false, hides = p.bias.data != nullptr;
  for (int n = 0; n < kStages - 1; ++n) load(n);
  load_rows<kRows, DP, Tile.threads()>(q_tile, q, 0, row_count, p.D, q.is_vector(p.D));
  drain_copies();
  __syncthreads();
  constexpr bool kKeepQueries = DP <= 128;  // in registers
  uint32_t queries[kKeepQueries ? DP / 16 : 1][4];
  auto load_queries = [&](uint32_t (&to)[4], int kk) {
    load_matrices(to, q_tile + lane % 16 * pitch + 16 * kk + lane / 16 * 8);
  };
  if constexpr (kKeepQueries) {
#pragma unroll
    for (int kk = 0; kk < DP / 16; ++kk) load_queries(queries[kk], kk);
  }
  while (true) {
    clear(o);
    m[0] = m[1] = -infinity();
    l[0] = l[1] = 0.f;
    for (int n = 0; n < mine; ++n) {
      wait_copies<kStages - 2>();
      __syncwarp();
      load(n + kStages - 1);  // into the slot that the last turn has read
      T* const k_tile = ring + n % kStages * 2 * kKeys * pitch;
      T* const v_tile = k_tile + kKeys * pitch;
      const int k0 = key_of(n), j0 = k0 + 2 * t;
      // Two sums, of even and of odd steps: a product waits for the one before it.
      float s[1][2][4], odd[2][4];
      clear(s);
#pragma unroll
      for (int e = 0; e < 8; ++e) odd[e / 4][e % 4] = 0.f;
#pragma unroll
      for (int kk = 0; kk < DP / 16; ++kk) {
        uint32_t keys[4];
        load_matrices(keys, k_tile + (lane % 8 + lane / 16 * 8) * pitch + 16 * kk + lane / 8 % 2 * 8);
        if constexpr (!kKeepQueries) load_queries(queries[0], kk);
        float (&sums)[2][4] = kk % 2 ? odd : s[0];
        multiply_add<T>(sums[0], queries[kKeepQueries ? kk : 0], keys[0], keys[1]);
        multiply_add<T>(sums[1], queries[kKeepQueries ? kk : 0], keys[2], keys[3]);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) s[0][e / 4][e % 4] += odd[e / 4][e % 4];
      scale_scores<T>(p, s, nullptr);
      add_terms(p, seen, s, rows, j0);
      const bool partial = p.mask.data || seen.begin(p.Nq - 1) > k0 || seen.end(0) < k0 + kKeys;
      if (partial) {
        hides = true;
        uint32_t visible[2];
        visible_bits<1, 2>(seen, rows, j0, visible);
        if (p.mask.data) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int r = e / 2 % 2, bit = e / 4 * 2 + e % 2;
            if (!(visible[r] >> bit & 1)) continue;
            if (!p.mask.data[b * p.mask.stride[0] + rows.h[r] * p.mask.stride[1] + rows.i[r] * p.mask.stride[2] +
                             (j0 + e / 4 * 8 + e % 2) * p.mask.stride[3]])
              visible[r] &= ~(1u << bit);
          }
        }
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (!(visible[e / 2 % 2] >> (e / 4 * 2 + e % 2) & 1)) s[0][e / 4][e % 4] = -infinity();
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float next = fmaxf(fmaxf(s[0][0][2 * r], s[0][0][2 * r + 1]), fmaxf(s[0][1][2 * r], s[0][1][2 * r + 1]));
        next = fmaxf(next, __shfl_xor_sync(~0u, next, 1));
        next = fmaxf(m[r], fmaxf(next, __shfl_xor_sync(~0u, next, 2)));
        const float shift = next == -infinity() ? 0.f : next;
        const float alpha = exp2_of<T>(m[r] - shift);
        m[r] = next;
        float sum = 0.f;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = s[0][e / 2][2 * r + e % 2];
          x = exp2_of<T>(x - shift);
          sum += x;
        }
        l[r] = l[r] * alpha + sum;
        if (__any_sync(~0u, alpha != 1.f)) {
#pragma unroll
          for (int ni = 0; ni < ON; ++ni) o[0][ni][2 * r] *= alpha, o[0][ni][2 * r + 1] *= alpha;
        }
      }
      if (p.dropout_seed) {
        uint32_t kept[2];
        kept_bits<1, 2>(p, rows, j0, kept);
        drop(p, kept, s);
      }
      if (contain && (partial || p.bias.data)) {
        // As multiply_hiding(). The weights of a row are spread over the lanes of a quad.
#pragma unroll 1
        for (int key = 0; key < kKeys; ++key) {
          float x[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float first = key < 8 ? s[0][0][2 * r] : s[0][1][2 * r];
            const float second = key < 8 ? s[0][0][2 * r + 1] : s[0][1][2 * r + 1];
            x[r] = __shfl_sync(~0u, to_float(from_float<T>(key % 2 ? second : first)), key % 8 / 2, 4);
          }
#pragma unroll
          for (int ni = 0; ni < ON; ++ni) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float z = to_float(v_tile[key * pitch + 8 * ni + 2 * t + c]);
              if (is_finite(z)) continue;
#pragma unroll
              for (int r = 0; r < 2; ++r)
                if (x[r] != 0.f) o[0][ni][2 * r + c] += x[r] * z;
            }
          }
        }
        __syncwarp();
        clear_nonfinite<kKeys, DP, 32>(v_tile, p.Dv, lane);
        __syncwarp();
      }
      // The accumulators of S have the layout of the left operand.
      const uint32_t weights[4] = {pack<T>(s[0][0][0], s[0][0][1]), pack<T>(s[0][0][2], s[0][0][3]),
                                   pack<T>(s[0][1][0], s[0][1][1]), pack<T>(s[0][1][2], s[0][1][3])};
#pragma unroll
      for (int ni = 0; ni < ON; ni += 2) {
        uint32_t values[4];
        load_matrices_transposed(values, v_tile + lane % 16 * pitch + 8 * ni + lane / 16 * 8);
        multiply_add<T>(o[0][ni], weights, values[0], values[1]);
        multiply_add<T>(o[0][ni + 1], weights, values[2], values[3]);
      }
      __syncwarp();
    }
    if (contain || !hides || !__any_sync(~0u, any_nonfinite(o))) break;
    contain = true;
    drain_copies();
    __syncwarp();
    for (int n = 0; n < kStages - 1; ++n) load(n);
  }
  drain_copies();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    l[r] += __shfl_xor_sync(~0u, l[r], 1);
    l[r] += __shfl_xor_sync(~0u, l[r], 2);
  }

  // Merge the warps, in their order: o [warps][rows][DP + 4], m and l [warps][rows].
  constexpr int o_pitch = DP + 4;
  __syncthreads();
  float* const all_o = reinterpret_cast<float*>(q_tile + kRows * pitch);
  float* const all_m = all_o + kWarps * kRows * o_pitch;
  float* const all_l = all_m + kWarps * kRows;
  static_assert((kWarps * kRows * (o_pitch + 2)) * sizeof(float) <= sizeof(T) * kWarps * kStages * 2 * kKeys * pitch);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * kRows + 8 * r + g;
    if (t == 0) all_m[row] = m[r], all_l[row] = l[r];
#pragma unroll
    for (int ni = 0; ni < ON; ++ni)
      store_pair(all_o + row * o_pitch + 8 * ni + 2 * t, o[0][ni][2 * r], o[0][ni][2 * r + 1]);
  }
  __syncthreads();
  for (int row = warp; row < row_count; row += kWarps) {
    const int i = row / p.G, h = hkv * p.G + row % p.G;
    const float sink = p.sinks && f.splits == 1 ? p.sinks[h] * kLog2e : -infinity();
    float top = sink, weights[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, all_m[w * kRows + row]);
    const float shift = top == -infinity() ? 0.f : top;
    float total = exp2f(sink - shift);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      weights[w] = exp2f(all_m[w * kRows + row] - shift);
      total = fmaf(weights[w], all_l[w * kRows + row], total);
    }
    const float scale = total == 0.f ? 0.f : 1.f / total;
    const float lse2 = total == 0.f ? -infinity() : shift + log2f(total);
    const int64_t to_row = (int64_t(b) * p.Hq + h) * p.Nq + i;
    const int64_t part = int64_t(blockIdx.z) * p.B * p.Hq * p.Nq + to_row;
    if (lane == 0) {
      if (f.splits > 1)
        f.lse_part[part] = lse2;
      else if (f.lse)
        f.lse[to_row] = f.lse_base2 ? lse2 : lse2 * kLn2;
    }
    T* const to = static_cast<T*>(f.o.data) + b * f.o.stride[0] + h * f.o.stride[1] + i * f.o.stride[2];
    for (int d = lane; d < p.Dv; d += 32) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum = fmaf(weights[w], all_o[(w * kRows + row) * o_pitch + d], sum);
      if (f.splits > 1)
        f.o_part[part * p.Dv + d] = sum * scale;
      else
        to[d] = from_float<T>(sum * scale);
    }
  }
}

}  // namespace mfa::cuda
