// hopper_backward.cuh: gradients of q, k and v for 16-bit inputs. Two kernels, no atomics, the same bits every time: one
// keeps queries and walks keys (dq), one keeps keys and walks queries (dk, dv). Both recompute P = exp2(S - lse).
//
//   S = Q K^T,  dP = dO V^T,  dS = P (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO
//
// The same main loop serves both: a warpgroup keeps 64 rows of the stationary pair (Q, dO) or (K, V) and multiplies them by
// tiles of the passing pair (K, V) or (Q, dO), so the dk, dv kernel works on transposed tiles. P and dS stay in registers
// as operands. Products are queued in order: those of the next tile follow while exponents of this one are computed.
// Source: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.
//
// As in the forward, passing tiles that are not seen in full are cleaned of NaN and infinity first, because their zero
// weights would not keep those out of the sums. Rows that do see such a key have a NaN lse, and so get their NaN.
#pragma once

#include "hopper_softmax.cuh"

namespace mfa::cuda::hopper {

enum class Gradient { dq, dkv, dk, dv };

template <class T_, Gradient gradient_, int choice>
struct BackwardTile {
  using T = T_;
  static constexpr Gradient gradient = gradient_;
  static constexpr bool keeps_queries = gradient == Gradient::dq;
  static constexpr bool first = gradient != Gradient::dv;                              // sums dS times the first of the pair
  static constexpr bool second = gradient == Gradient::dkv || gradient == Gradient::dv;  // P times the second
  static constexpr TileChoice c = keeps_queries ? dq_tiles[choice] : dkv_tiles[choice];
  static constexpr int columns = c.columns, consumers = c.consumers, rows = 64 * consumers, BN = c.tile,
                       stages = c.stages, chunks = chunks_of(columns);
  static constexpr BackwardLayout layout = backward_layout(c);
  static constexpr int threads = layout.threads;
  static constexpr int feeder_registers = consumers == 3 ? 32 : 24, consumer_registers = consumers == 3 ? 160 : 240;
  // Barriers, in order.
  static constexpr int work_full = 0, work_empty = 2, stay_full = 4, stay_empty = stay_full + consumers,
                       first_full = stay_empty + consumers, second_full = first_full + stages,
                       first_empty = second_full + stages, second_empty = first_empty + stages,
                       clean = second_empty + stages, barriers = clean + stages;
  static_assert(barriers == backward_barriers(c));
};

template <class Tile>
struct BackwardShared {
  unsigned char* base;  // aligned to 1024 bytes
  uint32_t at;

  __device__ __forceinline__ explicit BackwardShared(unsigned char* raw) {
    at = (shared_address(raw) + 1023) & ~1023u;
    base = raw + (at - shared_address(raw));
  }
  __device__ __forceinline__ uint32_t barrier(int i) const { return at + Tile::layout.barriers_at + i * 8; }
  __device__ __forceinline__ uint32_t stay(int which, int warpgroup) const {
    return at + (which * Tile::consumers + warpgroup) * Tile::layout.stay_bytes;
  }
  __device__ __forceinline__ uint32_t first(int stage) const {
    return at + Tile::layout.first_at + stage * Tile::layout.pass_bytes;
  }
  __device__ __forceinline__ uint32_t second(int stage) const {
    return at + Tile::layout.second_at + stage * Tile::layout.pass_bytes;
  }
  // Base-2 lse, then delta, of the passing queries.
  __device__ __forceinline__ int rows_at(int stage) const { return Tile::layout.rows_at + stage * Tile::BN * 8; }
  __device__ __forceinline__ const float* row_lse(int stage) const {
    return reinterpret_cast<const float*>(base + rows_at(stage));
  }
  __device__ __forceinline__ const float* row_delta(int stage) const { return row_lse(stage) + Tile::BN; }
  __device__ __forceinline__ volatile Work* work(int slot) const {
    return reinterpret_cast<volatile Work*>(base + Tile::layout.work_at) + slot;
  }
};

// For dk and dv the passing tiles are repeated for each query head of the group.
template <class Tile>
__device__ __forceinline__ Work backward_work(const Problem& p, const HopperSchedule& s, int id) {
  if (id >= s.tiles) return {-1};
  const int heads = Tile::keeps_queries ? p.Hq : p.Hkv;
  const WorkItem item = work_item(s, p.B * heads, heads, id);
  Work w{item.b, item.h, item.tile * Tile::rows};
  w.see = visibility(p, w.b);
  if constexpr (Tile::keeps_queries)
    w.tiles = key_tiles<Tile::BN>(w.see, w.row0, min(w.row0 + Tile::rows, p.Nq));
  else
    w.tiles = query_tiles<Tile::BN>(w.see, p.Nq, w.row0, Tile::rows);
  w.passes = w.tiles.last == w.tiles.first ? 0 : Tile::keeps_queries ? 1 : p.G;
  return w;
}

struct BackwardMaps {
  const TensorMap *stay_first, *stay_second, *pass_first, *pass_second;
};

// The feeding warpgroup's first thread.
template <class Tile>
__device__ __forceinline__ void feed(const BackwardParams& params, const HopperSchedule& s,
                                     const BackwardShared<Tile>& shared, const BackwardMaps& maps) {
  const Problem& p = params.p;
  Ring<2> slot;
  Ring<1> stay;
  Ring<Tile::stages> ring;
  for (int id = blockIdx.x;; id = draw_tile(s)) {
    const Work w = backward_work<Tile>(p, s, id);
    barrier_wait(shared.barrier(Tile::work_empty + slot.stage), slot.parity ^ 1);
    leave(shared.work(slot.stage), w);
    barrier_arrive(shared.barrier(Tile::work_full + slot.stage));
    slot.advance();
    if (w.b < 0) break;
    if (!w.passes) continue;
#pragma unroll 1
    for (int i = 0; i < Tile::consumers; ++i) {
      constexpr int tiles = Tile::first ? 2 : 1;
      const uint32_t full = shared.barrier(Tile::stay_full + i);
      barrier_wait(shared.barrier(Tile::stay_empty + i), stay.parity ^ 1);
      barrier_arrive_expect(full, tiles * Tile::layout.stay_bytes);
      load_tile<64, Tile::columns>(shared.stay(0, i), maps.stay_first, full, w.row0 + 64 * i, w.h, w.b);
      if constexpr (Tile::first)
        load_tile<64, Tile::columns>(shared.stay(1, i), maps.stay_second, full, w.row0 + 64 * i, w.h, w.b);
    }
    stay.advance();
    for (int pass = 0; pass < w.passes; ++pass) {
      const int head = Tile::keeps_queries ? w.h / p.G : w.h * p.G + pass;
      for (int n = w.tiles.first; n < w.tiles.last; ++n) {
        const uint32_t full = shared.barrier(Tile::first_full + ring.stage);
        barrier_wait(shared.barrier(Tile::first_empty + ring.stage), ring.parity ^ 1);
        if constexpr (Tile::keeps_queries) {
          barrier_arrive_expect(full, Tile::layout.pass_bytes);
        } else {
          // Rows past the padded end are not read, and masked: such a tile is not full.
          const int64_t row = (int64_t{w.b} * p.Hq + head) * params.Nq_padded + n * Tile::BN;
          const uint32_t bytes = min(Tile::BN, params.Nq_padded - n * Tile::BN) * 4;
          barrier_arrive_expect(full, Tile::layout.pass_bytes + 2 * bytes);
          copy_bytes(shared.at + shared.rows_at(ring.stage), params.lse2 + row, bytes, full);
          copy_bytes(shared.at + shared.rows_at(ring.stage) + Tile::BN * 4, params.delta + row, bytes, full);
        }
        load_tile<Tile::BN, Tile::columns>(shared.first(ring.stage), maps.pass_first, full, n * Tile::BN, head, w.b);
        const uint32_t full_second = shared.barrier(Tile::second_full + ring.stage);
        barrier_wait(shared.barrier(Tile::second_empty + ring.stage), ring.parity ^ 1);
        barrier_arrive_expect(full_second, Tile::layout.pass_bytes);
        load_tile<Tile::BN, Tile::columns>(shared.second(ring.stage), maps.pass_second, full_second, n * Tile::BN, head,
                                           w.b);
        ring.advance();
      }
    }
  }
}

// The feeding warpgroup's other warps: clean passing tiles that are not seen in full, the second of the pair only where it
// is summed.
template <class Tile>
__device__ __forceinline__ void clean(const BackwardShared<Tile>& shared, int warp, int lane) {
  Ring<2> slot;
  Ring<Tile::stages> ring;
  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage), slot.parity);
    const SharedWork work{shared.work(slot.stage)};
    if (work.w->b < 0) break;
    const int passes = work.w->passes;
    for (int pass = 0; pass < passes; ++pass)
      for (int n = work.w->tiles.first; n < work.w->tiles.last; ++n) {
        barrier_wait(shared.barrier(Tile::first_full + ring.stage), ring.parity);
        barrier_wait(shared.barrier(Tile::second_full + ring.stage), ring.parity);
        if (!work.full(n)) {
          using T = typename Tile::T;
          constexpr int bytes = Tile::layout.pass_bytes;
          clean_tile<T, bytes, 3>(shared.base + (shared.first(ring.stage) - shared.at), warp, lane);
          if constexpr (Tile::second)
            clean_tile<T, bytes, 3>(shared.base + (shared.second(ring.stage) - shared.at), warp, lane);
          fence_async_shared();
          __syncwarp();
          if (lane == 0) barrier_arrive(shared.barrier(Tile::clean + ring.stage));
        }
        __syncwarp();
        if (lane == 0) {
          barrier_arrive(shared.barrier(Tile::first_empty + ring.stage));
          barrier_arrive(shared.barrier(Tile::second_empty + ring.stage));
        }
        ring.advance();
      }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.barrier(Tile::work_empty + slot.stage));
  }
}

// The passing rows that a stationary row meets: keys that a query sees, or queries that see a key.
template <class Tile>
__device__ __forceinline__ void meets(const Visibility& see, int Nq, int row, int& begin, int& end) {
  if constexpr (Tile::keeps_queries) {
    begin = see.begin(row);
    end = row < Nq ? see.end(row) : 0;
  } else {
    const int first = see.right < 0 ? 0 : row - see.offset - see.right;
    const int last = see.left < 0 ? Nq : row - see.offset + see.left + 1;
    begin = max(first, 0);
    end = row < see.keys ? min(last, Nq) : 0;
  }
}

template <class Tile>
__device__ __forceinline__ void consume(const BackwardParams& params, const BackwardShared<Tile>& shared, int warpgroup,
                                        int thread) {
  using T = typename Tile::T;
  constexpr int BN = Tile::BN, columns = Tile::columns;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = 64 * warpgroup + thread / 32 * 16 + lane / 4;

  Ring<2> slot;
  Ring<1> stay;
  Ring<Tile::stages> ring;
  uint32_t clean_parity = 0;  // one bit a stage
  const auto release = [&](int barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.barrier(barrier));
  };

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage), slot.parity);
    const SharedWork work{shared.work(slot.stage)};
    if (work.w->b < 0) break;
    const int passes = work.w->passes;
    float lse[2], delta[2];  // of kept queries
    if constexpr (Tile::keeps_queries) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = work.w->row0 + row_in_tile + 8 * r;
        const int64_t at = (int64_t{work.w->b} * p.Hq + work.w->h) * params.Nq_padded + query;
        lse[r] = query < p.Nq ? params.lse2[at] : INFINITY;
        delta[r] = query < p.Nq ? params.delta[at] : 0.f;
      }
    }
    float sums[columns / 2] = {};                          // dS times the first of the pair: dq or dk
    float sums_v[Tile::second ? columns / 2 : 1] = {};  // P times the second: dv
    float x[BN / 2], y[BN / 2];                            // S, then P; dP, then dS
    uint32_t packed_p[BN / 4], packed_ds[BN / 4];

    if (passes > 0) barrier_wait(shared.barrier(Tile::stay_full + warpgroup), stay.parity);
    int last_stage = -1;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
      for (int n = work.w->tiles.first; n < work.w->tiles.last; ++n) {
        const bool partial = !work.full(n);
        barrier_wait(shared.barrier(Tile::first_full + ring.stage), ring.parity);
        if (partial) {
          barrier_wait(shared.barrier(Tile::clean + ring.stage), clean_parity >> ring.stage & 1);
          clean_parity ^= 1u << ring.stage;
        }
        products_fence();
        multiply_columns<T, BN, columns, 64, BN>(x, shared.stay(0, warpgroup), shared.first(ring.stage));
        products_commit();
        barrier_wait(shared.barrier(Tile::second_full + ring.stage), ring.parity);
        if constexpr (Tile::first) {
          products_fence();
          multiply_columns<T, BN, columns, 64, BN>(y, shared.stay(1, warpgroup), shared.second(ring.stage));
          products_commit();
          products_wait<1>();
        } else {
          products_wait<0>();
        }
        settle(x);
        // The products of the round before are finished too.
        if (last_stage >= 0) {
          release(Tile::first_empty + last_stage);
          if constexpr (Tile::second) release(Tile::second_empty + last_stage);
        }
        last_stage = ring.stage;

#pragma unroll
        for (int i = 0; i < BN / 8; ++i) {
          float2 column_lse;
          if constexpr (!Tile::keeps_queries)
            column_lse = *reinterpret_cast<const float2*>(shared.row_lse(ring.stage) + 8 * i + 2 * (lane % 4));
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& value = x[4 * i + 2 * r + e];
              const float l = Tile::keeps_queries ? lse[r] : e ? column_lse.y : column_lse.x;
              value = exp2_fast(fmaf(value, p.scale_log2, -l));
            }
        }
        int begin[2];  // of what the lane's rows meet in this tile, from its first column
        uint32_t width[2];
        if (partial) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            int end;
            meets<Tile>(work.see(), p.Nq, work.w->row0 + row_in_tile + 8 * r, begin[r], end);
            width[r] = max(end - begin[r], 0);
            begin[r] -= n * BN + 2 * (lane % 4);
          }
#pragma unroll
          for (int i = 0; i < BN / 2; ++i) {
            const int column = i / 4 * 8 + i % 2;
            // delta is finite unless d_o is not: then dv must not miss it, though the tile is clean.
            const float spoil = Tile::second ? 0.f * shared.row_delta(ring.stage)[column + 2 * (lane % 4)] : 0.f;
            x[i] = static_cast<uint32_t>(column - begin[i / 2 % 2]) < width[i / 2 % 2] ? x[i] + spoil : 0.f;
          }
        }
        if constexpr (Tile::second) {
          pack_fragment<T, BN>(x, packed_p);
          settle(packed_p);
          products_fence();
          multiply_rows<T, columns, BN, BN>(sums_v, packed_p, shared.second(ring.stage), 1);
          products_commit();
        }
        if constexpr (Tile::first) {
          settle(x);
          products_wait<Tile::second ? 1 : 0>();
          settle(y);
          if constexpr (!Tile::second) release(Tile::second_empty + ring.stage);
#pragma unroll
          for (int i = 0; i < BN / 8; ++i) {
            float2 column_delta;
            if constexpr (!Tile::keeps_queries)
              column_delta = *reinterpret_cast<const float2*>(shared.row_delta(ring.stage) + 8 * i + 2 * (lane % 4));
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float& value = y[4 * i + 2 * r + e];
                value = x[4 * i + 2 * r + e] *
                        (value - (Tile::keeps_queries ? delta[r] : e ? column_delta.y : column_delta.x));
              }
          }
          if (partial) {  // a NaN in what is not seen survives the product with zero
#pragma unroll
            for (int i = 0; i < BN / 2; ++i)
              if (static_cast<uint32_t>(i / 4 * 8 + i % 2 - begin[i / 2 % 2]) >= width[i / 2 % 2]) y[i] = 0.f;
          }
          pack_fragment<T, BN>(y, packed_ds);
          settle(packed_ds);
          products_fence();
          multiply_rows<T, columns, BN, BN>(sums, packed_ds, shared.first(ring.stage), 1);
          products_commit();
        }
        if constexpr (Tile::second && Tile::first) products_wait<1>();  // frees packed_p
        ring.advance();
      }
    products_wait<0>();
    settle(sums);
    settle(sums_v);
    if (passes > 0) {
      release(Tile::first_empty + last_stage);
      if constexpr (Tile::second) release(Tile::second_empty + last_stage);
      release(Tile::stay_empty + warpgroup);
      stay.advance();
    }

    const auto write = [&](const auto& d, const MutableTensor& to, int width, float scale) {
      if (!to.data) return;
      const float weight[2] = {scale, scale};
      T* at[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = work.w->row0 + row_in_tile + 8 * r;
        at[r] = row < (Tile::keeps_queries ? p.Nq : p.Nk) ? static_cast<T*>(to.data) + work.w->b * to.stride[0] +
                                                                work.w->h * to.stride[1] + row * to.stride[2]
                                                          : nullptr;
      }
      write_rows<T, columns>(d, weight, at, width, lane);
    };
    if constexpr (Tile::keeps_queries)
      write(sums, params.dq, p.D, p.scale);
    else if constexpr (Tile::first)
      write(sums, params.dk, p.D, p.scale);
    if constexpr (Tile::second) write(sums_v, params.dv, p.Dv, 1.f);
    release(Tile::work_empty + slot.stage);
  }
}

// Grid: at most one block an SM, no more than there are tiles.
template <class Tile>
__device__ __forceinline__ void backward(const BackwardParams& params, const HopperSchedule& s,
                                         const BackwardMaps& maps) {
  extern __shared__ unsigned char raw_shared[];
  const BackwardShared<Tile> shared(raw_shared);
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch_map(maps.stay_first);
    prefetch_map(maps.stay_second);
    prefetch_map(maps.pass_first);
    prefetch_map(maps.pass_second);
    constexpr int readers = Tile::consumers * 4 + 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.barrier(Tile::work_full + i), 1);
      barrier_init(shared.barrier(Tile::work_empty + i), readers);
    }
#pragma unroll
    for (int i = 0; i < Tile::consumers; ++i) {
      barrier_init(shared.barrier(Tile::stay_full + i), 1);
      barrier_init(shared.barrier(Tile::stay_empty + i), 4);
    }
#pragma unroll
    for (int i = 0; i < Tile::stages; ++i) {
      barrier_init(shared.barrier(Tile::first_full + i), 1);
      barrier_init(shared.barrier(Tile::second_full + i), 1);
      barrier_init(shared.barrier(Tile::first_empty + i), readers);
      barrier_init(shared.barrier(Tile::second_empty + i), readers);
      barrier_init(shared.barrier(Tile::clean + i), 3);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::feeder_registers>();
    if (warp == 0) {
      if (lane == 0) feed<Tile>(params, s, shared, maps);
    } else {
      clean<Tile>(shared, warp - 1, lane);
    }
  } else {
    take_registers<Tile::consumer_registers>();
    consume<Tile>(params, shared, warpgroup - 1, threadIdx.x % 128);
  }
}

// delta = sum_d o d_o - dlse and the base-2 lse, rows padded to Nq_padded. One warp a row.
template <class T>
__device__ __forceinline__ void prepare(const BackwardParams& params) {
  const Problem& p = params.p;
  const int64_t at = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (at >= int64_t{p.B} * p.Hq * params.Nq_padded) return;
  const int i = at % params.Nq_padded, h = at / params.Nq_padded % p.Hq, b = at / params.Nq_padded / p.Hq;
  float delta = 0.f, lse = INFINITY;
  if (i < p.Nq) {
    const T* o = static_cast<const T*>(params.o.data) + b * params.o.stride[0] + h * params.o.stride[1] +
                 i * params.o.stride[2];
    const T* d_o = static_cast<const T*>(params.d_o.data) + b * params.d_o.stride[0] + h * params.d_o.stride[1] +
                   i * params.d_o.stride[2];
    for (int d = lane * 8; d < p.Dv; d += 256) {
      T a[8], c[8];
      *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(o + d);
      *reinterpret_cast<uint4*>(c) = *reinterpret_cast<const uint4*>(d_o + d);
#pragma unroll
      for (int e = 0; e < 8; ++e) delta = fmaf(static_cast<float>(a[e]), static_cast<float>(c[e]), delta);
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    const int64_t row = (int64_t{b} * p.Hq + h) * p.Nq + i;
    if (params.dlse) delta -= params.dlse[row];
    lse = params.lse[row];
    lse = lse == -INFINITY ? INFINITY : params.lse_base2 ? lse : lse * log2_e;
  }
  if (lane == 0) {
    params.delta[at] = delta;
    params.lse2[at] = lse;
  }
}

}  // namespace mfa::cuda::hopper
