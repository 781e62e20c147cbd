// hopper_pipeline.cuh: what the Hopper kernels' warps share: rings of stages, drawing work, loading tiles, cleaning
// value tiles, writing rows.
#pragma once

#include "hopper_atoms.cuh"
#include "hopper_tiles.cuh"
#include "hopper_wgmma.cuh"

namespace mfa::cuda::hopper {

// Position in a ring of shared-memory stages: which stage, and the parity of its current use.
template <int stages>
class Ring {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ int stage_before() const { return stage_ == 0 ? stages - 1 : stage_ - 1; }
  __device__ __forceinline__ void advance() {
    if (++stage_ == stages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// The same for a power of two of stages, in one register.
template <int stages>
class CountedRing {
 public:
  static_assert((stages & (stages - 1)) == 0);
  __device__ __forceinline__ int stage() const { return count_ % stages; }
  __device__ __forceinline__ uint32_t parity() const { return count_ / stages & 1; }
  __device__ __forceinline__ void advance() { ++count_; }
  __device__ __forceinline__ uint32_t count() const { return count_; }  // how often it has advanced

 private:
  uint32_t count_ = 0;
};

// How many threads of a warp arrive at a barrier for all of it. One is enough; a build for compute-sanitizer's
// racecheck, which does not know that the others have met the one before, lets each arrive.
#ifdef MFA_EACH_LANE_ARRIVES
constexpr int warp_arrivals = 32;
#else
constexpr int warp_arrivals = 1;
#endif
// What this warp did is done; called by all of it.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  barrier_arrive_if(barrier, lane < warp_arrivals);
}

// Makes the barriers of a ring of `stages`: `fills` arrivals say that a stage is full, `reads` that it is empty again.
template <class Shared>
__device__ __forceinline__ void init_ring(const Shared& shared, int full, int empty, int stages, int fills, int reads) {
#pragma unroll
  for (int i = 0; i < stages; ++i) {
    barrier_init(shared.barrier(full + i), fills);
    barrier_init(shared.barrier(empty + i), reads);
  }
}

// Counters from which blocks draw tiles; see HopperSchedule.
__device__ uint32_t drawn_tiles[HopperSchedule::slots];

// The next tile of this block. Each block stops at its first number past the end, so `tiles` draws happen in all when
// there are at least as many tiles as blocks; the last one clears the counter. Draws when the tiles before `from` have
// been drawn.
__device__ __forceinline__ int draw_tile(const HopperSchedule& s, int from = 0) {
  while (from > 0 && static_cast<int>(load_relaxed(&drawn_tiles[s.slot]) + blocks_in_all()) < from) {
  }
  const uint32_t drawn = atomicAdd(&drawn_tiles[s.slot], 1u);
  if (drawn == static_cast<uint32_t>(s.tiles) - 1) drawn_tiles[s.slot] = 0;
  return static_cast<int>(drawn + blocks_in_all());
}

// What a block works on: rows from row0 of one head (b < 0: no more work) and the passing tiles they meet, `passes`
// times. The feeding thread works it out and leaves it in shared memory, where the other warps read what they need when
// they need it: their registers are full. For the same reason the parts are written one by one.
class SharedWork {
 public:
  static constexpr int bytes = shared_work_bytes;
  __device__ __forceinline__ explicit SharedWork(uint32_t at) : at_(at) {}

  __device__ __forceinline__ int b() const { return get(0); }
  __device__ __forceinline__ int h() const { return get(1); }
  __device__ __forceinline__ int row0() const { return get(2); }
  __device__ __forceinline__ int passes() const { return get(3); }
  __device__ __forceinline__ int first() const { return get(4); }
  __device__ __forceinline__ int last() const { return get(5); }
  __device__ __forceinline__ bool full(int n) const { return n >= get(6) && n < get(7); }
  __device__ __forceinline__ Visibility see() const { return {get(8), get(9), get(10), get(11)}; }
  __device__ __forceinline__ int offset() const { return get(9); }
  __device__ __forceinline__ int start() const { return get(12); }
  __device__ __forceinline__ int count() const { return get(13); }
  __device__ __forceinline__ int group_end() const { return get(14); }
  __device__ __forceinline__ uint32_t steps() const { return get(15); }

  __device__ __forceinline__ void set_end() const { set(0, -1); }
  __device__ __forceinline__ void set_item(const WorkItem& item, int rows) const {
    set(0, item.b);
    set(1, item.h);
    set(2, item.tile * rows);
  }
  __device__ __forceinline__ void set_visibility(const Visibility& see) const {
    set(8, see.keys);
    set(9, see.offset);
    set(10, see.left);
    set(11, see.right);
  }
  __device__ __forceinline__ void set_start(int n) const { set(12, n); }
  __device__ __forceinline__ void set_group_end(int id) const { set(14, id); }
  __device__ __forceinline__ void set_steps(uint32_t n) const { set(15, n); }  // of the block, up to the end of this
  // Of the passing tiles, how many are visited. None: no passes.
  __device__ __forceinline__ void set_count(int n) const {
    set(13, n);
    if (n == 0) set(3, 0);
  }
  // Tile n as number `origin` + n * `step`.
  __device__ __forceinline__ void set_tiles(const KeyTiles& tiles, int passes, int step = 1, int origin = 0) const {
    set(3, tiles.last > tiles.first ? passes : 0);
    set(4, origin + tiles.first * step);
    set(5, origin + tiles.last * step);
    set(6, origin + tiles.full_first * step);
    set(7, origin + tiles.full_last * step);
  }

 private:
  __device__ __forceinline__ int get(int i) const { return load_shared(at_ + 4 * i); }
  __device__ __forceinline__ void set(int i, int x) const { store_shared(at_ + 4 * i, x); }
  uint32_t at_;
};

// Loads `rows` rows of `columns` columns into chunks of 64 columns, `rows` rows each.
template <int rows, int columns>
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap* map, uint32_t barrier, int n, int h, int b) {
#pragma unroll
  for (int c = 0; c < chunks_of(columns); ++c) copy_box(to + c * rows * 128, map, barrier, c * 64, n, h, b);
}

// Zeroes every NaN and infinity of a tile in shared memory; one of `warps` warps, number `warp`. Returns whether the
// tile's part of this warp had any.
template <class T, int bytes, int warps>
__device__ __forceinline__ bool clean_tile(unsigned char* tile, int warp, int lane) {
  const int from = (warp * 32 + lane) * 16;
  constexpr int step = warps * 32 * 16;
  // Hardly ever is there any: first look for the largest magnitude.
  uint32_t largest[2] = {};
#pragma unroll 4
  for (int at = from; at < bytes; at += step) {
    const uint4 x = *reinterpret_cast<const uint4*>(tile + at);
    largest[0] = larger<T>(larger<T>(largest[0], x.x & 0x7fff7fffu), x.y & 0x7fff7fffu);
    largest[1] = larger<T>(larger<T>(largest[1], x.z & 0x7fff7fffu), x.w & 0x7fff7fffu);
  }
  if (!__any_sync(0xffffffffu, nonfinite_mask<T>(largest[0]) | nonfinite_mask<T>(largest[1]))) return false;
#pragma unroll 1
  for (int at = from; at < bytes; at += step) {
    uint4& x = *reinterpret_cast<uint4*>(tile + at);
    x = {x.x & ~nonfinite_mask<T>(x.x), x.y & ~nonfinite_mask<T>(x.y), x.z & ~nonfinite_mask<T>(x.z),
         x.w & ~nonfinite_mask<T>(x.w)};
  }
  return true;
}

// Transposes the 4 x 4 matrices whose rows are the registers of four lanes that lie `stride` apart.
template <int stride = 1>
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane) {
  const bool odd = lane & stride, upper = lane & 2 * stride;
  const auto exchange = [](uint32_t& low, uint32_t& high, bool give_low, int distance) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, give_low ? low : high, distance);
    (give_low ? low : high) = got;
  };
  exchange(x[0], x[1], odd, stride);
  exchange(x[2], x[3], odd, stride);
  exchange(x[0], x[2], upper, 2 * stride);
  exchange(x[1], x[3], upper, 2 * stride);
}

// Writes the two rows of a 64 x N sum fragment that this lane shares with its quad, times weight[], as T, 16 bytes a
// lane. `row` are the rows' addresses, null where there is no such row; columns from `columns` on (a multiple of 8) are
// padding.
template <class T, int N>
__device__ __forceinline__ void write_rows(const float (&d)[N / 2], const float (&weight)[2], T* const (&row)[2],
                                           int columns, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int g = 0; g < N / 32; ++g) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (4 * g + i) * 4 + 2 * r;
        x[i] = pack<T>(d[at] * weight[r], d[at + 1] * weight[r]);
      }
      transpose_quad(x, lane);
      const int column = (4 * g + lane % 4) * 8;
      if (row[r] && column < columns) *reinterpret_cast<uint4*>(row[r] + column) = {x[0], x[1], x[2], x[3]};
    }
  }
}

}  // namespace mfa::cuda::hopper
