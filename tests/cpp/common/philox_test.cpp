#include "common/philox.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "support/json.h"

namespace mfa {
namespace {

using testing::Json;

PhiloxWords words(const Json& json) {
  PhiloxWords result{};
  for (size_t i = 0; i < 4; ++i) result[i] = static_cast<uint32_t>(json[i].unsigned_integer());
  return result;
}

TEST(Philox, KnownAnswers) {
  const Json golden = Json::golden("philox.json");
  ASSERT_GE(golden["vectors"].size(), 3u);
  for (const Json& vector : golden["vectors"]) {
    const uint64_t key = vector["key"][0].unsigned_integer() | vector["key"][1].unsigned_integer() << 32;
    EXPECT_EQ(philox4x32(words(vector["counter"]), key), words(vector["out10"]));
    EXPECT_EQ(philox4x32(words(vector["counter"]), key, 7), words(vector["out7"]));
  }
}

TEST(Philox, DropoutMasks) {
  const Json golden = Json::golden("philox.json")["dropout"];
  const uint64_t seed = golden["seed"].unsigned_integer();
  const auto offset = static_cast<uint32_t>(golden["offset"].unsigned_integer());
  const auto H = static_cast<uint32_t>(golden["H"].unsigned_integer());
  const auto Nq = static_cast<uint32_t>(golden["Nq"].unsigned_integer());
  const auto Nk = static_cast<uint32_t>(golden["Nk"].unsigned_integer());
  ASSERT_GE(golden["masks"].size(), 8u);
  for (const Json& mask : golden["masks"]) {
    const auto p = static_cast<float>(mask["p"].number());
    const auto row_head = static_cast<uint32_t>(mask["b"].unsigned_integer() * H + mask["h"].unsigned_integer());
    for (uint32_t i = 0; i < Nq; ++i) {
      std::string keep;
      for (uint32_t j = 0; j < Nk; ++j)
        keep += dropout_words(seed, row_head, i, j, offset)[j & 3] >= dropout_threshold(p) ? '1' : '0';
      EXPECT_EQ(keep, mask["keep"][i].text()) << "p " << p << ", row_head " << row_head << ", query " << i;
    }
  }
}

TEST(Philox, ThresholdsOfTheEnds) {
  EXPECT_EQ(dropout_threshold(0.f), 0u);                 // everything is kept
  EXPECT_EQ(dropout_threshold(1.f), uint64_t{1} << 32);  // nothing is
  EXPECT_EQ(dropout_threshold(0.25f), uint64_t{1} << 30);
}

TEST(Philox, TheShareOfKeptKeysIsOneMinusP) {
  constexpr int kDraws = 1 << 20;
  for (float p : {0.1f, 0.5f, 0.9f}) {
    const uint64_t threshold = dropout_threshold(p);
    int kept = 0;
    for (uint32_t j = 0; j < kDraws; j += 4) {
      for (uint32_t word : dropout_words(1234, 5, 77, j)) kept += word >= threshold;
    }
    const double sigma = std::sqrt(kDraws * p * (1 - p));
    EXPECT_NEAR(kept, kDraws * (1. - p), 4 * sigma);
  }
}

TEST(Philox, EachArgumentChangesTheWords) {
  const PhiloxWords base = dropout_words(1, 2, 3, 4, 5);
  EXPECT_EQ(dropout_words(1, 2, 3, 7, 5), base);  // keys 4 to 7 share a block
  EXPECT_NE(dropout_words(1, 2, 3, 8, 5), base);
  EXPECT_NE(dropout_words(9, 2, 3, 4, 5), base);
  EXPECT_NE(dropout_words(1 | uint64_t{1} << 40, 2, 3, 4, 5), base);
  EXPECT_NE(dropout_words(1, 9, 3, 4, 5), base);
  EXPECT_NE(dropout_words(1, 2, 9, 4, 5), base);
  EXPECT_NE(dropout_words(1, 2, 3, 4, 9), base);
}

}  // namespace
}  // namespace mfa
