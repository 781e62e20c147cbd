#include "common/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace mfa {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The value of a 16-bit pattern from its fields, by arithmetic alone.
double decode(uint16_t bits, int mantissa_bits, int bias) {
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int last_exponent = (1 << (15 - mantissa_bits)) - 1;
  if (exponent == last_exponent) return mantissa ? kNaN : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

struct Half {
  static constexpr int mantissa_bits = 10, bias = 15;
  static float widen(uint16_t bits) { return to_float(float16{bits}); }
  static uint16_t narrow(float x) { return to_float16(x).bits; }
};
struct Brain {
  static constexpr int mantissa_bits = 7, bias = 127;
  static float widen(uint16_t bits) { return to_float(bfloat16{bits}); }
  static uint16_t narrow(float x) { return to_bfloat16(x).bits; }
};

template <typename Format>
class SixteenBits : public testing::Test {};
using Formats = testing::Types<Half, Brain>;
TYPED_TEST_SUITE(SixteenBits, Formats);

TYPED_TEST(SixteenBits, EveryPatternWidensToItsValueAndReturns) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const double expected = decode(bits, TypeParam::mantissa_bits, TypeParam::bias);
    const float wide = TypeParam::widen(bits);
    const uint16_t back = TypeParam::narrow(wide);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(wide)) << bits;
      ASSERT_TRUE(std::isnan(TypeParam::widen(back))) << bits;
      ASSERT_EQ(back & 0x8000, bits & 0x8000) << "the sign of a NaN";
    } else {
      ASSERT_EQ(wide, expected) << bits;
      ASSERT_EQ(std::signbit(wide), (bits & 0x8000) != 0) << bits;
      ASSERT_EQ(back, bits);
    }
  }
}

// Between each two neighbours: the half-way point goes to the even one, and a hair beside it to the nearer.
TYPED_TEST(SixteenBits, RoundingIsToNearestAndTiesGoToEven) {
  const uint32_t infinity = ((1u << (15 - TypeParam::mantissa_bits)) - 1) << TypeParam::mantissa_bits;
  for (uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t bits = 0; bits + 1 < infinity; ++bits) {
      const uint16_t low = sign | bits, high = sign | (bits + 1);
      const double middle = (double{TypeParam::widen(low)} + TypeParam::widen(high)) / 2;
      const float tie = static_cast<float>(middle);
      ASSERT_EQ(tie, middle);  // exact: float has more bits than both formats
      ASSERT_EQ(TypeParam::narrow(tie), bits & 1 ? high : low) << bits;
      ASSERT_EQ(TypeParam::narrow(std::nextafter(tie, 0.f)), low) << bits;
      ASSERT_EQ(TypeParam::narrow(std::nextafter(tie, sign ? -kInfinity : kInfinity)), high) << bits;
    }
  }
}

TYPED_TEST(SixteenBits, ValuesPastTheLargestBecomeInfinity) {
  const uint16_t infinity = ((1 << (15 - TypeParam::mantissa_bits)) - 1) << TypeParam::mantissa_bits;
  const float largest = TypeParam::widen(infinity - 1);
  const float ulp = largest - TypeParam::widen(infinity - 2);
  const float tie = largest + ulp / 2;
  EXPECT_EQ(TypeParam::narrow(std::nextafter(tie, 0.f)), infinity - 1);
  EXPECT_EQ(TypeParam::narrow(tie), infinity);
  EXPECT_EQ(TypeParam::narrow(kInfinity), infinity);
  EXPECT_EQ(TypeParam::narrow(-kInfinity), 0x8000 | infinity);
  EXPECT_EQ(TypeParam::narrow(std::numeric_limits<float>::max()), infinity);
}

TYPED_TEST(SixteenBits, TinyValuesRoundToZeroOrTheSmallest) {
  const float smallest = TypeParam::widen(1);
  EXPECT_EQ(TypeParam::narrow(smallest), 1);
  EXPECT_EQ(TypeParam::narrow(smallest / 2), 0);
  EXPECT_EQ(TypeParam::narrow(-smallest / 2), 0x8000);
  EXPECT_EQ(TypeParam::narrow(smallest * 0.75f), 1);
  EXPECT_EQ(TypeParam::narrow(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(TypeParam::narrow(0.f), 0);
  EXPECT_EQ(TypeParam::narrow(-0.f), 0x8000);
}

// Signalling or quiet, with any payload: also one that lives in the bits that are cut off.
TYPED_TEST(SixteenBits, NaNStaysAQuietNaN) {
  const uint16_t quiet = 1 << (TypeParam::mantissa_bits - 1);
  for (uint32_t payload : {0x00000001u, 0x00001fffu, 0x00002000u, 0x00400000u, 0x007fffffu}) {
    for (uint32_t sign : {0u, 0x80000000u}) {
      const uint16_t narrow = TypeParam::narrow(std::bit_cast<float>(sign | 0x7f800000u | payload));
      EXPECT_TRUE(std::isnan(TypeParam::widen(narrow))) << payload;
      EXPECT_TRUE(narrow & quiet) << payload;
      EXPECT_EQ(narrow >> 15, sign >> 31);
    }
  }
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(size_of(DType::f32), 4u);
  EXPECT_EQ(size_of(DType::f16), 2u);
  EXPECT_EQ(size_of(DType::bf16), 2u);
  EXPECT_EQ(std::string(name_of(DType::f32)), "float32");
  EXPECT_EQ(std::string(name_of(DType::f16)), "float16");
  EXPECT_EQ(std::string(name_of(DType::bf16)), "bfloat16");
}

TEST(DType, ElementsAreStoredAndLoadedByType) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    unsigned char buffer[16] = {};
    for (int i = 0; i < 4; ++i) store_from_float(buffer, dtype, i, 0.5f * i - 1.f);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(load_as_float(buffer, dtype, i), 0.5f * i - 1.f) << name_of(dtype);
  }
}

}  // namespace
}  // namespace mfa
