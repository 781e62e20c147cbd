// NaN and infinity in what a row does not see never reach the row.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "support/kernels.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::CaseSpec;
using testing::ForwardResults;
using testing::Random;
using testing::Tensor;

bool row_sees(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) {
  if (!testing::is_visible(p, b, h, i, j)) return false;
  const int64_t* s = p.bias.stride;
  return !p.bias.data || load_as_float(p.bias.data, p.bias.dtype, b * s[0] + h * s[1] + i * s[2] + j * s[3]) !=
                             -std::numeric_limits<float>::infinity();
}

// Poisons single keys that some rows see and others do not, and compares the rows that do not. The sweeps
// poison what no row sees.
void check_containment(CaseSpec spec, uint64_t seed) {
  spec.poison = false;
  AttentionCase c(spec, seed);
  const AttentionProblem& p = c.problem;
  testing::for_each_isa([&](const std::string& isa) {
    SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
    const ForwardResults clean = testing::run_forward(p);
    const testing::BackwardResults clean_grad = testing::run_backward(p, clean, c.d_o.ref(), c.dlse_or_null());
    const Tensor k = c.k, v = c.v;
    for (int32_t j : {0, 1, spec.Nk / 2, spec.Nk - 1}) {
      for (float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (int32_t b = 0; b < p.B; ++b)
          for (int32_t h = 0; h < p.Hkv; ++h) {
            c.k.fill_row(b, h, j, poison);
            c.v.fill_row(b, h, j, poison);
          }
        const ForwardResults poisoned = testing::run_forward(p);
        const testing::BackwardResults grad = testing::run_backward(p, poisoned, c.d_o.ref(), c.dlse_or_null());
        for (int32_t b = 0; b < p.B; ++b)
          for (int32_t h = 0; h < p.Hkv; ++h)
            for (int32_t d = 0; d < spec.D; ++d) c.k.set(b, h, j, d, k.get(b, h, j, d));
        for (int32_t b = 0; b < p.B; ++b)
          for (int32_t h = 0; h < p.Hkv; ++h)
            for (int32_t d = 0; d < spec.Dv; ++d) c.v.set(b, h, j, d, v.get(b, h, j, d));
        for (int32_t b = 0; b < p.B; ++b)
          for (int32_t h = 0; h < p.Hq; ++h)
            for (int32_t i = 0; i < p.Nq; ++i) {
              if (row_sees(p, b, h, i, j)) continue;
              for (int32_t d = 0; d < p.Dv; ++d)
                ASSERT_EQ(poisoned.o.get(b, h, i, d), clean.o.get(b, h, i, d))
                    << "o: key " << j << " = " << poison << ", head " << h << ", row " << i;
              for (int32_t d = 0; d < p.D; ++d)
                ASSERT_EQ(grad.dq.get(b, h, i, d), clean_grad.dq.get(b, h, i, d))
                    << "dq: key " << j << " = " << poison << ", head " << h << ", row " << i;
            }
      }
    }
  });
}

// The same of the gradients of keys: what a row and its cotangent hold does not reach keys that it does not see, also
// where it is computed together with rows that see them.
TEST(CpuContainment, KeysDoNotFeelRowsThatDoNotSeeThem) {
  Random random(45);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t N : {5, 41, 300}) {
      CaseSpec spec;
      spec.dtype = dtype;
      spec.D = spec.Dv = 32;
      spec.Nq = spec.Nk = N;
      spec.causal = true;
      spec.poison = false;
      AttentionCase c(spec, random.bits());
      const AttentionProblem& p = c.problem;
      testing::for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
        const ForwardResults forward = testing::run_forward(p);
        const testing::BackwardResults clean = testing::run_backward(p, forward, c.d_o.ref(), nullptr);
        const Tensor q = c.q, d_o = c.d_o;
        for (int32_t i : {0, 1, N / 2}) {
          for (float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            for (int32_t h = 0; h < p.Hq; ++h) {
              c.q.fill_row(0, h, i, poison);
              c.d_o.fill_row(0, h, i, poison);
            }
            const testing::BackwardResults grad = testing::run_backward(p, forward, c.d_o.ref(), nullptr);
            for (int32_t h = 0; h < p.Hq; ++h)
              for (int32_t d = 0; d < spec.D; ++d) {
                c.q.set(0, h, i, d, q.get(0, h, i, d));
                c.d_o.set(0, h, i, d, d_o.get(0, h, i, d));
              }
            for (int32_t h = 0; h < p.Hkv; ++h)
              for (int32_t j = i + 1; j < N; ++j)
                for (int32_t d = 0; d < spec.D; ++d) {
                  ASSERT_EQ(grad.dk.get(0, h, j, d), clean.dk.get(0, h, j, d)) << "dk: row " << i << ", key " << j;
                  ASSERT_EQ(grad.dv.get(0, h, j, d), clean.dv.get(0, h, j, d)) << "dv: row " << i << ", key " << j;
                }
          }
        }
      });
    }
  }
}

TEST(CpuContainment, CausalRowsDoNotFeelLaterKeys) {
  Random random(41);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t N : {5, 40, 300}) {
      CaseSpec spec;
      spec.dtype = dtype;
      spec.D = spec.Dv = 32;
      spec.Nq = spec.Nk = N;
      spec.causal = true;
      check_containment(spec, random.bits());
    }
  }
}

TEST(CpuContainment, WindowsAndMasksHideWhatTheyHide) {
  Random random(42);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t Nq : {1, 3, 50}) {
      CaseSpec spec;
      spec.dtype = dtype;
      spec.D = spec.Dv = 24;
      spec.Hq = 2;
      spec.Nq = Nq;
      spec.Nk = 290;
      spec.mask.axes = 7;
      check_containment(spec, random.bits());
      spec.window_left = 20;
      spec.window_right = 3;
      spec.mask.axes = testing::kAbsent;
      check_containment(spec, random.bits());
    }
  }
}

TEST(CpuContainment, ABiasOfMinusInfinityHidesWhatItHides) {
  Random random(44);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t Nq : {1, 3, 50}) {
      CaseSpec spec;
      spec.dtype = spec.bias_dtype = dtype;
      spec.D = spec.Dv = 24;
      spec.Hq = 4;
      spec.Hkv = 2;
      spec.Nq = Nq;
      spec.Nk = 290;
      spec.bias.axes = 7;
      spec.bias_minus_infinity = 0.5;
      check_containment(spec, random.bits());
    }
  }
}

// What a decode step finds in the cache behind the sequence is anything.
TEST(CpuContainment, KeysPastTheLengthAreNotRead) {
  Random random(43);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t Nq : {1, 4, 70}) {
      CaseSpec spec;
      spec.dtype = dtype;
      spec.B = 3;
      spec.Hq = 4;
      spec.Hkv = 2;
      spec.D = spec.Dv = 64;
      spec.Nq = Nq;
      spec.Nk = 777;
      spec.kv_lengths = true;
      spec.causal = true;
      const AttentionCase c(spec, random.bits());  // poisoned
      const testing::Expected expected(c);
      testing::for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
        testing::check_against_reference(c, expected);
      });
    }
  }
}

}  // namespace
}  // namespace mfa
