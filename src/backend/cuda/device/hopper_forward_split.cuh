// hopper_forward_split.cuh: softmax attention forward for float32 inputs on 16-bit matrix products.
//
// A float32 number, scaled into range by a power of two, is the sum of two float16 numbers, x = x0 + x1, but for at
// most a unit in its last place: 2 * 11 significant bits and a sign between. A product of two such sums is taken as
// three products of parts, the smallest first; the fourth is of the size of a float32 rounding. `split` writes the
// parts of q, k and v beside each other once; `forward_split` is then the loop of hopper_forward.cuh with three
// products in the place of one. Tensor cores cut what they add instead of rounding it, so long sums are made of short
// ones, which start from zero and are added in registers: scores of 64 columns, outputs of one key tile. Idea: Henry,
// Tang & Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations",
// arXiv:1904.06376.
//
// Tiles of 64 rows are scaled as one, so that their greatest magnitude is near 2^15; what is 2^-16 of that still has
// the bits of a float32. Rows that are smaller throughout are set apart, as are those with NaN, infinity or what may
// overflow in a product: their parts are zero, and their scores and outputs are computed by multiply-adds.
#pragma once

#include "hopper_forward.cuh"

namespace mfa::cuda::hopper {

// Products of elements below this stay in range.
constexpr float split_limit = 0x1p62f;
// The greatest magnitude of a tile is scaled to 2^split_exponent or up to twice that; rows below 2^-split_spread of it
// are set apart.
constexpr int split_exponent = 14, split_spread = 16;

template <int choice, bool modified_>
struct SplitTile {
  using T = float;
  using Part = __half;
  static constexpr bool modified = modified_;  // by anything but a softcap, whose function here errs too much
  static constexpr TileChoice c = modified ? split_modified_tiles[choice] : split_tiles[choice];
  static constexpr int columns = c.columns, consumers = c.consumers, BQ = 64 * consumers, BK = c.tile,
                       stages = c.stages;
  static constexpr SplitLayout layout = split_layout(c);
  static constexpr int threads = layout.threads, q_bytes = split_parts * layout.q_part,
                       k_bytes = split_parts * layout.k_part;
  static constexpr int feeder_registers = consumers == 3 ? 56 : 40, consumer_registers = consumers == 3 ? 152 : 232;
  // Barriers, in order.
  static constexpr int work_full = 0, work_empty = 2, q_full = 4, q_empty = q_full + consumers,
                       k_full = q_empty + consumers, k_empty = k_full + stages, v_full = k_empty + stages,
                       v_empty = v_full + stages, barriers = v_empty + stages;
  static_assert(barriers == split_barriers(c) && BK == split_rows);
  static_assert(layout.bytes <= shared_bytes_of_block);
};

template <class Tile>
struct SplitShared {
  uint32_t at;  // shared address, aligned to 1024 bytes

  __device__ __forceinline__ explicit SplitShared(unsigned char* raw) : at((shared_address(raw) + 1023) & ~1023u) {}
  __device__ __forceinline__ uint32_t barrier(int i) const { return at + Tile::layout.barriers_at + i * 8; }
  __device__ __forceinline__ uint32_t q(int warpgroup) const { return at + warpgroup * Tile::q_bytes; }
  __device__ __forceinline__ uint32_t k(int stage) const { return at + Tile::layout.k_at + stage * Tile::k_bytes; }
  __device__ __forceinline__ uint32_t v(int stage) const { return at + Tile::layout.v_at + stage * Tile::k_bytes; }
  // What is known of the tiles there.
  __device__ __forceinline__ uint32_t k_facts(int stage) const { return facts(stage); }
  __device__ __forceinline__ uint32_t v_facts(int stage) const { return facts(Tile::stages + stage); }
  __device__ __forceinline__ SharedWork work(int slot) const {
    return SharedWork(at + Tile::layout.work_at + slot * SharedWork::bytes);
  }

 private:
  __device__ __forceinline__ uint32_t facts(int i) const {
    return at + Tile::layout.facts_at + i * sizeof(SplitTileFacts);
  }
};

// How many tiles of parts these rows are.
__device__ __forceinline__ int tiles_of(int rows) { return (rows + split_rows - 1) / split_rows; }

__device__ __forceinline__ SplitTileFacts shared_facts(uint32_t at) {
  SplitTileFacts facts;
  uint32_t apart[2];
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(apart[0]), "=r"(apart[1]), "=f"(facts.scale), "=r"(facts.nonfinite)
               : "r"(at)
               : "memory");
  facts.apart = uint64_t{apart[1]} << 32 | apart[0];
  return facts;
}

// Two numbers as pairs of parts.
__device__ __forceinline__ void split_pair(float x, float y, uint32_t (&part)[split_parts]) {
  const __half2 first = __floats2half2_rn(x, y);
  const float2 taken = __half22float2(first);
  const __half2 second = __floats2half2_rn(x - taken.x, y - taken.y);
  part[0] = reinterpret_cast<const uint32_t&>(first);
  part[1] = reinterpret_cast<const uint32_t&>(second);
}

// Writes the parts of 64 rows of q, k or v, zeros from column D on, and the facts of the tile. 256 threads; grid: the
// row tiles of all heads of q, then of k, then of v.
template <int columns>
__device__ __forceinline__ void split(const Problem& p, const SplitOperands& s) {
  constexpr int warps = 8, rows = split_rows / warps, pairs = columns / 64;
  __shared__ uint32_t tops[split_rows];
  const int q_tiles = tiles_of(p.Nq), k_tiles = tiles_of(p.Nk);
  const int64_t of_q = int64_t{p.B} * p.Hq * q_tiles, of_k = int64_t{p.B} * p.Hkv * k_tiles;
  const int64_t id = blockIdx.x;
  const int which = id < of_q ? 0 : id < of_q + of_k ? 1 : 2;
  const int64_t within = which == 0 ? id : id - of_q - (which == 2 ? of_k : 0);
  const int tiles = which ? k_tiles : q_tiles, heads = which ? p.Hkv : p.Hq, N = which ? p.Nk : p.Nq;
  const int D = which == 2 ? p.Dv : p.D;
  const Tensor& x = which == 0 ? p.q : which == 1 ? p.k : p.v;
  const int64_t head = within / tiles;
  const int n0 = static_cast<int>(within % tiles) * split_rows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* from = static_cast<const float*>(x.data) + head / heads * x.stride[0] + head % heads * x.stride[1];

  float in[rows][pairs][2];
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int j = 0; j < pairs; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = n0 + warp + r * warps, column = 64 * j + 2 * lane + e;
        in[r][j][e] = n < N && column < D ? from[n * x.stride[2] + column] : 0.f;
      }

  // Magnitudes are ordered as their bits are, with NaN above infinity.
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    uint32_t top = 0;
#pragma unroll
    for (int j = 0; j < pairs; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) top = max(top, __float_as_uint(in[r][j][e]) & 0x7fffffffu);
    top = __reduce_max_sync(0xffffffffu, top);
    if (lane == 0) tops[warp + r * warps] = top;
  }
  __syncthreads();
  const uint32_t infinity = 0x7f800000u, limit = which == 2 ? infinity : __float_as_uint(split_limit);
  const uint32_t top[2] = {tops[lane], tops[32 + lane]};
  const uint32_t tile_top =
      __reduce_max_sync(0xffffffffu, max(top[0] < limit ? top[0] : 0, top[1] < limit ? top[1] : 0));
  uint32_t apart[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    apart[i] = __ballot_sync(0xffffffffu, top[i] >= limit || (top[i] && top[i] + (split_spread << 23) < tile_top));
  const bool nonfinite = __any_sync(0xffffffffu, max(top[0], top[1]) >= infinity);
  // The biased exponents of the tile's scale and of its inverse, both normal numbers.
  const int exponent = max(static_cast<int>(tile_top >> 23) - split_exponent, 1);
  const float scale = __uint_as_float(exponent << 23), inverse = __uint_as_float((254 - exponent) << 23);

  const int64_t plane = int64_t{p.B} * heads * N * columns;
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<__half*>(s.parts[which]) + head * N * columns);
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int row = warp + r * warps, n = n0 + row;
    const float factor = apart[r * warps / 32] >> row % 32 & 1 ? 0.f : inverse;
#pragma unroll
    for (int j = 0; j < pairs; ++j) {
      uint32_t part[split_parts];
      split_pair(factor ? in[r][j][0] * factor : 0.f, factor ? in[r][j][1] * factor : 0.f, part);
      if (n < N) {
#pragma unroll
        for (int i = 0; i < split_parts; ++i) to[(i * plane + int64_t{n} * columns) / 2 + 32 * j + lane] = part[i];
      }
    }
  }
  if (threadIdx.x == 0) s.tiles[which][within] = {uint64_t{apart[1]} << 32 | apart[0], scale, nonfinite};
}

// The feeding warpgroup's first thread. Maps are of [parts * B, H, N, columns].
template <class Tile>
__device__ __forceinline__ void feed_split(const Problem& p, const SplitOperands& operands, const HopperSchedule& s,
                                           const SplitShared<Tile>& shared, const TensorMap* q, const TensorMap* k,
                                           const TensorMap* v) {
  constexpr int facts_bytes = sizeof(SplitTileFacts);
  Ring<2> slot;
  Ring<1> q_ring;
  Ring<Tile::stages> ring;
  const auto load = [&](uint32_t to, uint32_t facts_to, const TensorMap* map, const SplitTileFacts* facts, int full,
                        int empty, const SharedWork& w, int n) {
    const int kv_head = w.b() * p.Hkv + w.h() / p.G;
    barrier_wait(shared.barrier(empty + ring.stage()), ring.parity() ^ 1);
    const uint32_t barrier = shared.barrier(full + ring.stage());
    barrier_arrive_expect(barrier, Tile::k_bytes + facts_bytes);
    copy_bytes(facts_to, facts + (kv_head * tiles_of(p.Nk) + n), facts_bytes, barrier);
#pragma unroll
    for (int i = 0; i < split_parts; ++i)
      load_tile<Tile::BK, Tile::columns>(to + i * Tile::layout.k_part, map, barrier, n * Tile::BK, w.h() / p.G,
                                         w.b() + i * p.B);
  };
  for (int id = blockIdx.x;; id = draw_tile(s)) {
    barrier_wait(shared.barrier(Tile::work_empty + slot.stage()), slot.parity() ^ 1);
    const SharedWork w = shared.work(slot.stage());
    leave_work<Tile>(w, p, s, id);
    barrier_arrive(shared.barrier(Tile::work_full + slot.stage()));
    slot.advance();
    if (w.b() < 0) break;
    if (!w.passes()) continue;
#pragma unroll 1
    for (int i = 0; i < Tile::consumers; ++i) {
      const uint32_t full = shared.barrier(Tile::q_full + i);
      barrier_wait(shared.barrier(Tile::q_empty + i), q_ring.parity() ^ 1);
      barrier_arrive_expect(full, Tile::q_bytes);
#pragma unroll
      for (int part = 0; part < split_parts; ++part)
        load_tile<64, Tile::columns>(shared.q(i) + part * Tile::layout.q_part, q, full, w.row0() + 64 * i, w.h(),
                                     w.b() + part * p.B);
    }
    q_ring.advance();
    for (int n = w.last() - 1; n >= w.first(); --n, ring.advance()) {
      load(shared.k(ring.stage()), shared.k_facts(ring.stage()), k, operands.tiles[1], Tile::k_full, Tile::k_empty, w,
           n);
      load(shared.v(ring.stage()), shared.v_facts(ring.stage()), v, operands.tiles[2], Tile::v_full, Tile::v_empty, w,
           n);
    }
  }
}

// Calls f(part of a, part of b) for the products of parts that count but the largest.
template <class F>
__device__ __forceinline__ void for_small_parts(const F& f) {
  f(0, 1);
  f(1, 0);
}

// sums = scale Q K^T. The products of the first parts are summed 64 columns at a time.
template <class Tile>
__device__ __forceinline__ void multiply_scores(float (&sums)[Tile::BK / 2], uint32_t q, uint32_t k, float scale) {
  using Part = typename Tile::Part;
  constexpr int BK = Tile::BK, halves = Tile::columns / 64;
  zero(sums);
  products_fence();
  for_small_parts([&](int a, int b) {
    multiply_columns<Part, BK, Tile::columns, 64, BK, false>(sums, q + a * Tile::layout.q_part,
                                                             k + b * Tile::layout.k_part);
  });
  products_commit();
  float piece[halves][BK / 2];
#pragma unroll
  for (int half = 0; half < halves; ++half) {
    products_fence();
    multiply_columns<Part, BK, 64, 64, BK>(piece[half], q + half * 64 * 128, k + half * BK * 128);
    products_commit();
  }
  products_wait<0>();
  settle(sums);
#pragma unroll
  for (int half = 0; half < halves; ++half) {
    settle(piece[half]);
#pragma unroll
    for (int i = 0; i < BK / 2; ++i) sums[i] += piece[half][i];
  }
#pragma unroll
  for (float& x : sums) x *= scale;
}

// Of a tile, the scores of rows and keys that were set apart, from the elements themselves. Rare, and therefore small
// rather than fast.
template <class Tile>
__device__ __forceinline__ void scores_apart(float (&sums)[Tile::BK / 2], const Problem& p, int b, int h, int query,
                                             uint64_t queries_apart, int key0, uint64_t keys_apart, int lane) {
  const float* q = static_cast<const float*>(p.q.data) + b * p.q.stride[0] + h * p.q.stride[1];
  const float* k = static_cast<const float*>(p.k.data) + b * p.k.stride[0] + h / p.G * p.k.stride[1];
#pragma unroll
  for (int i = 0; i < Tile::BK / 2; ++i) {
    const int row = query + i / 2 % 2 * 8, in_tile = i / 4 * 8 + lane % 4 * 2 + i % 2, key = key0 + in_tile;
    if (row >= p.Nq || key >= p.Nk || !((queries_apart >> row % split_rows | keys_apart >> in_tile) & 1) ||
        (Tile::modified && bias_hides(p, b, h, row, key)))
      continue;
    float sum = 0.f;
#pragma unroll 1
    for (int d = 0; d < p.D; ++d) sum = fmaf(q[row * p.q.stride[2] + d], k[key * p.k.stride[2] + d], sum);
    sums[i] = sum;
  }
}

// Adds to o what finite values of keys that were set apart give.
template <class Tile>
__device__ __forceinline__ void add_values_apart(float (&o)[Tile::columns / 2], const float (&weights)[Tile::BK / 2],
                                                 const Problem& p, int b, int h, int key0, uint64_t keys_apart,
                                                 int lane) {
  const float* v = static_cast<const float*>(p.v.data) + b * p.v.stride[0] + h / p.G * p.v.stride[1];
#pragma unroll 1
  for (; keys_apart; keys_apart &= keys_apart - 1) {
    const int key = __ffsll(keys_apart) - 1, from = lane / 4 * 4 + key % 8 / 2;
    float weight[2] = {};
#pragma unroll
    for (int i = 0; i < Tile::BK / 2; ++i)
      if (i / 4 == key / 8 && i % 2 == key % 2) weight[i / 2 % 2] = weights[i];
#pragma unroll
    for (float& x : weight) x = __shfl_sync(0xffffffffu, x, from);
#pragma unroll
    for (int i = 0; i < Tile::columns / 2; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const float x = column < p.Dv ? v[(key0 + key) * p.v.stride[2] + column] : 0.f;
      if (fabsf(x) < INFINITY) o[i] = fmaf(weight[i / 2 % 2], x, o[i]);
    }
  }
}

// Parts leave up to one unit in the last place of a value: nothing among the roundings of a sum, but all of the error
// where one key has all of a row's weight. So each lane notes, of its two rows, the key that has nearly all of the
// weight that the lane has seen.
struct LeadingKey {
  static constexpr float share = .875f;
  float weight[2] = {};  // as Softmax counts it, dropout's factor aside
  int key[2] = {};

  // After a step over keys from key0 on, whose weights were multiplied by `kept` or dropped.
  template <int BK>
  __device__ __forceinline__ void note(const float (&weights)[BK / 2], const Softmax& softmax, float scale,
                                       const float (&alpha)[2], float kept, int key0, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weight[r] *= alpha[r];
      const float top = exp2_fast((softmax.own[r] - softmax.m[r]) * scale);
      if (top < share * softmax.l[r] || !(softmax.own[r] > -INFINITY)) continue;
      weight[r] = 0.f;
#pragma unroll
      for (int i = 0; i < BK / 4; ++i)
        if (weights[i / 2 * 4 + 2 * r + i % 2] == top * kept) {
          weight[r] = top;
          key[r] = key0 + i / 2 * 8 + lane % 4 * 2 + i % 2;
        }
    }
  }

  // Adds what the parts leave of that key's value to a row that is all but that value. inverse_l: of the rows' sums.
  template <int columns>
  __device__ __forceinline__ void complete(float (&o)[columns / 2], const Problem& p, const SplitTileFacts* facts,
                                           const float* v, const float (&inverse_l)[2], float kept, int lane) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t leads = __ballot_sync(0xffffffffu, weight[r] * inverse_l[r] >= share) >> lane / 4 * 4 & 15;
      const int from = lane / 4 * 4 + __ffs(leads) - 1, n = __shfl_sync(0xffffffffu, key[r], from);
      const float factor = __shfl_sync(0xffffffffu, weight[r], from) * kept;
      if (!leads || facts[n / split_rows].apart >> n % split_rows & 1) continue;
      const float scale = facts[n / split_rows].scale, inverse = 1.f / scale;
#pragma unroll
      for (int i = 0; i < columns / 4; ++i) {
        const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
        const float x = column < p.Dv ? v[n * p.v.stride[2] + column] * inverse : 0.f;
        const float rest = x - __half2float(__float2half_rn(x));
        o[i / 2 * 4 + 2 * r + i % 2] += factor * ((rest - __half2float(__float2half_rn(rest))) * scale);
      }
    }
  }
};

template <class Tile>
__device__ __forceinline__ void consume_split(const ForwardParams& params, const SplitOperands& operands,
                                              const SplitShared<Tile>& shared, int warpgroup, int thread) {
  using Part = typename Tile::Part;
  constexpr int BK = Tile::BK, columns = Tile::columns, halves = columns / 64;
  const Problem& p = params.p;
  const int lane = thread % 32, row_in_tile = 64 * warpgroup + thread / 32 * 16 + lane / 4;
  const float scale = Tile::modified ? 1.f : p.scale_log2;

  Ring<2> slot;
  Ring<1> q_ring;
  Ring<Tile::stages> ring;
  const auto release = [&](int barrier) { warp_arrive(shared.barrier(barrier), lane); };
  // Probabilities are at most 2^2, dropout's factor aside: scaled as tiles are.
  const float kept = Tile::modified && p.dropout_seed ? p.dropout_scale : 1.f;
  float weight_scale = __int_as_float((127 + split_exponent - 2) << 23), weight_inverse = 1.f / weight_scale;
  if (kept > 1.f && kept < INFINITY) {
    const int exponent = (__float_as_int(kept) >> 23) - 126;
    weight_scale *= __int_as_float((127 - exponent) << 23);
    weight_inverse *= __int_as_float((127 + exponent) << 23);
  }

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const auto rows = [&] { return row_pair(work.see(), work.row0() + row_in_tile, p.Nq); };
    Softmax softmax;
    LeadingKey leading;
    float o[columns / 2] = {};
    bool nonfinite = false;
    if (work.passes()) {
      const int q_tile =
          min(work.row0() / split_rows + warpgroup, tiles_of(p.Nq) - 1);  // rows past the end: of no tile
      const SplitTileFacts of_q = operands.tiles[0][(work.b() * p.Hq + work.h()) * tiles_of(p.Nq) + q_tile];
      barrier_wait(shared.barrier(Tile::q_full + warpgroup), q_ring.parity());
#pragma unroll 1
      for (int n = work.last() - 1; n >= work.first(); --n, ring.advance()) {
        float sums[BK / 2], alpha[2];
        barrier_wait(shared.barrier(Tile::k_full + ring.stage()), ring.parity());
        const SplitTileFacts of_k = shared_facts(shared.k_facts(ring.stage()));
        multiply_scores<Tile>(sums, shared.q(warpgroup), shared.k(ring.stage()), of_q.scale * of_k.scale);
        release(Tile::k_empty + ring.stage());
        if (n == work.first()) release(Tile::q_empty + warpgroup);

        if (of_q.apart | of_k.apart)
          scores_apart<Tile>(sums, p, work.b(), work.h(), work.row0() + row_in_tile, of_q.apart, n * BK, of_k.apart,
                             lane);
        if constexpr (Tile::modified) {
          BiasTile<BK> bias;
          if (p.bias.data) bias.load(p, work.b(), work.h(), work.row0() + row_in_tile, n * BK, lane);
          ScoreTile<BK>{p, work.b(), work.h(), work.row0() + row_in_tile, n * BK, lane, work.offset()}.apply(
              sums, bias, work.full(n), rows);
        } else if (!work.full(n)) {
          mask_scores<BK>(sums, rows(), n * BK, lane);
        }
        softmax.template step<BK, true>(sums, scale, alpha, NotWider{});
        if constexpr (Tile::modified)
          if (p.dropout_seed) drop<BK>(sums, p, work.b() * p.Hq + work.h(), work.row0() + row_in_tile, n * BK, lane);
        leading.note<BK>(sums, softmax, scale, alpha, kept, n * BK, lane);
        uint32_t probabilities[split_parts][BK / 4];
#pragma unroll
        for (int i = 0; i < BK / 4; ++i) {
          uint32_t part[split_parts];
          split_pair(sums[2 * i] * weight_scale, sums[2 * i + 1] * weight_scale, part);
#pragma unroll
          for (int j = 0; j < split_parts; ++j) probabilities[j][i] = part[j];
        }
        if (__any_sync(0xffffffffu, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
          for (int i = 0; i < columns / 2; ++i) o[i] *= alpha[i / 2 % 2];
        }

        barrier_wait(shared.barrier(Tile::v_full + ring.stage()), ring.parity());
        const SplitTileFacts of_v = shared_facts(shared.v_facts(ring.stage()));
        if (of_v.apart) {
          add_values_apart<Tile>(o, sums, p, work.b(), work.h(), n * BK, of_v.apart, lane);
          nonfinite |= of_v.nonfinite != 0;
        }
#pragma unroll
        for (int j = 0; j < split_parts; ++j) settle(probabilities[j]);
        float added[halves][32];
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          zero(added[half]);
          products_fence();
          const auto multiply = [&](int a, int b) {
            multiply_rows<Part, 64, BK, BK>(added[half], probabilities[a],
                                            shared.v(ring.stage()) + b * Tile::layout.k_part + half * BK * 128, 1);
          };
          for_small_parts(multiply);
          multiply(0, 0);
          products_commit();
        }
        const float scale_back = of_v.scale * weight_inverse;
        const auto add = [&](int half) {
          settle(added[half]);
#pragma unroll
          for (int i = 0; i < 32; ++i) o[32 * half + i] = fmaf(added[half][i], scale_back, o[32 * half + i]);
        };
        if constexpr (halves == 2) {
          products_wait<1>();
          add(0);
        }
        products_wait<0>();
        add(halves - 1);
        release(Tile::v_empty + ring.stage());
      }
      q_ring.advance();
    }

    const int b = work.b(), h = work.h();
    float weight[2], lse[2];
    softmax.finish(scale, p.sinks ? p.sinks[h] * log2_e : -INFINITY, weight, lse, NotWider{});
    leading.complete<columns>(o, p, operands.tiles[2] + (b * p.Hkv + h / p.G) * tiles_of(p.Nk),
                              static_cast<const float*>(p.v.data) + b * p.v.stride[0] + h / p.G * p.v.stride[1], weight,
                              kept, lane);
    float* row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = work.row0() + row_in_tile + 8 * r;
      row[r] = query < p.Nq ? static_cast<float*>(params.o.data) + b * params.o.stride[0] + h * params.o.stride[1] +
                                  query * params.o.stride[2]
                            : nullptr;
      if (params.lse && row[r] && lane % 4 == 0)
        params.lse[(int64_t{b} * p.Hq + h) * p.Nq + query] = params.lse_base2 ? lse[r] : lse[r] * ln_2;
#pragma unroll
      for (int i = 0; i < columns / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * i + 2 * (lane % 4) + e;
          if (row[r] && column < p.Dv) row[r][column] = o[4 * i + 2 * r + e] * weight[r];
        }
    }
    if (nonfinite) {
      const RowPair pair = rows();
      return_nonfinite<Tile, 2>(p, work, row, 0, p.Dv, lane, [&](int r, int key) {
        const int query = work.row0() + row_in_tile + 8 * r;
        return key >= pair.begin[r] && key < pair.end[r] &&
               (!Tile::modified ||
                ((!p.mask.data || mask_shows(p, b, h, query, key)) && !bias_hides(p, b, h, query, key)));
      });
    }
    release(Tile::work_empty + slot.stage());
  }
}

// Grid: at most one block an SM, no more than there are tiles.
template <class Tile>
__device__ __forceinline__ void forward_split(const ForwardParams& params, const SplitOperands& operands,
                                              const HopperSchedule& s, const TensorMap* q, const TensorMap* k,
                                              const TensorMap* v) {
  extern __shared__ unsigned char raw_shared[];
  const SplitShared<Tile> shared(raw_shared);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_map(q);
    prefetch_map(k);
    prefetch_map(v);
    constexpr int readers = warp_arrivals * 4, all_readers = Tile::consumers * readers;
    init_ring(shared, Tile::work_full, Tile::work_empty, 2, 1, all_readers);
    init_ring(shared, Tile::q_full, Tile::q_empty, Tile::consumers, 1, readers);
    init_ring(shared, Tile::k_full, Tile::k_empty, Tile::stages, 1, all_readers);
    init_ring(shared, Tile::v_full, Tile::v_empty, Tile::stages, 1, all_readers);
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::feeder_registers>();
    if (threadIdx.x == 0) feed_split<Tile>(params.p, operands, s, shared, q, k, v);
  } else {
    take_registers<Tile::consumer_registers>();
    consume_split<Tile>(params, operands, shared, warpgroup - 1, threadIdx.x % 128);
  }
}

}  // namespace mfa::cuda::hopper
