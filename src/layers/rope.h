// rope.h: rotary position encoding: pair i of the first `dims` channels of the token at position t is turned by
// scale * t * frequency_i. Source: Su et al., "RoFormer", arXiv:2104.09864.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace mfa {

struct RopeProblem {
  int64_t B = 0, H = 0, T = 0;
  int32_t D = 0, dims = 0;
  DType dtype = DType::f32;
  const void* x = nullptr;  // [B, H, T, D], the last axis dense
  int64_t stride[3] = {0, 0, 0};
  void* out = nullptr;               // [B, H, T, D] dense
  bool traditional = false;          // pairs are channels (2 i, 2 i + 1), else (i, i + dims / 2)
  float scale = 1.f;                 // of positions
  float base = 0.f;                  // frequency_i = base^(-2 i / dims), if `periods` is null
  const float* periods = nullptr;    // [dims / 2]: frequency_i = 1 / periods[i]
  const int32_t* offsets = nullptr;  // position of the first token: [B], or one for all
  bool offset_each = false;
};

// Runs on the process's thread pool. Angles are float64, so that they hold for any position.
void rope(const RopeProblem& p);

// What the rotation of every token is made of, for several problems that differ in x and H alone.
struct RopeTurns {
  explicit RopeTurns(const RopeProblem& p);
  std::vector<float> cosine, sine;  // [B, T, dims / 2]
};
// As rope(), on the calling thread.
void rope(const RopeProblem& p, const RopeTurns& turns);

}  // namespace mfa
