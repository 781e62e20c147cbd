// Packed, paged, block-sparse and neighbourhood calls give the bits of the dense call that they stand for, and top-k
// floors what the scores say.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
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
using testing::Random;

const DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

class CpuFamily : public ::testing::Test {
 protected:
  ~CpuFamily() override { set_thread_count(0); }
};

TensorRef offset(const TensorRef& x, DType dtype, int64_t elements) {
  TensorRef result = x;
  result.data = static_cast<const uint8_t*>(x.data) + elements * static_cast<int64_t>(size_of(dtype));
  return result;
}

// Compares rows of (b, h) of `part`, a dense call with one sequence, with those of the whole.
void expect_rows(const AttentionProblem& p, const ForwardResults& whole, int32_t b, const ForwardResults& part) {
  const std::vector<float> o = whole.o.values();
  for (int32_t h = 0; h < p.Hq; ++h)
    for (int32_t i = 0; i < query_count(p, b); ++i) {
      const int64_t r = row_index(p, b, h, i), s = int64_t{h} * query_count(p, b) + i;
      ASSERT_EQ(whole.lse[r], part.lse[s]) << "sequence " << b << ", head " << h << ", row " << i;
      for (int32_t d = 0; d < p.Dv; ++d)
        ASSERT_EQ(o[r * p.Dv + d], part.o.get(0, h, i, d)) << "sequence " << b << ", head " << h << ", row " << i;
    }
}

CaseSpec packed_spec(Random& random, DType dtype) {
  CaseSpec spec;
  spec.dtype = dtype;
  spec.B = 5;
  spec.Hkv = 2;
  spec.Hq = random.pick({2, 4, 8});
  spec.Nq = random.pick({3, 60, 400});
  spec.Nk = random.pick({70, 600});
  spec.D = random.pick({40, 64});
  spec.Dv = random.pick({64, 72});
  spec.causal = random.chance(0.6);
  if (random.chance(0.3)) spec.window_left = 50;
  spec.alibi = random.chance(0.3);
  spec.sinks = random.chance(0.3);
  spec.kv_lengths = random.chance(0.5);
  spec.packed_queries = spec.packed_keys = true;
  return spec;
}

TEST_F(CpuFamily, APackedSequenceHasTheBitsOfItsOwnCall) {
  Random random(61);
  for (int n = 0; n < testing::case_count(12); ++n) {
    const CaseSpec spec = packed_spec(random, kTypes[n % 3]);
    const AttentionCase c(spec, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      const AttentionProblem& p = c.problem;
      for (int threads : {1, 2, 7}) {
        set_thread_count(threads);
        const ForwardResults whole = testing::run_forward(p);
        for (int32_t b = 0; b < p.B; ++b) {
          AttentionProblem alone = p;
          alone.B = 1;
          alone.query_starts = alone.key_starts = nullptr;
          alone.Nq = query_count(p, b);
          alone.Nk = p.key_starts[b + 1] - p.key_starts[b];
          alone.q = offset(p.q, p.dtype, query_element(p, p.q.stride, b, 0, 0));
          alone.k = offset(p.k, p.dtype, key_element(p, p.k.stride, b, 0, 0));
          alone.v = offset(p.v, p.dtype, key_element(p, p.v.stride, b, 0, 0));
          if (p.kv_lengths) alone.kv_lengths += b;
          expect_rows(p, whole, b, testing::run_forward(alone));
        }
      }
    });
  }
}

// Two problems that differ in how they say what is visible: `p` by lists or a neighbourhood, the other by a mask.
void expect_bits_of_mask(const AttentionCase& c) {
  const AttentionProblem& p = c.problem;
  std::vector<uint8_t> mask(int64_t{p.B} * p.Hq * p.Nq * p.Nk);
  for (int32_t b = 0, n = 0; b < p.B; ++b)
    for (int32_t h = 0; h < p.Hq; ++h)
      for (int32_t i = 0; i < p.Nq; ++i)
        for (int32_t j = 0; j < p.Nk; ++j, ++n) mask[n] = testing::is_visible(p, b, h, i, j);
  AttentionProblem masked = p;
  masked.blocks = BlockListRef{};
  masked.neighbourhood = Neighbourhood{};
  masked.causal = false;
  masked.window_left = masked.window_right = -1;
  const int64_t Nq = p.Nq, Nk = p.Nk;
  masked.mask = {mask.data(), {p.Hq * Nq * Nk, Nq * Nk, Nk, 1}};
  for (int threads : {1, 3}) {
    set_thread_count(threads);
    ASSERT_EQ(testing::bytes_of(testing::run_forward(p)), testing::bytes_of(testing::run_forward(masked)));
  }
  const bool wants_probs = true;
  const ForwardResults sparse = testing::run_forward(p, wants_probs), other = testing::run_forward(masked, wants_probs);
  ASSERT_EQ(testing::bytes_of(sparse), testing::bytes_of(other));
}

// Intervals leave out, at their ends, what single vectors of rows do not see; a mask leaves out nothing.
TEST_F(CpuFamily, IntervalsHaveTheBitsOfTheMask) {
  Random random(65);
  for (int n = 0; n < testing::case_count(40); ++n) {
    CaseSpec spec;
    spec.dtype = kTypes[n % 3];
    spec.Hkv = 2;
    spec.Hq = random.pick({2, 6});
    spec.Nq = random.pick({60, 130, 401});
    spec.Nk = random.pick({59, 130, 403, 700});
    spec.D = random.pick({40, 64});
    spec.Dv = random.pick({64, 72, 77});
    spec.causal = random.chance(0.6);
    spec.window_left = random.pick({-1, 0, 5, 33, 100, 256});
    spec.window_right = random.pick({-1, -1, 0, 7, 100});
    spec.kv_lengths = random.chance(0.2);
    spec.alibi = random.chance(0.2);
    spec.softcap = random.pick({0.f, 0.f, 5.f});
    const AttentionCase c(spec, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      expect_bits_of_mask(c);
    });
    if (HasFailure()) return;
  }
}

TEST_F(CpuFamily, BlockListsHaveTheBitsOfTheMask) {
  Random random(63);
  for (int n = 0; n < testing::case_count(30); ++n) {
    CaseSpec spec;
    spec.dtype = kTypes[n % 3];
    spec.B = 2;
    spec.Hkv = 2;
    spec.Hq = random.pick({2, 4, 8});
    spec.Nq = random.pick({1, 5, 100, 300});
    spec.Nk = random.pick({70, 700});
    spec.D = spec.Dv = random.pick({40, 64});
    spec.causal = random.chance(0.4);
    spec.block_q = random.pick({16, 64, 100});
    spec.block_k = random.pick({16, 17, 64, 128});
    spec.blocks_by_batch = random.chance(0.5);
    spec.blocks_by_head = random.chance(0.5);
    spec.blocks_visible = random.pick({0.05, 0.2, 0.6});
    spec.alibi = random.chance(0.3);
    spec.dropout_p = random.pick({0.f, 0.3f});
    spec.bias.axes = random.pick({testing::kAbsent, 7});
    const AttentionCase c(spec, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      expect_bits_of_mask(c);
    });
    if (HasFailure()) return;
  }
}

TEST_F(CpuFamily, ANeighbourhoodHasTheBitsOfTheMask) {
  Random random(64);
  for (int n = 0; n < testing::case_count(40);) {
    CaseSpec spec;
    testing::add_family(random, spec);
    if (spec.neighbourhood.axes == 0) continue;
    CaseSpec grid;
    grid.dtype = kTypes[n++ % 3];
    grid.B = random.pick({1, 2});
    grid.Hkv = 2;
    grid.Hq = random.pick({2, 6});
    grid.D = grid.Dv = random.pick({16, 40});
    grid.Nq = spec.Nq;
    grid.Nk = spec.Nk;
    grid.neighbourhood = spec.neighbourhood;
    grid.causal = random.chance(0.2);
    const AttentionCase c(grid, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(grid) + " isa " + isa);
      expect_bits_of_mask(c);
    });
    if (HasFailure()) return;
  }
}

// Floors against the scores that the kernel itself reports as probabilities, and a floored call against the mask that
// the floors stand for.
TEST_F(CpuFamily, FloorsLeaveTheLargestScores) {
  Random random(65);
  for (int n = 0; n < testing::case_count(18); ++n) {
    CaseSpec spec;
    spec.dtype = kTypes[n % 3];
    spec.B = 2;
    spec.Hkv = 1;
    spec.Hq = random.pick({1, 3});
    spec.Nq = random.pick({1, 4, 70});
    spec.Nk = random.pick({5, 300, 3000});
    spec.D = spec.Dv = 24;
    spec.causal = random.chance(0.5);
    spec.kv_lengths = random.chance(0.3);
    spec.alibi = random.chance(0.3);
    spec.softcap = random.pick({0.f, 5.f});
    spec.mask.axes = random.pick({testing::kAbsent, 3});
    if (random.chance(0.3)) {
      spec.block_q = spec.block_k = 32;
      spec.blocks_by_head = random.chance(0.5);
    }
    const AttentionCase c(spec, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      AttentionProblem p = c.problem;
      const std::vector<float> open(row_count(p), -std::numeric_limits<float>::infinity());
      p.score_floor = open.data();  // so that the products are those of floors
      const ForwardResults all = testing::run_forward(p, true);
      for (int32_t keep : {1, 7, 100, 5000}) {
        const std::vector<int32_t> kept(p.B, keep);
        std::vector<float> floors(row_count(p), std::nanf(""));
        cpu::score_floors(c.problem, kept.data(), floors.data());
        std::vector<uint8_t> mask(row_count(p) * p.Nk);
        for (int32_t b = 0; b < p.B; ++b)
          for (int32_t h = 0; h < p.Hq; ++h)
            for (int32_t i = 0; i < p.Nq; ++i) {
              const int64_t r = row_index(p, b, h, i);
              // Probabilities ascend with the scores: the keep-th largest separates kept from hidden.
              std::vector<float> probs(all.probs.begin() + r * p.Nk, all.probs.begin() + (r + 1) * p.Nk), sorted;
              int64_t visible = 0;
              for (int32_t j = 0; j < p.Nk; ++j) visible += testing::is_visible(p, b, h, i, j);
              const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(keep, key_count(p, b)));
              ASSERT_EQ(floors[r] == -std::numeric_limits<float>::infinity(), visible < wanted) << "row " << r;
              sorted = probs;
              std::sort(sorted.begin(), sorted.end(), std::greater<>());
              const float least = visible < wanted ? 0.f : sorted[wanted - 1];
              for (int32_t j = 0; j < p.Nk; ++j)
                mask[r * p.Nk + j] = testing::is_visible(p, b, h, i, j) && probs[j] >= least;
              if (visible >= wanted) {
                // The floor is that score: exp2(floor - lse) is the probability.
                const double prob = std::exp2(floors[r] - double{all.lse[r]} * 1.4426950408889634);
                ASSERT_NEAR(prob, least, 2e-5 * prob + 1e-7) << "row " << r;
              }
            }
        AttentionProblem floored = c.problem, masked = p;
        floored.score_floor = floors.data();
        const int64_t Nk = p.Nk, Nq = p.Nq;
        masked.mask = {mask.data(), {p.Hq * Nq * Nk, Nq * Nk, Nk, 1}};
        masked.blocks = BlockListRef{};
        const ForwardResults top = testing::run_forward(floored), other = testing::run_forward(masked);
        ASSERT_EQ(testing::bytes_of(top), testing::bytes_of(other)) << "keep " << keep;
        // Both hide the same keys, so the gradients see the same scores; lists cut the rows into other tiles.
        if (spec.block_q) continue;
        const BackwardResults grad = testing::run_backward(floored, top, c.d_o.ref(), nullptr);
        const BackwardResults other_grad = testing::run_backward(masked, other, c.d_o.ref(), nullptr);
        ASSERT_EQ(grad.dv.values(), other_grad.dv.values()) << "keep " << keep;
        ASSERT_EQ(grad.dk.values(), other_grad.dk.values()) << "keep " << keep;
      }
    });
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace mfa
