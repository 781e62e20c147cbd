#include "layers/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "backend/cpu/isa.h"
#include "common/thread_pool.h"

namespace mfa {
namespace {

std::vector<double> frequencies(const RopeProblem& p) {
  std::vector<double> out(static_cast<size_t>(p.dims / 2));
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = p.periods ? 1.0 / p.periods[i] : std::pow(double{p.base}, -2.0 * static_cast<double>(i) / p.dims);
  return out;
}

// Cosines and sines of the token `t` of batch entry `b`. The angle is reduced in float64; a turn is then exact enough
// in float32.
void turns_of(const RopeProblem& p, const std::vector<double>& frequency, int64_t b, int64_t t, float* cosine,
              float* sine) {
  constexpr double kCircle = 2 * std::numbers::pi;
  const double position = p.scale * static_cast<double>(p.offsets[p.offset_each ? b : 0] + t);
  for (size_t i = 0; i < frequency.size(); ++i) {
    const double angle = position * frequency[i];
    const auto reduced = static_cast<float>(angle - kCircle * std::nearbyint(angle / kCircle));
    cosine[i] = std::cos(reduced);
    sine[i] = std::sin(reduced);
  }
}

// Pairs of neighbours.
void turn_neighbours(const RopeProblem& p, const char* x, const float* cosine, const float* sine, char* out) {
  for (int i = 0; i < p.dims / 2; ++i) {
    const float a = load_as_float(x, p.dtype, 2 * i), b = load_as_float(x, p.dtype, 2 * i + 1);
    store_from_float(out, p.dtype, 2 * i, a * cosine[i] - b * sine[i]);
    store_from_float(out, p.dtype, 2 * i + 1, a * sine[i] + b * cosine[i]);
  }
}

void turn_heads(const RopeProblem& p, const cpu::LayerTable& kernels, int64_t token, const float* cosine,
                const float* sine) {
  const int64_t b = token / p.T, t = token % p.T, size = static_cast<int64_t>(size_of(p.dtype));
  for (int64_t h = 0; h < p.H; ++h) {
    const char* x = static_cast<const char*>(p.x) + (b * p.stride[0] + h * p.stride[1] + t * p.stride[2]) * size;
    char* out = static_cast<char*>(p.out) + ((b * p.H + h) * p.T + t) * p.D * size;
    if (p.traditional) {
      turn_neighbours(p, x, cosine, sine, out);
    } else {
      kernels.turn_row(p.dtype, x, cosine, sine, p.dims / 2, out);
    }
    std::copy(x + p.dims * size, x + p.D * size, out + p.dims * size);
  }
}

}  // namespace

RopeTurns::RopeTurns(const RopeProblem& p) {
  const std::vector<double> frequency = frequencies(p);
  const int64_t tokens = p.B * p.T, half = p.dims / 2;
  cosine.resize(static_cast<size_t>(tokens * half));
  sine.resize(cosine.size());
  for (int64_t token = 0; token < tokens; ++token)
    turns_of(p, frequency, token / p.T, token % p.T, cosine.data() + token * half, sine.data() + token * half);
}

void rope(const RopeProblem& p, const RopeTurns& turns) {
  const cpu::LayerTable& kernels = cpu::require_kernels().layers();
  for (int64_t token = 0; token < p.B * p.T; ++token) {
    const int64_t at = token * (p.dims / 2);
    turn_heads(p, kernels, token, turns.cosine.data() + at, turns.sine.data() + at);
  }
}

void rope(const RopeProblem& p) {
  const cpu::LayerTable& kernels = cpu::require_kernels().layers();
  const std::vector<double> frequency = frequencies(p);
  const int64_t tokens = p.B * p.T;
  const int64_t chunk = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, p.H * p.D));  // about 10 us of work
  const auto task = [&](int64_t index, int) {
    std::vector<float> cosine(frequency.size()), sine(frequency.size());
    const int64_t end = std::min(tokens, (index + 1) * chunk);
    for (int64_t token = index * chunk; token < end; ++token) {
      turns_of(p, frequency, token / p.T, token % p.T, cosine.data(), sine.data());
      turn_heads(p, kernels, token, cosine.data(), sine.data());
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
