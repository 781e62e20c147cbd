#include "layers/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "common/thread_pool.h"

namespace mfa {
namespace {

template <typename T>
T round_to(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T out;
    store_from_float(&out, std::is_same_v<T, bfloat16> ? DType::bf16 : DType::f16, 0, x);
    return out;
  }
}

template <typename T>
void normalise(const RmsNormProblem& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.D;
  constexpr int kSums = 8;  // independent sums, which the compiler puts into vectors
  float sums[kSums] = {};
  int i = 0;
  for (; i + kSums <= p.D; i += kSums)
    for (int j = 0; j < kSums; ++j) sums[j] += to_float(x[i + j]) * to_float(x[i + j]);
  for (; i < p.D; ++i) sums[i % kSums] += to_float(x[i]) * to_float(x[i]);
  float sum = 0.f;
  for (const float part : sums) sum += part;
  const float factor = 1.f / std::sqrt(sum / static_cast<float>(p.D) + p.eps);
  if (!weight) {
    for (i = 0; i < p.D; ++i) out[i] = round_to<T>(to_float(x[i]) * factor);
  } else if (p.weight_stride == 1) {
    for (i = 0; i < p.D; ++i) out[i] = round_to<T>(to_float(x[i]) * factor * to_float(weight[i]));
  } else {
    for (i = 0; i < p.D; ++i) out[i] = round_to<T>(to_float(x[i]) * factor * to_float(weight[i * p.weight_stride]));
  }
}

}  // namespace

void rms_norm(const RmsNormProblem& p) {
  const int64_t chunk = std::max<int64_t>(1, 16384 / std::max(1, p.D));  // about 10 us of work
  const auto task = [&](int64_t index, int) {
    const int64_t end = std::min(p.rows, (index + 1) * chunk);
    for (int64_t row = index * chunk; row < end; ++row) {
      if (p.dtype == DType::f32) {
        normalise<float>(p, row);
      } else if (p.dtype == DType::f16) {
        normalise<float16>(p, row);
      } else {
        normalise<bfloat16>(p, row);
      }
    }
  };
  const int64_t tasks = (p.rows + chunk - 1) / chunk;
  if (tasks <= 4) {
    for (int64_t index = 0; index < tasks; ++index) task(index, 0);
  } else {
    parallel_for(tasks, task);
  }
}

}  // namespace mfa
