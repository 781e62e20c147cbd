#include "linear/reference.h"

#include <cstring>

namespace mfa {
namespace {

// The code of element `i` of a stored row.
uint32_t code_at(const void* row, int64_t i, int32_t bits) {
  const auto* bytes = static_cast<const uint8_t*>(row);
  uint32_t code = 0;
  for (int32_t bit = 0; bit < bits; ++bit) {
    const int64_t at = i * bits + bit;
    code |= ((bytes[at / 8] >> (at % 8)) & 1u) << bit;
  }
  return code;
}

}  // namespace

double weight_at(const MatmulProblem& p, int32_t k, int32_t n) {
  const int64_t row = p.w.transposed ? n : k, element = p.w.transposed ? k : n;
  if (!p.w.quantised()) return load_as_float(p.w.data, p.dtype, row * p.w.stride + element);
  const AffineRef& affine = p.w.affine;
  const auto* words = static_cast<const uint32_t*>(p.w.data) + row * p.w.stride;
  const int64_t group = element / affine.group_size;
  const double scale = load_as_float(affine.scales, p.dtype, row * affine.scale_stride + group);
  const double bias = load_as_float(affine.biases, p.dtype, row * affine.bias_stride + group);
  return scale * code_at(words, element, affine.bits) + bias;
}

std::vector<double> reference_matmul(const MatmulProblem& p) {
  std::vector<double> w(static_cast<size_t>(p.K) * static_cast<size_t>(p.N));
  for (int32_t k = 0; k < p.K; ++k)
    for (int32_t n = 0; n < p.N; ++n) w[static_cast<size_t>(k) * p.N + n] = weight_at(p, k, n);
  std::vector<double> out(static_cast<size_t>(p.M) * static_cast<size_t>(p.N), 0.0);
  for (int64_t r = 0; r < p.M; ++r) {
    double* row = out.data() + r * p.N;
    for (int32_t k = 0; k < p.K; ++k) {
      const double x = load_as_float(p.x.data, p.dtype, p.x.at(r) + k);
      for (int32_t n = 0; n < p.N; ++n) row[n] += x * w[static_cast<size_t>(k) * p.N + n];
    }
    for (int32_t n = 0; n < p.N; ++n) {
      row[n] *= p.alpha;
      if (p.c.data)
        row[n] += double{p.beta} * load_as_float(p.c.data, p.dtype, r * p.c.row_stride + n * p.c.column_stride);
    }
  }
  return out;
}

}  // namespace mfa
