// elementary.h: e^x in plain arithmetic, so that compilers put loops of it into vectors.
#pragma once

#include <bit>
#include <cstdint>

namespace mfa {

// e^x = 2^n e^r for whole n = x / ln 2 rounded, |r| <= ln 2 / 2; the backend's vectors compute the same.
inline constexpr float kExpLog2e = 1.44269504f, kExpLn2High = 0.693359375f, kExpLn2Low = -2.12194440e-4f;
inline constexpr float kExpToInteger = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
// Of e^r, from r^7 on down: Taylor's, whose next term is below 6e-9.
inline constexpr float kExpSeries[8] = {1.f / 5040.f, 1.f / 720.f, 1.f / 120.f, 1.f / 24.f, 1.f / 6.f, 0.5f, 1.f, 1.f};

// e^x within 2 ulp for every float; 0, infinity and NaN come out as they should.
[[gnu::always_inline]] inline float fast_exp(float x) {
  const float low = x < -104.f ? -104.f : x;  // e^-104 rounds to 0, e^89 to infinity; NaN stays
  const float clamped = low > 89.f ? 89.f : low;
  const float shifted = clamped * kExpLog2e + kExpToInteger;
  const float n = shifted - kExpToInteger;
  const float r = clamped - n * kExpLn2High - n * kExpLn2Low;
  float series = kExpSeries[0];
  for (int i = 1; i < 8; ++i) series = series * r + kExpSeries[i];
  // 2^n in two factors, as it may be subnormal or above the largest float.
  const auto exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kExpToInteger);
  const int32_t half = exponent >> 1;
  const auto power = [](int32_t e) { return std::bit_cast<float>(static_cast<uint32_t>(e + 127) << 23); };
  return series * power(half) * power(exponent - half);
}

}  // namespace mfa
