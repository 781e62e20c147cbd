// attention_case.h: one attention problem of a benchmark with its data, and the check of its answers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/problem.h"

namespace mfa::bench {

struct Shape {
  int32_t Hq = 8, Hkv = 8, Nq = 0, Nk = 0, D = 0;
  DType dtype = DType::f32;
  bool causal = false;
  int32_t window_left = -1, window_right = -1;
};

// Inputs have unit variance and are dense [1, H, N, D], as an MLX array would be: aligned to 16 bytes, not to a line.
class AttentionCase {
 public:
  AttentionCase(const Shape& shape, bool with_gradients);
  AttentionCase(const AttentionCase&) = delete;
  AttentionCase& operator=(const AttentionCase&) = delete;

  void forward();
  void backward();  // reads the forward's o and lse

  // Floating point operations of the visible pairs only: 4 H Nq Nk D forward and 10 H Nq Nk D backward if all are.
  double forward_flops() const { return 4.0 * visible_pairs() * problem_.D; }
  double backward_flops() const { return 10.0 * visible_pairs() * problem_.D; }
  double key_value_bytes() const;
  // Pairs of a query and a key it sees, over all query heads.
  double visible_pairs() const;
  double visible_fraction() const;

  // Largest relative error, |got - exact| / |exact| of a row's vector, over a few random rows, `exact` by dot products
  // in float64. Throws std::runtime_error if it is beyond what the dtype's rounding explains.
  double check_forward();
  double check_backward();

 private:
  using Buffer = std::vector<std::byte>;
  Buffer random_tensor(int32_t heads, int32_t length, uint64_t seed) const;
  std::vector<double> row(const void* data, int64_t index) const;
  std::vector<double> probabilities(int32_t head, int32_t query, double* lse) const;
  double judge(const char* what, double error, double tolerance) const;

  AttentionProblem problem_;
  Buffer q_, k_, v_, o_, d_o_, dq_, dk_, dv_;
  std::vector<float> lse_;
};

}  // namespace mfa::bench
