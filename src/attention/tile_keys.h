// tile_keys.h: which keys of a block some row of a tile sees, by block lists and neighbourhoods.
//
// Kernels compute a block of keys for all rows of a tile together. Keys that no row of it sees are left out, so a block
// becomes a list of keys; a row sees the same bits, as keys it does not see add nothing to it.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/plan.h"
#include "attention/problem.h"

namespace mfa {

// Keys of one block in ascending order.
struct KeyList {
  int32_t count = 0;       // entries
  bool contiguous = true;  // they are the keys key[0], key[0] + 1 ..
  bool has_padding = false;
  alignas(64) int32_t key[kKeyBlock];
  // Entries that no row sees, so that pairs (2t, 2t + 1) of keys stay pairs; their keys may not exist.
  bool padding[kKeyBlock];
};

class TileKeys {
 public:
  explicit TileKeys(const AttentionProblem& p) : p_(p) {}

  // Whether anything but the rows' intervals cuts the keys.
  static bool cuts(const AttentionProblem& p) { return p.blocks.offsets || p.neighbourhood.axes > 0; }

  // The rows whose keys are asked for.
  void select(int32_t b, const int32_t* query, const int32_t* head, int32_t rows);

  // The keys of [first, last), part of one block, that some row sees. `pairs`: in whole pairs.
  void list(int64_t first, int64_t last, bool pairs, KeyList& out) const;

  // Whether the block lists show different keys to different rows.
  bool lists_differ() const { return lists_.size() > 1; }

 private:
  void add_range(int64_t first, int64_t last, bool pairs, KeyList& out) const;

  const AttentionProblem& p_;
  std::vector<int64_t> lists_;                     // the rows' lists, each once
  std::vector<uint8_t> axis_seen_[3];              // by coordinate: kKeySeen, kQueryDone
  int32_t axis_begin_[3] = {}, axis_end_[3] = {};  // the coordinates that are seen lie in between
};

// sees() of visibility.h, out of line for code that is compiled for one instruction set.
bool row_sees(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j);
bool lists_show(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j);

// The positions of tokens along each axis: as keys, and the first and last of what they see as queries. A key at u is
// seen along the axis if begin <= u < end; the interleaved sequences of a dilated axis follow one another.
void key_positions(const Neighbourhood& n, const int32_t* tokens, int32_t count, int32_t* const (&u)[3]);
void query_spans(const Neighbourhood& n, const int32_t* tokens, int32_t count, int32_t* const (&begin)[3],
                 int32_t* const (&end)[3]);

}  // namespace mfa
