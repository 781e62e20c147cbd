#include "support/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/layout.h"

namespace mfa::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int64_t bias_size(const AttentionProblem& p) {
  if (!p.bias.data) return 0;
  const int64_t extent[4] = {p.B, p.Hq, p.Nq, p.Nk};
  int64_t size = 1;
  for (int axis = 0; axis < 4; ++axis) size *= p.bias.stride[axis] != 0 ? extent[axis] : 1;
  return size;
}

template <typename T>
void append(std::vector<uint8_t>& bytes, const std::vector<T>& values) {
  const auto* data = reinterpret_cast<const uint8_t*>(values.data());
  bytes.insert(bytes.end(), data, data + values.size() * sizeof(T));
}

// Half a unit in the last place, relative: the rounding of a result.
double rounding_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 0x1p-24;
    case DType::f16:
      return 0x1p-11;
    case DType::bf16:
      return 0x1p-8;
  }
  return 0;
}

// max|x - exact| <= 2 max|unfused - exact| + rounding of the result. Where a result has few elements, or its terms
// cancel, the unfused error may be small by chance: four standard deviations of the rounding, and float32 noise, are
// let pass.
void check_error(const char* what, const std::vector<float>& got, const std::vector<double>& exact,
                 const UnfusedResult& unfused, DType dtype, double largest_score) {
  ASSERT_EQ(got.size(), exact.size()) << what;
  ASSERT_EQ(unfused.values.size(), exact.size()) << what;
  double error = 0, unfused_error = 0, largest = 0;
  size_t worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(std::isfinite(got[i])) << what << "[" << i << "] = " << got[i] << ", exact " << exact[i];
    const double difference = std::abs(got[i] - exact[i]);
    if (difference > error) {
      error = difference;
      worst = i;
    }
    unfused_error = std::max(unfused_error, std::abs(unfused.values[i] - exact[i]));
    largest = std::max(largest, std::abs(exact[i]));
  }
  // A few roundings of exp2 and of the sums; scores, and the lse beside them, are float32 of their size.
  const double noise = (8 + 2 * largest_score) * 0x1p-24 * unfused.noise;
  const double subnormal = dtype == DType::f16 ? 0x1p-25 : 0;
  const double chance = std::max(2 * unfused_error, 4 * unfused.spread);
  EXPECT_LE(error, chance + rounding_of(dtype) * largest + noise + subnormal)
      << what << ": unfused error " << unfused_error << ", spread " << unfused.spread << ", largest " << largest
      << ", noise " << noise << "; worst [" << worst << "] = " << got[worst] << ", exact " << exact[worst];
}

}  // namespace

ForwardResults run_forward(const AttentionProblem& p, bool wants_probs, Layout o_layout) {
  ForwardResults results;
  results.o = Tensor(p.dtype, query_shape(p, p.Dv), o_layout);
  const int64_t rows = row_count(p);
  results.lse.assign(rows, kNaN);
  if (wants_probs) results.probs.assign(rows * p.Nk, kNaN);
  cpu::attention_forward(p,
                         {results.o.mutable_ref(), results.lse.data(), wants_probs ? results.probs.data() : nullptr});
  return results;
}

BackwardResults run_backward(const AttentionProblem& p, const ForwardResults& forward, const TensorRef& d_o,
                             const float* dlse, Layout layout) {
  BackwardResults results;
  results.dq = Tensor(p.dtype, query_shape(p, p.D), layout);
  results.dk = Tensor(p.dtype, key_shape(p, p.D), layout);
  results.dv = Tensor(p.dtype, key_shape(p, p.Dv), layout);
  AttentionGradients out;
  out.dq = results.dq.mutable_ref();
  out.dk = results.dk.mutable_ref();
  out.dv = results.dv.mutable_ref();
  if (p.bias.data) {
    results.dbias.assign(bias_size(p), kNaN);
    out.dbias = results.dbias.data();
  }
  if (p.sinks) {
    results.dsinks.assign(p.Hq, kNaN);
    out.dsinks = results.dsinks.data();
  }
  if (p.alibi_slopes) {
    results.dalibi_slopes.assign(p.Hq, kNaN);
    out.dalibi_slopes = results.dalibi_slopes.data();
  }
  cpu::attention_backward(p, {forward.o.ref(), d_o, forward.lse.data(), dlse}, out);
  return results;
}

std::vector<uint8_t> bytes_of(const ForwardResults& results) {
  std::vector<uint8_t> bytes = results.o.bytes();
  append(bytes, results.lse);
  append(bytes, results.probs);
  return bytes;
}

std::vector<uint8_t> bytes_of(const BackwardResults& results) {
  std::vector<uint8_t> bytes;
  for (const Tensor* tensor : {&results.dq, &results.dk, &results.dv}) append(bytes, tensor->bytes());
  for (const auto* values : {&results.dbias, &results.dsinks, &results.dalibi_slopes}) append(bytes, *values);
  return bytes;
}

Expected::Expected(const AttentionCase& c)
    : forward(reference_forward(c.problem)),
      backward(reference_backward(c.problem, c.d_o.ref(), c.dlse_or_null())),
      unfused(run_unfused(c.problem, c.d_o.ref(), c.dlse_or_null())) {}

void check_against_reference(const AttentionCase& c, const Expected& expected) {
  const AttentionProblem& p = c.problem;
  const Unfused& unfused = expected.unfused;
  const double score = unfused.largest_score;
  const bool wants_probs = c.spec.q_layout == Layout::dense && int64_t{p.Nq} * p.Nk < 20000;
  const ForwardResults forward = run_forward(p, wants_probs, c.spec.o_layout);
  check_error("o", forward.o.values(), expected.forward.o, unfused.o, p.dtype, score);
  EXPECT_TRUE(forward.o.gaps_are_untouched()) << "o";

  const std::vector<float> o = forward.o.values();
  for (size_t r = 0; r < forward.lse.size(); ++r) {
    const double exact = expected.forward.lse[r];
    if (exact == -kInfinity) {
      ASSERT_EQ(forward.lse[r], exact) << "row " << r << " sees nothing";
    } else {
      ASSERT_NEAR(forward.lse[r], exact, 2e-5 * std::max(1., std::abs(exact))) << "lse[" << r << "]";
    }
    const auto begin = expected.forward.probs.begin() + static_cast<int64_t>(r) * p.Nk;
    const bool empty = std::all_of(begin, begin + p.Nk, [](double prob) { return prob == 0; });
    for (int32_t d = 0; empty && d < p.Dv; ++d) ASSERT_EQ(o[r * p.Dv + d], 0.f) << "row " << r << " sees nothing";
  }
  // Kernels for 16-bit types may take an exp2 that is exact to about 1e-5 only.
  double exp_error = (p.dtype == DType::f32 ? 0x1p-21 : 0x1p-16) + score * 0x1p-22;
  // The error rule for probabilities: twice the relative error of those that plain float32 steps give.
  for (size_t i = 0; i < std::min(forward.probs.size(), unfused.probs.size()); ++i) {
    const double exact = expected.forward.probs[i];
    if (exact > 0x1p-24) exp_error = std::max(exp_error, 2 * std::abs(unfused.probs[i] - exact) / exact);
  }
  for (size_t i = 0; i < forward.probs.size(); ++i)
    ASSERT_NEAR(forward.probs[i], expected.forward.probs[i], 2e-7 + exp_error * expected.forward.probs[i])
        << "probs[" << i << "]";

  const BackwardResults backward = run_backward(p, forward, c.d_o.ref(), c.dlse_or_null(), c.spec.o_layout);
  const ReferenceGradients& exact = expected.backward;
  check_error("dq", backward.dq.values(), exact.dq, unfused.dq, p.dtype, score);
  check_error("dk", backward.dk.values(), exact.dk, unfused.dk, p.dtype, score);
  check_error("dv", backward.dv.values(), exact.dv, unfused.dv, p.dtype, score);
  check_error("dbias", backward.dbias, exact.dbias, unfused.dbias, DType::f32, score);
  check_error("dsinks", backward.dsinks, exact.dsinks, unfused.dsinks, DType::f32, score);
  check_error("dalibi_slopes", backward.dalibi_slopes, exact.dalibi_slopes, unfused.dalibi_slopes, DType::f32, score);
  for (const Tensor* tensor : {&backward.dq, &backward.dk, &backward.dv})
    EXPECT_TRUE(tensor->gaps_are_untouched()) << "a gradient";
}

}  // namespace mfa::testing
