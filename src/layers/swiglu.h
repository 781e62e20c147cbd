// swiglu.h: out = gate / (1 + exp(-gate)) * x, element by element, in float32, rounded once.
// Source: Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mfa {

struct SwigluProblem {
  int64_t size = 0;
  DType dtype = DType::f32;
  const void* gate = nullptr;  // all three dense
  const void* x = nullptr;
  void* out = nullptr;
};

// Runs on the process's thread pool.
void swiglu(const SwigluProblem& p);

}  // namespace mfa
