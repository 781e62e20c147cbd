// The precision of the kernels on normal inputs, N = 1024, D = 128: relative L2 error within twice, largest error
// within four times what rounding inputs, probabilities and outputs to the type costs with float32 sums.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "support/kernels.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::CaseSpec;

struct Floors {
  DType dtype;
  double o_l2, o_max_full, o_max_causal, lse_max, gradient_l2;
};

double relative_l2(const std::vector<float>& got, const std::vector<double>& exact) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - exact[i]) * (got[i] - exact[i]);
    size += exact[i] * exact[i];
  }
  return std::sqrt(error / size);
}

double largest_error(const std::vector<float>& got, const std::vector<double>& exact) {
  double error = 0;
  for (size_t i = 0; i < got.size(); ++i) error = std::max(error, std::abs(got[i] - exact[i]));
  return error;
}

class CpuPrecision : public ::testing::TestWithParam<Floors> {};

TEST_P(CpuPrecision, IsThatOfTheType) {
  const Floors& floors = GetParam();
  for (bool causal : {false, true}) {
    CaseSpec spec;
    spec.dtype = floors.dtype;
    spec.Nq = spec.Nk = testing::case_count(1024) == 1024 ? 1024 : 256;
    spec.D = spec.Dv = 128;
    spec.causal = causal;
    const AttentionCase c(spec, 71);
    const ReferenceOutputs exact = reference_forward(c.problem);
    const ReferenceGradients gradients = reference_backward(c.problem, c.d_o.ref(), nullptr);
    // Fewer keys average less: outputs and their errors grow.
    const double growth = std::sqrt(1024. / spec.Nk);
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      const testing::ForwardResults forward = testing::run_forward(c.problem);
      const testing::BackwardResults backward = testing::run_backward(c.problem, forward, c.d_o.ref(), nullptr);
      EXPECT_LE(relative_l2(forward.o.values(), exact.o), 2 * floors.o_l2);
      EXPECT_LE(largest_error(forward.o.values(), exact.o),
                4 * growth * (causal ? floors.o_max_causal : floors.o_max_full));
      EXPECT_LE(largest_error(forward.lse, exact.lse), 4 * floors.lse_max);
      EXPECT_LE(relative_l2(backward.dq.values(), gradients.dq), 2 * floors.gradient_l2);
      EXPECT_LE(relative_l2(backward.dk.values(), gradients.dk), 2 * floors.gradient_l2);
      EXPECT_LE(relative_l2(backward.dv.values(), gradients.dv), 2 * floors.gradient_l2);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Types, CpuPrecision,
                         ::testing::Values(Floors{DType::f16, 2.8e-4, 1.1e-4, 6.3e-4, 9e-7, 3.0e-4},
                                           Floors{DType::bf16, 2.3e-3, 7.1e-4, 6.6e-3, 8e-7, 2.6e-3},
                                           Floors{DType::f32, 5e-7, 3.4e-7, 1.3e-6, 9e-7, 6e-7}),
                         [](const auto& info) { return std::string(mfa::name_of(info.param.dtype)); });

// Rows of dS sum to zero, so an offset that all keys share cancels in dq = dS K, but only as exactly as dS is kept.
void check_offset_keys(CaseSpec spec) {
  spec.dtype = DType::bf16;
  spec.Nq = spec.Nk = testing::case_count(1024) == 1024 ? 1024 : 256;
  spec.D = spec.Dv = 128;
  spec.poison = false;
  AttentionCase c(spec, 72);
  const AttentionProblem& p = c.problem;
  for (int32_t h = 0; h < p.Hkv; ++h)
    for (int32_t j = 0; j < p.Nk; ++j)
      for (int32_t d = 0; d < 4; ++d) c.k.set(0, h, j, d, c.k.get(0, h, j, d) + 20.f);
  const ReferenceGradients gradients = reference_backward(p, c.d_o.ref(), c.dlse_or_null());
  testing::for_each_isa([&](const std::string& isa) {
    SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
    const testing::ForwardResults forward = testing::run_forward(p);
    const testing::BackwardResults backward = testing::run_backward(p, forward, c.d_o.ref(), c.dlse_or_null());
    EXPECT_LE(relative_l2(backward.dq.values(), gradients.dq), 0.005);
  });
}

TEST(CpuPrecisionOffset, KeysWithLargeCommonChannelsDoNotSpoilTheGradientOfTheQueries) {
  CaseSpec plain, causal, sinks, masked, dropout;
  causal.causal = true;
  sinks.sinks = sinks.dlse = true;
  masked.mask.axes = 7;
  dropout.dropout_p = 0.2f;
  for (const CaseSpec& spec : {plain, causal, sinks, masked, dropout}) check_offset_keys(spec);
}

}  // namespace
}  // namespace mfa
