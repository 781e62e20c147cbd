// hopper_forward_split.cuh: softmax attention forward for float32 inputs on 16-bit matrix products.
//
// A float32 number is the sum of three bfloat16 numbers, x = x0 + x1 + x2, exactly: 3 * 8 significant bits. A product
// of two such sums is taken as the six products of parts whose sizes are not below 2^-24 of the whole, smallest first,
// so what is left out is of the size of a float32 rounding. `split` writes the parts of q, k and v beside each other
// once; `forward_split` is then the loop of hopper_forward.cuh with six products in the place of one. Tensor cores cut
// what they add instead of rounding it, so long sums are made of short ones, which start from zero and are added in
// registers: scores of 16 columns, outputs of one key tile. Idea: Henry, Tang & Heinecke, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations", arXiv:1904.06376.
//
// Parts cannot stand for NaN and infinity (0 * inf is NaN), nor multiply near the end of float32's range. Tiles of 64
// rows that hold such elements are marked: scores of marked tiles of q and k are computed by multiply-adds, and rows
// that see a marked value tile get back what its parts left out.
#pragma once

#include "hopper_forward.cuh"

namespace mfa::cuda::hopper {

// Products of elements below this stay in range whatever their parts.
constexpr float split_limit = 0x1p62f;

template <int choice, bool modified_>
struct SplitTile {
  using T = float;
  using Part = __nv_bfloat16;
  static constexpr bool modified = modified_;  // by anything but a softcap, whose function here errs too much
  static constexpr TileChoice c = modified ? split_modified_tiles[choice] : split_tiles[choice];
  static constexpr int columns = c.columns, consumers = c.consumers, BQ = 64 * consumers, BK = c.tile,
                       stages = c.stages;
  static constexpr SplitLayout layout = split_layout(c);
  static constexpr int threads = layout.threads, q_bytes = split_parts * layout.q_part,
                       k_bytes = split_parts * layout.k_part;
  static constexpr int feeder_registers = consumers == 3 ? 32 : 40, consumer_registers = consumers == 3 ? 160 : 232;
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
  __device__ __forceinline__ SharedWork work(int slot) const {
    return SharedWork(at + Tile::layout.work_at + slot * SharedWork::bytes);
  }
};

// Two numbers as three pairs of parts.
__device__ __forceinline__ void split_pair(float x, float y, uint32_t (&part)[split_parts]) {
#pragma unroll
  for (int i = 0; i < split_parts; ++i) {
    part[i] = pack<__nv_bfloat16>(x, y);
    x -= __uint_as_float(part[i] << 16);
    y -= __uint_as_float(part[i] & 0xffff0000u);
  }
}

// Writes the parts of 64 rows of q, k or v, zeros from column D on, and whether a row has elements that parts do not
// stand for. 256 threads; grid: the row tiles of all heads of q, then of k, then of v.
template <int columns>
__device__ __forceinline__ void split(const Problem& p, const SplitOperands& s) {
  constexpr int warps = 8, rows = split_rows / warps, pairs = columns / 64;
  const int q_tiles = (p.Nq + split_rows - 1) / split_rows, k_tiles = (p.Nk + split_rows - 1) / split_rows;
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
  const float limit = which == 2 ? INFINITY : split_limit;

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
  bool marked = false;
  const int64_t plane = int64_t{p.B} * heads * N * columns;
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(s.parts[which]) + head * N * columns);
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int n = n0 + warp + r * warps;
#pragma unroll
    for (int j = 0; j < pairs; ++j) {
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool fits = fabsf(in[r][j][e]) < limit;
        y[e] = fits ? in[r][j][e] : 0.f;
        marked |= !fits;
      }
      uint32_t part[split_parts];
      split_pair(y[0], y[1], part);
      if (n < N) {
#pragma unroll
        for (int i = 0; i < split_parts; ++i) to[(i * plane + int64_t{n} * columns) / 2 + 32 * j + lane] = part[i];
      }
    }
  }
  marked = __syncthreads_or(marked);
  if (threadIdx.x == 0) s.marks[which][within] = marked;
}

// The feeding warpgroup's first thread. Maps are of [parts * B, H, N, columns].
template <class Tile>
__device__ __forceinline__ void feed_split(const Problem& p, const HopperSchedule& s, const SplitShared<Tile>& shared,
                                           const TensorMap* q, const TensorMap* k, const TensorMap* v) {
  Ring<2> slot;
  Ring<1> q_ring;
  Ring<Tile::stages> ring;
  const auto load = [&](uint32_t to, const TensorMap* map, int full, int empty, const SharedWork& w, int n) {
    barrier_wait(shared.barrier(empty + ring.stage()), ring.parity() ^ 1);
    const uint32_t barrier = shared.barrier(full + ring.stage());
    barrier_arrive_expect(barrier, Tile::k_bytes);
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
      load(shared.k(ring.stage()), k, Tile::k_full, Tile::k_empty, w, n);
      load(shared.v(ring.stage()), v, Tile::v_full, Tile::v_empty, w, n);
    }
  }
}

// Calls f(part of a, part of b) for the products of parts that count but the largest, the smallest first.
template <class F>
__device__ __forceinline__ void for_small_parts(const F& f) {
  f(0, 2);
  f(2, 0);
  f(1, 1);
  f(0, 1);
  f(1, 0);
}

// sums = Q K^T. The products of the first parts are summed 16 columns at a time.
template <class Tile>
__device__ __forceinline__ void multiply_scores(float (&sums)[Tile::BK / 2], uint32_t q, uint32_t k) {
  using Part = typename Tile::Part;
  constexpr int BK = Tile::BK;
  zero(sums);
  products_fence();
  for_small_parts([&](int a, int b) {
    multiply_columns<Part, BK, Tile::columns, 64, BK, false>(sums, q + a * Tile::layout.q_part,
                                                             k + b * Tile::layout.k_part);
  });
  products_commit();
  const TileDescriptor a(q), b(k);
  float piece[2][BK / 2] = {};
  const auto add = [&](float (&x)[BK / 2]) {
    settle(x);
#pragma unroll
    for (int i = 0; i < BK / 2; ++i) sums[i] += x[i];
  };
#pragma unroll
  for (int i = 0; i < Tile::columns / 16; ++i) {
    const int chunk = i / 4, within = i % 4 * 32;  // bytes
    products_fence();
    Product<BK>::template shared_a<Part, 0, 0>(piece[i % 2], a.at(chunk * 64 * 128 + within),
                                               b.at(chunk * BK * 128 + within), 0);
    products_commit();
    products_wait<1>();
    if (i == 0)
      settle(sums);
    else
      add(piece[(i - 1) % 2]);
  }
  products_wait<0>();
  add(piece[1]);
}

// Whether the bias takes the key from the row, whatever its score.
__device__ __forceinline__ bool bias_hides(const Problem& p, int b, int h, int query, int key) {
  if (!p.bias.data) return false;
  const int64_t at = b * p.bias.stride[0] + h * p.bias.stride[1] + query * p.bias.stride[2] + key * p.bias.stride[3];
  return (p.bias.dtype == Element::f32 ? static_cast<const float*>(p.bias.data)[at]
          : p.bias.dtype == Element::f16
              ? static_cast<float>(static_cast<const __half*>(p.bias.data)[at])
              : static_cast<float>(static_cast<const __nv_bfloat16*>(p.bias.data)[at])) == -INFINITY;
}

// Of a tile, the products of rows and keys with elements that parts do not stand for, from the elements themselves.
// Rare, and therefore small rather than fast.
template <class Tile>
__device__ __forceinline__ void exact_products(float (&sums)[Tile::BK / 2], const Problem& p, int b, int h, int query,
                                               int key0, int lane) {
  const float* q = static_cast<const float*>(p.q.data) + b * p.q.stride[0] + h * p.q.stride[1];
  const float* k = static_cast<const float*>(p.k.data) + b * p.k.stride[0] + h / p.G * p.k.stride[1];
#pragma unroll
  for (int i = 0; i < Tile::BK / 2; ++i) {
    const int row = query + i / 2 % 2 * 8, key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row >= p.Nq || key >= p.Nk || (Tile::modified && bias_hides(p, b, h, row, key))) continue;
    float sum = 0.f;
    bool fits = true;
#pragma unroll 1
    for (int d = 0; d < p.D; ++d) {
      const float x = q[row * p.q.stride[2] + d], y = k[key * p.k.stride[2] + d];
      fits &= fabsf(x) < split_limit && fabsf(y) < split_limit;
      sum = fmaf(x, y, sum);
    }
    sums[i] = fits ? sums[i] : sum;
  }
}

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
  const auto release = [&](int barrier) {
    __syncwarp();
    barrier_arrive_if(shared.barrier(barrier), lane == 0);
  };
  // Whether any of a head's row tiles [first, last) is marked.
  const auto any_marked = [&](int which, int tiles, int head, int first, int last) {
    bool found = false;
    for (int n = first + lane; n < last; n += 32) found |= operands.marks[which][int64_t{head} * tiles + n] != 0;
    return __any_sync(0xffffffffu, found) != 0;
  };

  for (;; slot.advance()) {
    barrier_wait(shared.barrier(Tile::work_full + slot.stage()), slot.parity());
    const SharedWork work = shared.work(slot.stage());
    if (work.b() < 0) break;
    const auto rows = [&] { return row_pair(work.see(), work.row0() + row_in_tile, p.Nq); };
    const int kv_head = work.b() * p.Hkv + work.h() / p.G, q_tile = work.row0() / split_rows + warpgroup,
              k_tiles = (p.Nk + split_rows - 1) / split_rows, q_tiles = (p.Nq + split_rows - 1) / split_rows;

    Softmax softmax;
    float o[columns / 2] = {};
    if (work.passes()) {
      const bool q_marked = any_marked(0, q_tiles, work.b() * p.Hq + work.h(), q_tile, min(q_tile + 1, q_tiles));
      const bool k_marked = any_marked(1, k_tiles, kv_head, work.first(), work.last());
      barrier_wait(shared.barrier(Tile::q_full + warpgroup), q_ring.parity());
#pragma unroll 1
      for (int n = work.last() - 1; n >= work.first(); --n, ring.advance()) {
        float sums[BK / 2], alpha[2];
        barrier_wait(shared.barrier(Tile::k_full + ring.stage()), ring.parity());
        multiply_scores<Tile>(sums, shared.q(warpgroup), shared.k(ring.stage()));
        release(Tile::k_empty + ring.stage());
        if (n == work.first()) release(Tile::q_empty + warpgroup);

        if (q_marked || (k_marked && any_marked(1, k_tiles, kv_head, n, n + 1)))
          exact_products<Tile>(sums, p, work.b(), work.h(), work.row0() + row_in_tile, n * BK, lane);
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
        uint32_t probabilities[split_parts][BK / 4];
#pragma unroll
        for (int i = 0; i < BK / 4; ++i) {
          uint32_t part[split_parts];
          split_pair(sums[2 * i], sums[2 * i + 1], part);
#pragma unroll
          for (int j = 0; j < split_parts; ++j) probabilities[j][i] = part[j];
        }
        if (__any_sync(0xffffffffu, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
          for (int i = 0; i < columns / 2; ++i) o[i] *= alpha[i / 2 % 2];
        }

        barrier_wait(shared.barrier(Tile::v_full + ring.stage()), ring.parity());
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
        const auto add = [&](int half) {
          settle(added[half]);
#pragma unroll
          for (int i = 0; i < 32; ++i) o[32 * half + i] += added[half][i];
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
    if (work.passes() && any_marked(2, k_tiles, kv_head, work.first(), work.last())) {
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
    constexpr int consumer_warps = Tile::consumers * 4;
    init_ring(shared, Tile::work_full, Tile::work_empty, 2, 1, consumer_warps);
    init_ring(shared, Tile::q_full, Tile::q_empty, Tile::consumers, 1, 4);
    init_ring(shared, Tile::k_full, Tile::k_empty, Tile::stages, 1, consumer_warps);
    init_ring(shared, Tile::v_full, Tile::v_empty, Tile::stages, 1, consumer_warps);
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::feeder_registers>();
    if (threadIdx.x == 0) feed_split<Tile>(params.p, s, shared, q, k, v);
  } else {
    take_registers<Tile::consumer_registers>();
    consume_split<Tile>(params, operands, shared, warpgroup - 1, threadIdx.x % 128);
  }
}

}  // namespace mfa::cuda::hopper
