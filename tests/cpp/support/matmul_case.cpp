#include "support/matmul_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "backend/cpu/matmul.h"
#include "common/check.h"
#include "linear/reference.h"

namespace mfa::testing {
namespace {

constexpr uint64_t kDraws = 16;  // of plain programs, as tests/python/linear_problems.py
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The bytes hold `count` elements of NaN.
std::vector<uint8_t> poisoned(DType dtype, int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count) * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) store_from_float(bytes.data(), dtype, i, kNaN);
  return bytes;
}

double rounded(double x, DType dtype) {
  uint8_t bytes[4];
  store_from_float(bytes, dtype, 0, static_cast<float>(x));
  return load_as_float(bytes, dtype, 0);
}

double rounding_of(DType dtype) { return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8; }

// Terms added one by one in float32, weights and results rounded to the dtype: what a plain program computes, in the
// order of k or, with `draw`, in some other.
std::vector<double> unfused(const MatmulProblem& p, uint64_t draw) {
  std::vector<int32_t> order(static_cast<size_t>(p.K));
  std::iota(order.begin(), order.end(), 0);
  if (draw > 0) std::shuffle(order.begin(), order.end(), std::mt19937_64(draw));
  std::vector<double> out;
  out.reserve(static_cast<size_t>(p.M * p.N));
  std::vector<float> w(static_cast<size_t>(p.K) * static_cast<size_t>(p.N));
  for (int32_t k = 0; k < p.K; ++k)
    for (int32_t n = 0; n < p.N; ++n)
      w[static_cast<size_t>(n) * p.K + k] = static_cast<float>(rounded(weight_at(p, k, n), p.dtype));
  for (int64_t r = 0; r < p.M; ++r)
    for (int32_t n = 0; n < p.N; ++n) {
      float sum = 0;
      for (const int32_t k : order)
        sum += load_as_float(p.x.data, p.dtype, p.x.at(r) + k) * w[static_cast<size_t>(n) * p.K + k];
      sum *= p.alpha;
      if (p.c.data) sum += p.beta * load_as_float(p.c.data, p.dtype, r * p.c.row_stride + n * p.c.column_stride);
      out.push_back(rounded(sum, p.dtype));
    }
  return out;
}

}  // namespace

std::string describe(const MatmulSpec& s) {
  return concat(name_of(s.dtype), " M ", s.M, " N ", s.N, " K ", s.K, s.transposed ? " transposed" : "", " bits ",
                s.bits, " group ", s.group_size, " gaps ", s.x_gap, " ", s.w_gap, s.outliers ? " outliers" : "",
                s.scattered ? " scattered" : "", s.has_c ? " c" : "", s.c_broadcast_rows ? " one row" : "",
                s.c_strided ? " strided" : "", " alpha ", s.alpha, " beta ", s.beta);
}

MatmulSpec random_matmul(Random& random, int64_t max_products) {
  MatmulSpec s;
  s.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
  s.transposed = random.chance(0.6);
  if (random.chance(0.4)) {
    s.bits = random.pick({2, 3, 4, 5, 6, 8});
    s.group_size = random.pick({32, 64, 128});
  }
  for (;;) {
    s.M = random.chance(0.5) ? random.integer(0, 6) : random.integer(1, 220);
    s.N = static_cast<int32_t>(random.chance(0.3) ? random.integer(0, 70) : random.integer(1, 700));
    s.K = static_cast<int32_t>(random.chance(0.3) ? random.integer(0, 70) : random.integer(1, 1100));
    // Quantised rows are whole groups.
    if (s.bits) (s.transposed ? s.K : s.N) = s.group_size * static_cast<int32_t>(random.integer(1, 9));
    if (s.M * s.N * s.K <= max_products) break;
  }
  if (random.chance(0.3)) s.x_gap = static_cast<int32_t>(random.integer(1, 9));
  if (random.chance(0.3)) s.w_gap = static_cast<int32_t>(random.integer(1, 9));
  s.outliers = random.chance(0.2);
  s.scattered = random.chance(0.2);
  s.has_c = random.chance(0.4);
  s.c_broadcast_rows = random.chance(0.5);
  s.c_strided = random.chance(0.3);
  if (random.chance(0.3)) s.alpha = random.pick({0.5f, -1.25f, 3.f});
  if (s.has_c && random.chance(0.5)) s.beta = random.pick({0.f, 0.5f, -2.f});
  return s;
}

MatmulCase::MatmulCase(const MatmulSpec& spec, uint64_t seed) : spec_(spec) {
  Random random(seed);
  MatmulProblem& p = problem_;
  p.M = spec.M;
  p.N = spec.N;
  p.K = spec.K;
  p.dtype = spec.dtype;
  p.alpha = spec.alpha;
  p.beta = spec.beta;

  std::vector<int64_t> order(static_cast<size_t>(p.M));
  std::iota(order.begin(), order.end(), 0);
  if (spec.scattered)
    for (int64_t i = p.M - 1; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
  const int64_t x_pitch = p.K + spec.x_gap;
  x_ = poisoned(p.dtype, p.M * x_pitch);
  for (int64_t r = 0; r < p.M; ++r)
    for (int32_t k = 0; k < p.K; ++k) {
      const float factor = spec.outliers && random.chance(0.02) ? 500.f : 1.f;
      store_from_float(x_.data(), p.dtype, r * x_pitch + k, factor * random.normal());
    }
  p.x = {x_.data(), x_pitch, nullptr};
  out_pitch_ = p.N + (spec.scattered ? 3 : 0);
  out_ = poisoned(p.dtype, p.M * out_pitch_);
  p.out = out_.data();
  if (spec.scattered) {
    for (const int64_t r : order) {
      x_offsets_.push_back(r * x_pitch);
      out_offsets_.push_back(r * out_pitch_);
    }
    p.x.offsets = x_offsets_.data();
    p.out_offsets = out_offsets_.data();
  }

  const int64_t rows = spec.transposed ? p.N : p.K, columns = spec.transposed ? p.K : p.N;
  p.w.transposed = spec.transposed;
  if (spec.bits == 0) {
    p.w.stride = columns + spec.w_gap;
    w_ = poisoned(p.dtype, rows * p.w.stride);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns; ++i) store_from_float(w_.data(), p.dtype, r * p.w.stride + i, random.normal());
  } else {
    const int64_t words = columns * spec.bits / 32, groups = columns / spec.group_size;
    p.w.stride = words + spec.w_gap;
    w_.resize(static_cast<size_t>(rows * p.w.stride) * 4);
    for (uint8_t& byte : w_) byte = static_cast<uint8_t>(random.bits());
    p.w.affine = {spec.bits, spec.group_size, nullptr, nullptr, groups + spec.w_gap, groups};
    scales_ = poisoned(p.dtype, rows * p.w.affine.scale_stride);
    biases_ = poisoned(p.dtype, rows * groups);
    // Weights of unit variance: codes are uniform.
    const double step = std::sqrt(12.0) / (1 << spec.bits);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        const double scale = step * (0.5 + random.uniform());
        store_from_float(scales_.data(), p.dtype, r * p.w.affine.scale_stride + g, static_cast<float>(scale));
        store_from_float(biases_.data(), p.dtype, r * groups + g,
                         static_cast<float>(-scale * ((1 << spec.bits) - 1) / 2 + 0.1 * random.normal()));
      }
    p.w.affine.scales = scales_.data();
    p.w.affine.biases = biases_.data();
  }
  p.w.data = w_.data();

  if (spec.has_c) {
    p.c.column_stride = spec.c_strided ? 3 : 1;
    p.c.row_stride = spec.c_broadcast_rows ? 0 : p.N * p.c.column_stride;
    const int64_t rows_of_c = spec.c_broadcast_rows ? 1 : p.M;
    c_ = poisoned(p.dtype, rows_of_c * p.N * p.c.column_stride + 1);
    for (int64_t i = 0; i < rows_of_c * p.N; ++i)
      store_from_float(c_.data(), p.dtype, i * p.c.column_stride, random.normal());
    p.c.data = c_.data();
  }
}

MatmulProblem MatmulCase::rows(int64_t first, int64_t count) const {
  MatmulProblem p = problem_;
  const auto size = static_cast<int64_t>(size_of(p.dtype));
  p.M = count;
  if (p.x.offsets) {
    p.x.offsets += first;
    p.out_offsets += first;
  } else {
    p.x.data = static_cast<const uint8_t*>(p.x.data) + first * p.x.stride * size;
    p.out = static_cast<uint8_t*>(p.out) + first * p.N * size;
  }
  if (p.c.data) p.c.data = static_cast<const uint8_t*>(p.c.data) + first * p.c.row_stride * size;
  return p;
}

void MatmulCase::run() { cpu::matmul({&problem_, 1}); }

std::vector<float> MatmulCase::result() const {
  std::vector<float> out;
  out.reserve(static_cast<size_t>(problem_.M * problem_.N));
  for (int64_t r = 0; r < problem_.M; ++r)
    for (int32_t n = 0; n < problem_.N; ++n)
      out.push_back(load_as_float(out_.data(), problem_.dtype, problem_.out_at(r) + n));
  return out;
}

std::vector<uint8_t> MatmulCase::result_bytes() const { return out_; }

void MatmulCase::clear_result() {
  const std::vector<uint8_t> empty = poisoned(problem_.dtype, problem_.M * out_pitch_);
  std::copy(empty.begin(), empty.end(), out_.begin());
}

void MatmulCase::set_x(int64_t r, int32_t k, float value) {
  store_from_float(x_.data(), problem_.dtype, problem_.x.at(r) + k, value);
}

void MatmulCase::set_code(int64_t n, int32_t k, uint32_t code) {
  uint8_t* row = w_.data() + n * problem_.w.stride * 4;
  if (spec_.bits == 8) {
    row[k] = static_cast<uint8_t>(code);
  } else {
    const int shift = k % 2 * 4;
    row[k / 2] = static_cast<uint8_t>((row[k / 2] & ~(15u << shift)) | code << shift);
  }
}

void MatmulCase::set_group(int64_t n, int32_t group, float scale, float bias) {
  const AffineRef& affine = problem_.w.affine;
  store_from_float(scales_.data(), problem_.dtype, n * affine.scale_stride + group, scale);
  store_from_float(biases_.data(), problem_.dtype, n * affine.bias_stride + group, bias);
}

void MatmulCase::check() const {
  const std::vector<double> exact = reference_matmul(problem_);
  const std::vector<float> got = result();
  double error = 0, largest = 0;
  size_t worst = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    ASSERT_TRUE(std::isfinite(got[i])) << "[" << i << "] = " << got[i] << ", exact " << exact[i];
    if (std::abs(got[i] - exact[i]) > error) {
      error = std::abs(got[i] - exact[i]);
      worst = i;
    }
    largest = std::max(largest, std::abs(exact[i]));
  }
  // Where there are few results one plain program's error may be small by chance.
  const auto bound = [&, rounding = rounding_of(problem_.dtype) * largest](double plain) {
    return 2 * plain + rounding;
  };
  double plain_error = 0;
  for (uint64_t draw = 0; draw == 0 || (draw < kDraws && error > bound(plain_error)); ++draw) {
    const std::vector<double> plain = unfused(problem_, draw);
    for (size_t i = 0; i < exact.size(); ++i) plain_error = std::max(plain_error, std::abs(plain[i] - exact[i]));
  }
  EXPECT_LE(error, bound(plain_error)) << "plain error " << plain_error << ", largest " << largest << "; worst ["
                                       << worst << "] = " << got[worst] << ", exact " << exact[worst];
  for (int64_t r = 0; r < problem_.M; ++r)
    for (int64_t n = problem_.N; n < out_pitch_; ++n)
      ASSERT_TRUE(std::isnan(load_as_float(out_.data(), problem_.dtype, r * out_pitch_ + n))) << "written beside";
}

}  // namespace mfa::testing
