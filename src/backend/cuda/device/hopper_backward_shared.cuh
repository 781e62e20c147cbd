// hopper_backward_shared.cuh: dk and dv of wide heads, whose sums do not fit one warpgroup: two work on the same 64
// keys. One computes S^T and P^T, sums dv and passes P^T on through shared memory; the other computes dP^T and sums dk.
// With modifiers what is passed on is P^T times the softcap's derivative, its sign set where dropout drops.
#pragma once

#include "hopper_backward.cuh"

namespace mfa::cuda::hopper {

// Each thread hands BN / 2 floats to the thread of its number in the other warpgroup.
template <class Tile>
__device__ __forceinline__ float4* exchange(const BackwardShared<Tile>& shared, int buffer, int thread) {
  return reinterpret_cast<float4*>(shared.base + Tile::layout.exchange_at + buffer * 64 * Tile::BN * 4) + thread;
}

template <class Tile>
__device__ __forceinline__ void consume_values(const BackwardParams& params, const BackwardShared<Tile>& shared,
                                               int thread) {
  using T = typename Tile::T;
  constexpr int BN = Tile::BN, columns = Tile::columns;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = thread / 32 * 16 + lane / 4;
  Ring<2> slot, p_ring;
  Ring<1> stay;
  Ring<Tile::stages> ring;
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };
  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const int passes = work.passes();
    float sums[columns / 2] = {};
    float x[BN / 2];
    uint32_t packed[BN / 4];
    bool started = false;
    if (passes > 0) barrier_wait(shared.barrier(Tile::stay_full), stay.parity());
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
      for (int column0 = work.first(); column0 < work.last(); column0 += BN) {
        const bool partial = !seen_in_full<Tile>(p, work, column0);
        barrier_wait(shared.barrier(Tile::first_full + ring.stage()), ring.parity());
        products_fence();
        multiply_columns<T, BN, columns, 64, BN>(x, shared.stay(0, 0), shared.first(ring.stage()));
        products_commit();
        const auto mask = mask_bits<Tile>(p, work, pass, place<Tile::modified>(row_in_tile, lane), column0);
        products_wait<0>();
        settle(x);
        barrier_arrive_if(shared.barrier(Tile::stay_empty),
                          lane < warp_arrivals && pass == passes - 1 && column0 + BN >= work.last());
        if (started) {
          release(Tile::first_empty + ring.stage_before());
          release(Tile::second_empty + ring.stage_before());
        }
        started = true;
        if (partial && !are_finite_queries(shared, ring.stage(), lane)) {
          barrier_wait(shared.barrier(Tile::second_full + ring.stage()), ring.parity());
          clean_step(shared, ring.stage());
        }

        const float none[2] = {};
        float factor[Tile::modified ? BN / 2 : 1];  // of what is passed on
        if constexpr (Tile::modified) {
          const auto at = gradient_tile<Tile>(p, work, pass, place<Tile::modified>(row_in_tile, lane), column0);
#pragma unroll
          for (int i = 0; i < BN / 2; ++i) factor[i] = 1.f;
          if (p.dropout_seed) at.mark_dropped(factor);
          at.scores(x, factor);
        }
        exponents<Tile>(x, none, shared, ring.stage(), Tile::modified ? 1.f : p.scale_log2, lane);
        if (!work.full(column0)) keep_seen<Tile>(x, work, p.Nq, {row_in_tile, lane}, column0);
        if constexpr (Tile::modified)
          if (p.mask.data) gradient_tile<Tile>(p, work, pass, {row_in_tile, lane}, column0).hide(x, mask);
        barrier_wait(shared.barrier(Tile::p_empty + p_ring.stage()), p_ring.parity() ^ 1);
        float4* to = exchange(shared, p_ring.stage(), thread);
#pragma unroll
        for (int i = 0; i < BN / 8; ++i) {
          // What is not seen stays 0, though its factor be NaN.
          const auto pass_on = [&](int k) {
            const float weight = x[4 * i + k];
            return !Tile::modified || weight == 0.f ? weight : weight * factor[4 * i + k];
          };
          to[128 * i] = {pass_on(0), pass_on(1), pass_on(2), pass_on(3)};
        }
        release(Tile::p_full + p_ring.stage());
        p_ring.advance();
        if constexpr (Tile::modified)
          if (p.dropout_seed) drop_marked<BN>(x, factor, p.dropout_scale);
        pack_fragment<T, BN>(x, packed);
        barrier_wait(shared.barrier(Tile::second_full + ring.stage()), ring.parity());
        settle(packed);
        products_fence();
        multiply_rows<T, columns, BN, BN>(sums, packed, shared.second(ring.stage()), 1);
        products_commit();
        ring.advance();
      }
    products_wait<0>();
    settle(sums);
    if (passes > 0) {
      release(Tile::first_empty + ring.stage_before());
      release(Tile::second_empty + ring.stage_before());
      stay.advance();
    }
    write_gradient<Tile>(sums, params.dv, work, row_in_tile, p.Nk, p.Dv, 1.f, lane);
    release(Tile::work_empty + slot.stage());
  }
}

template <class Tile>
__device__ __forceinline__ void consume_keys(const BackwardParams& params, const BackwardShared<Tile>& shared,
                                             int thread) {
  using T = typename Tile::T;
  constexpr int BN = Tile::BN, columns = Tile::columns;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = thread / 32 * 16 + lane / 4;
  Ring<2> slot, p_ring;
  Ring<1> stay;
  Ring<Tile::stages> ring;
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };
  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const int passes = work.passes();
    float sums[columns / 2] = {};
    float x[BN / 2], y[BN / 2];
    uint32_t packed[BN / 4];
    bool started = false;
    if (passes > 0) barrier_wait(shared.barrier(Tile::stay_full), stay.parity());
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
      for (int column0 = work.first(); column0 < work.last(); column0 += BN) {
        const bool partial = !seen_in_full<Tile>(p, work, column0);
        barrier_wait(shared.barrier(Tile::second_full + ring.stage()), ring.parity());
        products_fence();
        multiply_columns<T, BN, columns, 64, BN>(y, shared.stay(1, 0), shared.second(ring.stage()));
        products_commit();
        products_wait<0>();
        settle(y);
        barrier_arrive_if(shared.barrier(Tile::stay_empty),
                          lane < warp_arrivals && pass == passes - 1 && column0 + BN >= work.last());
        if (started) {
          release(Tile::first_empty + ring.stage_before());
          release(Tile::second_empty + ring.stage_before());
        }
        started = true;
        barrier_wait(shared.barrier(Tile::first_full + ring.stage()), ring.parity());
        if (partial && !are_finite_queries(shared, ring.stage(), lane)) clean_step(shared, ring.stage());

        barrier_wait(shared.barrier(Tile::p_full + p_ring.stage()), p_ring.parity());
        const float4* from = exchange(shared, p_ring.stage(), thread);
#pragma unroll
        for (int i = 0; i < BN / 8; ++i) {
          const float4 got = from[128 * i];
          x[4 * i] = got.x, x[4 * i + 1] = got.y, x[4 * i + 2] = got.z, x[4 * i + 3] = got.w;
        }
        const float none[2] = {};
        if constexpr (Tile::modified)
          if (p.dropout_seed) drop_marked<BN>(y, x, p.dropout_scale);
        subtract_delta<Tile>(y, none, shared, ring.stage(), lane);
        if constexpr (Tile::modified) {
#pragma unroll
          for (int i = 0; i < BN / 2; ++i) x[i] = fabsf(x[i]);
        }
        score_gradients<BN>(x, y, partial);
        release(Tile::p_empty + p_ring.stage());
        p_ring.advance();
        pack_fragment<T, BN>(y, packed);
        settle(packed);
        products_fence();
        multiply_rows<T, columns, BN, BN>(sums, packed, shared.first(ring.stage()), 1);
        products_commit();
        ring.advance();
      }
    products_wait<0>();
    settle(sums);
    if (passes > 0) {
      release(Tile::first_empty + ring.stage_before());
      release(Tile::second_empty + ring.stage_before());
      stay.advance();
    }
    write_gradient<Tile>(sums, params.dk, work, row_in_tile, p.Nk, p.D, p.scale, lane);
    release(Tile::work_empty + slot.stage());
  }
}

// Grid: at most one block an SM, no more than there are tiles.
template <class Tile>
__device__ __forceinline__ void backward(const BackwardParams& params, const HopperSchedule& s,
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
    constexpr int readers = warp_arrivals * Tile::consumer_warps;
    init_ring(shared, Tile::work_full, Tile::work_empty, 2, 1, readers);
    init_ring(shared, Tile::p_full, Tile::p_empty, 2, 4 * warp_arrivals, 4 * warp_arrivals);
    init_ring(shared, Tile::stay_full, Tile::stay_empty, Tile::consumers, 1, readers / Tile::consumers);
    init_ring(shared, Tile::first_full, Tile::first_empty, Tile::stages, 1, readers);
    init_ring(shared, Tile::second_full, Tile::second_empty, Tile::stages, 1, readers);
    barrier_init(shared.barrier(Tile::voted), readers);
    *shared.found(0) = 0;
    *shared.found(1) = 0;
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::feeder_registers>();
    if (warp == 0 && lane == 0) feed<Tile>(params, s, shared, maps);
  } else {
    take_registers<Tile::consumer_registers>();
    if constexpr (!Tile::shared_keys)
      consume<Tile>(params, shared, warpgroup - 1, threadIdx.x % 128);
    else if (warpgroup == 1)
      consume_values<Tile>(params, shared, threadIdx.x % 128);
    else
      consume_keys<Tile>(params, shared, threadIdx.x % 128);
  }
}

}  // namespace mfa::cuda::hopper
