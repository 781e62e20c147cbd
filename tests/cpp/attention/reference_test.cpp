#include "attention/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "support/attention_case.h"
#include "support/golden_attention.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::CaseSpec;
using testing::Solution;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Solution solve_by_reference(const AttentionProblem& p, const TensorRef& d_o, const float* dlse) {
  const ReferenceOutputs out = reference_forward(p);
  const ReferenceGradients grad = reference_backward(p, d_o, dlse);
  return {out.o, out.lse, grad.dq, grad.dk, grad.dv, grad.dbias, grad.dsinks};
}

class ReferenceGolden : public ::testing::TestWithParam<std::string> {};

// Slopes, scales and dropout probabilities are float32 in a problem, hence not exact to float64.
TEST_P(ReferenceGolden, Agrees) { testing::check_golden_case(GetParam(), solve_by_reference, 2e-7, 1e-6); }

INSTANTIATE_TEST_SUITE_P(Cases, ReferenceGolden, ::testing::ValuesIn(testing::golden_case_names()),
                         [](const auto& info) { return info.param; });

TEST(Reference, GoldenMerge) { testing::check_golden_merge(solve_by_reference, 1e-9); }

TEST(Reference, AllGoldenCasesArePresent) { EXPECT_EQ(testing::golden_case_names().size(), 22u); }

// <d_o, o> + <dlse, lse>, over the rows that see something.
double loss(const AttentionCase& c) {
  const ReferenceOutputs out = reference_forward(c.problem);
  const std::vector<float> d_o = c.d_o.values();
  double sum = 0;
  for (size_t i = 0; i < out.o.size(); ++i) sum += d_o[i] * out.o[i];
  for (size_t r = 0; r < c.dlse.size(); ++r) {
    if (out.lse[r] != -kInfinity) sum += c.dlse[r] * out.lse[r];
  }
  return sum;
}

// Compares `gradient[i]` with a central difference for the float number i that `at(i)` refers to.
void check_differences(AttentionCase& c, const char* what, const std::vector<double>& gradient,
                       const std::function<float*(size_t)>& at) {
  for (size_t i = 0; i < gradient.size(); ++i) {
    float* x = at(i);
    if (!std::isfinite(*x)) {  // poison, a bias or a sink of -inf: no gradient
      EXPECT_EQ(gradient[i], 0) << what << "[" << i << "]";
      continue;
    }
    const float kept = *x;
    const float high = kept + 0x1p-8f, low = kept - 0x1p-8f;
    *x = high;
    const double above = loss(c);
    *x = low;
    const double below = loss(c);
    *x = kept;
    const double expected = (above - below) / (double{high} - double{low});
    EXPECT_NEAR(gradient[i], expected, 2e-4 * std::max(1., std::abs(expected))) << what << "[" << i << "]";
  }
}

void check_all_differences(const CaseSpec& spec, uint64_t seed) {
  SCOPED_TRACE(testing::describe(spec));
  AttentionCase c(spec, seed);
  const ReferenceGradients grad = reference_backward(c.problem, c.d_o.ref(), c.dlse_or_null());
  // Dense float32 tensors: element i of the gradient is element i of the storage.
  const auto element = [](const TensorRef& x) {
    return [data = static_cast<const float*>(x.data)](size_t i) { return const_cast<float*>(data + i); };
  };
  check_differences(c, "dq", grad.dq, element(c.problem.q));
  check_differences(c, "dk", grad.dk, element(c.problem.k));
  check_differences(c, "dv", grad.dv, element(c.problem.v));
  check_differences(c, "dbias", grad.dbias, [&](size_t i) { return reinterpret_cast<float*>(c.bias.data()) + i; });
  check_differences(c, "dsinks", grad.dsinks, [&](size_t i) { return &c.sinks[i]; });
  check_differences(c, "dalibi_slopes", grad.dalibi_slopes, [&](size_t i) { return &c.slopes[i]; });
}

CaseSpec small_spec() {
  CaseSpec spec;
  spec.B = 2;
  spec.Hq = 4;
  spec.Hkv = 2;
  spec.Nq = 3;
  spec.Nk = 5;
  spec.D = 3;
  spec.Dv = 4;
  spec.dlse = true;
  return spec;
}

TEST(Reference, GradientsAreThoseOfFiniteDifferences) {
  check_all_differences(small_spec(), 1);
  CaseSpec spec = small_spec();
  spec.causal = true;
  spec.softcap = 1.5f;
  spec.alibi = spec.sinks = spec.kv_lengths = true;
  check_all_differences(spec, 2);
  spec.window_left = 1;
  spec.dropout_p = 0.3f;
  spec.mask.axes = 15;
  spec.bias.axes = 15;
  spec.bias_minus_infinity = 0.2;
  check_all_differences(spec, 3);
}

TEST(Reference, BiasGradientsOfEveryBroadcastShapeAreThoseOfFiniteDifferences) {
  for (int axes = 0; axes < 16; ++axes) {
    CaseSpec spec = small_spec();
    spec.bias.axes = axes;
    spec.causal = axes % 2 == 1;
    check_all_differences(spec, 100 + axes);
  }
}

TEST(Reference, HiddenKeysAreNeverTouched) {
  testing::Random random(7);
  for (int i = 0; i < testing::case_count(150); ++i) {
    const CaseSpec spec = testing::random_spec(random, 1 << 16);
    SCOPED_TRACE(testing::describe(spec));
    const AttentionCase c(spec, random.bits());
    const ReferenceOutputs out = reference_forward(c.problem);
    for (double x : out.o) ASSERT_TRUE(std::isfinite(x));
    for (double x : out.lse) ASSERT_TRUE(std::isfinite(x) || x == -kInfinity);
    for (double x : out.probs) ASSERT_TRUE(x >= 0 && x <= 1 + 1e-12);
    const ReferenceGradients grad = reference_backward(c.problem, c.d_o.ref(), c.dlse_or_null());
    for (const auto* values : {&grad.dq, &grad.dk, &grad.dv, &grad.dbias, &grad.dsinks, &grad.dalibi_slopes})
      for (double x : *values) ASSERT_TRUE(std::isfinite(x));
  }
}

TEST(Reference, ARowThatSeesNothingIsZero) {
  CaseSpec spec = small_spec();
  spec.mask.axes = 15;
  spec.mask_visible = 0;
  const AttentionCase c(spec, 3);
  const ReferenceOutputs out = reference_forward(c.problem);
  const ReferenceGradients grad = reference_backward(c.problem, c.d_o.ref(), c.dlse_or_null());
  for (double x : out.o) EXPECT_EQ(x, 0);
  for (double x : out.lse) EXPECT_EQ(x, -kInfinity);
  for (const auto* values : {&grad.dq, &grad.dk, &grad.dv})
    for (double x : *values) EXPECT_EQ(x, 0);

  spec.sinks = true;
  const AttentionCase with_sinks(spec, 4);
  const ReferenceOutputs sunk = reference_forward(with_sinks.problem);
  for (double x : sunk.o) EXPECT_EQ(x, 0);
  for (size_t r = 0; r < sunk.lse.size(); ++r) EXPECT_EQ(sunk.lse[r], with_sinks.sinks[r / spec.Nq % spec.Hq]);
}

TEST(Reference, OptionsAtTheirNeutralValueChangeNothing) {
  CaseSpec spec = small_spec();
  const AttentionCase c(spec, 5);
  const ReferenceOutputs plain = reference_forward(c.problem);
  const auto expect_same = [&](const AttentionProblem& p) {
    const ReferenceOutputs out = reference_forward(p);
    for (size_t i = 0; i < out.o.size(); ++i) EXPECT_NEAR(out.o[i], plain.o[i], 1e-12);
    for (size_t i = 0; i < out.lse.size(); ++i) EXPECT_NEAR(out.lse[i], plain.lse[i], 1e-12);
  };
  AttentionProblem p = c.problem;
  const std::vector<float> zeros(4, 0.f), nothing(4, -std::numeric_limits<float>::infinity());
  p.bias.data = zeros.data();
  p.alibi_slopes = zeros.data();
  p.sinks = nothing.data();
  p.window_left = p.window_right = std::numeric_limits<int32_t>::max();
  const std::vector<int32_t> lengths = {5, 9};
  p.kv_lengths = lengths.data();
  const uint8_t one = 1;
  p.mask.data = &one;
  expect_same(p);
  p.softcap = 1e9f;
  expect_same(p);
}

TEST(Reference, DroppingEverythingGivesZero) {
  CaseSpec spec = small_spec();
  spec.dropout_p = 1.f;
  const AttentionCase c(spec, 6);
  for (double x : reference_forward(c.problem).o) EXPECT_EQ(x, 0);
  for (double x : reference_backward(c.problem, c.d_o.ref(), nullptr).dv) EXPECT_EQ(x, 0);
}

}  // namespace
}  // namespace mfa
