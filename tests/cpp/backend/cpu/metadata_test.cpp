// metadata_test.cpp: whatever numbers stand in the arrays that kernels use as addresses, a problem is refused, or
// computed from inside of its arrays: AddressSanitizer sees their ends, and what is outside would not be finite.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/layout.h"
#include "attention/validate.h"
#include "backend/cpu/attention.h"
#include "support/metadata.h"
#include "support/random.h"

namespace mfa {
namespace {

using testing::Metadata;
using testing::Random;

constexpr int kCases = 10000;  // each takes some tens of microseconds, also when instrumented
constexpr int32_t kD = 4, kHq = 2;

using Values = std::vector<float>;

Values random_values(Random& random, int64_t count) {
  Values values(static_cast<size_t>(count));
  for (float& x : values) x = random.normal();
  return values;
}

bool all_finite(const Values& values) {
  return std::ranges::all_of(values, [](float x) { return std::isfinite(x); });
}

// Arrays of exactly the elements that the shapes of `p` say, and the problem that points to them.
struct Computation {
  AttentionProblem p;
  Values q, k, v, o, lse, d_o, dlse, dq, dk, dv;

  Computation(Random& random, const AttentionProblem& metadata) : p(metadata) {
    p.Hq = kHq;
    p.D = p.Dv = kD;
    p.scale = 0.5f;
    const int64_t rows = row_count(p), queries = p.query_starts ? p.packed_queries : p.Nq;
    const int64_t page = p.pages.page_size, tokens = p.key_starts ? p.packed_keys : p.Nk;
    const int64_t keys = p.pages.table ? p.pages.pages * page : p.key_starts ? tokens : p.B * tokens;
    q = random_values(random, rows * kD);
    k = random_values(random, keys * kD);
    v = random_values(random, keys * kD);
    d_o = random_values(random, rows * kD);
    dlse = random_values(random, rows);
    o.resize(q.size());
    lse.resize(dlse.size());
    dq.resize(q.size());
    dk.resize(k.size());
    dv.resize(v.size());
    p.q = {q.data(), {kHq * queries * kD, queries * kD, kD}};
    const int64_t of_batch = (p.pages.table ? page : tokens) * kD;
    p.k = {k.data(), {of_batch, of_batch, kD}};
    p.v = {v.data(), {of_batch, of_batch, kD}};
  }

  void forward() {
    const AttentionOutputs out{{o.data(), {p.q.stride[0], p.q.stride[1], p.q.stride[2]}}, lse.data()};
    cpu::attention_forward(p, out);
  }

  void backward() {
    const auto like = [](const TensorRef& x, Values& values) {
      return MutableTensorRef{values.data(), {x.stride[0], x.stride[1], x.stride[2]}};
    };
    AttentionGradientInputs in;
    in.o = {o.data(), {p.q.stride[0], p.q.stride[1], p.q.stride[2]}};
    in.d_o = {d_o.data(), {p.q.stride[0], p.q.stride[1], p.q.stride[2]}};
    in.lse = lse.data();
    in.dlse = dlse.data();
    AttentionGradients out;
    out.dq = like(p.q, dq);
    out.dk = like(p.k, dk);
    out.dv = like(p.v, dv);
    cpu::attention_backward(p, in, out);
  }
};

TEST(MalformedMetadata, IsRefusedOrComputedFromInsideOfItsArrays) {
  Random random(20241);
  int computed_although_spoiled = 0;
  for (int i = 0; i < kCases; ++i) {
    Metadata m = testing::random_metadata(random);
    m.p.causal = random.chance(0.4);
    if (random.chance(0.2)) m.p.window_left = static_cast<int32_t>(random.integer(0, 5));
    const auto mistakes = random.integer(0, 2);
    for (int64_t n = 0; n < mistakes; ++n) testing::spoil(random, m);
    if (!m.error().empty()) continue;
    computed_although_spoiled += mistakes > 0;
    Computation run(random, m.problem());
    run.forward();
    ASSERT_TRUE(all_finite(run.o)) << "case " << i;
    run.backward();
    ASSERT_TRUE(all_finite(run.dq) && all_finite(run.dk) && all_finite(run.dv)) << "case " << i;
  }
  EXPECT_GT(computed_although_spoiled, kCases / 50);
}

TEST(MalformedMetadata, OfATopKSelectionIsComputedFromInsideOfItsArrays) {
  Random random(20242);
  for (int i = 0; i < kCases; ++i) {
    Metadata m = testing::random_metadata(random);
    if (!m.query_starts.empty() || !m.table.empty()) continue;
    Computation run(random, m.problem());
    std::vector<int32_t> keep(static_cast<size_t>(m.p.B));
    for (int32_t& n : keep)
      n = random.pick({std::numeric_limits<int32_t>::min(), -1, 0, 1, 3, 100, std::numeric_limits<int32_t>::max()});
    Values floors(run.lse.size());
    cpu::score_floors(run.p, keep.data(), floors.data());
    ASSERT_TRUE(std::ranges::none_of(floors, [](float x) { return std::isnan(x); })) << "case " << i;
    run.p.score_floor = floors.data();
    run.forward();
    ASSERT_TRUE(all_finite(run.o)) << "case " << i;
  }
}

TEST(MalformedMetadata, OfANeighbourhoodIsRefusedOrComputedFromInsideOfItsArrays) {
  Random random(20243);
  int refused = 0, computed = 0;
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < kCases; ++i) {
    Metadata m = testing::sizes(1, 1, 1);
    Neighbourhood& n = m.p.neighbourhood;
    n.axes = static_cast<int32_t>(random.integer(0, 4));
    n.shifts = random.chance(0.5);
    n.leans_left = random.chance(0.5);
    const bool absurd = random.chance(0.3);
    const auto number = [&](std::initializer_list<int32_t> sane) {
      return absurd && random.chance(0.3) ? random.pick({-kMost - 1, -1, 0, 7, kMost}) : random.pick(sane);
    };
    for (NeighbourhoodAxis& a : n.axis) {
      a = {number({1, 2, 3, 5}), number({2, 3, 4, 9}), number({1, 1, 2, 3}), number({1, 1, 2, 3}), random.chance(0.3)};
    }
    try {
      validate(n, "f");
    } catch (const std::invalid_argument& error) {
      ASSERT_EQ(std::string(error.what()).substr(0, 4), "[f] ");
      ++refused;
      continue;
    }
    double tokens = 1;  // a call is refused unless q and k have as many
    for (int32_t x = 0; x < n.axes; ++x) tokens *= n.axis[x].size;
    if (tokens > 200) continue;
    m.p.Nq = m.p.Nk = static_cast<int32_t>(tokens);
    m.p.causal = random.chance(0.2);
    Computation run(random, m.problem());
    run.forward();
    ASSERT_TRUE(all_finite(run.o)) << "case " << i;
    ++computed;
    if (computed % 4 > 0) continue;
    run.backward();
    ASSERT_TRUE(all_finite(run.dq) && all_finite(run.dk) && all_finite(run.dv)) << "case " << i;
  }
  EXPECT_GT(refused, kCases / 10);
  EXPECT_GT(computed, kCases / 10);
}

}  // namespace
}  // namespace mfa
