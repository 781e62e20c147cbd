// tiling.h: how the query rows of a problem are cut into tiles, and which tile a task has.
//
// The rows of one (sequence, KV head) come in one of three orders. By default row r is query r / heads of head
// r % heads, so that the heads of a group share the keys they load. Where each head has block lists of its own, a tile
// has rows of one head. Where every query has a neighbourhood, a tile is a box of the grid, whose windows overlap most.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/problem.h"

namespace mfa {

struct RowTiling {
  int32_t heads = 1;           // query heads whose rows share a tile
  int32_t parts = 1;           // tiles of different heads: Hq / Hkv / heads
  int32_t tile = 1;            // most rows of a tile
  int64_t unit = 0;            // tiles do not cross multiples of this many rows; 0: no such bounds
  int32_t box[3] = {0, 0, 0};  // queries of a tile along each axis of the grid; 0: rows are in order
  int32_t decode_rows = 0;     // sequences with up to this many rows in a part have one tile, in order
  bool in_boxes() const { return box[0] > 0; }
};

// The rows of one part of a sequence with `queries` queries, and whether they are one tile for the decode kernel.
inline int64_t part_rows(const RowTiling& t, int32_t queries) { return int64_t{t.heads} * queries; }
inline bool is_decode(const RowTiling& t, int32_t queries) { return part_rows(t, queries) <= t.decode_rows; }

// The tiles of one KV head of a sequence with `queries` queries.
int64_t tile_count(const RowTiling& t, const Neighbourhood& n, int32_t queries);

// Writes the query and the head of each row of `tile`, one of tile_count(), and returns how many there are; a box
// outside a dilated grid has none.
int32_t fill_rows(const RowTiling& t, const AttentionProblem& p, int32_t b, int32_t kv_head, int64_t tile,
                  int32_t* query, int32_t* head);

// The first query block from `block` on whose list of head `head` has one of the keys [k0, k0 + keys), or the number of
// query blocks.
int64_t listed_query_block(const AttentionProblem& p, int32_t b, int32_t head, int64_t k0, int32_t keys, int64_t block);

// The box of at most `most_rows` rows whose queries need the least work for each, where rows are computed in groups of
// `group_rows`, which leave out what their windows do not have, with vectors of `lanes` rows.
void choose_box(const Neighbourhood& n, int32_t heads, int32_t most_rows, int32_t group_rows, int32_t lanes,
                int32_t (&box)[3]);

// Whether every sequence of `p` is the whole grid of its neighbourhood.
bool covers_grid(const AttentionProblem& p);

// The tiles of all sequences and KV heads in the order of the tasks.
class TileMap {
 public:
  struct Place {
    int32_t b = 0, kv_head = 0;
    int64_t tile = 0;  // of the sequence and head
  };
  TileMap() = default;
  TileMap(const AttentionProblem& p, const RowTiling& t);

  int64_t count() const { return count_; }
  // The last tiles of a sequence come first: under a causal mask they see the most keys. Where rows see about as many
  // keys each, tiles of fewer rows come after all others: threads end nearer to each other. Of sequences of different
  // lengths the one with the most work comes first, with all its heads, or where the rows of a head lie together in
  // memory, with its head before the next head of any sequence.
  Place locate(int64_t index) const;
  // Sequence number `index` in that order.
  int32_t sequence(int32_t index) const { return order_.empty() ? index : order_[static_cast<size_t>(index)]; }

 private:
  int64_t count_ = 0, uniform_ = 0;  // `uniform_` tiles for each (sequence, KV head)
  int64_t whole_ = 0;                // and those of them that come before the last of every (sequence, KV head)
  int32_t heads_ = 1;
  bool heads_first_ = false;    // packed: all tiles of a head before the next head
  std::vector<int32_t> order_;  // packed: the sequences
  std::vector<int64_t> first_;  // and the tiles of one head before each, and in all
};

}  // namespace mfa
