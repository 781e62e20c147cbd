// Matrix products of the CPU backend: random problems against the float64 reference, and bits that depend on nothing
// but the row, for every instruction set.
#include "backend/cpu/matmul.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "backend/cpu/scratch.h"
#include "common/thread_pool.h"
#include "linear/plan.h"
#include "support/kernels.h"
#include "support/matmul_case.h"

namespace mfa {
namespace {

using testing::MatmulCase;
using testing::MatmulSpec;
using testing::Random;

struct MatmulSweep {
  const char* name;
  uint64_t seed;
  int cases;
  int64_t max_products;
};

class CpuMatmulSweep : public ::testing::TestWithParam<MatmulSweep> {};

TEST_P(CpuMatmulSweep, RandomProductsKeepTheErrorRule) {
  Random random(GetParam().seed);
  const int cases = testing::case_count(GetParam().cases);
  std::cout << cases << " cases, seed " << GetParam().seed << std::endl;
  for (int i = 0; i < cases; ++i) {
    const MatmulSpec spec = testing::random_matmul(random, GetParam().max_products);
    MatmulCase c(spec, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      c.clear_result();
      c.run();
      c.check();
    });
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, CpuMatmulSweep,
                         ::testing::Values(MatmulSweep{"Small", 31, 3000, 1 << 16},
                                           MatmulSweep{"Medium", 32, 400, 1 << 22},
                                           MatmulSweep{"Large", 33, 30, 1 << 26}),
                         [](const auto& info) { return info.param.name; });

// Every dtype with dense weights and every width of codes, both ways of storing them.
std::vector<MatmulSpec> kinds_of_weights() {
  std::vector<MatmulSpec> out;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const bool transposed : {true, false})
      for (const int32_t bits : {0, 2, 3, 4, 5, 6, 8}) {
        MatmulSpec spec;
        spec.dtype = dtype;
        spec.transposed = transposed;
        spec.bits = bits;
        out.push_back(spec);
      }
  return out;
}

TEST(CpuMatmul, ARowHasTheSameBitsInAnyBatchOfRows) {
  for (MatmulSpec spec : kinds_of_weights()) {
    spec.M = 110;  // more than are packed at a time
    spec.N = spec.bits && !spec.transposed ? 64 : 73;
    spec.K = spec.bits && spec.transposed ? 576 : 583;  // more than an inner block
    spec.has_c = true;
    MatmulCase c(spec, 5);
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      c.clear_result();
      c.run();
      const std::vector<uint8_t> together = c.result_bytes();
      for (int64_t rows = 1; rows < spec.M; rows += rows < 10 ? 1 : 37) {
        c.clear_result();
        for (int64_t r = 0; r < spec.M; r += rows) {
          const MatmulProblem part = c.rows(r, std::min(rows, spec.M - r));
          cpu::matmul({&part, 1});
        }
        ASSERT_EQ(c.result_bytes(), together) << rows << " rows at a time";
      }
    });
  }
}

// The weights themselves are poisoned, so results come from the packed ones.
TEST(CpuMatmul, WeightsPackedAheadGiveTheSameBits) {
  for (MatmulSpec spec : kinds_of_weights()) {
    if (spec.bits) continue;
    for (const int32_t K : {1, 3, 70, 512, 583, 1097}) {
      spec.M = 130;
      spec.N = 201;
      spec.K = K;
      spec.has_c = true;
      spec.w_gap = 3;
      MatmulCase c(spec, 11);
      testing::for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
        c.clear_result();
        c.run();
        const std::vector<uint8_t> expected = c.result_bytes();
        const MatmulProblem whole = c.problem();
        const cpu::AlignedBuffer packed(cpu::packed_weight_bytes(whole));
        std::memset(packed.data(), 0xff, packed.bytes());  // NaN where nothing is written
        cpu::pack_weights(whole, packed.data());
        const std::vector<uint8_t> poison(
            static_cast<size_t>((spec.transposed ? spec.N : K) * whole.w.stride) * size_of(spec.dtype), 0xff);
        for (const int threads : {1, 3}) {
          set_thread_count(threads);
          for (const int64_t rows : {5, 7, 8, 26, 47, 48, 130}) {
            c.clear_result();
            for (int64_t r = 0; r < spec.M; r += rows) {
              MatmulProblem part = c.rows(r, std::min(rows, spec.M - r));
              part.w.packed = packed.data();
              if (part.M > kDirectRows) part.w.data = poison.data();
              cpu::matmul({&part, 1});
            }
            ASSERT_EQ(c.result_bytes(), expected) << rows << " rows at a time, " << threads << " threads";
          }
        }
        set_thread_count(0);
      });
    }
  }
}

TEST(CpuMatmul, QuantisedWeightsAreNeverPackedAhead) {
  for (const MatmulSpec& spec : kinds_of_weights()) {
    if (spec.bits == 0) continue;
    MatmulSpec small = spec;
    small.N = small.K = 64;
    const MatmulCase c(small, 12);
    testing::for_each_isa([&](const std::string&) { EXPECT_EQ(cpu::packed_weight_bytes(c.problem()), 0u); });
  }
}

TEST(CpuMatmul, BitsDoNotDependOnTheNumberOfThreads) {
  for (MatmulSpec spec : kinds_of_weights()) {
    for (const int64_t rows : {1, 3, 450}) {  // one thread packs x in several goes
      spec.M = rows;
      spec.N = 512;
      spec.K = 512;
      MatmulCase c(spec, 6);
      testing::for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
        set_thread_count(1);
        c.clear_result();
        c.run();
        const std::vector<uint8_t> alone = c.result_bytes();
        for (const int threads : {2, 3, 7}) {
          set_thread_count(threads);
          c.clear_result();
          c.run();
          ASSERT_EQ(c.result_bytes(), alone) << threads << " threads";
        }
        set_thread_count(0);
      });
    }
  }
}

TEST(CpuMatmul, ARowOfNaNOrInfinityReachesNoOtherRow) {
  for (MatmulSpec spec : kinds_of_weights()) {
    for (const int64_t rows : {4, 37}) {
      spec.M = rows;
      spec.N = 64;
      spec.K = 64;
      MatmulCase c(spec, 7);
      testing::for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
        c.set_x(1, 5, 0.f);
        c.run();
        const std::vector<float> clean = c.result();
        for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
          c.set_x(1, 5, poison);
          c.run();
          const std::vector<float> got = c.result();
          for (int64_t i = 0; i < rows * spec.N; ++i) {
            if (i / spec.N == 1) {
              EXPECT_FALSE(std::isfinite(got[i])) << i;
            } else {
              ASSERT_EQ(got[i], clean[i]) << i;
            }
          }
        }
      });
    }
  }
}

TEST(CpuMatmul, ProductsOfOneCallAreThoseOfSingleCalls) {
  Random random(8);
  std::vector<std::unique_ptr<MatmulCase>> cases;
  std::vector<MatmulProblem> problems;
  for (int i = 0; i < 40; ++i) {
    MatmulSpec spec;
    spec.M = random.integer(0, 40);
    spec.N = 130;
    spec.K = 300;
    spec.dtype = DType::bf16;
    cases.push_back(std::make_unique<MatmulCase>(spec, random.bits()));
    problems.push_back(cases.back()->problem());
  }
  testing::for_each_isa([&](const std::string&) {
    for (const size_t count : {size_t{2}, problems.size()}) {
      cpu::matmul({problems.data(), count});
      for (size_t i = 0; i < count; ++i) {
        const std::vector<uint8_t> together = cases[i]->result_bytes();
        cases[i]->clear_result();
        cases[i]->run();
        ASSERT_EQ(cases[i]->result_bytes(), together);
      }
    }
  });
}

// Weights whose rows are 2^31 elements apart, in address space of which only they are touched.
TEST(CpuMatmul, OffsetsPast32BitsAreReached) {
  constexpr int64_t kStride = (int64_t{1} << 31) + 64;
  constexpr int32_t N = 3, K = 40;
  const size_t bytes = static_cast<size_t>(2 * kStride + K) * sizeof(bfloat16);
  void* region = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) GTEST_SKIP() << "no address space";
  auto* far = static_cast<bfloat16*>(region);
  std::vector<bfloat16> near(N * K), x(5 * K), expected(5 * N), got(5 * N);
  Random random(10);
  for (bfloat16& value : x) value = to_bfloat16(random.normal());
  for (int32_t n = 0; n < N; ++n)
    for (int32_t k = 0; k < K; ++k) far[n * kStride + k] = near[n * K + k] = to_bfloat16(random.normal());
  MatmulProblem p;
  p.N = N;
  p.K = K;
  p.dtype = DType::bf16;
  p.w.transposed = true;
  testing::for_each_isa([&](const std::string& isa) {
    SCOPED_TRACE(isa);
    for (const int64_t rows : {1, 5}) {
      p.M = rows;
      p.x = {x.data(), K, nullptr};
      p.w.data = near.data();
      p.w.stride = K;
      p.out = expected.data();
      cpu::matmul({&p, 1});
      p.w.data = far;
      p.w.stride = kStride;
      p.out = got.data();
      cpu::matmul({&p, 1});
      for (int64_t i = 0; i < rows * N; ++i) EXPECT_EQ(got[i].bits, expected[i].bits) << i;
      // The same region as rows of x.
      p.M = N;
      p.x = {far, kStride, nullptr};
      p.w.data = x.data();
      p.w.stride = K;
      p.out = got.data();
      cpu::matmul({&p, 1});
      p.x = {near.data(), K, nullptr};
      p.out = expected.data();
      cpu::matmul({&p, 1});
      for (int64_t i = 0; i < int64_t{N} * N; ++i) EXPECT_EQ(got[i].bits, expected[i].bits) << i;
    }
  });
  munmap(region, bytes);
}

TEST(CpuMatmul, NoTermsGiveTheAddend) {
  for (const int64_t rows : {2, 50}) {
    MatmulSpec spec;
    spec.M = rows;
    spec.N = 29;
    spec.K = 0;
    spec.has_c = true;
    MatmulCase c(spec, 9);
    testing::for_each_isa([&](const std::string&) {
      c.run();
      c.check();
    });
  }
}

}  // namespace
}  // namespace mfa
