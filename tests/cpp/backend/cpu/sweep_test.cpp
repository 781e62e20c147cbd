// Random problems, forward and every gradient, against the float64 reference, for every instruction set.
#include <gtest/gtest.h>

#include <iostream>
#include <ostream>
#include <string>
#include <vector>

#include "support/kernels.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::CaseSpec;
using testing::Expected;
using testing::Layout;
using testing::Random;

// Returns false once a case has failed, so that the first failure is the one that is read.
bool check_case(const CaseSpec& spec, uint64_t seed) {
  const AttentionCase c(spec, seed);
  const Expected expected(c);
  testing::for_each_isa([&](const std::string& isa) {
    SCOPED_TRACE(testing::describe(spec) + " seed " + std::to_string(seed) + " isa " + isa);
    testing::check_against_reference(c, expected);
  });
  return !::testing::Test::HasFailure();
}

struct Sweep {
  const char* name;
  uint64_t seed;
  int cases;
  int64_t max_work;  // B * Hq * Nq * Nk * (D + Dv)
};

void PrintTo(const Sweep& sweep, std::ostream* out) { *out << sweep.name; }

class CpuSweep : public ::testing::TestWithParam<Sweep> {};

TEST_P(CpuSweep, RandomProblemsKeepTheErrorRule) {
  const Sweep& sweep = GetParam();
  Random random(sweep.seed);
  const int cases = testing::case_count(sweep.cases);
  std::cout << cases << " cases, seed " << sweep.seed << std::endl;
  for (int i = 0; i < cases; ++i) {
    const CaseSpec spec = testing::random_spec(random, sweep.max_work);
    if (!check_case(spec, random.bits())) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, CpuSweep,
                         ::testing::Values(Sweep{"Small", 11, 3000, 1 << 18}, Sweep{"Medium", 12, 200, 1 << 23},
                                           Sweep{"MediumToo", 13, 500, 1 << 23}, Sweep{"Large", 14, 80, 1 << 27}),
                         [](const auto& info) { return info.param.name; });

// The same of packed, paged, rotated, block-sparse and neighbourhood problems, with every modifier.
class CpuFamilySweep : public ::testing::TestWithParam<Sweep> {};

TEST_P(CpuFamilySweep, RandomProblemsKeepTheErrorRule) {
  const Sweep& sweep = GetParam();
  Random random(sweep.seed);
  const int cases = testing::case_count(sweep.cases);
  std::cout << cases << " cases, seed " << sweep.seed << std::endl;
  for (int i = 0; i < cases; ++i) {
    CaseSpec spec = testing::random_spec(random, sweep.max_work);
    testing::add_family(random, spec);
    if (!check_case(spec, random.bits())) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, CpuFamilySweep,
                         ::testing::Values(Sweep{"Small", 15, 2000, 1 << 18}, Sweep{"Medium", 16, 300, 1 << 23},
                                           Sweep{"MediumToo", 17, 300, 1 << 23}, Sweep{"Large", 18, 30, 1 << 26}),
                         [](const auto& info) { return info.param.name; });

// Every head size, not only those that a draw meets.
TEST(CpuHeadDims, EveryHeadDimIsRight) {
  Random random(21);
  const int step = 576 / testing::case_count(576);
  for (int32_t D = 1; D <= 576; D += step) {
    CaseSpec spec;
    spec.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
    spec.Hq = 2;
    spec.D = D;
    spec.Dv = static_cast<int32_t>(random.integer(1, 576));
    spec.Nq = random.pick({1, 5, 9, 26});
    spec.Nk = random.pick({7, 33, 65});
    spec.causal = random.chance(0.3);
    spec.q_layout = spec.o_layout = random.pick({Layout::dense, Layout::padded_rows});
    spec.k_layout = random.pick({Layout::dense, Layout::padded_rows, Layout::token_major});
    spec.v_layout = random.pick({Layout::dense, Layout::padded_rows, Layout::token_major});
    if (!check_case(spec, random.bits())) return;
  }
}

// Lengths around vector widths, register tiles, row tiles and key blocks, in all pairs.
TEST(CpuLengths, EveryPairOfLengthsAroundTilesIsRight) {
  const std::vector<int32_t> lengths = {0,  1,  7,   8,   9,   31,  33,  63,  64,  65,  95,
                                        96, 97, 127, 128, 129, 255, 256, 257, 511, 512, 513};
  Random random(22);
  for (int32_t Nq : lengths) {
    for (int32_t Nk : lengths) {
      if (!random.chance(testing::case_count(1000) / 1000.)) continue;
      CaseSpec spec;
      spec.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
      spec.D = spec.Dv = random.pick({8, 16, 20});
      spec.Nq = Nq;
      spec.Nk = Nk;
      spec.causal = random.chance(0.5);
      spec.window_left = random.pick({-1, -1, 100});
      if (!check_case(spec, random.bits())) return;
    }
  }
}

TEST(CpuGroups, EveryGroupSizeIsRight) {
  Random random(23);
  for (int32_t group : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 25, 32, 71}) {
    for (int32_t Nq : {1, 2, 3, 17, 100}) {
      CaseSpec spec;
      spec.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
      spec.B = 2;
      spec.Hkv = random.pick({1, 2});
      spec.Hq = group * spec.Hkv;
      spec.D = spec.Dv = 32;
      spec.Nq = Nq;
      spec.Nk = random.pick({5, 70, 300});
      spec.causal = random.chance(0.5);
      spec.alibi = spec.sinks = random.chance(0.3);
      spec.kv_lengths = random.chance(0.3);
      if (!check_case(spec, random.bits())) return;
    }
  }
}

// A bias of every broadcast shape, with every mask shape, forward and backward.
TEST(CpuBroadcasts, EveryShapeOfBiasAndMaskIsRight) {
  Random random(24);
  for (int bias = 0; bias < 16; ++bias) {
    for (int mask = 0; mask < 16; ++mask) {
      CaseSpec spec;
      spec.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
      spec.B = 2;
      spec.Hkv = 2;
      spec.Hq = 4;
      spec.D = spec.Dv = 16;
      spec.Nq = random.pick({1, 3, 10, 40});
      spec.Nk = random.pick({9, 40, 270});
      spec.bias = {bias, random.chance(0.5)};
      spec.bias_dtype = random.pick({DType::f32, DType::f16, DType::bf16});
      spec.bias_minus_infinity = random.pick({0., 0.3});
      spec.mask = {mask, random.chance(0.5)};
      spec.causal = random.chance(0.3);
      if (!check_case(spec, random.bits())) return;
    }
  }
}

// Decode: few rows, many keys, the shapes of a server.
TEST(CpuDecode, LongCachesAreRight) {
  Random random(25);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t group : {1, 4, 8}) {
      for (int32_t Nq : {1, 2, 5}) {
        CaseSpec spec;
        spec.dtype = dtype;
        spec.B = 2;
        spec.Hkv = 2;
        spec.Hq = group * spec.Hkv;
        spec.D = random.pick({64, 80, 128});
        spec.Dv = random.pick({64, 128});
        spec.Nq = Nq;
        spec.Nk = random.pick({511, 1025, 2048, 4001});
        spec.causal = true;
        spec.kv_lengths = true;
        spec.sinks = random.chance(0.3);
        spec.window_left = random.pick({-1, 700});
        spec.mask.axes = random.pick({testing::kAbsent, 9});
        if (!check_case(spec, random.bits())) return;
      }
    }
  }
}

// The passes over the values of few rows: every number of whole vectors of channels, and a rest.
TEST(CpuDecode, EveryNumberOfChannelsIsRight) {
  Random random(27);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t Dv = 8; Dv <= 152; Dv += random.pick({7, 8, 9})) {
      CaseSpec spec;
      spec.dtype = dtype;
      spec.Hkv = 2;
      spec.Hq = random.pick({1, 2, 4, 5, 6, 8}) * spec.Hkv;
      spec.D = random.pick({16, 40});
      spec.Dv = Dv;
      spec.Nq = 1;
      spec.Nk = random.pick({1025, 1100});
      spec.kv_lengths = true;
      if (!check_case(spec, random.bits())) return;
    }
  }
}

// Large scores: exp of differences that underflow, a softmax that is one key only, and a maximum that comes last.
TEST(CpuScores, ExtremeScoresAreRight) {
  Random random(26);
  for (float scale : {-30.f, 4.f, 30.f}) {
    for (int32_t Nq : {1, 40}) {
      CaseSpec spec;
      spec.D = spec.Dv = 16;
      spec.Nq = Nq;
      spec.Nk = 600;
      spec.scale = scale;
      if (!check_case(spec, random.bits())) return;
    }
  }
}

}  // namespace
}  // namespace mfa
