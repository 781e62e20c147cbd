// Selectors: rankings with ties and NaN against plain sorting, the golden masks, and what each selection promises.
#include "masks/selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "common/thread_pool.h"
#include "masks/selectors.h"
#include "support/json.h"
#include "support/random.h"
#include "support/tensor.h"

namespace mfa {
namespace {

using testing::Json;
using testing::Random;

std::vector<int32_t> integers(int32_t n) {
  std::vector<int32_t> all(n);
  std::iota(all.begin(), all.end(), 0);
  return all;
}

std::vector<uint8_t> bits(const std::string& text) {
  std::vector<uint8_t> result;
  for (const char c : text) result.push_back(c == '1');
  return result;
}

std::vector<float> floats(const Json& values) {
  const std::vector<double> flat = values.flat();
  return {flat.begin(), flat.end()};
}

// Some of 0 .. n - 1, ascending.
std::vector<int32_t> random_candidates(Random& random, int32_t n) {
  std::vector<int32_t> all = integers(n);
  std::erase_if(all, [&](int32_t) { return random.chance(0.3); });
  return all;
}

TEST(Selection, TopOfARankingWithTiesAndNaNIsThatOfAStableSort) {
  Random random(21);
  for (int n = 0; n < testing::case_count(500); ++n) {
    const int32_t size = static_cast<int32_t>(random.integer(1, 40));
    std::vector<float> scores(size);
    for (float& score : scores) {
      score = random.chance(0.1) ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(random.integer(-3, 3));
    }
    std::vector<int32_t> candidates = random_candidates(random, size), ranked = candidates;
    const int64_t k = random.integer(1, size + 3);
    const auto key = [&](int32_t c) { return std::isnan(scores[c]) ? -INFINITY : scores[c]; };
    std::stable_sort(ranked.begin(), ranked.end(), [&](int32_t a, int32_t b) { return key(a) > key(b); });
    std::vector<uint8_t> expected(size), keep(size);
    for (size_t i = 0; i < ranked.size() && static_cast<int64_t>(i) < k; ++i) expected[ranked[i]] = 1;
    keep_top(scores.data(), candidates, k, keep.data());
    ASSERT_EQ(keep, expected) << "case " << n;
  }
}

TEST(Selection, MassIsTheShortestPrefixOfTheRanking) {
  Random random(22);
  for (int n = 0; n < testing::case_count(500); ++n) {
    const int32_t size = static_cast<int32_t>(random.integer(1, 30));
    std::vector<float> weights(size);
    for (float& weight : weights) weight = static_cast<float>(random.integer(0, 8)) / 64;  // sums are exact
    std::vector<int32_t> candidates = random_candidates(random, size), ranked = candidates;
    std::stable_sort(ranked.begin(), ranked.end(), [&](int32_t a, int32_t b) { return weights[a] > weights[b]; });
    const double mass = static_cast<double>(random.integer(0, 128)) / 64;
    std::vector<uint8_t> expected(size), keep(size);
    double sum = 0;
    for (size_t i = 0; i < ranked.size() && (i == 0 || sum < mass); ++i) {
      expected[ranked[i]] = 1;
      sum += weights[ranked[i]];
    }
    keep_mass(weights.data(), candidates, mass, keep.data());
    ASSERT_EQ(keep, expected) << "case " << n;
  }
}

TEST(Selection, BudgetDropsTiesWithTheFirstLeftOut) {
  Random random(23);
  for (int n = 0; n < testing::case_count(500); ++n) {
    std::vector<double> weights(random.integer(1, 30));
    for (double& weight : weights) weight = static_cast<double>(random.integer(0, 6));
    const int64_t budget = random.integer(0, 40);
    std::vector<double> sorted = weights;
    std::sort(sorted.rbegin(), sorted.rend());
    const double threshold = budget < static_cast<int64_t>(sorted.size()) ? sorted[budget] : 0;
    std::vector<uint8_t> keep(weights.size());
    keep_budget(weights, budget, keep.data());
    for (size_t i = 0; i < weights.size(); ++i) ASSERT_EQ(keep[i], weights[i] > threshold);
    ASSERT_LE(std::count(keep.begin(), keep.end(), 1), budget);
  }
}

TEST(Selection, SoftmaxIsOneOverTheCandidatesAlone) {
  const float scores[] = {1, 500, 2, std::numeric_limits<float>::quiet_NaN()};
  double weights[4];
  const int32_t some[] = {0, 2, 3};
  softmax(scores, 4, some, weights);
  EXPECT_DOUBLE_EQ(weights[0] + weights[2], 1);
  EXPECT_NEAR(weights[2] / weights[0], std::exp(1), 1e-12);
  EXPECT_EQ(weights[1], 0);
  EXPECT_EQ(weights[3], 0);
  softmax(scores, 4, {}, weights);
  for (const double weight : weights) EXPECT_EQ(weight, 0);
  const int32_t none[] = {3};
  softmax(scores, 4, none, weights);
  EXPECT_EQ(weights[3], 1);
}

TEST(Selection, GoldenMasses) {
  const Json golden = Json::golden("block_masks.json");
  const std::vector<float> weights = floats(golden["mass_selection"]["weights"]);
  for (const Json& row : golden["mass_selection"]["kept"]) {
    std::vector<uint8_t> keep(weights.size()), expected(weights.size());
    for (const double block : row["blocks"].flat()) expected[static_cast<size_t>(block)] = 1;
    std::vector<int32_t> candidates = integers(static_cast<int32_t>(weights.size()));
    keep_mass(weights.data(), candidates, row["threshold"].number(), keep.data());
    EXPECT_EQ(keep, expected) << row["threshold"].number();
  }
}

// A tensor [1, 1, N, D] of golden rows.
testing::Tensor tensor_of(const Json& rows, testing::Layout layout) {
  const std::vector<float> values = floats(rows);
  const auto N = static_cast<int64_t>(rows.size()), D = static_cast<int64_t>(values.size()) / N;
  testing::Tensor x(DType::f32, {1, 1, N, D}, layout);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t d = 0; d < D; ++d) x.set(0, 0, n, d, values[n * D + d]);
  }
  return x;
}

SelectionOperand operand(const testing::Tensor& x) {
  const auto& s = x.shape();
  return {x.ref(),
          x.dtype(),
          static_cast<int32_t>(s[0]),
          static_cast<int32_t>(s[1]),
          static_cast<int32_t>(s[2]),
          static_cast<int32_t>(s[3])};
}

TEST(Selection, GoldenDraftMasks) {
  const Json golden = Json::golden("block_masks.json");
  const Json& draft = golden["draft"];
  for (const auto layout : {testing::Layout::dense, testing::Layout::padded_rows, testing::Layout::reversed}) {
    const testing::Tensor q = tensor_of(draft["pooled_q"], layout), k = tensor_of(draft["pooled_k"], layout);
    const int32_t NQ = operand(q).N, NK = operand(k).N;
    const DraftOptions options{.rows = 3,
                               .columns = 3,
                               .local_range = static_cast<int64_t>(draft["local_range"].number()),
                               .budget = static_cast<int64_t>(draft["topk"].number())};
    const BlockPattern pattern = draft_tiles(operand(q), operand(k), {NQ, NK, 1, 1}, options);
    std::vector<uint8_t> tiles(NQ * NK);
    pattern.write_dense(tiles.data());
    for (int32_t r = 0; r < NQ; ++r) {
      EXPECT_EQ(std::vector<uint8_t>(tiles.begin() + r * NK, tiles.begin() + (r + 1) * NK),
                bits(draft["mask"][r].text()));
    }

    // Per-row top-k of the same scores among the same neighbours, as a rule of them.
    BlockRule allowed;
    allowed.grid = {NQ, NK, 1, 1};
    allowed.mark = [&](int32_t r, uint8_t* row) {
      for (int32_t c = 0; c < NK; ++c) row[c] = draft["local"][r % 9].text()[c % 9] == '1';
    };
    const auto top_k = static_cast<int64_t>(draft["row_topk"].number());
    averaged_top_tiles(operand(q), operand(k), allowed, top_k).write_dense(tiles.data());
    for (int32_t r = 0; r < NQ; ++r) {
      EXPECT_EQ(std::vector<uint8_t>(tiles.begin() + r * NK, tiles.begin() + (r + 1) * NK),
                bits(draft["row_mask"][r].text()));
    }
  }
}

TEST(Selection, GoldenAntidiagonals) {
  const Json golden = Json::golden("block_masks.json");
  const Json& row = golden["antidiagonal"];
  const auto stride = static_cast<int32_t>(row["stride"].number());
  const testing::Tensor q = tensor_of(row["q"], testing::Layout::padded_rows);
  const testing::Tensor k = tensor_of(row["k"], testing::Layout::sliced);
  const std::vector<float> rows_q = strided_rows(operand(q), 0, 0, stride, true);
  const std::vector<float> rows_k = strided_rows(operand(k), 0, 0, stride, false);
  const std::vector<float> expected = floats(row["scores"]);
  std::vector<float> scores(expected.size());
  product(rows_q.data(), rows_k.data(), 4, 4, stride * operand(q).D, 1.f, scores.data());
  EXPECT_EQ(scores, expected);  // values are multiples of 1/64: exact
}

TEST(Selection, MeansAndSimilaritiesAreThoseOfTheirRows) {
  Random random(24);
  for (int n = 0; n < testing::case_count(300); ++n) {
    SCOPED_TRACE("case " + std::to_string(n));
    const DType dtype = random.pick({DType::f32, DType::f16, DType::bf16});
    testing::Tensor x(
        dtype, {random.integer(1, 2), random.integer(1, 3), random.integer(1, 50), random.integer(1, 20)},
        random.pick({testing::Layout::dense, testing::Layout::padded_rows, testing::Layout::token_major,
                     testing::Layout::sliced, testing::Layout::reversed, testing::Layout::broadcast_heads}));
    x.fill_normal(random);
    const SelectionOperand in = operand(x);
    const auto block = static_cast<int32_t>(random.integer(1, 20));
    const int32_t tiles = (in.N + block - 1) / block;
    std::vector<int32_t> sizes;
    if (random.chance(0.4)) {
      for (int32_t t = 0; t < tiles; ++t) sizes.push_back(static_cast<int32_t>(random.integer(0, block)));
    }
    const std::vector<float> means = tile_means(in, block, sizes), similarities = tile_similarities(in, block);
    for (int32_t i = 0; i < in.B * in.H * tiles; ++i) {
      const int64_t b = i / tiles / in.H, h = i / tiles % in.H, first = int64_t{i % tiles} * block;
      const int64_t all = std::min<int64_t>(block, in.N - first);
      const int64_t rows = sizes.empty() ? all : std::min<int64_t>(all, sizes[i % tiles]);
      for (int32_t d = 0; d < in.D; ++d) {
        double mean = 0;
        for (int64_t r = 0; r < rows; ++r) mean += x.get(b, h, first + r, d) / static_cast<double>(rows);
        ASSERT_NEAR(means[int64_t{i} * in.D + d], mean, 1e-5);
      }
      double cosines = 0;
      for (int64_t r = 0; r < all; ++r) {
        for (int64_t s = 0; s < all; ++s) {
          double dot = 0, rr = 0, ss = 0;
          for (int32_t d = 0; d < in.D; ++d) {
            const double a = x.get(b, h, first + r, d), c = x.get(b, h, first + s, d);
            dot += a * c;
            rr += a * a;
            ss += c * c;
          }
          cosines += dot / std::sqrt(rr * ss);
        }
      }
      ASSERT_NEAR(similarities[i], cosines / static_cast<double>(all * all), 1e-5);
    }
  }
}

TEST(Selection, MasksAreTheSameOnAnyNumberOfThreads) {
  Random random(25);
  testing::Tensor q(DType::bf16, {2, 4, 200, 16}, testing::Layout::token_major);
  testing::Tensor k(DType::bf16, {2, 2, 300, 16}, testing::Layout::dense);
  q.fill_normal(random);
  k.fill_normal(random);
  const TileGrid grid{200, 300, 32, 16};
  const auto all = [&] {
    return std::vector<BlockPattern>{
        pooled_top_tiles(operand(q), operand(k), grid, {.top_k = 3, .centred = true, .q_sizes = {}, .k_sizes = {}}),
        similarity_mass_tiles(operand(q), operand(k), grid, {.mass = 0.5, .fraction = {}, .similarity = 0.05}),
        antidiagonal_tiles(operand(q), operand(k), grid, {.stride = 8, .mass = 0.5, .causal = true})};
  };
  const std::vector<BlockPattern> expected = all();
  for (const int threads : {1, 3}) {
    set_thread_count(threads);
    EXPECT_EQ(all(), expected);
  }
  set_thread_count(0);
}

}  // namespace
}  // namespace mfa
