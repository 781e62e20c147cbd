// reference.h: attention and its gradients in plain float64 loops: what "correct" means, for tests on every backend.
#pragma once

#include <vector>

#include "attention/problem.h"

namespace mfa {

// Tensors are laid out densely as their problem says: batched, packed ([H, packed rows, *]) or in pages ([pages, Hkv,
// page_size, *]). The score floor is not applied: a test of it gives the mask that it stands for.
struct ReferenceOutputs {
  std::vector<double> o;      // [B, Hq, Nq, Dv]
  std::vector<double> lse;    // [B, Hq, Nq], natural log
  std::vector<double> probs;  // [B, Hq, Nq, Nk], before dropout
};
ReferenceOutputs reference_forward(const AttentionProblem& p);

struct ReferenceGradients {
  std::vector<double> dq;             // [B, Hq, Nq, D]
  std::vector<double> dk;             // [B, Hkv, Nk, D]
  std::vector<double> dv;             // [B, Hkv, Nk, Dv]
  std::vector<double> dbias;          // shaped as the bias: extent 1 where its stride is 0
  std::vector<double> dsinks;         // [Hq]
  std::vector<double> dalibi_slopes;  // [Hq]
};
// d_o in the problem's dtype; dlse is the cotangent of the natural lse, [B, Hq, Nq] dense, or null.
ReferenceGradients reference_backward(const AttentionProblem& p, const TensorRef& d_o, const float* dlse);

}  // namespace mfa
