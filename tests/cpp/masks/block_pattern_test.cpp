// Lists of visible tiles: what they say, both ways, at one size and refined.
#include "masks/block_pattern.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/thread_pool.h"
#include "support/random.h"

namespace mfa {
namespace {

using testing::Random;

struct DenseMask {
  TileGrid grid;
  int32_t B = 1, H = 1;
  std::vector<uint8_t> tiles;  // [B, H, NQ, NK]
  uint8_t at(int32_t b, int32_t h, int32_t r, int32_t c) const {
    return tiles[((int64_t{b} * H + h) * grid.query_blocks() + r) * grid.key_blocks() + c];
  }
};

DenseMask random_mask(Random& random) {
  DenseMask mask;
  mask.grid = {static_cast<int32_t>(random.integer(0, 300)), static_cast<int32_t>(random.integer(0, 300)),
               static_cast<int32_t>(random.integer(1, 40)), static_cast<int32_t>(random.integer(1, 40))};
  mask.B = static_cast<int32_t>(random.integer(1, 3));
  mask.H = static_cast<int32_t>(random.integer(1, 3));
  mask.tiles.resize(int64_t{mask.B} * mask.H * mask.grid.query_blocks() * mask.grid.key_blocks());
  const double density = random.pick({0.0, 0.05, 0.5, 1.0});
  for (uint8_t& tile : mask.tiles) tile = random.chance(density);
  return mask;
}

BlockPattern pattern_of(const DenseMask& mask) {
  return BlockPattern::from_rows(mask.grid, mask.B, mask.H, [&](int32_t b, int32_t h, int32_t r, uint8_t* row) {
    for (int32_t c = 0; c < mask.grid.key_blocks(); ++c) row[c] = mask.at(b, h, r, c);
  });
}

TEST(BlockPattern, ListsSayWhatTheDenseMaskSaysBothWays) {
  Random random(11);
  for (int n = 0; n < testing::case_count(400); ++n) {
    SCOPED_TRACE("case " + std::to_string(n));
    const DenseMask mask = random_mask(random);
    const BlockPattern pattern = pattern_of(mask);
    const BlockListRef ref = pattern.ref();
    std::vector<int32_t> keys, queries;
    for (int32_t b = 0; b < mask.B; ++b) {
      for (int32_t h = 0; h < mask.H; ++h) {
        const int64_t l = b * ref.stride_b + h * ref.stride_h;
        for (int32_t r = 0; r < ref.query_blocks; ++r) {
          const int64_t i = l * (ref.query_blocks + 1) + r;
          ASSERT_EQ(ref.offsets[i], static_cast<int64_t>(keys.size()));
          for (int32_t c = 0; c < ref.key_blocks; ++c) {
            if (mask.at(b, h, r, c)) keys.push_back(c);
          }
          ASSERT_EQ(ref.offsets[i + 1], static_cast<int64_t>(keys.size()));
        }
        for (int32_t c = 0; c < ref.key_blocks; ++c) {
          const int64_t i = l * (ref.key_blocks + 1) + c;
          ASSERT_EQ(ref.transposed_offsets[i], static_cast<int64_t>(queries.size()));
          for (int32_t r = 0; r < ref.query_blocks; ++r) {
            if (mask.at(b, h, r, c)) queries.push_back(r);
          }
          ASSERT_EQ(ref.transposed_offsets[i + 1], static_cast<int64_t>(queries.size()));
        }
      }
    }
    ASSERT_EQ(pattern.key_ids(), keys);
    ASSERT_EQ(pattern.query_ids(), queries);
    ASSERT_EQ(ref.entries, pattern.count());
    std::vector<uint8_t> dense(mask.tiles.size(), 7);
    pattern.write_dense(dense.data());
    ASSERT_EQ(dense, mask.tiles);
  }
}

TEST(BlockPattern, RefinedTilesShowTheSamePairsOfTokens) {
  Random random(12);
  for (int n = 0; n < testing::case_count(300); ++n) {
    SCOPED_TRACE("case " + std::to_string(n));
    DenseMask mask = random_mask(random);
    const int32_t q = static_cast<int32_t>(random.integer(1, 12)), k = static_cast<int32_t>(random.integer(1, 12));
    mask.grid.block_q = q * static_cast<int32_t>(random.integer(1, 4));
    mask.grid.block_k = k * static_cast<int32_t>(random.integer(1, 4));
    mask.tiles.resize(int64_t{mask.B} * mask.H * mask.grid.query_blocks() * mask.grid.key_blocks());
    for (uint8_t& tile : mask.tiles) tile = random.chance(0.4);
    const BlockPattern fine = pattern_of(mask).refined(q, k);
    ASSERT_EQ(fine.grid(), (TileGrid{mask.grid.Nq, mask.grid.Nk, q, k}));
    const int64_t NQ = fine.grid().query_blocks(), NK = fine.grid().key_blocks();
    std::vector<uint8_t> dense(fine.lists() * NQ * NK);
    fine.write_dense(dense.data());
    for (int32_t l = 0; l < fine.lists(); ++l) {
      for (int32_t r = 0; r < NQ; ++r) {
        for (int32_t c = 0; c < NK; ++c) {
          ASSERT_EQ(dense[(l * NQ + r) * NK + c],
                    mask.at(l / mask.H, l % mask.H, r * q / mask.grid.block_q, c * k / mask.grid.block_k));
        }
      }
    }
  }
}

TEST(BlockPattern, ListsAreTheSameOnAnyNumberOfThreads) {
  Random random(13);
  const DenseMask mask = random_mask(random);
  const BlockPattern expected = pattern_of(mask);
  for (const int threads : {1, 2, 5}) {
    set_thread_count(threads);
    EXPECT_EQ(pattern_of(mask), expected);
  }
  set_thread_count(0);
}

TEST(BlockPattern, DensityIsTheShareOfVisibleTiles) {
  DenseMask mask{.grid = {64, 64, 32, 16}, .tiles = {1, 0, 0, 1, 0, 0, 0, 1}};
  EXPECT_DOUBLE_EQ(pattern_of(mask).density(), 3.0 / 8);
  EXPECT_DOUBLE_EQ(pattern_of({.grid = {0, 64, 32, 16}, .tiles = {}}).density(), 0);
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(BlockPattern, BadGridsAreOneClearError) {
  EXPECT_EQ(message_of([] { checked_grid("f", -1, 5, {1, 1}); }),
            "[f] numbers of tokens must be 0 to 2^31 - 1; got -1 queries and 5 keys");
  EXPECT_EQ(message_of([] { checked_grid("f", 5, int64_t{1} << 31, {1, 1}); }),
            "[f] numbers of tokens must be 0 to 2^31 - 1; got 5 queries and 2147483648 keys");
  EXPECT_EQ(message_of([] { checked_grid("f", 5, 5, {0, 16}); }),
            "[f] block sizes must be positive integers below 2^31; got (0, 16)");
  EXPECT_EQ(message_of([] { checked_grid("f", 1 << 30, 1 << 30, {1, 1}); }),
            "[f] expected at most 2^36 tiles; got 1073741824 by 1073741824: larger blocks are needed");
  const BlockPattern pattern = pattern_of({.grid = {64, 64, 32, 16}, .tiles = std::vector<uint8_t>(8)});
  EXPECT_EQ(message_of([&] { pattern.refined(32, 5); }),
            "[BlockMask.refine] block sizes must divide (32, 16); got (32, 5)");
}

}  // namespace
}  // namespace mfa
