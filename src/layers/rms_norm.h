// rms_norm.h: out = x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded once.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mfa {

struct RmsNormProblem {
  int64_t rows = 0;
  int32_t D = 0;
  DType dtype = DType::f32;
  const void* x = nullptr;  // [rows, D], rows dense and `stride` elements apart
  int64_t stride = 0;
  const void* weight = nullptr;  // [D] with `weight_stride`, or null
  int64_t weight_stride = 0;
  float eps = 0.f;
  void* out = nullptr;  // [rows, D] dense
};

// Runs on the process's thread pool. A row has the same bits whatever rows are computed with it.
void rms_norm(const RmsNormProblem& p);

}  // namespace mfa
