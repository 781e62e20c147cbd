// validate_test.cpp: values that are used as addresses: each mistake has its error, and what passes stays within
// bounds.
#include "attention/validate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/layout.h"
#include "attention/visibility.h"
#include "support/metadata.h"
#include "support/random.h"

namespace mfa {
namespace {

using testing::Metadata;
using testing::Random;
using testing::sizes;

Metadata packed() {
  Metadata m = sizes(2, 4, 5);
  m.query_starts = {0, 4, 6};
  m.key_starts = {0, 3, 8};
  m.p.packed_queries = 6;
  m.p.packed_keys = 8;
  return m;
}

Metadata paged() {
  Metadata m = sizes(2, 2, 12);
  m.table = {3, 0, -1, 2, -1, -1};
  m.lengths = {7, 4};
  m.p.pages = {nullptr, 3, 4, 5};
  return m;
}

Metadata rotary() {
  Metadata m = sizes(2, 3, 4);
  m.cos.resize(10 * 2);
  m.p.rope.positions = 10;
  m.p.rope.rotary_dim = 4;
  m.q_positions = {0, 7};
  m.k_positions = {6, 0};
  return m;
}

// Query block 0 sees key blocks 0 and 2, query block 1 sees 1.
Metadata listed() {
  Metadata m = sizes(1, 20, 40);
  m.p.blocks.block_q = m.p.blocks.block_k = 16;
  m.p.blocks.query_blocks = 2;
  m.p.blocks.key_blocks = 3;
  m.p.blocks.entries = 3;
  m.offsets = {0, 2, 3};
  m.key_ids = {0, 2, 1};
  m.transposed_offsets = {0, 1, 2, 3};
  m.query_ids = {0, 1, 0};
  return m;
}

struct Mistake {
  const char* name;
  Metadata (*valid)();
  std::function<void(Metadata&)> spoil;
  const char* error;
};

void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.name; }

class Validate : public ::testing::TestWithParam<Mistake> {};

TEST_P(Validate, MistakeHasItsError) {
  const Mistake& mistake = GetParam();
  Metadata m = mistake.valid();
  EXPECT_EQ(m.error(), "");
  mistake.spoil(m);
  EXPECT_EQ(m.error(), mistake.error);
}

INSTANTIATE_TEST_SUITE_P(
    Table, Validate,
    ::testing::Values(
        Mistake{"first start", packed, [](Metadata& m) { m.query_starts[0] = 1; },
                "[f] cu_seqlens_q must begin with 0; got 1"},
        Mistake{"descending starts", packed, [](Metadata& m) { m.key_starts[1] = 9; },
                "[f] no sequence may have more than 5 keys; got 9 in sequence 0"},
        Mistake{"negative start", packed, [](Metadata& m) { m.key_starts[1] = -2; },
                "[f] cu_seqlens_k must not decrease; got -2 after 0"},
        Mistake{"extreme starts", packed, [](Metadata& m) { m.key_starts[2] = std::numeric_limits<int32_t>::min(); },
                "[f] cu_seqlens_k must not decrease; got -2147483648 after 3"},
        Mistake{"last start", packed, [](Metadata& m) { m.query_starts[2] = 5; },
                "[f] cu_seqlens_q must end with the number of packed queries, 6; got 5"},
        Mistake{"long sequence", packed, [](Metadata& m) { m.p.Nq = 3; },
                "[f] no sequence may have more than 3 queries; got 4 in sequence 0"},
        Mistake{"negative length", paged, [](Metadata& m) { m.lengths[1] = -1; },
                "[f] seq_lens must be in [0, 12], what the block table has room for; got -1 for sequence 1"},
        Mistake{"long length", paged, [](Metadata& m) { m.lengths[0] = 13; },
                "[f] seq_lens must be in [0, 12], what the block table has room for; got 13 for sequence 0"},
        Mistake{"missing page", paged, [](Metadata& m) { m.lengths[1] = 5; },
                "[f] block_table must name pages in [0, 5) for the keys that a sequence has; got -1 at entry 1 of "
                "sequence 1"},
        Mistake{"page behind the pool", paged, [](Metadata& m) { m.table[1] = 5; },
                "[f] block_table must name pages in [0, 5) for the keys that a sequence has; got 5 at entry 1 of "
                "sequence 0"},
        Mistake{"query position", rotary, [](Metadata& m) { m.q_positions[1] = 8; },
                "[f] the positions of queries must lie in the rotary tables, [0, 10); got [8, 11) for sequence 1"},
        Mistake{"key position", rotary, [](Metadata& m) { m.k_positions[0] = -1; },
                "[f] the positions of keys must lie in the rotary tables, [0, 10); got [-1, 3) for sequence 0"},
        Mistake{"extreme position", rotary, [](Metadata& m) { m.q_positions[0] = std::numeric_limits<int32_t>::max(); },
                "[f] the positions of queries must lie in the rotary tables, [0, 10); got [2147483647, 2147483650) for "
                "sequence 0"},
        Mistake{"first offset", listed, [](Metadata& m) { m.offsets[0] = 1; },
                "[f] the offsets of block lists must begin with 0; got 1"},
        Mistake{"descending offsets", listed, [](Metadata& m) { m.offsets[1] = 4; },
                "[f] the offsets of block lists must ascend within [0, 3]; got 0 before 4"},
        Mistake{"unknown block", listed, [](Metadata& m) { m.key_ids[1] = 3; },
                "[f] block lists must name blocks in [0, 3); got 3"},
        Mistake{"descending blocks", listed, [](Metadata& m) { m.key_ids[1] = 0; },
                "[f] block lists must ascend; got 0 after 0"},
        Mistake{"unknown query block", listed, [](Metadata& m) { m.query_ids[2] = -1; },
                "[f] block lists must name blocks in [0, 2); got -1"}));

TEST(Validate, UnusedTableEntriesMayHoldAnything) {
  Metadata m = paged();
  m.table[2] = m.table[4] = m.table[5] = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(m.error(), "");
  m.lengths = {0, 0};
  m.table.assign(6, -1);
  EXPECT_EQ(m.error(), "");
}

TEST(Validate, KeysThatAreRotatedAlreadyNeedNoPositions) {
  Metadata m = rotary();
  m.p.Nk = 100;
  m.p.rope.rotates_k = false;
  EXPECT_EQ(m.error(), "");
}

// Raises unless all that a kernel would address is inside of what there is.
void expect_within_bounds(const AttentionProblem& p) {
  const int64_t stride[3] = {p.pages.table ? p.pages.page_size : p.Nk, 0, 1};
  const int64_t keys =
      p.pages.table ? int64_t{p.pages.pages} * p.pages.page_size : (p.key_starts ? p.packed_keys : int64_t{p.B} * p.Nk);
  for (int32_t b = 0; b < p.B; ++b) {
    ASSERT_LE(query_count(p, b), p.Nq);
    ASSERT_LE(key_count(p, b), p.Nk);
    for (int32_t i = 0; i < query_count(p, b); ++i) {
      ASSERT_GE(row_index(p, b, 0, i), 0);
      ASSERT_LT(row_index(p, b, 0, i), row_count(p));
      if (p.rope.cos) {
        ASSERT_GE(p.rope.q_positions[b] + i, 0);
        ASSERT_LT(p.rope.q_positions[b] + i, p.rope.positions);
      }
      for (int32_t j = 0; p.blocks.offsets && j < key_count(p, b); ++j) block_visible(p.blocks, b, 0, i, j);
    }
    for (int32_t j = 0; j < key_count(p, b); ++j) {
      const int64_t at = key_element(p, stride, b, 0, j);
      ASSERT_GE(at, 0);
      ASSERT_LT(at, keys);
      if (p.rope.cos && p.rope.rotates_k) {
        ASSERT_GE(p.rope.k_positions[b] + j, 0);
        ASSERT_LT(p.rope.k_positions[b] + j, p.rope.positions);
      }
    }
  }
}

TEST(Validate, RandomMetadataIsRefusedOrStaysWithinBounds) {
  Random random(20240);
  int refused = 0, spoiled_and_accepted = 0;
  const int cases = 10000;  // each takes microseconds, also when instrumented
  for (int i = 0; i < cases; ++i) {
    Metadata m = testing::random_metadata(random);
    ASSERT_EQ(m.error(), "") << "case " << i;
    const auto mistakes = random.integer(0, 3);
    for (int64_t n = 0; n < mistakes; ++n) spoil(random, m);
    const std::string error = m.error();
    if (!error.empty()) {
      ++refused;
      ASSERT_EQ(error.substr(0, 4), "[f] ") << "case " << i;
    } else {
      spoiled_and_accepted += mistakes > 0;
      expect_within_bounds(m.problem());
      ASSERT_FALSE(HasFatalFailure()) << "case " << i;
    }
  }
  EXPECT_GT(refused, cases / 4);
  EXPECT_GT(spoiled_and_accepted, cases / 50);
}

TEST(Validate, RandomIndicesAreRefusedOrNameRows) {
  Random random(7);
  int refused = 0;
  const int cases = 10000;
  for (int n = 0; n < cases; ++n) {
    const auto rows = static_cast<int32_t>(random.integer(0, 5)), count = static_cast<int32_t>(random.integer(0, 6));
    const int64_t stride = random.integer(1, 2);
    std::vector<int32_t> indices(static_cast<size_t>(count * stride));
    for (int32_t& index : indices) {
      index = random.chance(0.9)
                  ? static_cast<int32_t>(random.integer(0, std::max(0, rows - 1)))
                  : random.pick({-1, rows, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()});
    }
    bool valid = true;
    for (int64_t i = 0; i < count; ++i) valid &= indices[i * stride] >= 0 && indices[i * stride] < rows;
    try {
      validate_indices(indices.data(), stride, count, rows, "cache_batch_idx", "f");
      ASSERT_TRUE(valid);
    } catch (const std::invalid_argument& error) {
      ASSERT_FALSE(valid);
      ASSERT_EQ(std::string(error.what()).substr(0, 19), "[f] cache_batch_idx");
      ++refused;
    }
  }
  EXPECT_GT(refused, cases / 10);
}

}  // namespace
}  // namespace mfa
