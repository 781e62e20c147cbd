// The definition itself, on numbers small enough to do by hand.
#include "linear/reference.h"

#include <gtest/gtest.h>

#include <vector>

namespace mfa {
namespace {

TEST(MatmulReference, ScalesAndAdds) {
  const std::vector<float> x = {1, 2, 3, 4}, w = {1, 0, 2, 5, 6, 7}, c = {10, 20, 30};
  std::vector<float> out(6);
  MatmulProblem p;
  p.M = 2;
  p.N = 3;
  p.K = 2;
  p.x = {x.data(), 2, nullptr};
  p.w.data = w.data();
  p.w.stride = 3;
  p.alpha = 2;
  p.beta = 0.5f;
  p.c = {c.data(), 0, 1};
  p.out = out.data();
  EXPECT_EQ(reference_matmul(p), (std::vector<double>{27, 34, 47, 51, 58, 83}));
  p.w.transposed = true;  // [3, 2]
  p.w.stride = 2;
  EXPECT_EQ(reference_matmul(p), (std::vector<double>{7, 34, 55, 11, 62, 107}));
}

TEST(MatmulReference, CodesAreALittleEndianStream) {
  // 32 codes of 3 bits, 0 to 7 again and again, in 96 bits.
  std::vector<uint32_t> words(3);
  for (int i = 0; i < 32; ++i)
    for (int bit = 0; bit < 3; ++bit)
      if (i % 8 >> bit & 1) words[static_cast<size_t>(3 * i + bit) / 32] |= 1u << ((3 * i + bit) % 32);
  const float scale = 0.5f, bias = -1.f;
  MatmulProblem p;
  p.N = 1;
  p.K = 32;
  p.w.data = words.data();
  p.w.transposed = true;
  p.w.stride = 3;
  p.w.affine = {3, 32, &scale, &bias, 1, 1};
  for (int k = 0; k < 32; ++k) EXPECT_EQ(weight_at(p, k, 0), 0.5 * (k % 8) - 1) << k;
}

}  // namespace
}  // namespace mfa
