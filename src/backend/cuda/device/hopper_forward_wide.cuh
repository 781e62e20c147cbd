// hopper_forward_wide.cuh: the forward of heads whose output rows do not fit one warpgroup: two work on the same 64
// queries. Each computes the scores of one half of a tile's keys and sums one half of the output's columns; they
// exchange row maxima and, as a tile in shared memory, probabilities. And what every forward kernel runs.
#pragma once

#include "hopper_forward.cuh"

namespace mfa::cuda::hopper {

template <class Tile>
__device__ __forceinline__ void consume_halves(const ForwardParams& params, const ForwardShared<Tile>& shared,
                                               int warpgroup, int thread) {
  using T = typename Tile::T;
  constexpr int BK = Tile::BK, half_keys = BK / 2, columns = Tile::columns, half_columns = Tile::value_columns / 2;
  constexpr bool modified = Tile::modifiers == Modifiers::all;
  static_assert(BK == 64 && Tile::consumers == 1 && Tile::modifiers != Modifiers::mask);  // a tile of P is one chunk
  enum : uint32_t { maxima_ready = 1, sums_ready, probabilities_ready };                  // named barriers
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = thread / 32 * 16 + lane / 4, column0 = warpgroup * half_columns;
  const float scale = modified ? 1.f : p.scale_log2;

  Ring<2> slot, p_ring;
  Ring<1> q_ring;
  Ring<Tile::stages> k_ring, v_ring;
  uint32_t clean_parity = 0;  // one bit a stage
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };
  // x becomes join(x, that of the other warpgroup). Written again only after another barrier.
  const auto exchange = [&](int which, float (&x)[2], uint32_t barrier, const auto& join) {
    float* rows = reinterpret_cast<float*>(shared.base + Tile::layout.rows_at) + which * 128 + row_in_tile;
    if (lane % 4 == 0) {
      rows[warpgroup * 64] = x[0];
      rows[warpgroup * 64 + 8] = x[1];
    }
    named_sync(barrier, 256);
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = join(x[r], rows[(warpgroup ^ 1) * 64 + 8 * r]);
  };

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const auto rows = [&] { return row_pair(work.see(), work.row0() + row_in_tile, p.Nq); };
    const auto first_key = [&](int n) { return n * BK + warpgroup * half_keys; };

    Softmax softmax;
    float o[half_columns / 2] = {};
    float sums[half_keys / 2];
    bool cleaned = false;

    BiasTile<modified ? half_keys : 8> bias;
    const auto load_terms = [&](int n) {
      if constexpr (modified)
        if (p.bias.data) bias.load(p, work.b(), work.h(), work.row0() + row_in_tile, first_key(n), lane);
    };
    const auto multiply_keys = [&] {
      products_fence();
      multiply_columns<T, half_keys, columns, 64, BK>(sums, shared.q(0),
                                                      shared.k(k_ring.stage()) + warpgroup * half_keys * 128);
      products_commit();
    };
    const auto softmax_step = [&](int n, float (&alpha)[2]) {
      if constexpr (modified)
        ScoreTile<half_keys>{p, work.b(), work.h(), work.row0() + row_in_tile, first_key(n), lane, work.offset()}.apply(
            sums, bias, work.full(n), rows);
      else if (!work.full(n))
        mask_scores<half_keys>(sums, rows(), first_key(n), lane);
      softmax.template step<half_keys>(sums, scale, alpha, [&](float (&top)[2]) {
        exchange(0, top, maxima_ready, [](float x, float y) { return fmaxf(x, y); });
      });
    };
    // Two tiles in turn: the other warpgroup may still multiply by the one before.
    const auto share_probabilities = [&](int n) {
      if constexpr (modified)
        if (p.dropout_seed)
          drop<half_keys>(sums, p, work.b() * p.Hq + work.h(), work.row0() + row_in_tile, first_key(n), lane);
      p_ring.advance();
      unsigned char* tile =
          shared.base + Tile::layout.p_at + p_ring.stage() * 64 * 128 + row_in_tile * 128 + lane % 4 * 4;
#pragma unroll
      for (int i = 0; i < half_keys / 8; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          *reinterpret_cast<uint32_t*>(tile + 8 * r * 128 + ((warpgroup * half_keys / 8 + i) ^ lane / 4) * 16) =
              pack<T>(sums[4 * i + 2 * r], sums[4 * i + 2 * r + 1]);
      fence_async_shared();
      named_sync(probabilities_ready, 256);
    };
    const auto uncleaned = [&](int n) { return !hides_keys<Tile>(p) && work.full(n); };
    const auto wait_keys = [&](int n) {
      barrier_wait(shared.barrier(Tile::k_full + k_ring.stage()), k_ring.parity());
      return Tile::listed ? static_cast<int>(shared.key_tile(k_ring.stage())) : n - 1;
    };
    const auto multiply_values = [&](int n) {
      barrier_wait(shared.barrier(Tile::v_full + v_ring.stage()), v_ring.parity());
      if (!uncleaned(n)) {
        barrier_wait(shared.barrier(Tile::v_clean + v_ring.stage()), clean_parity >> v_ring.stage() & 1);
        clean_parity ^= 1u << v_ring.stage();
      }
      products_fence();
      multiply_tiles<T, half_columns, BK, 64, BK>(o, shared.at + Tile::layout.p_at + p_ring.stage() * 64 * 128,
                                                  shared.v(v_ring.stage()) + warpgroup * half_columns / 64 * BK * 128);
      products_commit();
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
      load_terms(n);
      barrier_wait(shared.barrier(Tile::q_full), q_ring.parity());
      multiply_keys();
      products_wait<0>();
      settle(sums);
      release(Tile::k_empty + k_ring.stage());
      k_ring.advance();
      softmax_step(n, alpha);
      share_probabilities(n);

      // n is the tile whose probabilities are ready; a round computes those of the next one.
#pragma unroll 1
      while (!is_last()) {
        const int next = wait_keys(n);
        load_terms(next);
        settle(o);
        multiply_keys();
        multiply_values(n);
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
          for (int i = 0; i < half_columns / 2; ++i) o[i] *= alpha[i / 2 % 2];
        }
        share_probabilities(next);
        go_to(next);
      }
      release(Tile::q_empty);
      q_ring.advance();
      settle(o);
      multiply_values(n);
      products_wait<0>();
      settle(o);
      release_values(n);
    }

    const int b = work.b(), h = work.h();
    float weight[2], lse[2];
    softmax.finish(scale, p.sinks ? p.sinks[h] * log2_e : -INFINITY, weight, lse, [&](float (&l)[2]) {
      if (work.passes()) exchange(1, l, sums_ready, [](float x, float y) { return x + y; });
    });
    T *row[2], *half_row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = work.row0() + row_in_tile + 8 * r;
      row[r] = query < p.Nq ? static_cast<T*>(params.o.data) + b * params.o.stride[0] + h * params.o.stride[1] +
                                  query * params.o.stride[2]
                            : nullptr;
      half_row[r] = row[r] ? row[r] + column0 : nullptr;
      if (params.lse && row[r] && lane % 4 == 0 && warpgroup == 0)
        params.lse[(int64_t{b} * p.Hq + h) * p.Nq + query] = params.lse_base2 ? lse[r] : lse[r] * ln_2;
    }
    write_rows<T, half_columns>(o, weight, half_row, p.Dv - column0, lane);
    if (cleaned) {
      const RowPair pair = rows();
      return_nonfinite<Tile>(p, work, row, column0, min(column0 + half_columns, p.Dv), lane, [&](int r, int key) {
        const int query = work.row0() + row_in_tile + 8 * r;
        return key >= pair.begin[r] && key < pair.end[r] &&
               (!modified || ((!p.mask.data || mask_shows(p, b, h, query, key)) && !bias_hides(p, b, h, query, key)));
      });
    }
    release(Tile::work_empty + slot.stage());
  }
}

// Grid: at most one block an SM, no more than there are tiles.
template <class Tile>
__device__ __forceinline__ void forward(const ForwardParams& params, const HopperSchedule& s, const TensorMap* q,
                                        const TensorMap* k, const TensorMap* v) {
  extern __shared__ unsigned char raw_shared[];
  const ForwardShared<Tile> shared(raw_shared);
  // Through a shuffle, so that the compiler keeps what follows from it in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4,
            lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch_map(q);
    prefetch_map(k);
    prefetch_map(v);
    constexpr int consumers = warp_arrivals * Tile::warpgroups * 4, readers = consumers + warp_arrivals * 3;
    init_ring(shared, Tile::work_full, Tile::work_empty, 2, 1, readers);
    init_ring(shared, Tile::q_full, Tile::q_empty, Tile::consumers, 1, consumers / Tile::consumers);
    init_ring(shared, Tile::k_full, Tile::k_empty, Tile::stages, 1, consumers);
    init_ring(shared, Tile::v_full, Tile::v_empty, Tile::stages, 1, readers);
#pragma unroll
    for (int i = 0; i < Tile::stages; ++i) barrier_init(shared.barrier(Tile::v_clean + i), 3 * warp_arrivals);
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::feeder_registers>();
    if (warp == 0) {
      if (lane == 0) feed<Tile>(params, s, shared, q, k, v);
    } else {
      clean<Tile>(params.p, shared, warp - 1, lane);
    }
  } else {
    take_registers<Tile::consumer_registers>();
    if constexpr (Tile::halves)
      consume_halves<Tile>(params, shared, warpgroup - 1, threadIdx.x % 128);
    else
      consume<Tile>(params, shared, warpgroup - 1, threadIdx.x % 128);
  }
}

}  // namespace mfa::cuda::hopper
