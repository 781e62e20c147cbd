// kernels.h: runs the CPU backend's attention on a test case and judges the results by the error rule.
#pragma once

#include <string>
#include <vector>

#include "attention/reference.h"
#include "backend/cpu/attention.h"
#include "support/attention_case.h"
#include "support/unfused.h"

namespace mfa::testing {

struct ForwardResults {
  Tensor o;
  std::vector<float> lse, probs;
};
ForwardResults run_forward(const AttentionProblem& p, bool wants_probs = false, Layout o_layout = Layout::dense);

struct BackwardResults {
  Tensor dq, dk, dv;
  std::vector<float> dbias, dsinks, dalibi_slopes;
};
BackwardResults run_backward(const AttentionProblem& p, const ForwardResults& forward, const TensorRef& d_o,
                             const float* dlse, Layout layout = Layout::dense);

// All results' bytes, for bitwise comparison.
std::vector<uint8_t> bytes_of(const ForwardResults& results);
std::vector<uint8_t> bytes_of(const BackwardResults& results);

// What a case must give, computed once for all instruction sets.
struct Expected {
  explicit Expected(const AttentionCase& c);
  ReferenceOutputs forward;
  ReferenceGradients backward;
  Unfused unfused;
};

// Runs forward and backward and checks everything: the error rule, empty rows, finiteness, untouched gaps.
void check_against_reference(const AttentionCase& c, const Expected& expected);

// Runs `body` for each instruction set that this processor can run.
template <typename Body>
void for_each_isa(Body body) {
  for (const std::string& isa : cpu::runnable_isas()) {
    cpu::set_isa(isa);
    body(isa);
  }
  cpu::set_isa("");
}

}  // namespace mfa::testing
