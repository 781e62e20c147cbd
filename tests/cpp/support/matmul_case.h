// matmul_case.h: a random matrix product in memory of its own, surrounded by NaN, and the error rule for its result.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "linear/problem.h"
#include "support/random.h"

namespace mfa::testing {

struct MatmulSpec {
  int64_t M = 1;
  int32_t N = 1, K = 1;
  DType dtype = DType::f32;
  bool transposed = true;
  int32_t bits = 0, group_size = 64;  // bits = 0: dense weights
  int32_t x_gap = 0, w_gap = 0;       // elements or words between rows
  bool outliers = false;              // some elements of x are far larger than their neighbours
  bool scattered = false;             // rows of x and of the result lie in another order
  bool has_c = false, c_broadcast_rows = false, c_strided = false;
  float alpha = 1.f, beta = 1.f;
};
std::string describe(const MatmulSpec& spec);
MatmulSpec random_matmul(Random& random, int64_t max_products);

class MatmulCase {
 public:
  MatmulCase(const MatmulSpec& spec, uint64_t seed);
  MatmulCase(const MatmulCase&) = delete;
  MatmulCase& operator=(const MatmulCase&) = delete;

  const MatmulProblem& problem() const { return problem_; }
  // The problem with rows [first, first + count) only.
  MatmulProblem rows(int64_t first, int64_t count) const;

  void run();  // on the process's pool, with the selected instruction set
  std::vector<float> result() const;
  std::vector<uint8_t> result_bytes() const;
  void clear_result();  // to NaN

  // max|result - exact| <= 2 max|unfused - exact| + the rounding of the result, and nothing beside it written.
  void check() const;

  // Sets element k of row r of x; the code, and the scale and bias of a group, of stored row n of the weights.
  void set_x(int64_t r, int32_t k, float value);
  void set_code(int64_t n, int32_t k, uint32_t code);  // of 4 or 8 bits
  void set_group(int64_t n, int32_t group, float scale, float bias);

 private:
  MatmulSpec spec_;
  MatmulProblem problem_;
  std::vector<uint8_t> x_, w_, c_, out_;
  std::vector<uint8_t> scales_, biases_;
  std::vector<int64_t> x_offsets_, out_offsets_;
  int64_t out_pitch_ = 0;
};

}  // namespace mfa::testing
