// dtype.h: the element types of tensors and host conversions between them and float.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mfa {

enum class DType : uint8_t { f32, f16, bf16 };

constexpr size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
  }
  return "unknown";
}

// Storage types: a 16-bit pattern that only converts. IEEE 754 binary16 and the upper half of binary32.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

[[gnu::always_inline]] inline float to_float(float x) { return x; }

[[gnu::always_inline]] inline float to_float(bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// The conversions of 16-bit types choose between results instead of branching, so that compilers put loops of them into
// vectors; signed comparisons, as SSE2 has no others.
[[gnu::always_inline]] inline float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const int32_t magnitude = x.bits & 0x7fff;
  const uint32_t shifted = static_cast<uint32_t>(magnitude) << 13;
  const uint32_t normal = shifted + ((127u - 15u) << 23);
  const uint32_t not_finite = shifted + ((255u - 31u) << 23);
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(shifted + (113u << 23)) - 0x1p-14f);
  const uint32_t finite = magnitude < 0x0400 ? subnormal : normal;
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00 ? not_finite : finite));
}

// Round to nearest, ties to even; NaN stays a quiet NaN.
[[gnu::always_inline]] inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>(static_cast<int32_t>(bits & 0x7fffffffu) > 0x7f800000 ? quiet : rounded)};
}

[[gnu::always_inline]] inline float16 to_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const auto compared = static_cast<int32_t>(magnitude);
  // Below 2^-14: adding 0.5 leaves the subnormal, rounded, in the low bits.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23)) >> 13;
  const uint32_t finite = compared < 0x38800000 ? subnormal : normal;
  const uint32_t not_nan = compared >= 0x477ff000 ? 0x7c00u : finite;  // 65520 and above round to infinity
  return {static_cast<uint16_t>(sign | (compared > 0x7f800000 ? 0x7e00u : not_nan))};
}

// The element `i` of a buffer of `dtype`, as a float.
[[gnu::always_inline]] inline float load_as_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::f16:
      return to_float(static_cast<const float16*>(data)[i]);
    case DType::bf16:
      return to_float(static_cast<const bfloat16*>(data)[i]);
  }
  return 0.f;
}

[[gnu::always_inline]] inline void store_from_float(void* data, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[i] = value;
      return;
    case DType::f16:
      static_cast<float16*>(data)[i] = to_float16(value);
      return;
    case DType::bf16:
      static_cast<bfloat16*>(data)[i] = to_bfloat16(value);
      return;
  }
}

}  // namespace mfa
