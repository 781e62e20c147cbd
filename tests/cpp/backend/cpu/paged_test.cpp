// Keys and values in pages of a pool: the bits of the dense call, whatever the pages' order and the pool's layout.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "attention/layout.h"
#include "attention/visibility.h"
#include "common/thread_pool.h"
#include "support/kernels.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::BackwardResults;
using testing::CaseSpec;
using testing::ForwardResults;
using testing::Layout;
using testing::Random;
using testing::Tensor;

const DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

class CpuPages : public ::testing::Test {
 protected:
  ~CpuPages() override { set_thread_count(0); }
};

// The pages' rows in one dense tensor.
Tensor gather(const AttentionProblem& p, const Tensor& pool) {
  Tensor dense(p.dtype, {p.B, p.Hkv, p.Nk, pool.shape()[3]}, Layout::padded_rows);
  for (int32_t b = 0; b < p.B; ++b)
    for (int32_t h = 0; h < p.Hkv; ++h)
      for (int32_t j = 0; j < key_count(p, b); ++j)
        for (int64_t d = 0; d < pool.shape()[3]; ++d)
          dense.set(
              b, h, j, d,
              pool.get(p.pages.table[b * p.pages.table_stride + j / p.pages.page_size], h, j % p.pages.page_size, d));
  return dense;
}

// Compares a paged case, forward and dq, with the dense call on one thread and on several.
void expect_bits_of_dense(const AttentionCase& c) {
  testing::for_each_isa([&](const std::string& isa) {
    SCOPED_TRACE(testing::describe(c.spec) + " isa " + isa);
    const AttentionProblem& p = c.problem;
    AttentionProblem dense = p;
    const Tensor k = gather(p, c.k), v = gather(p, c.v);
    dense.pages = PagesRef{};
    dense.k = k.ref();
    dense.v = v.ref();
    set_thread_count(1);
    const ForwardResults expected = testing::run_forward(dense);
    const BackwardResults expected_grad = testing::run_backward(dense, expected, c.d_o.ref(), nullptr);
    for (int threads : {1, 2, 3}) {
      set_thread_count(threads);
      const ForwardResults paged = testing::run_forward(p);
      ASSERT_EQ(testing::bytes_of(paged), testing::bytes_of(expected)) << threads << " threads";
      const BackwardResults grad = testing::run_backward(p, paged, c.d_o.ref(), nullptr);
      ASSERT_EQ(grad.dq.bytes(), expected_grad.dq.bytes()) << threads << " threads";
    }
  });
}

TEST_F(CpuPages, PagesHaveTheBitsOfTheDenseCall) {
  Random random(62);
  for (int n = 0; n < testing::case_count(24) && !HasFailure(); ++n) {
    CaseSpec spec;
    spec.dtype = kTypes[n % 3];
    spec.B = 5;
    spec.Hkv = 2;
    spec.Hq = random.pick({2, 4, 8});
    spec.Nq = random.pick({1, 1, 3, 200});
    spec.Nk = random.pick({70, 600});
    spec.D = random.pick({40, 64});
    spec.Dv = random.pick({64, 72});
    spec.causal = random.chance(0.6);
    if (random.chance(0.3)) spec.window_left = 50;
    spec.alibi = random.chance(0.3);
    spec.sinks = random.chance(0.3);
    spec.kv_lengths = true;
    spec.packed_queries = random.chance(0.5);
    spec.page_size = random.pick({1, 16, 16, 37, 256, 1000});
    spec.rotary_dim = random.pick({0, 0, 32});
    expect_bits_of_dense(AttentionCase(spec, random.bits()));
  }
}

// Few rows of a head, so that the heads decode together, in the order of heads or of tokens.
CaseSpec decode_spec(Random& random, int32_t Hkv, int32_t group) {
  CaseSpec spec;
  spec.dtype = random.pick({DType::f32, DType::f16, DType::bf16, DType::bf16});
  spec.B = 2;
  spec.Hkv = Hkv;
  spec.Hq = Hkv * group;
  // Of 1024 keys on any of these rows decode; fewer keys may take the kernel of many rows.
  spec.Nq = random.chance(0.4) ? static_cast<int32_t>(random.integer(1, 8 / group)) : 1;
  spec.Nk = random.pick({200, 700, 1024, 1300});
  spec.D = random.pick({20, 32, 40});
  spec.Dv = random.chance(0.5) ? spec.D : random.pick({24, 36});
  spec.page_size = random.pick({1, 16, 16, 37, 64, 256});
  spec.k_layout = random.pick({Layout::token_major, Layout::token_major, Layout::dense, Layout::sliced});
  spec.v_layout = random.chance(0.7) ? spec.k_layout : random.pick({Layout::token_major, Layout::reversed});
  spec.kv_lengths = random.chance(0.6);
  spec.causal = random.chance(0.5);
  if (random.chance(0.4)) spec.window_left = random.pick({0, 3, 70, 300});  // starts inside a block
  spec.alibi = random.chance(0.3);
  spec.sinks = random.chance(0.4);
  if (random.chance(0.2)) spec.softcap = 5;
  if (random.chance(0.25)) spec.mask.axes = random.pick({1, 5, 13});  // the heads see different keys
  if (random.chance(0.2)) spec.bias.axes = 5;
  if (random.chance(0.15)) spec.dropout_p = 0.3f;
  if (random.chance(0.2)) spec.rotary_dim = 16;
  spec.packed_queries = random.chance(0.3);
  spec.poison = random.chance(0.6);
  return spec;
}

TEST_F(CpuPages, HeadsThatDecodeTogetherHaveTheBitsOfTheDenseCall) {
  Random random(66);
  for (int repeat = 0; repeat < testing::case_count(6); ++repeat)
    for (int32_t Hkv : {1, 3, 4, 8, 12})
      for (int32_t group : {1, 2, 4, 8}) {
        expect_bits_of_dense(AttentionCase(decode_spec(random, Hkv, group), random.bits()));
        if (HasFailure()) return;
      }
}

TEST_F(CpuPages, HeadsThatDecodeTogetherMatchTheReference) {
  Random random(67);
  for (int n = 0; n < testing::case_count(16); ++n) {
    const AttentionCase c(decode_spec(random, random.pick({3, 4, 8}), random.pick({1, 2, 4})), random.bits());
    const testing::Expected expected(c);
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(c.spec) + " isa " + isa);
      testing::check_against_reference(c, expected);
    });
    if (HasFailure()) return;
  }
}

// One head sees NaN where another does not: each row of the first shows it, and the others keep their bits.
TEST_F(CpuPages, AHeadDoesNotFeelWhatAnotherSees) {
  Random random(68);
  for (Layout layout : {Layout::token_major, Layout::dense})
    for (DType dtype : kTypes)
      for (int32_t group : {1, 2, 8}) {
        CaseSpec spec;
        spec.dtype = dtype;
        spec.Hkv = 8;
        spec.Hq = 8 * group;
        spec.Nk = 1100;
        spec.D = spec.Dv = 32;
        spec.page_size = 16;
        spec.k_layout = spec.v_layout = layout;
        AttentionCase c(spec, random.bits());
        testing::for_each_isa([&](const std::string& isa) {
          SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
          const AttentionProblem& p = c.problem;
          const ForwardResults clean = testing::run_forward(p);
          const int32_t head = 5, token = 777;
          const int32_t page = p.pages.table[token / p.pages.page_size], row = token % p.pages.page_size;
          std::vector<float> kept;
          for (int32_t d = 0; d < p.Dv; ++d) kept.push_back(c.v.get(page, head, row, d));
          c.v.fill_row(page, head, row, std::numeric_limits<float>::quiet_NaN());
          const ForwardResults poisoned = testing::run_forward(p);
          for (int32_t d = 0; d < p.Dv; ++d) c.v.set(page, head, row, d, kept[static_cast<size_t>(d)]);
          for (int32_t h = 0; h < p.Hq; ++h)
            for (int32_t d = 0; d < p.Dv; ++d) {
              const float x = poisoned.o.get(0, h, 0, d);
              if (h / group == head) {
                ASSERT_NE(x, x) << "head " << h;
              } else {
                ASSERT_EQ(x, clean.o.get(0, h, 0, d)) << "head " << h;
              }
            }
        });
        if (HasFailure()) return;
      }
}

}  // namespace
}  // namespace mfa
