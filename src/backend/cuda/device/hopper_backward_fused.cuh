// hopper_backward_fused.cuh: gradients of q, k and v of 16-bit inputs in one pass: keys stay, queries pass, as in the
// dk, dv kernel of hopper_backward.cuh, and dS is used once more, for dQ. Five products a pair of tiles, not seven.
//
// Each key tile has a part of dQ. Parts are added in global memory, float32, in an order that depends on shapes and
// visibility alone, so the bits are the same every time: a counter at each query tile says whose turn it is. Key tiles
// are drawn in groups, and the members of a group walk the query tiles one behind the other, so that turns come without
// waiting and what the members read and add to stays in the L2 cache. Source of adding dQ by copy engine: Shah et al.,
// "FlashAttention-3", arXiv:2407.08608; the order is ours.
#pragma once

#include "hopper_backward.cuh"

namespace mfa::cuda::hopper {

template <class T_>
struct FusedTile {
  using T = T_;
  static constexpr bool modified = false, fused = true, keeps_queries = false, values = true;
  static constexpr TileChoice c = fused_choice;
  static constexpr int columns = c.columns, consumers = c.consumers, rows = 64 * consumers, BN = c.tile,
                       stages = c.stages;
  static constexpr FusedLayout layout = fused_layout(c);
  static constexpr int threads = 128 * (consumers + 1), consumer_warps = 4 * consumers, adders = 2;
  static constexpr int feeder_registers = 24, consumer_registers = 240;
  static constexpr int dq_columns = 64;  // of each warpgroup, all rows of a tile
  static_assert(consumers == 2 && stages == 2 && BN == 64 && columns == 128);
  // Barriers, in order.
  static constexpr int work_full = 0, work_empty = 2, stay_full = 4, stay_empty = 5, dq_full = 6, dq_empty = 8,
                       first_full = 10, second_full = first_full + stages, first_empty = second_full + stages,
                       second_empty = first_empty + stages, barriers = second_empty + stages;
  static_assert(barriers == fused_barriers(c));
  static_assert(layout.bytes <= shared_bytes_of_block);
};

// The feeding warpgroup's first thread.
template <class Tile>
__device__ __forceinline__ void feed_fused(const BackwardParams& params, const HopperSchedule& s,
                                           const BackwardShared<Tile>& shared, const BackwardMaps& maps) {
  const Problem& p = params.p;
  Ring<2> slot;
  Ring<1> stay;
  Ring<Tile::stages> ring;
  // Members of a group need each other's parts, so none may wait in its block behind another: a block draws again when
  // the whole group of its last tile has been drawn.
  int group_end = 0;
  for (int id = blockIdx.x;; id = draw_tile(s, group_end)) {
    barrier_wait(shared.barrier(Tile::work_empty + slot.stage()), slot.parity() ^ 1);
    const SharedWork w = shared.work(slot.stage());
    if (id >= s.tiles) {
      w.set_end();
    } else {
      const WorkItem item = fused_item(s, p.B * p.Hkv, p.Hkv, id);
      group_end = fused_group_end(s, item.tile, id);
      w.set_item(item, Tile::rows);
      w.set_visibility(visibility(p, w.b()));
      w.set_tiles(query_tiles<Tile::BN>(w.see(), p.Nq, w.row0(), Tile::rows, 0), p.G);
      w.set_dirty(0);
      w.set_start(walk_start(w.see(), w.row0() / Tile::rows, w.first(), w.last()));
    }
    barrier_arrive(shared.barrier(Tile::work_full + slot.stage()));
    slot.advance();
    if (w.b() < 0) break;
    if (!w.passes()) continue;
    bool kept = false;
    for (int pass = 0; pass < w.passes(); ++pass) {
      int n = w.start();
      do {
        load_pair<Tile>(params, shared, maps, w, ring, w.h() * p.G + pass, n * Tile::BN);
        // The stationary tiles follow the first passing ones: those find room while the work before is still
        // finishing.
        if (!kept) {
          kept = true;
          const uint32_t stay_full = shared.barrier(Tile::stay_full);
          barrier_wait(shared.barrier(Tile::stay_empty), stay.parity() ^ 1);
          barrier_arrive_expect(stay_full, 2 * Tile::consumers * Tile::layout.stay_bytes);
#pragma unroll 1
          for (int i = 0; i < Tile::consumers; ++i) {
            load_tile<64, Tile::columns>(shared.stay(0, i), maps.stay_first, stay_full, w.row0() + 64 * i, w.h(),
                                         w.b());
            load_tile<64, Tile::columns>(shared.stay(1, i), maps.stay_second, stay_full, w.row0() + 64 * i, w.h(),
                                         w.b());
          }
          stay.advance();
        }
        if (++n == w.last()) n = w.first();
      } while (n != w.start());
    }
  }
}

// Two more of the feeding warpgroup's warps, one for each of the two tiles of dq: add them, each when it is the key
// tile's turn. Lanes stand for the members of the group of key tiles.
template <class Tile>
__device__ __forceinline__ void add_queries(const BackwardParams& params, const HopperSchedule& s,
                                            const BackwardShared<Tile>& shared, int adder, int lane) {
  const Problem& p = params.p;
  Ring<2> slot;
  Ring<2> part;
  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const int member = work.row0() / Tile::rows % fused_group;
    KeyTiles seen{0, 0, 0, 0};
    int start = 0;
    if (const int tile = work.row0() / Tile::rows - member + lane; lane < fused_group && tile < s.tiles_per_head) {
      seen = query_tiles<Tile::BN>(work.see(), p.Nq, tile * Tile::rows, Tile::rows, 0);
      start = walk_start(work.see(), tile, seen.first, seen.last);
    }
    for (int pass = 0; pass < work.passes(); ++pass) {
      int n = work.start();
      do {
        if (part.stage() == adder) {
          const int when = n >= start ? n - start : n - start + seen.last - seen.first;
          const int now = __shfl_sync(0xffffffffu, when, member);
          const bool before = n >= seen.first && n < seen.last && (when < now || (when == now && lane < member));
          const int earlier = work.row0() / Tile::rows - member - work.see().begin(n * Tile::BN) / Tile::rows;
          const int turn = max(earlier, 0) + __popc(__ballot_sync(0xffffffffu, before));
          if (lane == 0) {
            const int64_t at = (int64_t{work.b()} * p.Hq + work.h() * p.G + pass) * fused_query_tiles(p.Nq) + n;
            constexpr int bytes = Tile::layout.dq_bytes;
            float* to = params.dq_sums + at * (bytes / 4);
            const uint32_t from = shared.at + Tile::layout.dq_at + part.stage() * bytes;
            while (load_acquire(params.dq_turns + at) != turn) {
            }
            fence_async();
            barrier_wait(shared.barrier(Tile::dq_full + part.stage()), part.parity());
            if (turn == 0)
              store_bytes(to, from, bytes);
            else
              add_floats(to, from, bytes);
            stores_commit();
            stores_wait_read();
            barrier_arrive(shared.barrier(Tile::dq_empty + part.stage()));
            stores_wait();
            fence_async();
            store_release(params.dq_turns + at, turn + 1);
          }
          __syncwarp();
        }
        part.advance();
        if (++n == work.last()) n = work.first();
      } while (n != work.start());
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.barrier(Tile::work_empty + slot.stage()));
  }
}

// dS^T of this warpgroup's 64 keys, as the products of dQ read it: 64 queries of [128 keys][128 bytes].
template <class Tile>
__device__ __forceinline__ void keep_score_gradients(const uint32_t (&ds)[Tile::BN / 4], uint32_t to, int warpgroup,
                                                     int thread) {
  const int lane = thread % 32, key = 64 * warpgroup + thread / 32 * 16 + lane % 16, half = lane / 16;
#pragma unroll
  for (int j = 0; j < Tile::BN / 16; ++j) store_matrices(to + key * 128 + ((2 * j + half) ^ key % 8) * 16, ds + 4 * j);
}

// This warpgroup's part of dQ of a tile = dS K, in units of 1 / scale.
template <class Tile>
__device__ __forceinline__ void multiply_queries(float (&dq)[Tile::dq_columns / 2], const BackwardShared<Tile>& shared,
                                                 uint32_t ds, int warpgroup) {
#pragma unroll
  for (int i = 0; i < Tile::dq_columns / 2; ++i) dq[i] = 0.f;
  constexpr int chunk_bytes = 64 * 128;
  uint32_t a = ds, b = shared.stay(0, 0) + warpgroup * chunk_bytes;
  asm volatile("" : "+r"(a), "+r"(b));
  const TileDescriptor da(a), db(b);
#pragma unroll
  for (int key = 0; key < Tile::rows; key += 16)
    Product<Tile::dq_columns>::template shared_a<typename Tile::T, 1, 1>(
        dq, da.at(key * 128), db.at(key / 64 * Tile::layout.stay_bytes + key % 64 * 128), key > 0);
}

// Marks work whose stationary keys have a NaN or infinity. Called by all threads of both warpgroups.
template <class Tile>
__device__ __forceinline__ void check_keys(const BackwardShared<Tile>& shared, const SharedWork& work) {
  using T = typename Tile::T;
  constexpr int threads = 32 * Tile::consumer_warps;
  uint32_t largest = 0;
#pragma unroll
  for (int at = (threadIdx.x - 128) * 16; at < Tile::consumers * Tile::layout.stay_bytes; at += threads * 16) {
    const uint4 x = *reinterpret_cast<const uint4*>(shared.base + at);
    for (uint32_t word : {x.x, x.y, x.z, x.w}) largest = larger<T>(largest, word & 0x7fff7fffu);
  }
  if (nonfinite_mask<T>(largest)) work.set_dirty(1);
  named_sync(2, threads);
}

template <class Tile>
__device__ __forceinline__ void consume_fused(const BackwardParams& params, const BackwardShared<Tile>& shared,
                                              int warpgroup, int thread) {
  using T = typename Tile::T;
  constexpr int BN = Tile::BN, columns = Tile::columns;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = 64 * warpgroup + thread / 32 * 16 + lane / 4;

  Ring<2> slot;
  Ring<1> stay;
  uint32_t step = 0;  // its low bit is the stage of everything that alternates
  const auto release = [&](int barrier) {
    __syncwarp();
    barrier_arrive_if(shared.barrier(barrier), lane == 0);
  };

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const int passes = work.passes();
    float dk[columns / 2] = {}, dv[columns / 2] = {};
    float x[BN / 2], y[BN / 2];  // S, then P; dP, then dS
    uint32_t packed_p[BN / 4], packed_ds[BN / 4];
    uint32_t end = step;
    if (passes > 0) {
      end += passes * (work.last() - work.first());
      barrier_wait(shared.barrier(Tile::stay_full), stay.parity());
      stay.advance();
      // Where elements are hidden, the keys too must be finite, for the sums of dq.
      if (!work.full(work.first()) || !work.full(work.last() - 1)) check_keys(shared, work);
    }
    int n = work.start();
    const uint32_t first_step = step;
#pragma unroll 1
    for (; step != end; ++step) {
      const uint32_t stage = step & 1, parity = step >> 1 & 1;
      const bool partial = !work.full(n);
      barrier_wait(shared.barrier(Tile::first_full + stage), parity);
      products_fence();
      multiply_columns<T, BN, columns, 64, BN>(x, shared.stay(0, warpgroup), shared.first(stage));
      products_commit();
      barrier_wait(shared.barrier(Tile::second_full + stage), parity);
      products_fence();
      multiply_columns<T, BN, columns, 64, BN>(y, shared.stay(1, warpgroup), shared.second(stage));
      products_commit();
      products_wait<1>();
      settle(x);
      if (step != first_step) release(Tile::first_empty + (stage ^ 1));  // dK of the step before is finished too
      if (partial && (work.dirty() || !are_finite_queries(shared, stage, lane))) {
        products_wait<0>();
        settle(y);
        clean_step(shared, stage);
      }
      const float none[2] = {};
      exponents<Tile>(x, none, shared, stage, p.scale_log2, lane);
      if (partial) keep_seen<Tile>(x, work, p.Nq, row_in_tile, n * BN, lane);
      pack_fragment<T, BN>(x, packed_p);
      settle(packed_p);
      products_fence();
      multiply_rows<T, columns, BN, BN>(dv, packed_p, shared.second(stage), 1);
      products_commit();
      settle(x);
      products_wait<1>();
      settle(y);
      subtract_delta<Tile>(y, none, shared, stage, lane);
      score_gradients<BN>(x, y, partial);
      pack_fragment<T, BN>(y, packed_ds);
      settle(packed_ds);
      const uint32_t ds = shared.at + Tile::layout.ds_at + stage * Tile::layout.ds_bytes;
      keep_score_gradients<Tile>(packed_ds, ds, warpgroup, thread);
      fence_async_shared();
      products_wait<0>();
      settle(dv);
      named_sync(1, 128 * Tile::consumers);
      float dq[Tile::dq_columns / 2];
      products_fence();
      multiply_queries<Tile>(dq, shared, ds, warpgroup);
      products_commit();
      multiply_rows<T, columns, BN, BN>(dk, packed_ds, shared.first(stage), 1);
      products_commit();
      products_wait<1>();
      settle(dq);
      release(Tile::second_empty + stage);
      barrier_wait(shared.barrier(Tile::dq_empty + stage), parity ^ 1);
      float4* to = reinterpret_cast<float4*>(shared.base + Tile::layout.dq_at + stage * Tile::layout.dq_bytes) +
                   warpgroup * Tile::dq_columns * 16 + thread;
#pragma unroll
      for (int i = 0; i < Tile::dq_columns / 8; ++i)
        to[128 * i] = {dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]};
      fence_async_shared();
      release(Tile::dq_full + stage);
      if (++n == work.last()) n = work.first();
    }
    products_wait<0>();
    settle(dk);
    settle(dv);
    if (passes > 0) {
      release(Tile::first_empty + (step & 1 ^ 1));
      release(Tile::stay_empty);
    }
    write_gradient<Tile>(dk, params.dk, work, row_in_tile, p.Nk, p.D, p.scale, lane);
    write_gradient<Tile>(dv, params.dv, work, row_in_tile, p.Nk, p.Dv, 1.f, lane);
    release(Tile::work_empty + slot.stage());
  }
}

// Grid: at most one block an SM, no more than there are tiles; at least two groups of blocks must run at the same time.
template <class Tile>
__device__ __forceinline__ void backward_fused(const BackwardParams& params, const HopperSchedule& s,
                                               const BackwardMaps& maps) {
  extern __shared__ unsigned char raw_shared[];
  const BackwardShared<Tile> shared(raw_shared);
  // Through a shuffle, so that the compiler keeps what follows from it in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4,
            lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch_map(maps.stay_first);
    prefetch_map(maps.stay_second);
    prefetch_map(maps.pass_first);
    prefetch_map(maps.pass_second);
    constexpr int readers = Tile::consumer_warps;
    init_ring(shared, Tile::work_full, Tile::work_empty, 2, 1, readers + Tile::adders);
    init_ring(shared, Tile::dq_full, Tile::dq_empty, 2, readers, 1);
    init_ring(shared, Tile::stay_full, Tile::stay_empty, 1, 1, readers);
    init_ring(shared, Tile::first_full, Tile::first_empty, Tile::stages, 1, readers);
    init_ring(shared, Tile::second_full, Tile::second_empty, Tile::stages, 1, readers);
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::feeder_registers>();
    if (warp == 0) {
      if (lane == 0) feed_fused<Tile>(params, s, shared, maps);
    } else if (warp <= Tile::adders) {
      add_queries<Tile>(params, s, shared, warp - 1, lane);
    }
  } else {
    take_registers<Tile::consumer_registers>();
    consume_fused<Tile>(params, shared, warpgroup - 1, threadIdx.x % 128);
  }
}

// dq from its sums. Grid: Hq * Nq_padded / BN, B blocks of 256; the last sums, which were written last, come first.
template <class Tile>
__device__ __forceinline__ void finish_queries(const BackwardParams& params) {
  using T = typename Tile::T;
  const Problem& p = params.p;
  const int n = (gridDim.x - 1 - blockIdx.x) / p.Hq, h = blockIdx.x % p.Hq, b = blockIdx.y;
  if (n * Tile::BN >= p.Nq) return;
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
  const KeyTiles tiles = key_tiles<Tile::rows>(visibility(p, b), n * Tile::BN, min((n + 1) * Tile::BN, p.Nq));
  constexpr int columns = Tile::dq_columns;
  float d[columns / 2] = {};
  if (tiles.last > tiles.first) {
    const int64_t at = (int64_t{b} * p.Hq + h) * fused_query_tiles(p.Nq) + n;
    const float4* from = reinterpret_cast<const float4*>(params.dq_sums) + at * (Tile::layout.dq_bytes / 16) +
                         warpgroup * columns * 16 + thread;
#pragma unroll
    for (int i = 0; i < columns / 8; ++i) {
      const float4 x = from[128 * i];
      d[4 * i] = x.x, d[4 * i + 1] = x.y, d[4 * i + 2] = x.z, d[4 * i + 3] = x.w;
    }
  }
  const int column0 = columns * warpgroup;
  const float weight[2] = {p.scale, p.scale};
  T* row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = n * Tile::BN + thread / 32 * 16 + lane / 4 + 8 * r;
    row[r] = i < p.Nq ? static_cast<T*>(params.dq.data) + b * params.dq.stride[0] + h * params.dq.stride[1] +
                            i * params.dq.stride[2] + column0
                      : nullptr;
  }
  write_rows<T, columns>(d, weight, row, p.D - column0, lane);
}

}  // namespace mfa::cuda::hopper
