// hopper_tiles.cuh: the tile choice of every Hopper kernel, how work is handed to blocks, and which key tiles a query
// tile visits. Included by kernels and host.
#pragma once

#include <cstdint>

#include "../params.h"

#ifdef __CUDACC__
#define MFA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MFA_HOST_DEVICE inline
#endif

namespace mfa::cuda {

// Blocks draw tiles from a counter, so that unequal tiles balance. `slot` names the counter; calls in flight at the
// same time need different ones. A kernel leaves its counter at zero.
struct HopperSchedule {
  static constexpr int slots = 4096;
  int32_t tiles;              // in all
  int32_t tiles_per_head;     // query tiles (forward, dq) or key tiles (dk, dv) of a head
  int32_t heads_per_section;  // heads that are worked on together, so that what they read stays in the L2 cache
  int32_t longest_last;       // tile 0 of a head is the shortest: hand out the last one first
  int32_t slot;
};

namespace hopper {

// --- Tile choice. D and Dv are padded with zeros to `columns`; a warpgroup owns 64 rows.

struct TileChoice {
  int columns;            // of q, k and v
  int consumers;          // warpgroups that multiply
  int tile;               // keys (forward, dq) or queries (dk, dv) a step
  int stages;             // of the rings of those tiles
  bool alternate;         // warpgroups take turns, at issuing products (forward) or at the passing tiles (one pass)
  int value_columns = 0;  // of v and o, where they are fewer; 0: the same
  bool halves = false;    // two warpgroups work on the same 64 rows: each on half the keys and half of o's columns
};
constexpr int warpgroups_of(TileChoice c) { return c.halves ? 2 : c.consumers; }
constexpr int value_columns_of(TileChoice c) { return c.value_columns ? c.value_columns : c.columns; }

constexpr TileChoice forward_tiles[] = {
    {64, 3, 128, 2, false},
    {96, 3, 112, 2, false},
    {128, 2, 128, 2, false},
    {192, 2, 112, 2, false},
    {256, 2, 80, 2, true},
    {512, 1, 64, 1, false, 512, true},
    {576, 1, 64, 1, false, 512, true},
    {192, 2, 128, 2, false, 128},
};
// The same with every modifier of scores, which need registers.
constexpr TileChoice forward_modified_tiles[] = {
    {64, 3, 64, 3, false},
    {96, 2, 64, 2, false},
    {128, 2, 64, 2, false},
    {192, 2, 64, 2, false},
    {256, 2, 48, 2, false},
    {512, 1, 64, 1, false, 512, true},
    {576, 1, 64, 1, false, 512, true},
};
// The same with a boolean mask alone.
constexpr TileChoice forward_mask_tiles[] = {
    {64, 3, 112, 3, false}, {96, 2, 128, 2, false}, {128, 2, 128, 2, false},
    {192, 2, 96, 2, false}, {256, 2, 64, 2, false},
};
// The same for float32, each element two of float16.
constexpr TileChoice split_tiles[] = {
    {64, 3, 64, 3, false},
    {128, 2, 64, 2, false},
};
constexpr TileChoice split_modified_tiles[] = {
    {64, 2, 64, 3, false},
    {128, 2, 64, 2, false},
};
// Queries stay, keys and values pass.
constexpr TileChoice dq_tiles[] = {
    {64, 2, 128, 3, false}, {96, 2, 80, 3, false},  {128, 2, 80, 3, false},
    {192, 2, 48, 3, false}, {256, 2, 32, 3, false},
};
// Keys and values stay, queries pass.
constexpr TileChoice dkv_tiles[] = {
    {64, 2, 112, 2, false},
    {96, 2, 64, 2, false},
    {128, 2, 64, 2, false},
};
// The same for wide heads, where one warpgroup cannot hold dk and dv: two work on the same 64 keys, one on each.
constexpr TileChoice dkv_shared_tiles[] = {
    {192, 1, 80, 2, false},
    {256, 1, 64, 2, false},
};
// The same three with every modifier of scores.
constexpr TileChoice dq_modified_tiles[] = {
    {64, 2, 64, 3, false},  {96, 2, 64, 3, false},  {128, 2, 64, 3, false},
    {192, 2, 48, 3, false}, {256, 2, 32, 3, false},
};
constexpr TileChoice dkv_modified_tiles[] = {
    {64, 2, 64, 2, false},
    {96, 2, 64, 2, false},
    {128, 2, 48, 2, false},
};
constexpr TileChoice dkv_shared_modified_tiles[] = {
    {192, 1, 64, 2, false},
    {256, 1, 48, 2, false},
};

// dq, dk and dv in one pass: keys and values stay, queries pass. 128 keys, half of them a warpgroup's; all of them each
// warpgroup's where they alternate.
constexpr TileChoice fused_tiles[] = {
    {64, 2, 64, 4, true},
    {128, 2, 64, 2, false},
};

constexpr int shared_work_bytes = 64;              // what a block works on, twice
constexpr int shared_bytes_of_block = 227 * 1024;  // the most that a block may have

constexpr int columns_of(int D) {
  return D <= 64 ? 64 : D <= 96 ? 96 : D <= 128 ? 128 : D <= 192 ? 192 : D <= 256 ? 256 : D <= 512 ? 512 : 576;
}
constexpr int chunks_of(int columns) { return (columns + 63) / 64; }

// Shared memory of the forward: Q of each warpgroup, rings of K and V, what cleaning found, barriers, work; for halves
// also two tiles of probabilities and two numbers a row of each warpgroup.
struct ForwardLayout {
  int q_bytes, k_bytes, v_bytes;  // of one warpgroup; of one stage
  int k_at, v_at, p_at, rows_at, found_at, barriers_at, work_at, bytes;
  int threads;
};
constexpr int forward_barriers(TileChoice c) { return 4 + 2 * c.consumers + 5 * c.stages; }
constexpr ForwardLayout forward_layout(TileChoice c) {
  ForwardLayout l{};
  l.q_bytes = chunks_of(c.columns) * 64 * 128;
  l.k_bytes = chunks_of(c.columns) * c.tile * 128;
  l.v_bytes = chunks_of(value_columns_of(c)) * c.tile * 128;
  l.k_at = c.consumers * l.q_bytes;
  l.v_at = l.k_at + c.stages * l.k_bytes;
  l.p_at = l.v_at + c.stages * l.v_bytes;
  l.rows_at = l.p_at + (c.halves ? 2 * 64 * c.tile * 2 : 0);
  l.found_at = l.rows_at + (c.halves ? 2 * 2 * 64 * 4 : 0);
  l.barriers_at = l.found_at + c.stages * 16;
  l.work_at = l.barriers_at + forward_barriers(c) * 8;
  l.bytes = l.work_at + 2 * shared_work_bytes + 1024;  // 1024: tiles are aligned to that
  l.threads = 128 * (warpgroups_of(c) + 1);
  return l;
}

// Shared memory of the forward for float32: the parts of Q of each warpgroup, rings of those of K and V, the facts of
// these, barriers, work. Tiles have split_rows rows.
constexpr int split_parts = 2, split_rows = 64;
struct SplitLayout {
  int q_part, k_part;  // of one warpgroup; of one stage, also of V
  int k_at, v_at, facts_at, barriers_at, work_at, bytes;
  int threads;
};
constexpr int split_barriers(TileChoice c) { return 4 + 2 * c.consumers + 4 * c.stages; }
constexpr SplitLayout split_layout(TileChoice c) {
  SplitLayout l{};
  l.q_part = chunks_of(c.columns) * 64 * 128;
  l.k_part = chunks_of(c.columns) * c.tile * 128;
  l.k_at = c.consumers * split_parts * l.q_part;
  l.v_at = l.k_at + c.stages * split_parts * l.k_part;
  l.facts_at = l.v_at + c.stages * split_parts * l.k_part;
  l.barriers_at = l.facts_at + 2 * c.stages * static_cast<int>(sizeof(SplitTileFacts));
  l.work_at = l.barriers_at + split_barriers(c) * 8;
  l.bytes = l.work_at + 2 * shared_work_bytes + 1024;
  l.threads = 128 * (c.consumers + 1);
  return l;
}

// Shared memory of a backward kernel: two stationary tiles of each warpgroup, a ring of pairs of passing tiles, with
// lse and delta of passing queries, barriers, work.
struct BackwardLayout {
  int stay_bytes, pass_bytes;  // of one tile of a warpgroup; of one tile of a stage
  int first_at, second_at, rows_at, exchange_at, found_at, barriers_at, work_at, bytes;
  int threads;
};
constexpr int backward_barriers(TileChoice c) { return 9 + 2 * c.consumers + 4 * c.stages; }
// `shared_keys`: two warpgroups work on the same keys and pass probabilities on in shared memory, two tiles deep.
constexpr BackwardLayout backward_layout(TileChoice c, bool shared_keys = false) {
  BackwardLayout l{};
  l.stay_bytes = chunks_of(c.columns) * 64 * 128;
  l.pass_bytes = chunks_of(c.columns) * c.tile * 128;
  l.first_at = 2 * c.consumers * l.stay_bytes;
  l.second_at = l.first_at + c.stages * l.pass_bytes;
  l.rows_at = l.second_at + c.stages * l.pass_bytes;
  l.exchange_at = l.rows_at + c.stages * c.tile * 8;
  l.found_at = l.exchange_at + (shared_keys ? 2 * 64 * c.tile * 4 : 0);
  l.barriers_at = l.found_at + 8;
  l.work_at = l.barriers_at + backward_barriers(c) * 8;
  l.bytes = l.work_at + 2 * shared_work_bytes + 1024;
  l.threads = 128 * ((shared_keys ? 2 : c.consumers) + 1);
  return l;
}

// The same for kernels that compute all three: all keys and values, also two tiles of dS, of both warpgroups' keys or
// of a warpgroup each, and tiles of dq. At a multiple of 1024 bytes.
struct FusedLayout {
  int stay_bytes, pass_bytes, first_at, second_at, rows_at, ds_bytes, ds_at, dq_bytes, dq_at, barriers_at, work_at,
      bytes;
};
constexpr int fused_parts(TileChoice c) { return c.alternate ? 6 : 2; }  // tiles of dq on their way
constexpr int fused_adders(TileChoice c) {
  return fused_parts(c) % 3 ? 2 : 3;
}  // each has its own of the parts' places
constexpr int fused_barriers(TileChoice c) { return 6 + 2 * fused_parts(c) + 4 * c.stages; }
constexpr FusedLayout fused_layout(TileChoice c) {
  FusedLayout l{};
  l.stay_bytes = chunks_of(c.columns) * 64 * 128;
  l.pass_bytes = chunks_of(c.columns) * c.tile * 128;
  l.first_at = 2 * c.consumers * l.stay_bytes;
  l.second_at = l.first_at + c.stages * l.pass_bytes;
  l.ds_bytes = 64 * c.consumers * c.tile * 2;
  l.ds_at = l.second_at + c.stages * l.pass_bytes;
  l.dq_bytes = c.tile * c.columns * 4;
  l.dq_at = l.ds_at + 2 * l.ds_bytes;
  l.rows_at = l.dq_at + fused_parts(c) * l.dq_bytes;
  l.barriers_at = l.rows_at + c.stages * c.tile * 8;
  l.work_at = l.barriers_at + fused_barriers(c) * 8;
  l.bytes = l.work_at + 2 * shared_work_bytes;
  return l;
}

// Rows that a block of the prepare kernel (256 threads) works on: 8 columns a lane, four rows a lane.
constexpr int prepare_lanes(int Dv) { return Dv <= 64 ? 8 : Dv <= 128 ? 16 : 32; }
constexpr int prepare_rows(int Dv) { return 256 / prepare_lanes(Dv) * 4; }

// --- Which head, which tile

struct WorkItem {
  int b, h, tile;
};

MFA_HOST_DEVICE WorkItem work_item(const HopperSchedule& s, int heads_in_all, int heads, int id) {
  const int section = id / (s.heads_per_section * s.tiles_per_head);
  const int first_head = section * s.heads_per_section;
  const int within = id - first_head * s.tiles_per_head;
  const int left = heads_in_all - first_head;
  const int width = left < s.heads_per_section ? left : s.heads_per_section;
  const int rank = within / width, head = first_head + within % width;
  return {head / heads, head % heads, s.longest_last ? s.tiles_per_head - 1 - rank : rank};
}

// Kernels that compute dq, dk and dv in one pass: the key tiles of a head are worked on in groups of `fused_group`,
// whose members walk the query tiles `fused_lag` tiles apart. So parts of dq can be added in a fixed order without
// waiting, and meet what they are added to in the L2 cache.
constexpr int fused_tile = 64, fused_keys = 128, fused_group = 8;
constexpr int fused_lag(TileChoice c) { return c.alternate ? 4 : 2; }
MFA_HOST_DEVICE int fused_query_tiles(int Nq) { return (Nq + fused_tile - 1) / fused_tile; }

// A group of every head, then the next group.
MFA_HOST_DEVICE WorkItem fused_item(const HopperSchedule& s, uint32_t heads_in_all, uint32_t heads, uint32_t id) {
  const uint32_t group = id / (fused_group * heads_in_all), within = id - group * fused_group * heads_in_all;
  const uint32_t left = s.tiles_per_head - group * fused_group, members = left < fused_group ? left : fused_group;
  const uint32_t head = within / members;
  return {static_cast<int>(head / heads), static_cast<int>(head % heads),
          static_cast<int>(group * fused_group + within % members)};
}

// The number after those of the group of key tile `tile`, whose own is `id`.
MFA_HOST_DEVICE int fused_group_end(const HopperSchedule& s, int tile, int id) {
  const int member = tile % fused_group, left = s.tiles_per_head - (tile - member);
  return id - member + (left < fused_group ? left : fused_group);
}

// `head_bytes`: the passing tensors of one head. Heads share a section as long as their keys and values fill about half
// of the L2 cache; with equal tiles one head at a time is best.
inline HopperSchedule schedule(int heads_in_all, int tiles_per_head, int64_t head_bytes, bool unequal,
                               bool longest_last, int slot) {
  constexpr int64_t section_bytes = 24 << 20;
  int64_t heads = unequal ? section_bytes / (head_bytes > 0 ? head_bytes : 1) : 1;
  if (unequal && heads < 4) heads = 4;
  if (heads < 1) heads = 1;
  if (heads > heads_in_all) heads = heads_in_all;
  return {heads_in_all * tiles_per_head, tiles_per_head, static_cast<int32_t>(heads), unequal && longest_last,
          slot % HopperSchedule::slots};
}

// --- Visibility of a tile: the rules of attention/visibility.h

struct Visibility {
  int keys;    // of this batch entry
  int offset;  // pos(i) - i
  int left;    // j >= pos(i) - left; -1 = open
  int right;   // j <= pos(i) + right; -1 = open. Causal is right = 0

  MFA_HOST_DEVICE int begin(int i) const {
    const int j = i + offset - left;
    return left < 0 || j < 0 ? 0 : j > keys ? keys : j;
  }
  MFA_HOST_DEVICE int end(int i) const {
    const int j = i + offset + right + 1;
    return right < 0 || j > keys ? keys : j;
  }
};

// Nq + Nk < 2^29, so 32 bits hold every position.
MFA_HOST_DEVICE Visibility visibility(const Problem& p, int b) {
  int keys = p.kv_lengths ? p.kv_lengths[b] : p.Nk;
  keys = keys < 0 ? 0 : keys > p.Nk ? p.Nk : keys;
  return {keys, keys > p.Nq ? keys - p.Nq : 0, p.window_left, p.window_right};
}

// Tiles [first, last) hold every key that rows [row_begin, row_end) see; in [full_first, full_last) every row sees all.
struct KeyTiles {
  int first, last, full_first, full_last;
  MFA_HOST_DEVICE bool full(int n) const { return n >= full_first && n < full_last; }
};

template <int BK>
MFA_HOST_DEVICE KeyTiles key_tiles(const Visibility& v, int row_begin, int row_end) {
  const int begin = v.begin(row_begin), end = v.end(row_end - 1);
  KeyTiles t{begin / BK, (end + BK - 1) / BK, (v.begin(row_end - 1) + BK - 1) / BK, v.end(row_begin) / BK};
  if (t.last < t.first) t.last = t.first;
  if (end <= begin) t.last = t.first;
  if (t.full_first < t.first) t.full_first = t.first;
  if (t.full_last > t.last) t.full_last = t.last;
  if (t.full_last <= t.full_first) t.full_first = t.full_last = t.first;
  return t;
}

// The first query that sees a key from key_begin on, a multiple of four.
MFA_HOST_DEVICE int first_query(const Visibility& v, int key_begin) {
  const int first = v.right < 0 ? 0 : key_begin - v.offset - v.right;
  return first < 0 ? 0 : first & ~3;
}

// The transpose: tiles [first, last), counted from query `origin`, hold every query from there that sees a key of
// [key_begin, key_begin + rows); in [full_first, full_last) every query sees all of them. Rows past Nq do not count.
template <int BM>
MFA_HOST_DEVICE KeyTiles query_tiles(const Visibility& v, int Nq, int key_begin, int rows, int origin) {
  const int key_end = key_begin + rows < v.keys ? key_begin + rows : v.keys;
  if (key_end <= key_begin) return {0, 0, 0, 0};
  // end(i) > key_begin from `begin` on, begin(i) < key_end before `end`.
  int begin = v.right < 0 ? 0 : key_begin - v.offset - v.right;
  int end = v.left < 0 ? Nq : key_end + v.left - v.offset;
  if (begin < origin) begin = origin;
  if (end > Nq) end = Nq;
  if (end <= begin) return {0, 0, 0, 0};
  // end(i) >= key_begin + rows from `full_begin` on, begin(i) <= key_begin before `full_end`.
  int full_begin = v.right < 0 ? 0 : key_begin + rows - v.offset - v.right - 1;
  const int full_end = v.left < 0 ? Nq : key_begin + v.left - v.offset + 1;
  if (full_begin < origin) full_begin = origin;
  KeyTiles t{(begin - origin) / BM, (end - origin + BM - 1) / BM, 0, 0};
  if (key_end == key_begin + rows && full_end > full_begin) {
    const int first = (full_begin - origin + BM - 1) / BM, last = full_end < Nq ? (full_end - origin) / BM : t.last;
    t.full_first = first < t.first ? t.first : first;
    t.full_last = last > t.last ? t.last : last;
  }
  if (t.full_last <= t.full_first) t.full_first = t.full_last = t.first;
  return t;
}

// Where a key tile of kernels that compute all gradients in one pass starts its walk over the query tiles [first,
// last), which goes round. Visibility may have set the tiles of a group apart.
MFA_HOST_DEVICE int walk_start(const Visibility& see, int tile, int first, int last, int lag) {
  const int apart = see.right >= 0 ? fused_keys / fused_tile : 0;
  return last <= first ? first : first + (lag - apart) * (tile % fused_group) % (last - first);
}

}  // namespace hopper
}  // namespace mfa::cuda
