// hopper_backward.cuh: gradients of q, k and v for 16-bit inputs. Two kernels, no atomics, the same bits every time:
// one keeps queries and walks keys (dq), one keeps keys and walks queries (dk, dv). Both recompute P = exp2(S - lse).
//
//   S = Q K^T,  dP = dO V^T,  dS = P (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO
//
// The same main loop serves both: a warpgroup keeps 64 rows of the stationary pair (Q, dO) or (K, V) and multiplies
// them by tiles of the passing pair (K, V) or (Q, dO), so the dk, dv kernel works on transposed tiles. P and dS stay in
// registers as operands. Products are queued in order: those of the next tile follow while exponents of this one are
// computed. Source: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.
//
// As in the forward, passing tiles that are not seen in full are cleaned of NaN and infinity, because their zero
// weights would not keep those out of the sums. Rows that do see such a key have a NaN lse, and so get their NaN; so do
// keys that such rows, or rows of a NaN d_o, see. Passing queries need cleaning where an lse is not finite; keys where
// their products are not.
#pragma once

#include "hopper_backward_modifiers.cuh"

namespace mfa::cuda::hopper {

enum class Gradient { dq, dkv, dkv_shared };

constexpr TileChoice backward_choice(Gradient g, bool modified, int choice) {
  if (modified)
    return g == Gradient::dq    ? dq_modified_tiles[choice]
           : g == Gradient::dkv ? dkv_modified_tiles[choice]
                                : dkv_shared_modified_tiles[choice];
  return g == Gradient::dq ? dq_tiles[choice] : g == Gradient::dkv ? dkv_tiles[choice] : dkv_shared_tiles[choice];
}

// `modified`: any modifier of scores; else visibility and sinks only.
template <class T_, Gradient gradient, bool modified_, int choice>
struct BackwardTile {
  using T = T_;
  static constexpr bool modified = modified_;
  static constexpr bool keeps_queries = gradient == Gradient::dq;
  static constexpr bool values = !keeps_queries;  // sums dv as well
  static constexpr bool shared_keys = gradient == Gradient::dkv_shared;
  static constexpr TileChoice c = backward_choice(gradient, modified, choice);
  static constexpr int columns = c.columns, consumers = c.consumers, rows = 64 * consumers, BN = c.tile,
                       stages = c.stages;
  static constexpr BackwardLayout layout = backward_layout(c, shared_keys);
  static constexpr int threads = layout.threads, consumer_warps = threads / 32 - 4;
  static constexpr int feeder_registers = 40, consumer_registers = 232;
  // Barriers, in order.
  static constexpr int work_full = 0, work_empty = 2, p_full = 4, p_empty = 6, stay_full = 8,
                       stay_empty = stay_full + consumers, first_full = stay_empty + consumers,
                       second_full = first_full + stages, first_empty = second_full + stages,
                       second_empty = first_empty + stages, voted = second_empty + stages, barriers = voted + 1;
  static_assert(barriers == backward_barriers(c));
  static_assert(layout.bytes <= shared_bytes_of_block);
};

template <class Tile>
struct BackwardShared {
  unsigned char* base;  // aligned to 1024 bytes
  uint32_t at;

  __device__ __forceinline__ explicit BackwardShared(unsigned char* raw) {
    at = (shared_address(raw) + 1023) & ~1023u;
    base = raw + (at - shared_address(raw));
  }
  __device__ __forceinline__ explicit BackwardShared(uint32_t aligned)
      : base(static_cast<unsigned char*>(__cvta_shared_to_generic(aligned))), at(aligned) {}
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
  __device__ __forceinline__ SharedWork work(int slot) const {
    return SharedWork(at + Tile::layout.work_at + slot * SharedWork::bytes);
  }
  // Whether keys that pass need cleaning, in alternate votes.
  __device__ __forceinline__ volatile uint32_t* found(uint32_t vote) const {
    return reinterpret_cast<volatile uint32_t*>(base + Tile::layout.found_at) + vote;
  }
};

// The passing tiles, by their first rows. Those of dk and dv begin at the first query of interest and are repeated for
// each head of the group.
template <class Tile>
__device__ __forceinline__ void leave_work(const SharedWork& to, const Problem& p, const HopperSchedule& s, int id) {
  if (id >= s.tiles) {
    to.set_end();
    return;
  }
  const int heads = Tile::keeps_queries ? p.Hq : p.Hkv;
  to.set_item(work_item(s, p.B * heads, heads, id), Tile::rows);
  to.set_visibility(visibility(p, to.b()));
  const int row0 = to.row0();
  if constexpr (Tile::keeps_queries) {
    to.set_tiles(key_tiles<Tile::BN>(to.see(), row0, min(row0 + Tile::rows, p.Nq)), 1, Tile::BN);
  } else {
    const int origin = first_query(to.see(), row0);
    to.set_tiles(query_tiles<Tile::BN>(to.see(), p.Nq, row0, Tile::rows, origin), p.G, Tile::BN, origin);
  }
}

struct BackwardMaps {
  const TensorMap *stay_first, *stay_second, *pass_first, *pass_second;
};

// Loads a pair of passing tiles, `row` their first, into the ring's next stage; for passing queries also their lse and
// delta.
template <class Tile, class Stages>
__device__ __forceinline__ void load_pair(const BackwardParams& params, const BackwardShared<Tile>& shared,
                                          const BackwardMaps& maps, const SharedWork& w, Stages& ring, int head,
                                          int row) {
  const Problem& p = params.p;
  const uint32_t full = shared.barrier(Tile::first_full + ring.stage());
  barrier_wait(shared.barrier(Tile::first_empty + ring.stage()), ring.parity() ^ 1);
  if constexpr (Tile::keeps_queries) {
    barrier_arrive_expect(full, Tile::layout.pass_bytes);
  } else {
    const int64_t from = int64_t{w.b() * p.Hq + head} * params.Nq_padded + row;
    constexpr uint32_t bytes = Tile::BN * 4;
    barrier_arrive_expect(full, Tile::layout.pass_bytes + 2 * bytes);
    copy_bytes(shared.at + shared.rows_at(ring.stage()), params.lse2 + from, bytes, full);
    copy_bytes(shared.at + shared.rows_at(ring.stage()) + bytes, params.delta + from, bytes, full);
  }
  load_tile<Tile::BN, Tile::columns>(shared.first(ring.stage()), maps.pass_first, full, row, head, w.b());
  const uint32_t full_second = shared.barrier(Tile::second_full + ring.stage());
  barrier_wait(shared.barrier(Tile::second_empty + ring.stage()), ring.parity() ^ 1);
  barrier_arrive_expect(full_second, Tile::layout.pass_bytes);
  load_tile<Tile::BN, Tile::columns>(shared.second(ring.stage()), maps.pass_second, full_second, row, head, w.b());
  ring.advance();
}

// Loads the i-th 64 rows of both stationary tiles.
template <class Tile>
__device__ __forceinline__ void load_stationary(const BackwardShared<Tile>& shared, const BackwardMaps& maps,
                                                const SharedWork& w, int i, uint32_t full) {
  load_tile<64, Tile::columns>(shared.stay(0, i), maps.stay_first, full, w.row0() + 64 * i, w.h(), w.b());
  load_tile<64, Tile::columns>(shared.stay(1, i), maps.stay_second, full, w.row0() + 64 * i, w.h(), w.b());
}

// The feeding warpgroup's first thread.
template <class Tile>
__device__ __forceinline__ void feed(const BackwardParams& params, const HopperSchedule& s,
                                     const BackwardShared<Tile>& shared, const BackwardMaps& maps) {
  const Problem& p = params.p;
  Ring<2> slot;
  Ring<1> stay;
  Ring<Tile::stages> ring;
  for (int id = blockIdx.x;; id = draw_tile(s)) {
    barrier_wait(shared.barrier(Tile::work_empty + slot.stage()), slot.parity() ^ 1);
    const SharedWork w = shared.work(slot.stage());
    leave_work<Tile>(w, p, s, id);
    barrier_arrive(shared.barrier(Tile::work_full + slot.stage()));
    slot.advance();
    if (w.b() < 0) break;
    if (!w.passes()) continue;
    // The stationary tiles follow the first passing ones: those find room while the work before is still finishing.
    bool kept = false;
    for (int pass = 0; pass < w.passes(); ++pass) {
      const int head = Tile::keeps_queries ? w.h() / p.G : w.h() * p.G + pass;
      for (int row = w.first(); row < w.last(); row += Tile::BN) {
        load_pair<Tile>(params, shared, maps, w, ring, head, row);
        if (kept) continue;
        kept = true;
#pragma unroll 1
        for (int i = 0; i < Tile::consumers; ++i) {
          const uint32_t full = shared.barrier(Tile::stay_full + i);
          barrier_wait(shared.barrier(Tile::stay_empty + i), stay.parity() ^ 1);
          barrier_arrive_expect(full, 2 * Tile::layout.stay_bytes);
          load_stationary(shared, maps, w, i, full);
        }
        stay.advance();
      }
    }
  }
}

// Whether every stationary row sees all of the passing tile.
template <class Tile>
__device__ __forceinline__ bool seen_in_full(const Problem& p, const SharedWork& work, int column0) {
  return !(Tile::modified && (p.mask.data || p.bias.data)) && work.full(column0);
}

// Whether all are finite.
template <int n>
__device__ __forceinline__ bool is_finite(const float (&x)[n]) {
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i % 2] = fmaf(x[i], 0.f, sum[i % 2]);
  return sum[0] + sum[1] == 0.f;
}

// The warps that work on the same passing tiles meet.
template <class Tile>
__device__ __forceinline__ void sync_readers() {
  constexpr int warps = Tile::consumer_warps;
  named_sync(2 + (threadIdx.x / 32 - 4) / warps, 32 * warps);
}

// Zeroes the NaNs and infinities of a step's tiles whose rows are summed.
template <class Tile>
__device__ __noinline__ void clean_tiles(uint32_t at, int stage) {
  using T = typename Tile::T;
  constexpr int warps = Tile::consumer_warps, bytes = Tile::layout.pass_bytes;
  const int warp = (threadIdx.x / 32 - 4) % warps, lane = threadIdx.x % 32;
  const BackwardShared<Tile> shared(at);
  clean_tile<T, bytes, warps>(shared.base + (shared.first(stage) - at), warp, lane);
  if constexpr (Tile::values) clean_tile<T, bytes, warps>(shared.base + (shared.second(stage) - at), warp, lane);
  fence_async_shared();
  sync_readers<Tile>();
}

// What is not seen has weight 0, but 0 times NaN is NaN: where a tile has hidden elements, its NaNs and infinities
// become zeros before its rows are summed. Passing queries are finite where their lse is, which every warp sees alike;
// so all threads that work on the tile come here together, and their products must be finished.
template <class Tile>
__device__ __forceinline__ bool are_finite_queries(const BackwardShared<Tile>& shared, int stage, int lane) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < Tile::BN; i += 32)
    if (Tile::BN - i >= 32 || lane < Tile::BN - i) sum = fmaf(shared.row_lse(stage)[i + lane], 0.f, sum);
  return __all_sync(0xffffffffu, sum == 0.f);
}
template <class Tile>
__device__ __forceinline__ void clean_step(const BackwardShared<Tile>& shared, int stage) {
  sync_readers<Tile>();
  clean_tiles<Tile>(shared.at, stage);
}

// A NaN or infinity in a passing key makes a product with every query that is not finite: `finite`, of this thread's
// products, tells without looking at the tile. A warp votes as soon as it has its products, and reads the result before
// the keys are summed.
template <class Tile>
__device__ __forceinline__ void vote(const BackwardShared<Tile>& shared, uint32_t parity, bool finite, int lane) {
  const bool any = __any_sync(0xffffffffu, !finite);
  if (any && lane == 0) *shared.found(parity) = 1;
  warp_arrive(shared.barrier(Tile::voted), lane);
}
template <class Tile>
__device__ __forceinline__ void clean_as_voted(const BackwardShared<Tile>& shared, uint32_t parity, int stage) {
  barrier_wait(shared.barrier(Tile::voted), parity);
  if (!*shared.found(parity)) return;
  sync_readers<Tile>();
  *shared.found(parity) = 0;
  clean_tiles<Tile>(shared.at, stage);
}

// Where a thread is in the stationary tile, of which each warpgroup has 64 rows, or all have all of them.
struct Place {
  int row, lane;
};
template <bool all_rows>
__device__ __forceinline__ Place place_anew() {
  const int number = thread_number(), lane = number % 32;
  return {(all_rows ? number % 128 : number - 128) / 32 * 16 + lane / 4, lane};
}
// Worked out `anew` rather than kept where registers are few.
template <bool anew>
__device__ __forceinline__ Place place(int row, int lane) {
  if constexpr (anew)
    return place_anew<false>();
  else
    return {row, lane};
}

// The passing rows that a stationary row meets, keys that a query sees or queries that see a key: the first, and one
// past the last.
template <class Tile>
__device__ __forceinline__ int first_met(const Visibility& see, int row) {
  if constexpr (Tile::keeps_queries)
    return see.begin(row);
  else
    return see.right < 0 ? 0 : max(row - see.offset - see.right, 0);
}
template <class Tile>
__device__ __forceinline__ int end_met(const Visibility& see, int Nq, int row) {
  if constexpr (Tile::keeps_queries) return row < Nq ? see.end(row) : 0;
  if (row >= see.keys) return 0;
  return see.left < 0 ? Nq : min(row - see.offset + see.left + 1, Nq);
}

// Scores, in units of `scale` in base 2, become probabilities. `lse` is of kept queries; that of passing ones is in
// shared memory.
template <class Tile>
__device__ __forceinline__ void exponents(float (&x)[Tile::BN / 2], const float (&lse)[2],
                                          const BackwardShared<Tile>& shared, int stage, float scale, int lane) {
#pragma unroll
  for (int i = 0; i < Tile::BN / 8; ++i) {
    float2 column;
    if constexpr (!Tile::keeps_queries)
      column = *reinterpret_cast<const float2*>(shared.row_lse(stage) + 8 * i + 2 * (lane % 4));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float l = Tile::keeps_queries ? lse[j / 2] : j % 2 ? column.y : column.x;
      x[4 * i + j] = exp2_fast(fmaf(x[4 * i + j], scale, -l));
    }
  }
}

// dP becomes dP - delta.
template <class Tile>
__device__ __forceinline__ void subtract_delta(float (&y)[Tile::BN / 2], const float (&delta)[2],
                                               const BackwardShared<Tile>& shared, int stage, int lane) {
#pragma unroll
  for (int i = 0; i < Tile::BN / 8; ++i) {
    float2 column;
    if constexpr (!Tile::keeps_queries)
      column = *reinterpret_cast<const float2*>(shared.row_delta(stage) + 8 * i + 2 * (lane % 4));
#pragma unroll
    for (int j = 0; j < 4; ++j) y[4 * i + j] -= Tile::keeps_queries ? delta[j / 2] : j % 2 ? column.y : column.x;
  }
}

// dS = P (dP - delta). Where the probability is zero, so is dS: a NaN in what is not seen would survive the product.
template <int BN>
__device__ __forceinline__ void score_gradients(const float (&x)[BN / 2], float (&y)[BN / 2], bool partial) {
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) y[i] *= x[i];
  if (!partial) return;
#pragma unroll
  for (int i = 0; i < BN / 2; ++i)
    if (x[i] == 0.f) y[i] = 0.f;
}

template <class Tile>
__device__ __forceinline__ GradientTile<Tile::BN, !Tile::keeps_queries> gradient_tile(const Problem& p,
                                                                                      const SharedWork& work, int pass,
                                                                                      const Place& at, int column0) {
  return {p,
          work.b(),
          Tile::keeps_queries ? work.h() : work.h() * p.G + pass,
          work.row0() + at.row,
          column0 + 2 * (at.lane % 4),
          at.lane,
          work.offset()};
}

// Probabilities of what is not seen become zero, whatever they were. column0: first passing row of the tile.
template <class Tile>
__device__ __forceinline__ void keep_seen(float (&x)[Tile::BN / 2], const SharedWork& work, int Nq, const Place& at,
                                          int column0) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Read one after the other: registers are few.
    const int first = column0 + 2 * (at.lane % 4);
    const uint32_t before =
        computed_here(columns_before(first_met<Tile>(work.see(), work.row0() + at.row + 8 * r) - first));
    const uint32_t seen = columns_before(end_met<Tile>(work.see(), Nq, work.row0() + at.row + 8 * r) - first) & ~before;
#pragma unroll
    for (int i = 0; i < Tile::BN / 4; ++i)
      if (!(seen >> i & 1)) x[4 * (i / 2) + 2 * r + i % 2] = 0.f;
  }
}

// The two rows of a lane of a gradient, times `scale`.
template <class Tile>
__device__ __forceinline__ void write_gradient(const float (&d)[Tile::columns / 2], const MutableTensor& to,
                                               const SharedWork& work, int row_in_tile, int rows, int width,
                                               float scale, int lane) {
  using T = typename Tile::T;
  if (!to.data) return;
  const float weight[2] = {scale, scale};
  T* at[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = work.row0() + row_in_tile + 8 * r;
    at[r] = row < rows
                ? static_cast<T*>(to.data) + work.b() * to.stride[0] + work.h() * to.stride[1] + row * to.stride[2]
                : nullptr;
  }
  write_rows<T, Tile::columns>(d, weight, at, width, lane);
}

template <class Tile>
__device__ __forceinline__ auto mask_bits(const Problem& p, const SharedWork& work, int pass, const Place& at,
                                          int column0) {
  typename GradientTile<Tile::BN, !Tile::keeps_queries>::MaskBits bits{};
  if constexpr (Tile::modified)
    if (p.mask.data) bits = gradient_tile<Tile>(p, work, pass, at, column0).mask_bits();
  return bits;
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
  uint32_t vote_parity = 0;
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const int passes = work.passes();
    float lse[2], delta[2];  // of kept queries
    if constexpr (Tile::keeps_queries) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = work.row0() + row_in_tile + 8 * r;
        const int64_t at = (int64_t{work.b()} * p.Hq + work.h()) * params.Nq_padded + query;
        lse[r] = query < p.Nq ? params.lse2[at] : INFINITY;
        delta[r] = query < p.Nq ? params.delta[at] : 0.f;
      }
    }
    float sums[columns / 2] = {};                       // dS times the first of the pair: dq or dk
    float sums_v[Tile::values ? columns / 2 : 1] = {};  // P times the second: dv
    float x[BN / 2], y[BN / 2];                         // S, then P; dP, then dS
    uint32_t packed_p[BN / 4], packed_ds[BN / 4];

    if (passes > 0) barrier_wait(shared.barrier(Tile::stay_full + warpgroup), stay.parity());
    bool started = false;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
      for (int column0 = work.first(); column0 < work.last(); column0 += BN) {
        const bool partial = !seen_in_full<Tile>(p, work, column0);
        barrier_wait(shared.barrier(Tile::first_full + ring.stage()), ring.parity());
        products_fence();
        multiply_columns<T, BN, columns, 64, BN>(x, shared.stay(0, warpgroup), shared.first(ring.stage()));
        products_commit();
        barrier_wait(shared.barrier(Tile::second_full + ring.stage()), ring.parity());
        products_fence();
        multiply_columns<T, BN, columns, 64, BN>(y, shared.stay(1, warpgroup), shared.second(ring.stage()));
        products_commit();
        // Read while the products are computed.
        const auto mask = mask_bits<Tile>(p, work, pass, place<Tile::modified>(row_in_tile, lane), column0);
        products_wait<Tile::modified ? 0 : 1>();
        settle(x);
        // The products of the round before are finished too.
        if (started) {
          release(Tile::first_empty + ring.stage_before());
          if constexpr (Tile::values) release(Tile::second_empty + ring.stage_before());
        }
        started = true;
        if (!Tile::values && partial) vote(shared, vote_parity, is_finite(x), lane);
        if (Tile::values && partial && !are_finite_queries(shared, ring.stage(), lane)) {
          products_wait<0>();
          clean_step(shared, ring.stage());
        }

        uint32_t kept = ~0u;  // by dropout
        if constexpr (Tile::modified) {
          settle(y);
          const auto at = gradient_tile<Tile>(p, work, pass, place<Tile::modified>(row_in_tile, lane), column0);
          if (p.dropout_seed) kept = at.template drop<Tile::values>(y);
          subtract_delta<Tile>(y, delta, shared, ring.stage(), lane);
          at.scores(x, y);
        }
        exponents<Tile>(x, lse, shared, ring.stage(), Tile::modified ? 1.f : p.scale_log2, lane);
        if (!work.full(column0)) keep_seen<Tile>(x, work, p.Nq, {row_in_tile, lane}, column0);
        if constexpr (Tile::modified)
          if (p.mask.data) gradient_tile<Tile>(p, work, pass, {row_in_tile, lane}, column0).hide(x, mask);
        if constexpr (Tile::values) {
          if (Tile::modified && p.dropout_seed)
            pack_kept<T, BN>(x, kept, p.dropout_scale, packed_p);
          else
            pack_fragment<T, BN>(x, packed_p);
          settle(packed_p);
          products_fence();
          multiply_rows<T, columns, BN, BN>(sums_v, packed_p, shared.second(ring.stage()), 1);
          products_commit();
        }
        settle(x);
        products_wait<Tile::values ? 1 : 0>();
        settle(y);
        barrier_arrive_if(shared.barrier(Tile::stay_empty + warpgroup),
                          lane < warp_arrivals && pass == passes - 1 && column0 + BN >= work.last());
        if constexpr (!Tile::values) release(Tile::second_empty + ring.stage());
        if constexpr (!Tile::modified) subtract_delta<Tile>(y, delta, shared, ring.stage(), lane);
        score_gradients<BN>(x, y, partial);
        pack_fragment<T, BN>(y, packed_ds);
        settle(packed_ds);
        if (!Tile::values && partial) {
          clean_as_voted(shared, vote_parity, ring.stage());
          vote_parity ^= 1;
        }
        products_fence();
        multiply_rows<T, columns, BN, BN>(sums, packed_ds, shared.first(ring.stage()), 1);
        products_commit();
        if constexpr (Tile::values) products_wait<1>();  // frees packed_p
        ring.advance();
      }
    products_wait<0>();
    settle(sums);
    settle(sums_v);
    if (passes > 0) {
      release(Tile::first_empty + ring.stage_before());
      if constexpr (Tile::values) release(Tile::second_empty + ring.stage_before());
      stay.advance();
    }

    if constexpr (Tile::keeps_queries) {
      write_gradient<Tile>(sums, params.dq, work, row_in_tile, p.Nq, p.D, p.scale, lane);
    } else {
      write_gradient<Tile>(sums, params.dk, work, row_in_tile, p.Nk, p.D, p.scale, lane);
      write_gradient<Tile>(sums_v, params.dv, work, row_in_tile, p.Nk, p.Dv, 1.f, lane);
    }
    release(Tile::work_empty + slot.stage());
  }
}

}  // namespace mfa::cuda::hopper
