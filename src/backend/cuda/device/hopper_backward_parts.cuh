// hopper_backward_parts.cuh: kernels that compute the gradients of q, k and v in one pass: their tiles, who feeds them,
// and how the parts of dq become dq. hopper_backward_fused.cuh holds the kernels.
//
// Each key tile has a part of dQ. Parts are added in global memory, float32, in an order that depends on shapes and
// visibility alone, so the bits are the same every time: a counter at each query tile says whose turn it is. Key tiles
// are drawn in groups, and the members of a group walk the query tiles one behind the other, so that turns come without
// waiting and what the members read and add to stays in the L2 cache. Source of adding dQ by copy engine: Shah et al.,
// "FlashAttention-3", arXiv:2407.08608; the order is ours.
#pragma once

#include "hopper_backward.cuh"

namespace mfa::cuda::hopper {

template <class T_, int choice>
struct FusedTile {
  using T = T_;
  static constexpr bool modified = false, keeps_queries = false, values = true;
  static constexpr TileChoice c = fused_tiles[choice];
  static constexpr int columns = c.columns, consumers = c.consumers, rows = 64 * consumers, BN = c.tile,
                       stages = c.stages;
  static constexpr FusedLayout layout = fused_layout(c);
  static constexpr bool alternate = c.alternate;
  static constexpr int consumer_warps = alternate ? 4 : 4 * consumers;  // that work on a tile of queries
  static constexpr int threads = 128 * (consumers + 1), parts = fused_parts(c), lag = fused_lag(c);
  static constexpr int adders = parts % 3 ? 2 : 3;  // each has its own of the parts' places
  static constexpr int feeder_registers = 24, consumer_registers = 240;
  static constexpr int dq_columns = 64;  // of each warpgroup, all rows of a tile
  static_assert(consumers == 2 && rows == fused_keys && BN == fused_tile && stages % 2 == 0 &&
                columns == (alternate ? 1 : 2) * dq_columns);
  // Barriers, in order.
  static constexpr int work_full = 0, work_empty = 2, stay_full = 4, stay_empty = 5, dq_full = 6,
                       dq_empty = dq_full + parts, first_full = dq_empty + parts, second_full = first_full + stages,
                       first_empty = second_full + stages, second_empty = first_empty + stages,
                       barriers = second_empty + stages;
  static_assert(barriers == fused_barriers(c));
  static_assert(layout.bytes <= shared_bytes_of_block);
};

// The feeding thread's positions in the ring of two works and in that of one pair of stationary tiles, in one register.
class WorkTurns {
 public:
  __device__ __forceinline__ int slot() const { return bits_ & 1; }
  __device__ __forceinline__ uint32_t slot_parity() const { return bits_ >> 1 & 1; }
  __device__ __forceinline__ uint32_t stay_parity() const { return bits_ >> 2; }
  __device__ __forceinline__ void next_slot() { bits_ = (bits_ & 4) | (bits_ + 1 & 3); }
  __device__ __forceinline__ void next_stay() { bits_ ^= 4; }

 private:
  uint32_t bits_ = 0;
};

// The feeding warpgroup's first thread.
template <class Tile>
__device__ __forceinline__ void feed_fused(const BackwardParams& params, const HopperSchedule& s, uint32_t at,
                                           const BackwardMaps& maps) {
  const Problem& p = params.p;
  WorkTurns turns;
  CountedRing<Tile::stages> ring;
  // Members of a group need each other's parts, so none may wait in its block behind another: a block draws again when
  // the whole group of its last tile has been drawn.
  for (int id = blockIdx.x;;) {
    const BackwardShared<Tile> shared(computed_here(at));
    barrier_wait(shared.barrier(Tile::work_empty + turns.slot()), turns.slot_parity() ^ 1);
    const SharedWork w = shared.work(turns.slot());
    if (id >= s.tiles) {
      w.set_end();
    } else {
      const WorkItem item = fused_item(s, computed_here(p.B * p.Hkv), computed_here(p.Hkv), id);
      w.set_group_end(fused_group_end(s, item.tile, id));
      w.set_item(item, Tile::rows);
      w.set_visibility(visibility(p, w.b()));
      w.set_tiles(query_tiles<Tile::BN>(w.see(), p.Nq, w.row0(), Tile::rows, 0), p.G);
      w.set_start(walk_start(w.see(), w.row0() / Tile::rows, w.first(), w.last(), Tile::lag));
      w.set_steps(ring.count() + w.passes() * (w.last() - w.first()));
    }
    barrier_arrive(shared.barrier(Tile::work_full + turns.slot()));
    turns.next_slot();
    if (w.b() < 0) break;
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
          barrier_wait(shared.barrier(Tile::stay_empty), turns.stay_parity() ^ 1);
          barrier_arrive_expect(stay_full, 2 * Tile::consumers * Tile::layout.stay_bytes);
#pragma unroll 1
          for (int i = 0; i < Tile::consumers; ++i) load_stationary(shared, maps, w, i, stay_full);
          turns.next_stay();
        }
        if (++n == w.last()) n = w.first();
      } while (n != w.start());
    }
    id = draw_tile(s, w.group_end());
  }
}

// What a block adds to the sums of dq of one tile of queries.
struct Part {
  int at;    // the tile, of all
  int turn;  // how many key tiles add to it before
};

// Others of the feeding warpgroup's warps, `adder` one of them: add the parts of dq, each when it is the key tile's
// turn.
template <class Tile>
__device__ __forceinline__ void add_queries(const BackwardParams& params, const HopperSchedule& s, uint32_t at,
                                            int adder, int lane) {
  const Problem& p = params.p;
  constexpr int bytes = Tile::layout.dq_bytes;
  CountedRing<2> slot;
  uint32_t index = adder;  // of this warp's next part, of all that this block adds
  for (;; slot.advance()) {
    const BackwardShared<Tile> shared(computed_here(at));
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    // Where each lane's part of the next 32 of this work goes. Called by the whole warp.
    const auto locate = [&] {
      const int tile = work.row0() / Tile::rows, member = tile % fused_group, tile0 = tile - member;
      // What the lane's member of the group sees, and where it starts.
      KeyTiles seen{0, 0, 0, 0};
      if (lane < fused_group && tile0 + lane < s.tiles_per_head)
        seen = query_tiles<Tile::BN>(work.see(), p.Nq, (tile0 + lane) * Tile::rows, Tile::rows, 0);
      const int start = walk_start(work.see(), tile0 + lane, seen.first, seen.last, Tile::lag);
      const uint32_t length = work.last() - work.first(),
                     number = index + lane * Tile::adders - work.steps() + work.passes() * length;
      const int pass = number / length, now = number % length;
      int n = work.start() + now;
      if (n >= work.last()) n -= length;
      const int goes_to = (work.b() * p.Hq + work.h() * p.G + pass) * fused_query_tiles(computed_here(p.Nq)) + n;
      int turn = max(tile0 - work.see().begin(n * Tile::BN) / Tile::rows, 0);
#pragma unroll 1
      for (int i = 0; i < fused_group; ++i) {
        const int first = __shfl_sync(0xffffffffu, seen.first, i), last = __shfl_sync(0xffffffffu, seen.last, i),
                  when = n - __shfl_sync(0xffffffffu, start, i);
        const int then = when >= 0 ? when : when + last - first;
        turn += n >= first && n < last && (then < now || (then == now && i < member));
      }
      return Part{goes_to, turn};
    };
    Part located{};
    int turn = -1;  // that the next part's tile is at, if it was read in advance
    for (int i = 0; index < work.steps(); i = (i + 1) % 32) {
      const BackwardShared<Tile> shared(computed_here(at));
      if (i == 0) located = locate();
      const Part part{__shfl_sync(0xffffffffu, located.at, i), __shfl_sync(0xffffffffu, located.turn, i)};
      const int next = __shfl_sync(0xffffffffu, located.at, (i + 1) % 32);
      const uint32_t stage = index % Tile::parts, parity = index / Tile::parts & 1;
      index += Tile::adders;
      if (lane == 0) {
        while (turn != part.turn) turn = load_acquire(params.dq_turns + part.at);
        fence_async_global();
        barrier_wait(shared.barrier(Tile::dq_full + stage), parity);
        float* to = params.dq_sums + int64_t{part.at} * (bytes / 4);
        const uint32_t from = shared.at + Tile::layout.dq_at + stage * bytes;
        if (part.turn == 0)
          store_bytes(to, from, bytes);
        else
          add_floats(to, from, bytes);
        stores_commit();
        // Read while the stores are being completed.
        turn = i < 31 && index < work.steps() ? load_relaxed(params.dq_turns + next) : -1;
        stores_wait_read();
        barrier_arrive(shared.barrier(Tile::dq_empty + stage));
        stores_wait();
        fence_device();  // what was stored is in place, and what was read came before
        store_relaxed(params.dq_turns + part.at, part.turn + 1);
      }
      __syncwarp();
    }
    warp_arrive(shared.barrier(Tile::work_empty + slot.stage()), lane);
  }
}

// dq from its sums, by warps whose block has no more key tiles: each draws tiles, waits until every part has been added
// and writes them. The first tiles of all heads come first: where keys behind the queries are hidden, those have been
// complete for long.
template <class Tile>
__device__ __forceinline__ void finish_queries(const BackwardParams& params, int lane) {
  using T = typename Tile::T;
  const Problem& p = params.p;
  constexpr int columns = Tile::dq_columns;
  const int heads = p.B * p.Hq, tiles = fused_query_tiles(p.Nq);
  const float weight[2] = {p.scale, p.scale};
  for (;;) {
    int drawn = 0;
    if (lane == 0) drawn = atomicAdd(params.dq_turns + heads * tiles, 1);
    drawn = __shfl_sync(0xffffffffu, drawn, 0);
    if (drawn >= heads * tiles) break;
    const int head = drawn % heads, b = head / p.Hq, h = head % p.Hq, row0 = drawn / heads * Tile::BN;
    const int64_t at = int64_t{head} * tiles + drawn / heads;
    const KeyTiles seen = key_tiles<Tile::rows>(visibility(p, b), row0, min(row0 + Tile::BN, p.Nq));
    const int parts = seen.last - seen.first;
    if (parts > 0)
      while (load_acquire(params.dq_turns + at) != parts) __nanosleep(1000);
#pragma unroll 1
    for (int i = 0; i < Tile::BN / 16 * (Tile::columns / columns); ++i) {
      const int row = i % (Tile::BN / 16) * 16, column0 = i / (Tile::BN / 16) * columns;
      float d[columns / 2] = {};
      if (parts > 0) {
        const float4* from = reinterpret_cast<const float4*>(params.dq_sums) + at * (Tile::layout.dq_bytes / 16) +
                             column0 * (Tile::BN / 4) + row * 2 + lane;
#pragma unroll
        for (int j = 0; j < columns / 8; ++j) {
          const float4 x = __ldcg(from + 128 * j);
          d[4 * j] = x.x, d[4 * j + 1] = x.y, d[4 * j + 2] = x.z, d[4 * j + 3] = x.w;
        }
      }
      T* to[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int q = row0 + row + lane / 4 + 8 * r;
        to[r] = q < p.Nq ? static_cast<T*>(params.dq.data) + b * params.dq.stride[0] + h * params.dq.stride[1] +
                               q * params.dq.stride[2] + column0
                         : nullptr;
      }
      write_rows<T, columns>(d, weight, to, p.D - column0, lane);
    }
  }
}

}  // namespace mfa::cuda::hopper
