// hopper_backward_fused.cuh: gradients of q, k and v of 16-bit inputs in one pass: keys stay, queries pass, as in the
// dk, dv kernel of hopper_backward.cuh, and dS is used once more, for dQ. Five products a pair of tiles, not seven.
#pragma once

#include "hopper_backward_parts.cuh"

namespace mfa::cuda::hopper {

// dS^T of 64 keys, the first or second, as the products of dQ read it: 64 queries of [128 keys][128 bytes].
template <class Tile>
__device__ __forceinline__ void keep_score_gradients(const uint32_t (&ds)[Tile::BN / 4], uint32_t to, int keys,
                                                     int thread) {
  const int lane = thread % 32, key = 64 * keys + thread / 32 * 16 + lane % 16, half = lane / 16;
#pragma unroll
  for (int j = 0; j < Tile::BN / 16; ++j) store_matrices(to + key * 128 + ((2 * j + half) ^ key % 8) * 16, ds + 4 * j);
}

// 64 columns of dQ of a tile = dS K, in units of 1 / scale.
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

// Leaves the sums of a warpgroup in shared memory, or adds those that another left.
template <int n>
__device__ __forceinline__ void keep_fragment(const float (&d)[n], unsigned char* to, int thread) {
#pragma unroll
  for (int i = 0; i < n / 4; ++i)
    reinterpret_cast<float4*>(to)[128 * i + thread] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
}
template <int n>
__device__ __forceinline__ void add_fragment(float (&d)[n], const unsigned char* from, int thread) {
#pragma unroll
  for (int i = 0; i < n / 4; ++i) {
    const float4 x = reinterpret_cast<const float4*>(from)[128 * i + thread];
    d[4 * i] += x.x, d[4 * i + 1] += x.y, d[4 * i + 2] += x.z, d[4 * i + 3] += x.w;
  }
}

// Zeroes the NaNs and infinities of the stationary keys, for the sums of dq of tiles with hidden elements. Called by
// all threads of both warpgroups.
template <class Tile>
__device__ __forceinline__ void clean_keys(const BackwardShared<Tile>& shared) {
  constexpr int warps = Tile::rows / 16;
  clean_tile<typename Tile::T, Tile::consumers * Tile::layout.stay_bytes, warps>(shared.base, threadIdx.x / 32 - 4,
                                                                                 threadIdx.x % 32);
  fence_async_shared();
  named_sync(1, 32 * warps);
}

// Of 64 keys of the warpgroup, numbered `keys`, and tile n of the queries: x, S before, becomes P and is added to dv;
// y, dP once its products are finished, becomes dS. Both are left packed too. The products of dv are under way
// afterwards.
template <class Tile>
__device__ __forceinline__ void differentiate(float (&x)[Tile::BN / 2], float (&y)[Tile::BN / 2],
                                              float (&dv)[Tile::columns / 2], uint32_t (&packed_p)[Tile::BN / 4],
                                              uint32_t (&packed_ds)[Tile::BN / 4], const BackwardShared<Tile>& shared,
                                              uint32_t stage, const Problem& p, const SharedWork& work, int keys, int n,
                                              bool partial, int lane) {
  using T = typename Tile::T;
  constexpr int BN = Tile::BN;
  const float none[2] = {};
  exponents<Tile>(x, none, shared, stage, p.scale_log2, lane);
  if (partial) {
    const Place at = place_anew<Tile::alternate>();
    keep_seen<Tile>(x, work, p.Nq, {at.row + 64 * keys, at.lane}, n * BN);
  }
  pack_fragment<T, BN>(x, packed_p);
  settle(packed_p);
  products_fence();
  multiply_rows<T, Tile::columns, BN, BN>(dv, packed_p, shared.second(stage), 1);
  products_commit();
  settle(x);
  products_wait<1>();
  settle(y);
  subtract_delta<Tile>(y, none, shared, stage, lane);
  score_gradients<BN>(x, y, partial);
  pack_fragment<T, BN>(y, packed_ds);
  settle(packed_ds);
}

// Each warpgroup keeps 64 of the keys, and both work on every tile of queries.
template <class Tile>
__device__ __forceinline__ void consume_together(const BackwardParams& params, const BackwardShared<Tile>& shared,
                                                 int warpgroup, int thread) {
  using T = typename Tile::T;
  constexpr int BN = Tile::BN, columns = Tile::columns;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = 64 * warpgroup + thread / 32 * 16 + lane / 4;

  Ring<2> slot;
  Ring<1> stay;
  uint32_t step = 0;  // says at which stage every ring is
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };

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
      if (!work.full(work.first()) || !work.full(work.last() - 1)) clean_keys(shared);
    }
    int n = work.start();
    const uint32_t first_step = step;
#pragma unroll 1
    for (; step != end; ++step) {
      constexpr int stages = Tile::stages;
      const uint32_t stage = step % stages, parity = step / stages & 1, half = step & 1;
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
      if (step != first_step)
        release(Tile::first_empty + (step - 1) % stages);  // dK of the step before is finished too
      if (partial && !are_finite_queries(shared, stage, lane)) {
        products_wait<0>();
        settle(y);
        clean_step(shared, stage);
      }
      differentiate<Tile>(x, y, dv, packed_p, packed_ds, shared, stage, p, work, 0, n, partial, lane);
      const uint32_t ds = shared.at + Tile::layout.ds_at + half * Tile::layout.ds_bytes;
      keep_score_gradients<Tile>(packed_ds, ds, warpgroup, thread);
      fence_async_shared();
      named_sync(1, 128 * Tile::consumers);
      products_wait<0>();  // frees packed_p
      settle(dv);
      float dq[Tile::dq_columns / 2];
      products_fence();
      multiply_queries<Tile>(dq, shared, ds, warpgroup);
      products_commit();
      multiply_rows<T, columns, BN, BN>(dk, packed_ds, shared.first(stage), 1);
      products_commit();
      products_wait<1>();
      settle(dq);
      release(Tile::second_empty + stage);
      barrier_wait(shared.barrier(Tile::dq_empty + half), step >> 1 & 1 ^ 1);
      keep_fragment(
          dq, shared.base + Tile::layout.dq_at + half * Tile::layout.dq_bytes + warpgroup * Tile::dq_columns * 256,
          thread);
      fence_async_shared();
      release(Tile::dq_full + half);
      if (++n == work.last()) n = work.first();
    }
    products_wait<0>();
    settle(dk);
    settle(dv);
    if (passes > 0) {
      release(Tile::first_empty + (step - 1) % Tile::stages);
      release(Tile::stay_empty);
    }
    write_gradient<Tile>(dk, params.dk, work, row_in_tile, p.Nk, p.D, p.scale, lane);
    write_gradient<Tile>(dv, params.dv, work, row_in_tile, p.Nk, p.Dv, 1.f, lane);
    release(Tile::work_empty + slot.stage());
  }
}

// Each warpgroup keeps all keys and takes every other tile of queries, so that one multiplies while the other computes
// exponents. At the end they add up.
template <class Tile>
__device__ __forceinline__ void consume_alternate(const BackwardParams& params, const BackwardShared<Tile>& shared,
                                                  int warpgroup, int thread) {
  using T = typename Tile::T;
  constexpr int BN = Tile::BN, columns = Tile::columns, stages = Tile::stages, parts = Tile::parts;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = thread / 32 * 16 + lane / 4;
  const uint32_t ds = shared.at + Tile::layout.ds_at + warpgroup * Tile::layout.ds_bytes;

  Ring<2> slot;
  Ring<1> stay;
  uint32_t end = 0;  // steps say at which stage every ring is; the even ones are the first warpgroup's
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const int passes = work.passes();
    float dk[2][columns / 2] = {}, dv[2][columns / 2] = {};  // of the first and the second 64 keys
    float x[BN / 2], y[BN / 2];                              // S, then P; dP, then dS
    uint32_t packed_p[BN / 4], packed_ds[BN / 4];
    if (passes > 0) {
      barrier_wait(shared.barrier(Tile::stay_full), stay.parity());
      stay.advance();
      if (!work.full(work.first()) || !work.full(work.last() - 1)) clean_keys(shared);
    }
    int n = work.start();
    uint32_t step = end;
    if (passes > 0) end += passes * (work.last() - work.first());
    const auto advance = [&] {
      ++step;
      if (++n == work.last()) n = work.first();
    };
    if ((step & 1) != warpgroup) advance();
#pragma unroll 1
    while (static_cast<int>(end - step) > 0) {
      const uint32_t stage = step % stages, parity = step / stages & 1;
      const bool partial = !work.full(n);
      barrier_wait(shared.barrier(Tile::first_full + stage), parity);
      products_fence();
      multiply_columns<T, BN, columns, 64, BN>(x, shared.stay(0, 0), shared.first(stage));
      products_commit();
      barrier_wait(shared.barrier(Tile::second_full + stage), parity);
      products_fence();
      multiply_columns<T, BN, columns, 64, BN>(y, shared.stay(1, 0), shared.second(stage));
      products_commit();
      if (partial && !are_finite_queries(shared, stage, lane)) {
        products_wait<0>();
        clean_step(shared, stage);
      }
      const auto differentiate_keys = [&](float (&dv)[columns / 2], int keys) {
        products_wait<1>();
        settle(x);
        differentiate<Tile>(x, y, dv, packed_p, packed_ds, shared, stage, p, work, keys, n, partial, lane);
        keep_score_gradients<Tile>(packed_ds, ds, keys, thread);
        products_wait<0>();  // frees packed_p
        settle(dv);
      };
      differentiate_keys(dv[0], 0);
      products_fence();
      multiply_rows<T, columns, BN, BN>(dk[0], packed_ds, shared.first(stage), 1);
      multiply_columns<T, BN, columns, 64, BN>(x, shared.stay(0, 1), shared.first(stage));
      products_commit();
      products_fence();
      multiply_columns<T, BN, columns, 64, BN>(y, shared.stay(1, 1), shared.second(stage));
      products_commit();
      differentiate_keys(dv[1], 1);
      settle(dk[0]);
      fence_async_shared();
      sync_readers<Tile>();
      float dq[Tile::dq_columns / 2];
      products_fence();
      multiply_queries<Tile>(dq, shared, ds, 0);
      products_commit();
      multiply_rows<T, columns, BN, BN>(dk[1], packed_ds, shared.first(stage), 1);
      products_commit();
      products_wait<1>();
      settle(dq);
      release(Tile::second_empty + stage);
      barrier_wait(shared.barrier(Tile::dq_empty + step % parts), step / parts & 1 ^ 1);
      keep_fragment(dq, shared.base + Tile::layout.dq_at + step % parts * Tile::layout.dq_bytes, thread);
      fence_async_shared();
      release(Tile::dq_full + step % parts);
      products_wait<0>();
      settle(dk[1]);
      release(Tile::first_empty + stage);
      advance();
      advance();
    }
    if (passes > 0) {
      release(Tile::stay_empty);
      // The first warpgroup adds up dk, the second dv.
      step += (warpgroup + parts - step % parts) % parts;
      barrier_wait(shared.barrier(Tile::dq_empty + warpgroup), step / parts & 1 ^ 1);
      unsigned char* const places[2] = {shared.base + Tile::layout.ds_at, shared.base + Tile::layout.dq_at};
      const auto leave = [&](const float (&d)[2][columns / 2]) {
        for (int keys : {0, 1}) keep_fragment(d[keys], places[keys] + warpgroup * Tile::layout.ds_bytes, thread);
        named_sync(1, 128 * Tile::consumers);
      };
      const auto add = [&](float (&d)[2][columns / 2]) {
        for (int keys : {0, 1}) add_fragment(d[keys], places[keys] + (1 - warpgroup) * Tile::layout.ds_bytes, thread);
        named_sync(1, 128 * Tile::consumers);
      };
      if (warpgroup == 0) {
        leave(dv);
        add(dk);
      } else {
        leave(dk);
        add(dv);
      }
    }
    const auto write = [&](const float (&d)[2][columns / 2], const MutableTensor& to, int width, float scale) {
      for (int keys : {0, 1})
        write_gradient<Tile>(d[keys], to, work, row_in_tile + 64 * keys, p.Nk, width, scale, lane);
    };
    if (warpgroup == 0)
      write(dk, params.dk, p.D, p.scale);
    else
      write(dv, params.dv, p.Dv, 1.f);
    release(Tile::work_empty + slot.stage());
  }
}

// Grid: at most one block an SM, no more than there are tiles; at least two groups of blocks must run at the same time.
template <class Tile>
__device__ __forceinline__ void backward_fused(const BackwardParams& params, const HopperSchedule& s,
                                               const BackwardMaps& maps) {
  extern __shared__ __align__(1024) unsigned char aligned_shared[];
  const BackwardShared<Tile> shared(shared_address(aligned_shared));
  // Through a shuffle, so that the compiler keeps what follows from it in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4,
            lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch_map(maps.stay_first);
    prefetch_map(maps.stay_second);
    prefetch_map(maps.pass_first);
    prefetch_map(maps.pass_second);
    constexpr int readers = warp_arrivals * Tile::consumer_warps, all_readers = warp_arrivals * 4 * Tile::consumers;
    init_ring(shared, Tile::work_full, Tile::work_empty, 2, 1, all_readers + warp_arrivals * Tile::adders);
    init_ring(shared, Tile::dq_full, Tile::dq_empty, Tile::parts, readers, 1);
    init_ring(shared, Tile::stay_full, Tile::stay_empty, 1, 1, all_readers);
    init_ring(shared, Tile::first_full, Tile::first_empty, Tile::stages, 1, readers);
    init_ring(shared, Tile::second_full, Tile::second_empty, Tile::stages, 1, readers);
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::feeder_registers>();
    if (warp == 0) {
      if (lane == 0) feed_fused<Tile>(params, s, shared.at, maps);
    } else if (warp <= Tile::adders) {
      add_queries<Tile>(params, s, shared.at, warp - 1, lane);
    }
  } else {
    take_registers<Tile::consumer_registers>();
    if constexpr (Tile::alternate)
      consume_alternate<Tile>(params, shared, warpgroup - 1, threadIdx.x % 128);
    else
      consume_together<Tile>(params, shared, warpgroup - 1, threadIdx.x % 128);
    finish_queries<Tile>(params, lane);
  }
}

}  // namespace mfa::cuda::hopper
