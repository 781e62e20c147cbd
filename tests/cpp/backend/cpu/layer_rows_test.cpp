// The small layers on rows of every instruction set: float64 references, the same bits from all, nothing past the ends.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "support/kernels.h"
#include "support/random.h"

namespace mfa {
namespace {

using cpu::LayerTable;
using testing::Random;

constexpr int kSizes[] = {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 576, 577, 1536};
constexpr uint8_t kUntouched = 0xa5;

// `size` elements of a dtype, with some bytes behind them that nobody may write to.
struct Row {
  DType dtype;
  int size;
  std::vector<uint8_t> bytes;

  Row(DType dtype, int size) : dtype(dtype), size(size), bytes(size * size_of(dtype) + 64, kUntouched) {}
  Row(DType dtype, const std::vector<double>& values) : Row(dtype, static_cast<int>(values.size())) {
    for (int i = 0; i < size; ++i) store_from_float(data(), dtype, i, static_cast<float>(values[i]));
  }
  void* data() { return bytes.data(); }
  double operator[](int i) const { return load_as_float(bytes.data(), dtype, i); }
  bool end_is_untouched() const {
    return std::all_of(bytes.end() - 64, bytes.end(), [](uint8_t b) { return b == kUntouched; });
  }
};

std::vector<double> normal_values(Random& random, int size, double scale = 1) {
  std::vector<double> values(static_cast<size_t>(size));
  for (double& value : values) value = scale * random.normal();
  return values;
}

// Half a unit in the last place of the dtype, and the float32 arithmetic before it.
double tolerance(DType dtype, double exact, double float_error) {
  const double unit = dtype == DType::f32 ? 0 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const double smallest = dtype == DType::f16 ? 0x1p-25 : 0;
  return std::abs(exact) * unit * 1.001 + smallest + float_error * 0x1p-23;
}

using Compute = std::function<void(const LayerTable&, Row& out)>;
using Exact = std::function<double(int i)>;

// `error` is that of element i in units of 2^-23.
void check(DType dtype, int size, const Compute& compute, const Exact& exact, const Exact& error) {
  std::vector<uint8_t> first;
  testing::for_each_isa([&](const std::string& isa) {
    SCOPED_TRACE(std::string(name_of(dtype)) + " " + std::to_string(size) + " isa " + isa);
    Row out(dtype, size);
    compute(cpu::require_kernels().layers(), out);
    for (int i = 0; i < size; ++i)
      ASSERT_NEAR(out[i], exact(i), tolerance(dtype, exact(i), error(i))) << "element " << i;
    EXPECT_TRUE(out.end_is_untouched());
    if (first.empty()) first = out.bytes;
    EXPECT_EQ(out.bytes, first) << "bits differ between instruction sets";
  });
}

void for_each_problem(const std::function<void(DType, int, Random&)>& f) {
  Random random(20);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const int size : kSizes) f(dtype, size, random);
}

TEST(CpuLayerRows, NormRowIsThatOfFloat64) {
  for_each_problem([](DType dtype, int size, Random& random) {
    for (const bool weighted : {false, true}) {
      Row x(dtype, normal_values(random, size)), weight(dtype, normal_values(random, size));
      double squares = 0;
      for (int i = 0; i < size; ++i) squares += x[i] * x[i];
      const double factor = 1 / std::sqrt(squares / size + 1e-5f);
      const auto exact = [&](int i) { return x[i] * factor * (weighted ? weight[i] : 1); };
      check(
          dtype, size,
          [&](const LayerTable& k, Row& out) {
            k.norm_row(dtype, x.data(), weighted ? weight.data() : nullptr, size, 1e-5f, out.data());
          },
          exact, [&](int i) { return (4 + size / 16.0) * std::abs(exact(i)); });
    }
  });
}

TEST(CpuLayerRows, SwigluIsThatOfFloat64) {
  for_each_problem([](DType dtype, int size, Random& random) {
    Row gate(dtype, normal_values(random, size, 5)), x(dtype, normal_values(random, size));
    const auto exact = [&](int i) { return gate[i] / (1 + std::exp(-gate[i])) * x[i]; };
    check(
        dtype, size, [&](const LayerTable& k, Row& out) { k.swiglu(dtype, gate.data(), x.data(), size, out.data()); },
        exact, [&](int i) { return 8 * std::abs(exact(i)); });
  });
}

TEST(CpuLayerRows, AddIsThatOfFloat64) {
  for_each_problem([](DType dtype, int size, Random& random) {
    Row a(dtype, normal_values(random, size)), b(dtype, normal_values(random, size));
    const auto exact = [&](int i) { return a[i] + b[i]; };
    check(
        dtype, size, [&](const LayerTable& k, Row& out) { k.add(dtype, a.data(), b.data(), size, out.data()); }, exact,
        [&](int i) { return std::abs(exact(i)); });
  });
}

TEST(CpuLayerRows, TurnRowIsThatOfFloat64) {
  for_each_problem([](DType dtype, int half, Random& random) {
    Row x(dtype, normal_values(random, 2 * half));
    std::vector<float> cosine, sine;
    for (int i = 0; i < half; ++i) {
      const double angle = 3 * random.normal();
      cosine.push_back(static_cast<float>(std::cos(angle)));
      sine.push_back(static_cast<float>(std::sin(angle)));
    }
    const auto exact = [&](int i) {
      const int j = i % half;
      return i < half ? x[j] * cosine[j] - x[half + j] * sine[j] : x[j] * sine[j] + x[half + j] * cosine[j];
    };
    check(
        dtype, 2 * half,
        [&](const LayerTable& k, Row& out) {
          k.turn_row(dtype, x.data(), cosine.data(), sine.data(), half, out.data());
        },
        exact, [&](int i) { return 2 * (std::abs(x[i % half]) + std::abs(x[half + i % half])); });
  });
}

TEST(CpuLayerRows, NaNAndInfinityComeOutAsArithmeticHasThem) {
  constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(std::string(name_of(dtype)) + " isa " + isa);
      const LayerTable& kernels = cpu::require_kernels().layers();
      for (const int before : {0, 13}) {  // in a last, partial vector and behind whole ones
        std::vector<double> gates(before, 1), ones(before + 5, 1);
        for (const double g : {kNaN, kInf, -kInf, -200.0, 200.0}) gates.push_back(g);
        Row gate(dtype, gates), x(dtype, ones), out(dtype, before + 5);
        kernels.swiglu(dtype, gate.data(), x.data(), before + 5, out.data());
        EXPECT_TRUE(std::isnan(out[before]));
        EXPECT_EQ(out[before + 1], kInf);
        EXPECT_TRUE(std::isnan(out[before + 2]));  // -inf / inf
        EXPECT_EQ(out[before + 3], 0);
        EXPECT_EQ(out[before + 4], 200);
        if (before > 0) {
          EXPECT_NEAR(out[0], 0.7310586, 0.003);
        }
        kernels.add(dtype, gate.data(), gate.data(), before + 5, out.data());
        EXPECT_TRUE(std::isnan(out[before]));
        EXPECT_EQ(out[before + 1], kInf);
        EXPECT_EQ(out[before + 2], -kInf);
        kernels.norm_row(dtype, gate.data(), nullptr, before + 5, 1e-5f, out.data());
        for (int i = 0; i < before + 5; ++i) EXPECT_TRUE(std::isnan(out[i]));
      }
    });
  }
}

TEST(CpuLayerRows, AnOutputMayBeAnInput) {
  Random random(21);
  for (const int size : {5, 24, 577}) {
    const std::vector<double> a = normal_values(random, size), b = normal_values(random, size);
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE("isa " + isa);
      const LayerTable& kernels = cpu::require_kernels().layers();
      Row gate(DType::f16, a), x(DType::f16, b), apart(DType::f16, size);
      kernels.swiglu(DType::f16, gate.data(), x.data(), size, apart.data());
      kernels.swiglu(DType::f16, gate.data(), x.data(), size, gate.data());
      EXPECT_EQ(gate.bytes, apart.bytes);
    });
  }
}

}  // namespace
}  // namespace mfa
