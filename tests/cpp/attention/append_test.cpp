// append_test.cpp: rows appended to caches of every layout, rotated and read back, and the errors of their places.
#include "attention/append.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/random.h"

namespace mfa {
namespace {

// A cache of `pages` pages (or batch entries) of `page_size` tokens, stored token-major, and rows for it, in float32.
struct Caches {
  static constexpr int32_t B = 2, H = 3, N = 4, D = 8, pages = 6, page_size = 5;
  std::vector<float> cache = std::vector<float>(pages * page_size * H * D), rows = std::vector<float>(B * H * N * D);
  std::vector<int32_t> starts = {3, 0}, table = {4, 1, -1, 2, -1, -1};
  CacheRows p;

  Caches() {
    for (size_t i = 0; i < cache.size(); ++i) cache[i] = static_cast<float>(i);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = -1.f - static_cast<float>(i);
    p.B = B;
    p.H = H;
    p.N = N;
    p.D = D;
    p.capacity = 3 * page_size;
    p.cache = {cache.data(), {page_size * H * D, D, H * D}};
    p.rows = {rows.data(), {H * N * D, N * D, D}};
    p.starts = starts.data();
    p.pages = {table.data(), 3, page_size, pages};
  }

  std::string error() const {
    try {
      validate(p, "f");
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "";
  }
};

TEST(Append, WritesRowsThroughTheTableAndNothingElse) {
  Caches c;
  std::vector<float> expected = c.cache;
  for (int b = 0; b < Caches::B; ++b)
    for (int h = 0; h < Caches::H; ++h)
      for (int t = 0; t < Caches::N; ++t)
        for (int d = 0; d < Caches::D; ++d) {
          const int token = c.starts[b] + t, page = c.table[b * 3 + token / Caches::page_size];
          expected[((page * Caches::page_size + token % Caches::page_size) * Caches::H + h) * Caches::D + d] =
              c.rows[((b * Caches::H + h) * Caches::N + t) * Caches::D + d];
        }
  EXPECT_EQ(c.error(), "");
  append_rows(c.p);
  EXPECT_EQ(c.cache, expected);
}

TEST(Append, ReadsBackWhatItWrote) {
  Caches c;
  append_rows(c.p);
  const std::vector<float> rows = c.rows;
  std::fill(c.rows.begin(), c.rows.end(), 0.f);
  read_rows(c.p);
  EXPECT_EQ(c.rows, rows);
}

TEST(Append, WritesIntoBatchEntriesWithoutATable) {
  Caches c;
  c.p.pages = {};
  c.p.capacity = Caches::page_size;
  c.starts = {1, 0};
  EXPECT_EQ(c.error(), "");
  append_rows(c.p);
  EXPECT_EQ(c.cache[Caches::H * Caches::D], -1.f);  // entry 0, token 1, head 0
  EXPECT_EQ(c.cache[0], 0.f);
}

TEST(Append, TurnsPairsOfBothKindsByThePositionAndBack) {
  for (const bool interleaved : {true, false}) {
    for (const int32_t rotary_dim : {2, 6, 8}) {
      Caches c;
      const int32_t half = rotary_dim / 2, positions = 9;
      std::vector<float> cos, sin;
      for (int32_t i = 0; i < positions * half; ++i) {
        cos.push_back(std::cos(0.3f * static_cast<float>(i)));
        sin.push_back(std::sin(0.3f * static_cast<float>(i)));
      }
      const std::vector<int32_t> first = {5, 2};
      c.p.rope = {cos.data(), sin.data(), positions, rotary_dim, interleaved, true, first.data(), nullptr};
      EXPECT_EQ(c.error(), "");
      append_rows(c.p);
      const float* row = c.rows.data() + ((1 * Caches::H + 2) * Caches::N + 3) * Caches::D;  // entry 1, head 2, token 3
      const float* stored = c.cache.data() + ((2 * Caches::page_size + 3) * Caches::H + 2) * Caches::D;
      std::vector<double> expected(row, row + Caches::D);
      for (int32_t i = 0; i < half; ++i) {
        const int32_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
        const double u = cos[5 * half + i], v = sin[5 * half + i];
        expected[a] = row[a] * u - row[b] * v;
        expected[b] = row[a] * v + row[b] * u;
      }
      for (int32_t d = 0; d < Caches::D; ++d) EXPECT_NEAR(stored[d], expected[d], 1e-5 * std::abs(row[d]) + 1e-5);
      const std::vector<float> rows = c.rows;
      read_rows(c.p);
      for (size_t i = 0; i < rows.size(); ++i) EXPECT_NEAR(c.rows[i], rows[i], 1e-4);
    }
  }
}

TEST(Append, RoundsToTheDtypeOnce) {
  std::vector<bfloat16> cache(2), rows = {to_bfloat16(1.f), to_bfloat16(3.f)};
  const float cos = 0.6f, sin = 0.8f;
  const int32_t start = 0;
  CacheRows p;
  p.B = p.H = p.N = p.capacity = 1;
  p.D = 2;
  p.dtype = DType::bf16;
  p.cache = {cache.data(), {2, 2, 2}};
  p.rows = {rows.data(), {2, 2, 2}};
  p.starts = &start;
  p.rope = {&cos, &sin, 1, 2, true, true, nullptr, nullptr};
  append_rows(p);
  EXPECT_EQ(cache[0].bits, to_bfloat16(0.6f - 3 * 0.8f).bits);
  EXPECT_EQ(cache[1].bits, to_bfloat16(0.8f + 3 * 0.6f).bits);
}

TEST(Append, PlacesThatDoNotFitAreRefused) {
  Caches c;
  c.starts = {12, 0};
  EXPECT_EQ(c.error(),
            "[f] sequences must have room for their lengths and the 4 new tokens, 15 in all; got length 12 for "
            "sequence 0");
  c.starts = {0, -1};
  EXPECT_NE(c.error().find("got length -1 for sequence 1"), std::string::npos);
  c.starts = {7, 0};
  EXPECT_EQ(c.error(),
            "[f] block_table must name pages in [0, 6) for the tokens that are appended; got -1 at entry 2 of "
            "sequence 0");
  c.starts = {3, 0};
  c.table[1] = 6;
  EXPECT_NE(c.error().find("got 6 at entry 1 of sequence 0"), std::string::npos);
  c.table[1] = 2;
  EXPECT_EQ(c.error(), "[f] each page may be appended to once; got page 2 for sequences 0 and 1");
  c.table[1] = 1;
  const std::vector<float> tables(5);
  const std::vector<int32_t> first = {0, 2};
  c.p.rope = {tables.data(), tables.data(), 5, 2, true, true, first.data(), nullptr};
  EXPECT_EQ(c.error(),
            "[f] the positions of new keys must lie in the rotary tables, [0, 5); got [2, 6) for sequence 1");
}

// A step whose attention would fail is refused before rows are written.
TEST(Append, WhatTheAttentionThatFollowsNeedsIsCheckedToo) {
  Caches c;
  c.starts = {6, 0};
  c.table = {-1, 1, 5, 2, -1, -1};
  EXPECT_EQ(c.error(), "");
  c.p.attended = true;
  EXPECT_EQ(c.error(),
            "[f] block_table must name pages in [0, 6) for the keys that a sequence has; got -1 at entry 0 of "
            "sequence 0");
  c.table[0] = 4;
  const std::vector<int32_t> first = {0, 2}, queries = {0, 8};
  c.p.rope = {nullptr, nullptr, 10, 2, true, false, first.data(), nullptr};
  c.p.queries = 3;
  c.p.query_positions = queries.data();
  EXPECT_EQ(c.error(),
            "[f] the positions of queries must lie in the rotary tables, [0, 10); got [8, 11) for sequence 1");
  c.p.queries = 2;
  EXPECT_EQ(c.error(), "");
  c.p.rope.rotates_k = true;
  c.p.rope.positions = 9;
  EXPECT_EQ(c.error(), "[f] the positions of keys must lie in the rotary tables, [0, 9); got [0, 10) for sequence 0");
}

// The arrays lie on the heap and have exactly the sizes that their shapes give: AddressSanitizer sees their ends.
TEST(Append, RandomPlacesAreRefusedOrWrittenInsideOfTheCache) {
  testing::Random random(5);
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  int refused = 0, appended = 0;
  const int cases = 10000;
  for (int n = 0; n < cases; ++n) {
    const auto pick = [&](int low, int high) { return static_cast<int32_t>(random.integer(low, high)); };
    const bool paged = random.chance(0.6), rotates = random.chance(0.4);
    const int32_t page_size = pick(0, 5), columns = pick(0, 3), count = paged ? pick(0, 8) : pick(0, 3);
    CacheRows p;
    p.B = paged ? pick(0, 3) : count;
    p.H = 1;
    p.N = pick(0, 4);
    p.D = random.chance(0.05) ? 0 : 2;
    p.capacity = paged ? columns * page_size : page_size;
    const auto wrong = [&](int32_t right) {
      return random.chance(0.06) ? random.pick({-kMost - 1, -1, 0, 3, 7, kMost}) : right;
    };
    std::vector<int32_t> starts, table, positions;
    for (int32_t b = 0; b < p.B; ++b) starts.push_back(wrong(pick(0, std::max(0, p.capacity - p.N))));
    for (int32_t i = 0; paged && i < p.B * columns; ++i) table.push_back(wrong(i % std::max(1, count)));
    for (int32_t b = 0; b < p.B; ++b) positions.push_back(wrong(pick(0, 3)));
    const std::vector<float> angles(7, 0.6f);
    std::vector<float> cache(static_cast<size_t>(count * page_size * p.D), 1.f);
    std::vector<float> rows(static_cast<size_t>(p.B * p.N * p.D));
    std::fill(rows.begin(), rows.end(), 2.f);
    p.cache = {cache.data(), {page_size * p.D, p.D, p.D}};
    p.rows = {rows.data(), {p.N * p.D, p.D, p.D}};
    p.starts = starts.data();
    if (paged) p.pages = {table.data(), columns, page_size, count};
    if (rotates && p.D > 0) p.rope = {angles.data(), angles.data(), 7, 2, true, true, positions.data(), nullptr};
    try {
      validate(p, "f");
    } catch (const std::invalid_argument& error) {
      ASSERT_EQ(std::string(error.what()).substr(0, 4), "[f] ");
      ++refused;
      continue;
    }
    append_rows(p);
    EXPECT_EQ(std::count_if(cache.begin(), cache.end(), [](float x) { return x != 1.f; }), p.B * p.N * p.D);
    read_rows(p);
    ++appended;
  }
  EXPECT_GT(refused, cases / 10);
  EXPECT_GT(appended, cases / 10);
}

}  // namespace
}  // namespace mfa
