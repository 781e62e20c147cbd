#include "masks/block_pattern.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/thread_pool.h"

namespace mfa {
namespace {

// Query blocks of a task: enough tiles that a task is some microseconds of work.
int32_t rows_per_task(const TileGrid& grid) { return std::max(1, (1 << 16) / std::max(1, grid.key_blocks())); }

void reserve_ids(std::vector<int32_t>& ids, int64_t count) {
  ids.reserve(count);
  expect_huge_pages(ids.data(), count * sizeof(int32_t));
}

// Writes the places of the bytes that are 1 and returns how many there are. Most words are all zero or all one.
int32_t places_of_ones(const uint8_t* row, int32_t n, int32_t* places) {
  int32_t c = 0, count = 0;
  for (; c + 8 <= n; c += 8) {
    uint64_t word;
    std::memcpy(&word, row + c, 8);
    if (word == 0) continue;
    if (word == 0x0101010101010101u) {
      for (int32_t i = 0; i < 8; ++i) places[count + i] = c + i;
      count += 8;
      continue;
    }
    for (int32_t i = c; i < c + 8; ++i) {
      places[count] = i;
      count += row[i];
    }
  }
  for (; c < n; ++c) {
    places[count] = c;
    count += row[c];
  }
  return count;
}

}  // namespace

TileGrid checked_grid(const char* function, int64_t Nq, int64_t Nk, TileSize tile) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(Nq >= 0 && Nk >= 0 && Nq <= kMost && Nk <= kMost, function, "numbers of tokens must be 0 to 2^31 - 1; got ", Nq,
        " queries and ", Nk, " keys");
  check(tile.q >= 1 && tile.k >= 1 && tile.q <= kMost && tile.k <= kMost, function,
        "block sizes must be positive integers below 2^31; got (", tile.q, ", ", tile.k, ")");
  const TileGrid grid{static_cast<int32_t>(Nq), static_cast<int32_t>(Nk), static_cast<int32_t>(tile.q),
                      static_cast<int32_t>(tile.k)};
  check(int64_t{grid.query_blocks()} * grid.key_blocks() <= int64_t{1} << 36, function,
        "expected at most 2^36 tiles; got ", grid.query_blocks(), " by ", grid.key_blocks(),
        ": larger blocks are needed");
  return grid;
}

BlockPattern BlockPattern::from_rows(TileGrid grid, int32_t batch, int32_t heads, const MarkRow& mark) {
  BlockPattern p;
  p.grid_ = grid;
  p.batch_ = batch;
  p.heads_ = heads;
  const int32_t NQ = grid.query_blocks(), NK = grid.key_blocks();
  const int32_t chunk = rows_per_task(grid);
  const int64_t chunks = (NQ + chunk - 1) / chunk, tasks = p.lists() * chunks;
  p.offsets_.assign(p.lists() * (NQ + int64_t{1}), 0);

  std::vector<std::vector<int32_t>> ids(tasks);  // of each task; then joined in order
  parallel_for(tasks, [&](int64_t task, int) {
    const int64_t l = task / chunks;
    const int32_t first = static_cast<int32_t>(task % chunks) * chunk, last = std::min(NQ, first + chunk);
    std::vector<uint8_t> row(NK);
    std::vector<int32_t> places(NK + 1);  // one more: the place after the last is written before it is known
    for (int32_t r = first; r < last; ++r) {
      std::fill(row.begin(), row.end(), uint8_t{0});
      mark(static_cast<int32_t>(l / heads), static_cast<int32_t>(l % heads), r, row.data());
      const int32_t count = places_of_ones(row.data(), NK, places.data());
      ids[task].insert(ids[task].end(), places.begin(), places.begin() + count);
      p.offsets_[l * (NQ + int64_t{1}) + r + 1] = count;
    }
  });

  int64_t total = 0;
  for (int64_t l = 0; l < p.lists(); ++l) {
    int64_t* at = p.offsets_.data() + l * (NQ + int64_t{1});
    at[0] = total;
    for (int32_t r = 0; r < NQ; ++r) at[r + 1] += at[r];
    total = at[NQ];
  }
  reserve_ids(p.key_ids_, total);
  for (const auto& part : ids) p.key_ids_.insert(p.key_ids_.end(), part.begin(), part.end());
  p.transpose();
  return p;
}

BlockPattern BlockPattern::from_rule(const BlockRule& rule) {
  return from_rows(rule.grid, 1, 1, [&](int32_t, int32_t, int32_t r, uint8_t* row) { rule.mark(r, row); });
}

void BlockPattern::transpose() {
  const int64_t NQ = grid_.query_blocks(), NK = grid_.key_blocks();
  transposed_offsets_.assign(lists() * (NK + 1), 0);
  reserve_ids(query_ids_, count());
  query_ids_.resize(key_ids_.size());
  parallel_for(lists(), [&](int64_t l, int) {
    const int64_t* rows = offsets_.data() + l * (NQ + 1);
    int64_t* columns = transposed_offsets_.data() + l * (NK + 1);
    for (int64_t e = rows[0]; e < rows[NQ]; ++e) ++columns[key_ids_[e] + 1];
    columns[0] = rows[0];
    for (int64_t c = 0; c < NK; ++c) columns[c + 1] += columns[c];
    std::vector<int64_t> next(columns, columns + NK);
    for (int64_t r = 0; r < NQ; ++r) {
      for (int64_t e = rows[r]; e < rows[r + 1]; ++e) query_ids_[next[key_ids_[e]]++] = static_cast<int32_t>(r);
    }
  });
}

BlockListRef BlockPattern::ref() const {
  BlockListRef ref;
  ref.block_q = grid_.block_q;
  ref.block_k = grid_.block_k;
  ref.query_blocks = grid_.query_blocks();
  ref.key_blocks = grid_.key_blocks();
  ref.stride_h = heads_ > 1 ? 1 : 0;
  ref.stride_b = batch_ > 1 ? heads_ : 0;
  ref.entries = count();
  ref.offsets = offsets_.data();
  ref.key_ids = key_ids_.data();
  ref.transposed_offsets = transposed_offsets_.data();
  ref.query_ids = query_ids_.data();
  return ref;
}

double BlockPattern::density() const {
  const double tiles = static_cast<double>(lists()) * grid_.query_blocks() * grid_.key_blocks();
  return tiles == 0 ? 0 : static_cast<double>(count()) / tiles;
}

void BlockPattern::write_dense(uint8_t* out) const {
  const int64_t NQ = grid_.query_blocks(), NK = grid_.key_blocks();
  if (NK == 0) return;
  const int64_t chunk = rows_per_task(grid_), rows = lists() * NQ;
  parallel_for((rows + chunk - 1) / chunk, [&](int64_t task, int) {
    for (int64_t n = task * chunk; n < std::min(rows, (task + 1) * chunk); ++n) {
      uint8_t* row = out + n * NK;
      std::memset(row, 0, NK);
      const int64_t i = n / NQ * (NQ + 1) + n % NQ;
      for (int64_t e = offsets_[i]; e < offsets_[i + 1]; ++e) row[key_ids_[e]] = 1;
    }
  });
}

BlockPattern BlockPattern::refined(int64_t block_q, int64_t block_k) const {
  check(block_q >= 1 && block_k >= 1 && grid_.block_q % block_q == 0 && grid_.block_k % block_k == 0,
        "BlockMask.refine", "block sizes must divide (", grid_.block_q, ", ", grid_.block_k, "); got (", block_q, ", ",
        block_k, ")");
  const TileGrid fine = checked_grid("BlockMask.refine", grid_.Nq, grid_.Nk, {block_q, block_k});
  const int64_t rows = grid_.block_q / block_q, columns = grid_.block_k / block_k;
  return from_rows(fine, batch_, heads_, [&](int32_t b, int32_t h, int32_t r, uint8_t* row) {
    const int64_t i = (int64_t{b} * heads_ + h) * (grid_.query_blocks() + int64_t{1}) + r / rows;
    for (int64_t e = offsets_[i]; e < offsets_[i + 1]; ++e) {
      const int64_t first = key_ids_[e] * columns, last = std::min<int64_t>(fine.key_blocks(), first + columns);
      std::memset(row + first, 1, last - first);
    }
  });
}

}  // namespace mfa
