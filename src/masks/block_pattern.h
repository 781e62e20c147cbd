// block_pattern.h: the visible tiles of block-sparse attention as lists, both ways, for each batch entry and head.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "attention/problem.h"
#include "mfa/block_rules.h"

namespace mfa {

class BlockPattern {
 public:
  // Sets row[c] = 1, and nothing to another value, for the key blocks that query block `r` of (b, h) sees; the row is
  // zero on entry. Called by many threads.
  using MarkRow = std::function<void(int32_t b, int32_t h, int32_t r, uint8_t* row)>;

  // `batch` and `heads` are 1 where all batch entries, or all heads, have the same tiles.
  static BlockPattern from_rows(TileGrid grid, int32_t batch, int32_t heads, const MarkRow& mark);
  static BlockPattern from_rule(const BlockRule& rule);

  const TileGrid& grid() const { return grid_; }
  int32_t batch() const { return batch_; }
  int32_t heads() const { return heads_; }
  int64_t lists() const { return int64_t{batch_} * heads_; }

  // As BlockListRef says. Key blocks of a query block, and query blocks of a key block, ascend.
  const std::vector<int64_t>& offsets() const { return offsets_; }
  const std::vector<int32_t>& key_ids() const { return key_ids_; }
  const std::vector<int64_t>& transposed_offsets() const { return transposed_offsets_; }
  const std::vector<int32_t>& query_ids() const { return query_ids_; }
  BlockListRef ref() const;  // valid as long as the pattern lives

  int64_t count() const { return static_cast<int64_t>(key_ids_.size()); }  // visible tiles of all lists
  double density() const;                                                  // of all tiles; 0 if there are none

  // [batch, heads, query_blocks, key_blocks], 1 = visible.
  void write_dense(uint8_t* out) const;

  // The same pairs of tokens in smaller tiles, whose sides divide those of the larger. Throws std::invalid_argument.
  BlockPattern refined(int64_t block_q, int64_t block_k) const;

  bool operator==(const BlockPattern&) const = default;

 private:
  void transpose();

  TileGrid grid_;
  int32_t batch_ = 1, heads_ = 1;
  std::vector<int64_t> offsets_, transposed_offsets_;
  std::vector<int32_t> key_ids_, query_ids_;
};

// The grid of lengths and sides given from outside. Throws std::invalid_argument for a negative length, a side below 1,
// a number of 2^31 or above, and more than 2^36 tiles, which no list should be walked for.
TileGrid checked_grid(const char* function, int64_t Nq, int64_t Nk, TileSize tile);

}  // namespace mfa
