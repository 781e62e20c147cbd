// hopper_forward.cuh: softmax attention forward for 16-bit inputs.
//
// A block works on tiles of 64 * consumers queries of one head. Its first warpgroup feeds it: one thread draws tiles
// and loads Q, K and V by tensor copies, three warps clean value tiles. The other warpgroups each own 64 queries: S = Q
// K^T of the next key tile is computed while the softmax of the current one runs, P stays in registers as operand of P
// V. Source: Shah et al., "FlashAttention-3", arXiv:2407.08608; Milakov & Gimelshein, arXiv:1805.02867.
//
// Zero probabilities do not keep a NaN in a value row out of P V, so tiles that some row does not see in full are
// cleaned in shared memory first; where that found something, the rows that do see it get it back at the end:
// `return_nonfinite`.
#pragma once

#include "hopper_modifiers.cuh"

namespace mfa::cuda::hopper {

// none: visibility and sinks only. mask: a boolean mask too. all: anything.
enum class Modifiers { none, mask, all };

constexpr TileChoice forward_choice(Modifiers m, int choice) {
  return m == Modifiers::none   ? forward_tiles[choice]
         : m == Modifiers::mask ? forward_mask_tiles[choice]
                                : forward_modified_tiles[choice];
}

template <class T_, Modifiers modifiers_, int choice>
struct ForwardTile {
  using T = T_;
  static constexpr Modifiers modifiers = modifiers_;
  static constexpr bool listed = modifiers != Modifiers::none;  // a mask may leave key tiles out
  static constexpr TileChoice c = forward_choice(modifiers, choice);
  static constexpr int columns = c.columns, value_columns = value_columns_of(c), consumers = c.consumers,
                       BQ = 64 * consumers, BK = c.tile, stages = c.stages, warpgroups = warpgroups_of(c);
  static constexpr bool alternate = c.alternate, halves = c.halves;
  static constexpr ForwardLayout layout = forward_layout(c);
  static constexpr int threads = layout.threads, q_bytes = layout.q_bytes, k_bytes = layout.k_bytes,
                       v_bytes = layout.v_bytes;
  static constexpr int feeder_registers = consumers == 3 ? 32 : 40, consumer_registers = consumers == 3 ? 160 : 232;
  // Barriers, in order.
  static constexpr int work_full = 0, work_empty = 2, q_full = 4, q_empty = q_full + consumers,
                       k_full = q_empty + consumers, k_empty = k_full + stages, v_full = k_empty + stages,
                       v_empty = v_full + stages, v_clean = v_empty + stages, barriers = v_clean + stages;
  static_assert(barriers == forward_barriers(c));
  static_assert(layout.bytes <= shared_bytes_of_block);
};

// One block's shared memory.
template <class Tile>
struct ForwardShared {
  unsigned char* base;  // aligned to 1024 bytes
  uint32_t at;          // its shared address

  __device__ __forceinline__ explicit ForwardShared(unsigned char* raw) {
    at = (shared_address(raw) + 1023) & ~1023u;
    base = raw + (at - shared_address(raw));
  }
  __device__ __forceinline__ uint32_t barrier(int i) const { return at + Tile::layout.barriers_at + i * 8; }
  __device__ __forceinline__ uint32_t q(int warpgroup) const { return at + warpgroup * Tile::q_bytes; }
  __device__ __forceinline__ uint32_t k(int stage) const { return at + Tile::layout.k_at + stage * Tile::k_bytes; }
  __device__ __forceinline__ uint32_t v(int stage) const { return at + Tile::layout.v_at + stage * Tile::v_bytes; }
  __device__ __forceinline__ volatile uint32_t* found(int stage) const {
    return reinterpret_cast<volatile uint32_t*>(base + Tile::layout.found_at + stage * 16);
  }
  // Which tile of keys a stage holds, if tiles may be left out.
  __device__ __forceinline__ volatile uint32_t& key_tile(int stage) const { return found(stage)[3]; }
  __device__ __forceinline__ SharedWork work(int slot) const {
    return SharedWork(at + Tile::layout.work_at + slot * SharedWork::bytes);
  }
};

// Of the key tiles of a word of ShownTiles, those of [first, end) that a mask shows to any of a block's queries. The
// feeding thread has few registers, so it reads everything again each time.
template <class Tile>
__device__ __forceinline__ uint32_t shown_bits(const ForwardParams& params, const SharedWork& w, int word, int end) {
  const ShownTiles& shown = params.shown;
  const int tile = w.row0() / 64, tiles = min((params.p.Nq + 63) / 64 - tile, Tile::consumers);
  const uint32_t* from =
      shown.words + (w.b() * shown.stride[0] + w.h() * shown.stride[1] + tile * shown.stride[2] + word);
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < tiles; ++i, from += shown.stride[2]) bits |= *from;
  const int before = w.first() - word * 32, behind = word * 32 + 32 - end;
  if (before > 0) bits &= 0xffffffffu << before;
  if (behind > 0) bits &= 0xffffffffu >> behind;
  return bits;
}
template <class Tile>
__device__ __forceinline__ int count_shown(const ForwardParams& params, const SharedWork& w) {
  if (!params.shown.words) return w.last() - w.first();
  int n = 0;
#pragma unroll 1
  for (int word = w.first() / 32; word * 32 < w.last(); ++word)
    n += __popc(shown_bits<Tile>(params, w, word, w.last()));
  return n;
}
// The key tile to visit after tile n, or less than 0: the last one before it, of those that a mask shows.
template <class Tile>
__device__ __forceinline__ int tile_before(const ForwardParams& params, const SharedWork& w, int n) {
  if (!Tile::listed || !params.shown.words) return n > w.first() ? n - 1 : -1;
#pragma unroll 1
  while (n > w.first()) {
    const int word = (n - 1) / 32;
    if (const uint32_t bits = shown_bits<Tile>(params, w, word, n)) return word * 32 + 31 - __clz(bits);
    n = word * 32;
  }
  return -1;
}

// Queries of a tile; key tiles are visited last first.
template <class Tile>
__device__ __forceinline__ void leave_work(const SharedWork& to, const Problem& p, const HopperSchedule& s, int id) {
  if (id >= s.tiles) {
    to.set_end();
    return;
  }
  to.set_item(work_item(s, p.B * p.Hq, p.Hq, id), Tile::BQ);
  to.set_visibility(visibility(p, to.b()));
  const int row0 = to.row0();
  to.set_tiles(key_tiles<Tile::BK>(to.see(), row0, min(row0 + Tile::BQ, p.Nq)), 1);
}

// The feeding warpgroup's first thread.
template <class Tile>
__device__ __forceinline__ void feed(const ForwardParams& params, const HopperSchedule& s,
                                     const ForwardShared<Tile>& shared, const TensorMap* q, const TensorMap* k,
                                     const TensorMap* v) {
  const Problem& p = params.p;
  Ring<2> slot;
  Ring<1> q_ring;
  Ring<Tile::stages> k_ring, v_ring;
  const auto load_k = [&](const SharedWork& w, int n) {
    const uint32_t full = shared.barrier(Tile::k_full + k_ring.stage());
    barrier_wait(shared.barrier(Tile::k_empty + k_ring.stage()), k_ring.parity() ^ 1);
    if constexpr (Tile::listed) shared.key_tile(k_ring.stage()) = n;
    barrier_arrive_expect(full, Tile::k_bytes);
    load_tile<Tile::BK, Tile::columns>(shared.k(k_ring.stage()), k, full, n * Tile::BK, w.h() / p.G, w.b());
    k_ring.advance();
  };
  const auto load_v = [&](const SharedWork& w, int n) {
    const uint32_t full = shared.barrier(Tile::v_full + v_ring.stage());
    barrier_wait(shared.barrier(Tile::v_empty + v_ring.stage()), v_ring.parity() ^ 1);
    barrier_arrive_expect(full, Tile::v_bytes);
    load_tile<Tile::BK, Tile::value_columns>(shared.v(v_ring.stage()), v, full, n * Tile::BK, w.h() / p.G, w.b());
    v_ring.advance();
  };
  for (int id = blockIdx.x;; id = draw_tile(s)) {
    barrier_wait(shared.barrier(Tile::work_empty + slot.stage()), slot.parity() ^ 1);
    const SharedWork w = shared.work(slot.stage());
    leave_work<Tile>(w, p, s, id);
    if constexpr (Tile::listed)
      if (w.b() >= 0 && w.passes()) w.set_count(count_shown<Tile>(params, w));
    barrier_arrive(shared.barrier(Tile::work_full + slot.stage()));
    slot.advance();
    if (w.b() < 0) break;
    if (!w.passes()) continue;
    load_k(w, tile_before<Tile>(params, w, w.last()));
#pragma unroll 1
    for (int i = 0; i < Tile::consumers; ++i) {
      const uint32_t full = shared.barrier(Tile::q_full + i);
      barrier_wait(shared.barrier(Tile::q_empty + i), q_ring.parity() ^ 1);
      barrier_arrive_expect(full, Tile::q_bytes);
      load_tile<64, Tile::columns>(shared.q(i), q, full, w.row0() + 64 * i, w.h(), w.b());
    }
    q_ring.advance();
    for (int n = tile_before<Tile>(params, w, w.last()); n >= 0; n = tile_before<Tile>(params, w, n)) {
      if (const int next = tile_before<Tile>(params, w, n); next >= 0) load_k(w, next);
      load_v(w, n);
    }
  }
}

// Whether keys of a tile may be hidden that visibility shows.
template <class Tile>
__device__ __forceinline__ bool hides_keys(const Problem& p) {
  return (Tile::modifiers != Modifiers::none && p.mask.data) || (Tile::modifiers == Modifiers::all && p.bias.data);
}

// The feeding warpgroup's other warps: clean the value tiles that are not seen in full.
template <class Tile>
__device__ __forceinline__ void clean(const Problem& p, const ForwardShared<Tile>& shared, int warp, int lane) {
  Ring<2> slot;
  Ring<Tile::stages> v_ring;
  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const int tiles = !work.passes() ? 0 : Tile::listed ? work.count() : work.last() - work.first();
    for (int i = 0; i < tiles; ++i) {
      barrier_wait(shared.barrier(Tile::v_full + v_ring.stage()), v_ring.parity());
      if (hides_keys<Tile>(p) || !work.full(work.last() - 1 - i)) {
        const bool any = clean_tile<typename Tile::T, Tile::v_bytes, 3>(
            shared.base + (shared.v(v_ring.stage()) - shared.at), warp, lane);
        if (lane == 0) shared.found(v_ring.stage())[warp] = any;
        fence_async_shared();
        warp_arrive(shared.barrier(Tile::v_clean + v_ring.stage()), lane);
      }
      warp_arrive(shared.barrier(Tile::v_empty + v_ring.stage()), lane);
      v_ring.advance();
    }
    warp_arrive(shared.barrier(Tile::work_empty + slot.stage()), lane);
  }
}

// Adds to written rows of the output the NaNs and infinities that cleaning took from keys they see. A lane works on the
// columns that it wrote, those of [first, last): `run` of every 4 * run. Rare, and therefore small rather than fast.
template <class Tile, int run = 8, class Seen>
__device__ __forceinline__ void return_nonfinite(const Problem& p, const SharedWork& work,
                                                 typename Tile::T* const (&row)[2], int first, int last, int lane,
                                                 const Seen& seen) {
  using T = typename Tile::T;
#pragma unroll 1
  for (int key = work.first() * Tile::BK; key < min(work.last() * Tile::BK, work.see().keys); ++key) {
    const bool sees[2] = {row[0] && seen(0, key), row[1] && seen(1, key)};
    if (!sees[0] && !sees[1]) continue;
    const T* v = static_cast<const T*>(p.v.data) + work.b() * p.v.stride[0] + work.h() / p.G * p.v.stride[1] +
                 key * p.v.stride[2];
#pragma unroll 1
    for (int column = first + lane % 4 * run; column < last; column += column % run == run - 1 ? 3 * run + 1 : 1) {
      const float x = static_cast<float>(v[column]);
      if (fabsf(x) < INFINITY) continue;
      if (sees[0]) row[0][column] = T(static_cast<float>(row[0][column]) + x);
      if (sees[1]) row[1][column] = T(static_cast<float>(row[1][column]) + x);
    }
  }
}

template <class Tile>
__device__ __forceinline__ void consume(const ForwardParams& params, const ForwardShared<Tile>& shared, int warpgroup,
                                        int thread) {
  using T = typename Tile::T;
  constexpr int BK = Tile::BK, columns = Tile::columns, value_columns = Tile::value_columns;
  constexpr bool modified = Tile::modifiers == Modifiers::all, mask_only = Tile::modifiers == Modifiers::mask;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = 64 * warpgroup + thread / 32 * 16 + lane / 4;
  const float scale = modified ? 1.f : p.scale_log2;
  const uint32_t my_turn = 1 + warpgroup, next_turn = 1 + (warpgroup + 1) % Tile::consumers;
  if (Tile::alternate && warpgroup == Tile::consumers - 1) named_arrive(next_turn, 256);

  Ring<2> slot;
  Ring<1> q_ring;
  Ring<Tile::stages> k_ring, v_ring;
  uint32_t clean_parity = 0;  // one bit a stage
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const auto rows = [&] { return row_pair(work.see(), work.row0() + row_in_tile, p.Nq); };

    // Of this warpgroup's rows.
    const auto seen_by_all = [&](int n) {
      const Visibility see = work.see();
      const int row = work.row0() + 64 * warpgroup;
      return n * BK >= see.begin(row + 63) && (n + 1) * BK <= see.end(row);
    };
    const auto seen_by_none = [&](int n) {
      return n * BK >= work.see().end(min(work.row0() + 64 * warpgroup + 63, p.Nq - 1));
    };

    Softmax softmax;
    float o[value_columns / 2] = {};
    float sums[BK / 2];
    uint32_t probabilities[BK / 4];
    bool cleaned = false;

    MaskTile<mask_only ? BK : 16> mask;
    BiasTile<modified ? BK : 8> bias;
    const auto load_terms = [&](int n) {
      if constexpr (mask_only) mask.load(p, work.b(), work.h(), work.row0() + row_in_tile, n * BK, lane);
      if constexpr (modified)
        if (p.bias.data) bias.load(p, work.b(), work.h(), work.row0() + row_in_tile, n * BK, lane);
    };
    const auto softmax_step = [&](int n, float (&alpha)[2]) {
      if constexpr (modified)
        ScoreTile<BK>{p, work.b(), work.h(), work.row0() + row_in_tile, n * BK, lane, work.offset()}.apply(
            sums, bias, work.full(n), rows);
      else if (!work.full(n) && !seen_by_all(n))
        mask_scores<BK>(sums, rows(), n * BK, lane);
      if constexpr (mask_only) mask.apply(sums, lane);
      softmax.template step<BK>(sums, scale, alpha, NotWider{});
    };
    const auto finish_step = [&](int n) {
      if constexpr (modified)
        if (p.dropout_seed) drop<BK>(sums, p, work.b() * p.Hq + work.h(), work.row0() + row_in_tile, n * BK, lane);
      pack_fragment<T, BK>(sums, probabilities);
    };
    const auto uncleaned = [&](int n) { return !hides_keys<Tile>(p) && work.full(n); };
    // The tile whose keys are there, the next after n.
    const auto wait_keys = [&](int n) {
      barrier_wait(shared.barrier(Tile::k_full + k_ring.stage()), k_ring.parity());
      return Tile::listed ? static_cast<int>(shared.key_tile(k_ring.stage())) : n - 1;
    };
    const auto wait_values = [&](int n) {
      barrier_wait(shared.barrier(Tile::v_full + v_ring.stage()), v_ring.parity());
      if (!uncleaned(n)) {
        barrier_wait(shared.barrier(Tile::v_clean + v_ring.stage()), clean_parity >> v_ring.stage() & 1);
        clean_parity ^= 1u << v_ring.stage();
      }
    };
    const auto release_values = [&](int n) {
      if (!uncleaned(n)) {
        const volatile uint32_t* found = shared.found(v_ring.stage());
        cleaned |= (found[0] | found[1] | found[2]) != 0;
      }
      release(Tile::v_empty + v_ring.stage());
      v_ring.advance();
    };

    if (work.passes()) {
      float alpha[2];
      int n = wait_keys(work.last()), left = Tile::listed ? work.count() : 0;
      const int first = work.first();
      const auto is_last = [&] { return Tile::listed ? left <= 1 : n <= first; };
      const auto go_to = [&](int next) {
        n = next;
        if constexpr (Tile::listed) --left;
      };
      if constexpr (!Tile::alternate)
        while (!is_last() && seen_by_none(n)) {
          release(Tile::k_empty + k_ring.stage());
          k_ring.advance();
          wait_values(n);
          release_values(n);
          go_to(wait_keys(n));
        }
      load_terms(n);
      barrier_wait(shared.barrier(Tile::q_full + warpgroup), q_ring.parity());
      products_fence();
      multiply_columns<T, BK, columns, 64, BK>(sums, shared.q(warpgroup), shared.k(k_ring.stage()));
      products_commit();
      products_wait<0>();
      settle(sums);
      release(Tile::k_empty + k_ring.stage());
      k_ring.advance();
      softmax_step(n, alpha);
      finish_step(n);

      // n is the tile whose probabilities are ready; a round computes those of the next one.
#pragma unroll 1
      while (!is_last()) {
        const int next = wait_keys(n);
        load_terms(next);
        if (Tile::alternate) named_sync(my_turn, 256);
        settle(o);
        settle(probabilities);
        products_fence();
        multiply_columns<T, BK, columns, 64, BK>(sums, shared.q(warpgroup), shared.k(k_ring.stage()));
        products_commit();
        wait_values(n);
        products_fence();
        multiply_rows<T, value_columns, BK, BK>(o, probabilities, shared.v(v_ring.stage()), 1);
        products_commit();
        if (Tile::alternate) named_arrive(next_turn, 256);
        products_wait<1>();
        settle(sums);
        release(Tile::k_empty + k_ring.stage());
        k_ring.advance();
        softmax_step(next, alpha);
        settle(sums);  // the wait below must not move up past the softmax
        products_wait<0>();
        settle(o);
        release_values(n);
        if (__any_sync(0xffffffffu, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
          for (int i = 0; i < value_columns / 2; ++i) o[i] *= alpha[i / 2 % 2];
        }
        finish_step(next);
        go_to(next);
      }
      release(Tile::q_empty + warpgroup);
      q_ring.advance();
      wait_values(n);
      settle(o);
      settle(probabilities);
      products_fence();
      multiply_rows<T, value_columns, BK, BK>(o, probabilities, shared.v(v_ring.stage()), 1);
      products_commit();
      products_wait<0>();
      settle(o);
      release_values(n);
    }

    const int b = work.b(), h = work.h();
    float weight[2], lse[2];
    softmax.finish(scale, p.sinks ? p.sinks[h] * log2_e : -INFINITY, weight, lse, NotWider{});
    T* row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = work.row0() + row_in_tile + 8 * r;
      row[r] = query < p.Nq ? static_cast<T*>(params.o.data) + b * params.o.stride[0] + h * params.o.stride[1] +
                                  query * params.o.stride[2]
                            : nullptr;
      if (params.lse && row[r] && lane % 4 == 0)
        params.lse[(int64_t{b} * p.Hq + h) * p.Nq + query] = params.lse_base2 ? lse[r] : lse[r] * ln_2;
    }
    write_rows<T, value_columns>(o, weight, row, p.Dv, lane);
    if (cleaned) {
      const RowPair pair = rows();
      return_nonfinite<Tile>(p, work, row, 0, p.Dv, lane, [&](int r, int key) {
        const bool inside = key >= pair.begin[r] && key < pair.end[r];
        if constexpr (modified || mask_only)
          return inside && (!p.mask.data || mask_shows(p, b, h, work.row0() + row_in_tile + 8 * r, key)) &&
                 !(modified && bias_hides(p, b, h, work.row0() + row_in_tile + 8 * r, key));
        return inside;
      });
    }
    release(Tile::work_empty + slot.stage());
  }
}

}  // namespace mfa::cuda::hopper
