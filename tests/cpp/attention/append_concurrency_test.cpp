// append_concurrency_test.cpp: rows that several threads append.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "attention/append.h"
#include "common/thread_pool.h"
#include "support/random.h"

namespace mfa {
namespace {

TEST(AppendConcurrency, LongRowsAreTheSameOnAnyNumberOfThreads) {
  constexpr int32_t N = 3000, D = 64;
  std::vector<float> cache(2 * N * D), rows(N * D);
  testing::Random random(1);
  for (float& x : rows) x = random.normal();
  const int32_t start = 17;
  CacheRows p;
  p.B = p.H = 1;
  p.N = N;
  p.D = D;
  p.capacity = 2 * N;
  p.cache = {cache.data(), {0, 0, D}};
  p.rows = {rows.data(), {0, 0, D}};
  p.starts = &start;
  for (const int threads : {1, 4}) {
    set_thread_count(threads);
    std::fill(cache.begin(), cache.end(), 0.f);
    append_rows(p);
    EXPECT_TRUE(std::equal(rows.begin(), rows.end(), cache.begin() + start * D));
    EXPECT_EQ(cache[start * D - 1], 0.f);
    EXPECT_EQ(cache[(start + N) * D], 0.f);
  }
  set_thread_count(0);
}

}  // namespace
}  // namespace mfa
