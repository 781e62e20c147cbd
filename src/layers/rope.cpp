#include "layers/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "common/thread_pool.h"

namespace mfa {
namespace {

struct Turn {
  float cosine, sine;
};

std::vector<double> frequencies(const RopeProblem& p) {
  std::vector<double> out(static_cast<size_t>(p.dims / 2));
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = p.periods ? 1.0 / p.periods[i] : std::pow(double{p.base}, -2.0 * static_cast<double>(i) / p.dims);
  return out;
}

// The turns of the token `t` of batch entry `b`. The angle is reduced in float64; a turn is then exact enough in
// float32.
void turns_of(const RopeProblem& p, const std::vector<double>& frequency, int64_t b, int64_t t, Turn* out) {
  constexpr double kCircle = 2 * std::numbers::pi;
  const double position = p.scale * static_cast<double>(p.offsets[p.offset_each ? b : 0] + t);
  for (size_t i = 0; i < frequency.size(); ++i) {
    const double angle = position * frequency[i];
    const auto reduced = static_cast<float>(angle - kCircle * std::nearbyint(angle / kCircle));
    out[i] = {std::cos(reduced), std::sin(reduced)};
  }
}

template <typename T, DType kDType>
void turn_row(const RopeProblem& p, const T* x, const Turn* turns, T* out) {
  const int half = p.dims / 2, apart = p.traditional ? 1 : half, step = p.traditional ? 2 : 1;
  for (int i = 0; i < half; ++i) {
    const float a = to_float(x[i * step]), b = to_float(x[i * step + apart]);
    store_from_float(out, kDType, i * step, a * turns[i].cosine - b * turns[i].sine);
    store_from_float(out, kDType, i * step + apart, a * turns[i].sine + b * turns[i].cosine);
  }
  std::copy(x + p.dims, x + p.D, out + p.dims);
}

template <typename T, DType kDType>
void turn_heads(const RopeProblem& p, const std::vector<double>& frequency, int64_t token, std::vector<Turn>& turns) {
  const int64_t b = token / p.T, t = token % p.T;
  turns_of(p, frequency, b, t, turns.data());
  for (int64_t h = 0; h < p.H; ++h)
    turn_row<T, kDType>(p, static_cast<const T*>(p.x) + b * p.stride[0] + h * p.stride[1] + t * p.stride[2],
                        turns.data(), static_cast<T*>(p.out) + ((b * p.H + h) * p.T + t) * p.D);
}

}  // namespace

void rope(const RopeProblem& p) {
  const std::vector<double> frequency = frequencies(p);
  const int64_t tokens = p.B * p.T;
  const int64_t chunk = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, p.H * p.D));  // about 10 us of work
  const auto task = [&](int64_t index, int) {
    std::vector<Turn> turns(frequency.size());
    const int64_t end = std::min(tokens, (index + 1) * chunk);
    for (int64_t token = index * chunk; token < end; ++token) {
      if (p.dtype == DType::f32) {
        turn_heads<float, DType::f32>(p, frequency, token, turns);
      } else if (p.dtype == DType::f16) {
        turn_heads<float16, DType::f16>(p, frequency, token, turns);
      } else {
        turn_heads<bfloat16, DType::bf16>(p, frequency, token, turns);
      }
    }
  };
  const int64_t tasks = (tokens + chunk - 1) / chunk;
  if (tasks <= 4) {
    for (int64_t index = 0; index < tasks; ++index) task(index, 0);
  } else {
    parallel_for(tasks, task);
  }
}

}  // namespace mfa
