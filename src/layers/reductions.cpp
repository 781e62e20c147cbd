#include "layers/reductions.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "common/thread_pool.h"
#include "layers/elementary.h"

namespace mfa {
namespace {

constexpr int kLanes = 16;       // independent results, which the compiler puts into vectors
constexpr int64_t kPart = 4096;  // elements of a row that are reduced by themselves: some 10 us of work

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// What is known of a part of a row.
struct Maximum {
  float value = kLowest;
  bool has_nan = false;
};

template <typename T>
Maximum maximum(const T* x, int64_t size) {
  std::array<float, kLanes> largest;
  std::array<int32_t, kLanes> nan{};
  largest.fill(kLowest);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const float value = to_float(x[i + j]);
      largest[j] = value > largest[j] ? value : largest[j];
      nan[j] |= value != value;
    }
  for (; i < size; ++i) {
    const float value = to_float(x[i]);
    largest[0] = value > largest[0] ? value : largest[0];
    nan[0] |= value != value;
  }
  return {*std::max_element(largest.begin(), largest.end()),
          std::any_of(nan.begin(), nan.end(), [](int32_t n) { return n != 0; })};
}

template <typename T>
float sum_of_exponentials(const T* x, int64_t size, float largest) {
  std::array<float, kPart> terms;
  for (int64_t i = 0; i < size; ++i) terms[i] = fast_exp(to_float(x[i]) - largest);
  std::fill(terms.begin() + size, terms.begin() + (size + kLanes - 1) / kLanes * kLanes, 0.f);
  std::array<float, kLanes> sums{};
  for (int64_t i = 0; i < size; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sums[j] += terms[i + j];
  float sum = 0.f;
  for (const float part : sums) sum += part;
  return sum;
}

int64_t parts_of(const ReductionProblem& p) { return (p.D + kPart - 1) / kPart; }

// Runs reduce(first element, size, part) for all parts of all rows, parts being counted through.
template <typename Reduce>
void for_each_part(const ReductionProblem& p, const Reduce& reduce) {
  const int64_t parts = parts_of(p), count = p.rows * parts;
  const int64_t chunk = std::max<int64_t>(1, kPart / p.D);
  const auto visit = [&]<typename T>(const T* x, int64_t task) {
    for (int64_t i = task * chunk; i < std::min(count, (task + 1) * chunk); ++i) {
      const int64_t begin = i % parts * kPart;
      reduce(x + i / parts * p.D + begin, std::min(kPart, p.D - begin), i);
    }
  };
  parallel_for((count + chunk - 1) / chunk, [&](int64_t task, int) {
    if (p.dtype == DType::f32) {
      visit(static_cast<const float*>(p.x), task);
    } else if (p.dtype == DType::f16) {
      visit(static_cast<const float16*>(p.x), task);
    } else {
      visit(static_cast<const bfloat16*>(p.x), task);
    }
  });
}

std::vector<Maximum> maxima_of(const ReductionProblem& p) {
  std::vector<Maximum> maxima(static_cast<size_t>(p.rows * parts_of(p)));
  for_each_part(p, [&](const auto* x, int64_t size, int64_t part) { maxima[part] = maximum(x, size); });
  return maxima;
}

// Whether `b` comes before `a` in the order that arg_max() follows.
bool is_above(const Maximum& b, const Maximum& a) { return !a.has_nan && (b.has_nan || b.value > a.value); }

}  // namespace

void log_sum_exp(const ReductionProblem& p) {
  const int64_t parts = parts_of(p);
  const std::vector<Maximum> maxima = maxima_of(p);
  std::vector<Maximum> largest(static_cast<size_t>(p.rows));
  for (size_t i = 0; i < maxima.size(); ++i)
    if (Maximum& row = largest[i / parts]; is_above(maxima[i], row)) row = maxima[i];
  std::vector<float> sums(maxima.size());
  for_each_part(p, [&](const auto* x, int64_t size, int64_t part) {
    sums[part] = sum_of_exponentials(x, size, largest[part / parts].value);
  });
  for (int64_t r = 0; r < p.rows; ++r) {
    const Maximum& row = largest[r];
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += sums[r * parts + i];
    float result = std::isinf(row.value) ? row.value : row.value + static_cast<float>(std::log(sum));
    if (row.has_nan) result = std::numeric_limits<float>::quiet_NaN();
    store_from_float(p.out, p.dtype, r, result);
  }
}

void arg_max(const ReductionProblem& p) {
  const int64_t parts = parts_of(p);
  const std::vector<Maximum> maxima = maxima_of(p);
  for (int64_t r = 0; r < p.rows; ++r) {
    int64_t best = 0;
    for (int64_t i = 1; i < parts; ++i)
      if (is_above(maxima[r * parts + i], maxima[r * parts + best])) best = i;
    const Maximum& largest = maxima[r * parts + best];
    int64_t at = best * kPart;
    for (;; ++at) {
      const float value = load_as_float(p.x, p.dtype, r * p.D + at);
      if (largest.has_nan ? std::isnan(value) : value == largest.value) break;
    }
    static_cast<uint32_t*>(p.out)[r] = static_cast<uint32_t>(at);
  }
}

}  // namespace mfa
