// The golden cases through the CPU kernels, in float32.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "support/golden_attention.h"
#include "support/kernels.h"

namespace mfa {
namespace {

using testing::Solution;

Solution solve_by_kernels(const AttentionProblem& p, const TensorRef& d_o, const float* dlse) {
  const auto doubles = [](const std::vector<float>& values) {
    return std::vector<double>(values.begin(), values.end());
  };
  const testing::ForwardResults forward = testing::run_forward(p);
  const testing::BackwardResults backward = testing::run_backward(p, forward, d_o, dlse);
  return {doubles(forward.o.values()),   doubles(forward.lse),          doubles(backward.dq.values()),
          doubles(backward.dk.values()), doubles(backward.dv.values()), doubles(backward.dbias),
          doubles(backward.dsinks)};
}

class CpuGolden : public ::testing::TestWithParam<std::string> {};

TEST_P(CpuGolden, Agrees) {
  testing::for_each_isa([](const std::string& isa) {
    SCOPED_TRACE(isa);
    testing::check_golden_case(GetParam(), solve_by_kernels, 1e-5, 3e-5);
  });
}

INSTANTIATE_TEST_SUITE_P(Cases, CpuGolden, ::testing::ValuesIn(testing::golden_case_names()),
                         [](const auto& info) { return info.param; });

TEST(CpuGoldenMerge, Agrees) {
  testing::for_each_isa([](const std::string& isa) {
    SCOPED_TRACE(isa);
    testing::check_golden_merge(solve_by_kernels, 1e-5);
  });
}

}  // namespace
}  // namespace mfa
