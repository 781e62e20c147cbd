// elementary.h: e^x in plain arithmetic, so that compilers put loops of it into vectors.
#pragma once

#include <bit>
#include <cstdint>

namespace mfa {

// e^x within 2 ulp for every float; 0, infinity and NaN come out as they should.
[[gnu::always_inline]] inline float fast_exp(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kToInteger = 12582912.f;    // 1.5 * 2^23: what is added to it is rounded to an integer
  const float low = x < -104.f ? -104.f : x;  // e^-104 rounds to 0, e^89 to infinity; NaN stays
  const float clamped = low > 89.f ? 89.f : low;
  const float shifted = clamped * kLog2e + kToInteger;
  const float n = shifted - kToInteger;
  const float r = clamped - n * kLn2High - n * kLn2Low;  // |r| <= ln 2 / 2
  // Taylor's series, whose next term is below 6e-9.
  float series = 1.f / 5040.f * r + 1.f / 720.f;
  series = series * r + 1.f / 120.f;
  series = series * r + 1.f / 24.f;
  series = series * r + 1.f / 6.f;
  series = series * r + 0.5f;
  series = series * r + 1.f;
  series = series * r + 1.f;
  // 2^n in two factors, as it may be subnormal or above the largest float.
  const auto exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kToInteger);
  const int32_t half = exponent >> 1;
  const auto power = [](int32_t e) { return std::bit_cast<float>(static_cast<uint32_t>(e + 127) << 23); };
  return series * power(half) * power(exponent - half);
}

}  // namespace mfa
