// Products with codes whose groups are sums of integers: rows of unequal, tiny and infinite elements, infinite scales.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "backend/cpu/matmul.h"
#include "linear/reference.h"
#include "support/kernels.h"
#include "support/matmul_case.h"

namespace mfa {
namespace {

using testing::MatmulCase;
using testing::MatmulSpec;
using testing::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// Each kind of integer product, with rows for each of its kernels.
void for_each_kind(const std::function<void(const MatmulSpec&)>& f) {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const int32_t bits : {4, 8})
      for (const int32_t group_size : {32, 64, 128})
        for (const int64_t rows : {1, 2, 3, 4, 7, 21}) {
          MatmulSpec spec;
          spec.M = rows;
          spec.N = 45;
          spec.K = 640;
          spec.dtype = dtype;
          spec.bits = bits;
          spec.group_size = group_size;
          ASSERT_TRUE(sums_integers(MatmulCase(spec, 1).problem()));
          f(spec);
        }
}

void check_on_each_isa(MatmulCase& c, const MatmulSpec& spec) {
  testing::for_each_isa([&](const std::string& isa) {
    SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
    c.clear_result();
    c.run();
    c.check();
  });
}

// The larger elements are multiplied by exact zeros, so nothing of theirs hides an error of the smaller ones.
TEST(CpuIntegerMatmul, SmallElementsBesideLargeOnesKeepTheErrorRule) {
  for_each_kind([](const MatmulSpec& spec) {
    for (const float large : {40.f, 1000.f, 30000.f})
      for (const int every : {8, 32, 128}) {
        MatmulCase c(spec, 2);
        const uint32_t middle = 1u << (spec.bits - 1);
        for (int32_t n = 0; n < spec.N; ++n) {
          for (int32_t g = 0; g < spec.K / spec.group_size; ++g)
            c.set_group(n, g, 0.125f, -0.125f * static_cast<float>(middle));
          for (int32_t k = 0; k < spec.K; k += every) c.set_code(n, k, middle);
        }
        for (int64_t r = 0; r < spec.M; ++r)
          for (int32_t k = 0; k < spec.K; k += every) c.set_x(r, k, r % 2 ? -large : large);
        check_on_each_isa(c, spec);
      }
  });
}

TEST(CpuIntegerMatmul, ElementsOfAllMagnitudesKeepTheErrorRule) {
  for_each_kind([](const MatmulSpec& spec) {
    MatmulCase c(spec, 3);
    Random random(4);
    for (int64_t r = 0; r < spec.M; ++r)
      for (int32_t k = 0; k < spec.K; ++k)
        c.set_x(
            r, k,
            random.chance(0.2) ? 0.f : random.normal() * std::exp2(12.f * static_cast<float>(random.uniform()) - 4.f));
    check_on_each_isa(c, spec);
  });
}

TEST(CpuIntegerMatmul, ARowWithOutliersHasTheSameBitsInAnyBatch) {
  for_each_kind([](MatmulSpec spec) {
    spec.M = 23;
    MatmulCase c(spec, 5);
    for (int64_t r = 0; r < spec.M; r += 3)
      for (int32_t k = static_cast<int32_t>(r); k < spec.K; k += 150) c.set_x(r, k, 3000.f);
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      c.clear_result();
      c.run();
      const std::vector<uint8_t> together = c.result_bytes();
      for (const int64_t rows : {1, 2, 4, 5}) {
        c.clear_result();
        for (int64_t r = 0; r < spec.M; r += rows) {
          const MatmulProblem part = c.rows(r, std::min(rows, spec.M - r));
          cpu::matmul({&part, 1});
        }
        ASSERT_EQ(c.result_bytes(), together) << rows << " rows at a time";
      }
    });
  });
}

TEST(CpuIntegerMatmul, PowersOfTwoInXPassThrough) {
  for_each_kind([](const MatmulSpec& spec) {
    const bool half = spec.dtype == DType::f16;
    for (const int power : {half ? -10 : -116, half ? 4 : 110}) {
      MatmulCase plain(spec, 6), scaled(spec, 6);
      Random random(7);
      for (int64_t r = 0; r < spec.M; ++r)
        for (int32_t k = 0; k < spec.K; ++k) {
          // Few digits, so that float16 keeps them at its smallest.
          const float x = std::round(8.f * random.normal()) / 32.f;
          plain.set_x(r, k, x);
          scaled.set_x(r, k, std::ldexp(x, power));
        }
      for (int32_t n = 0; n < spec.N; ++n)
        for (int32_t g = 0; g < spec.K / spec.group_size; ++g)
          for (MatmulCase* c : {&plain, &scaled}) c->set_group(n, g, 0.5f, -3.f);
      testing::for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
        plain.run();
        scaled.run();
        const std::vector<float> expected = plain.result(), got = scaled.result();
        for (size_t i = 0; i < got.size(); ++i) {
          if (half && std::abs(got[i]) < 0x1p-14f) continue;  // rounded as a subnormal
          ASSERT_EQ(got[i], std::ldexp(expected[i], power)) << i;
        }
      });
    }
  });
}

TEST(CpuIntegerMatmul, SubnormalElementsCount) {
  for_each_kind([](const MatmulSpec& spec) {
    const float unit = spec.dtype == DType::f16 ? 0x1p-24f : 0x1p-133f;
    MatmulCase c(spec, 8);
    for (int64_t r = 0; r < spec.M; ++r)
      for (int32_t k = 0; k < spec.K; ++k) c.set_x(r, k, unit * static_cast<float>((k + r) % 5));
    for (int32_t n = 0; n < spec.N; ++n)
      for (int32_t g = 0; g < spec.K / spec.group_size; ++g) c.set_group(n, g, 1024.f, 512.f);
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      c.run();
      const std::vector<double> exact = reference_matmul(c.problem());
      const std::vector<float> got = c.result();
      for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i] / exact[i], 1., 0x1p-8) << i;
    });
  });
}

// NaN, infinities and finite elements in their places; finite ones nearly so.
void check_classes(const MatmulCase& c) {
  const std::vector<double> exact = reference_matmul(c.problem());
  const std::vector<float> got = c.result();
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isfinite(exact[i])) {
      ASSERT_NEAR(got[i], exact[i], 0.01 * std::abs(exact[i]) + 0.5) << i;
    } else {
      ASSERT_EQ(std::isnan(got[i]), std::isnan(exact[i])) << i << ": " << got[i] << ", exact " << exact[i];
      if (std::isnan(exact[i])) continue;
      ASSERT_EQ(got[i], exact[i]) << i;
    }
  }
}

TEST(CpuIntegerMatmul, NaNAndInfinityComeOutAsIeeeHasThem) {
  for_each_kind([](const MatmulSpec& spec) {
    MatmulCase c(spec, 9);
    const uint32_t middle = 1u << (spec.bits - 1);
    for (int32_t n = 0; n < spec.N; ++n) {
      c.set_group(n, 0, 0.25f, -0.25f * static_cast<float>(middle));
      if (n % 3 == 0) c.set_code(n, 5, middle);  // an infinity by zero
      if (n % 5 == 0) c.set_group(n, 1, n % 2 ? kInfinity : -kInfinity, 1.f);
      if (n % 7 == 0) c.set_group(n, 2, 1.f, n % 2 ? -kInfinity : kInfinity);
      if (n % 11 == 10) c.set_group(n, 3, kNaN, 1.f);
    }
    // A group whose elements have one sign, by weights of one sign: an infinite scale is an infinite sum.
    for (int32_t k = spec.group_size; k < 2 * spec.group_size; ++k) {
      for (int64_t r = 0; r < spec.M; ++r) c.set_x(r, k, 1.f + static_cast<float>(k % 3));
      for (int32_t n = 0; n < spec.N; n += 10) c.set_code(n, k, 1 + static_cast<uint32_t>(k % 3));
    }
    for (int64_t r = 0; r < spec.M; ++r) {
      if (r % 4 == 1) c.set_x(r, 5, kInfinity);
      if (r % 4 == 2) c.set_x(r, 5, -kInfinity);
      if (r % 4 == 3) c.set_x(r, 9, kNaN);
    }
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      c.clear_result();
      c.run();
      check_classes(c);
    });
  });
}

// The integer part of a group, times its scale, does not fit float32; the result does.
TEST(CpuIntegerMatmul, HugeScalesOfTinyElementsAreFinite) {
  MatmulSpec spec;
  spec.dtype = DType::bf16;
  spec.bits = 4;
  spec.N = 20;
  spec.K = 128;
  for (const int64_t rows : {1, 9}) {
    spec.M = rows;
    MatmulCase c(spec, 10);
    for (int64_t r = 0; r < rows; ++r)
      for (int32_t k = 0; k < spec.K; ++k) c.set_x(r, k, 0x1p-118f);
    for (int32_t n = 0; n < spec.N; ++n)
      for (int32_t g = 0; g < 2; ++g) c.set_group(n, g, 0x1p118f, 0.f);
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(isa);
      c.run();
      check_classes(c);
    });
  }
}

// A copy of some bytes that ends where memory that may not be touched begins.
class AtTheEndOfMemory {
 public:
  AtTheEndOfMemory(const void* data, size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t before = (bytes + page - 1) / page * page;
    mapped_ = before + page;
    region_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (region_ == MAP_FAILED || mprotect(region_ + before, page, PROT_NONE) != 0) throw std::bad_alloc();
    data_ = region_ + before - bytes;
    std::memcpy(data_, data, bytes);
  }
  ~AtTheEndOfMemory() { munmap(region_, mapped_); }
  AtTheEndOfMemory(const AtTheEndOfMemory&) = delete;
  AtTheEndOfMemory& operator=(const AtTheEndOfMemory&) = delete;
  const void* data() const { return data_; }

 private:
  char *region_, *data_;
  size_t mapped_;
};

TEST(CpuIntegerMatmul, NothingIsReadPastTheEndOfWeights) {
  constexpr int32_t kColumns = 19;
  for (const int32_t bits : {4, 8})
    for (const int32_t group_size : {32, 64, 128})
      for (const int32_t groups : {1, 2, 5, 8, 9, 18}) {
        const int32_t K = groups * group_size;
        Random random(12);
        std::vector<uint32_t> codes(static_cast<size_t>(kColumns * K * bits / 32));
        std::vector<bfloat16> scales(static_cast<size_t>(kColumns * groups)), biases(scales.size()),
            x(static_cast<size_t>(K)), expected(kColumns), got(kColumns);
        for (uint32_t& word : codes) word = static_cast<uint32_t>(random.bits());
        for (auto* values : {&scales, &biases, &x})
          for (bfloat16& value : *values) value = to_bfloat16(random.normal());
        const AtTheEndOfMemory last_codes(codes.data(), codes.size() * sizeof(uint32_t)),
            last_scales(scales.data(), scales.size() * sizeof(bfloat16)),
            last_biases(biases.data(), biases.size() * sizeof(bfloat16));
        scales.resize(scales.size() + 64);  // so that what is read past the end is not the same
        biases.resize(biases.size() + 64);
        MatmulProblem p;
        p.M = 1;
        p.N = kColumns;
        p.K = K;
        p.dtype = DType::bf16;
        p.x = {x.data(), K, nullptr};
        p.w.transposed = true;
        p.w.stride = K * bits / 32;
        testing::for_each_isa([&](const std::string& isa) {
          SCOPED_TRACE(isa + " bits " + std::to_string(bits) + " groups " + std::to_string(groups));
          p.w.data = codes.data();
          p.w.affine = {bits, group_size, scales.data(), biases.data(), groups, groups};
          p.out = expected.data();
          cpu::matmul({&p, 1});
          p.w.data = last_codes.data();
          p.w.affine = {bits, group_size, last_scales.data(), last_biases.data(), groups, groups};
          p.out = got.data();
          cpu::matmul({&p, 1});
          EXPECT_EQ(std::memcmp(expected.data(), got.data(), kColumns * sizeof(bfloat16)), 0);
        });
      }
}

// Columns that follow each other in memory are multiplied as one, and a vector of codes may then belong to two.
TEST(CpuIntegerMatmul, ColumnsThatFollowEachOtherHaveTheBitsOfColumnsApart) {
  constexpr int32_t kColumns = 21, kRows = 4, kCodesApart = 3, kScalesApart = 5;
  for (const int32_t bits : {4, 8})
    for (const int32_t group_size : {32, 64, 128})
      for (const int32_t groups : {1, 2, 3, 5, 8, 9, 17, 18}) {
        const int32_t K = groups * group_size, words = K * bits / 32;
        Random random(13);
        std::vector<uint32_t> codes(static_cast<size_t>(kColumns * words));
        std::vector<float16> scales(static_cast<size_t>(kColumns * groups)), biases(scales.size()),
            x(static_cast<size_t>(kRows * K));
        for (uint32_t& word : codes) word = static_cast<uint32_t>(random.bits());
        for (auto* values : {&scales, &biases, &x})
          for (float16& value : *values) value = to_float16(random.normal());
        for (size_t i = K; i < x.size(); i += 40) x[i] = to_float16(1000.f);  // groups with rests in all rows but one
        std::vector<uint32_t> codes_apart(static_cast<size_t>(kColumns * (words + kCodesApart)), 0x5a5a5a5au);
        std::vector<float16> scales_apart(static_cast<size_t>(kColumns * (groups + kScalesApart)), to_float16(kNaN)),
            biases_apart(scales_apart);
        for (int32_t n = 0; n < kColumns; ++n) {
          std::copy_n(codes.begin() + n * words, words, codes_apart.begin() + n * (words + kCodesApart));
          std::copy_n(scales.begin() + n * groups, groups, scales_apart.begin() + n * (groups + kScalesApart));
          std::copy_n(biases.begin() + n * groups, groups, biases_apart.begin() + n * (groups + kScalesApart));
        }
        testing::for_each_isa([&](const std::string& isa) {
          for (int32_t rows = 1; rows <= kRows; ++rows) {
            SCOPED_TRACE(isa + " bits " + std::to_string(bits) + " groups " + std::to_string(groups) + " of " +
                         std::to_string(group_size) + " rows " + std::to_string(rows));
            std::vector<float16> together(static_cast<size_t>(rows * kColumns)), apart(together.size());
            MatmulProblem p;
            p.M = rows;
            p.N = kColumns;
            p.K = K;
            p.dtype = DType::f16;
            p.x = {x.data() + (kRows - rows) * K, K, nullptr};
            p.w.transposed = true;
            p.w.data = codes.data();
            p.w.stride = words;
            p.w.affine = {bits, group_size, scales.data(), biases.data(), groups, groups};
            p.out = together.data();
            cpu::matmul({&p, 1});
            p.w.data = codes_apart.data();
            p.w.stride = words + kCodesApart;
            p.w.affine = {bits,
                          group_size,
                          scales_apart.data(),
                          biases_apart.data(),
                          groups + kScalesApart,
                          groups + kScalesApart};
            p.out = apart.data();
            cpu::matmul({&p, 1});
            EXPECT_EQ(std::memcmp(together.data(), apart.data(), together.size() * sizeof(float16)), 0);
          }
        });
      }
}

}  // namespace
}  // namespace mfa
