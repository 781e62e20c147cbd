// The same call gives the same bits: in repeats, on any number of threads, and, forward, for a row in any company.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/thread_pool.h"
#include "support/kernels.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::BackwardResults;
using testing::CaseSpec;
using testing::ForwardResults;
using testing::Random;

class CpuDeterminism : public ::testing::Test {
 protected:
  ~CpuDeterminism() override { set_thread_count(0); }
};

// The element of `x` at [b, h, n, 0].
TensorRef at(const TensorRef& x, DType dtype, int64_t b, int64_t h, int64_t n) {
  const int64_t offset = b * x.stride[0] + h * x.stride[1] + n * x.stride[2];
  return {static_cast<const uint8_t*>(x.data) + offset * static_cast<int64_t>(size_of(dtype)),
          {x.stride[0], x.stride[1], x.stride[2]}};
}

// A forward's rows as bytes: of the output, then of its lse.
class Rows {
 public:
  explicit Rows(const ForwardResults& results)
      : Hq_(results.o.shape()[1]),
        Nq_(results.o.shape()[2]),
        size_(results.o.shape()[3] * static_cast<int64_t>(size_of(results.o.dtype()))),
        o_(results.o.bytes()),
        lse_(results.lse) {}

  std::vector<uint8_t> row(int64_t b, int64_t h, int64_t i) const {
    const int64_t r = (b * Hq_ + h) * Nq_ + i;
    std::vector<uint8_t> bytes(o_.begin() + r * size_, o_.begin() + (r + 1) * size_);
    const auto* lse = reinterpret_cast<const uint8_t*>(&lse_[r]);
    bytes.insert(bytes.end(), lse, lse + sizeof(float));
    return bytes;
  }

 private:
  int64_t Hq_, Nq_, size_;
  std::vector<uint8_t> o_;
  std::vector<float> lse_;
};

// Large enough for several tasks, key blocks and splits, and for every modifier.
std::vector<CaseSpec> specs() {
  std::vector<CaseSpec> result;
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    CaseSpec prefill;
    prefill.dtype = dtype;
    prefill.B = 2;
    prefill.Hkv = 2;
    prefill.Hq = 4;
    prefill.D = prefill.Dv = 64;
    prefill.Nq = 300;
    prefill.Nk = 700;
    prefill.causal = true;
    prefill.dlse = true;
    result.push_back(prefill);

    CaseSpec all = prefill;
    all.Nq = 130;
    all.Nk = 530;
    all.D = 72;
    all.softcap = 5;
    all.alibi = all.sinks = all.kv_lengths = true;
    all.window_left = 300;
    all.bias.axes = 5;  // [1, Hq, 1, Nk]: its gradient sums over batch and queries
    all.mask.axes = 3;
    all.dropout_p = 0.2f;
    result.push_back(all);

    CaseSpec decode = prefill;
    decode.Nq = 1;
    decode.Nk = 5000;
    decode.Hq = 8;
    decode.kv_lengths = true;
    decode.bias.axes = 9;
    result.push_back(decode);
  }
  return result;
}

std::vector<uint8_t> all_bytes(const AttentionCase& c) {
  const ForwardResults forward = testing::run_forward(c.problem);
  std::vector<uint8_t> bytes = testing::bytes_of(forward);
  const BackwardResults backward = testing::run_backward(c.problem, forward, c.d_o.ref(), c.dlse_or_null());
  const std::vector<uint8_t> more = testing::bytes_of(backward);
  bytes.insert(bytes.end(), more.begin(), more.end());
  return bytes;
}

TEST_F(CpuDeterminism, RepeatsAndThreadCountsGiveTheSameBits) {
  Random random(31);
  for (const CaseSpec& spec : specs()) {
    const AttentionCase c(spec, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      set_thread_count(1);
      const std::vector<uint8_t> first = all_bytes(c);
      for (int threads : {1, 2, 3, 2, 8, 2}) {
        set_thread_count(threads);
        for (int repeat = 0; repeat < testing::case_count(6); ++repeat)
          ASSERT_EQ(all_bytes(c), first) << threads << " threads";
      }
    });
  }
}

// Each row of a forward in a batch against the same row computed with its sequence and its key head alone.
TEST_F(CpuDeterminism, ARowDoesNotDependOnTheBatch) {
  Random random(32);
  for (CaseSpec spec : specs()) {
    spec.dropout_p = 0.f;  // its mask is a function of the place in the batch
    const AttentionCase c(spec, random.bits());
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      const AttentionProblem& p = c.problem;
      const Rows whole(testing::run_forward(p));
      const int32_t group = p.Hq / p.Hkv;
      for (int32_t b = 0; b < p.B; ++b) {
        for (int32_t kv_head = 0; kv_head < p.Hkv; ++kv_head) {
          AttentionProblem alone = p;
          const int32_t h = kv_head * group;
          alone.B = alone.Hkv = 1;
          alone.Hq = group;
          alone.q = at(p.q, p.dtype, b, h, 0);
          alone.k = at(p.k, p.dtype, b, kv_head, 0);
          alone.v = at(p.v, p.dtype, b, kv_head, 0);
          if (p.alibi_slopes) alone.alibi_slopes += h;
          if (p.sinks) alone.sinks += h;
          if (p.kv_lengths) alone.kv_lengths += b;
          if (p.bias.data)
            alone.bias.data =
                static_cast<const uint8_t*>(p.bias.data) +
                (b * p.bias.stride[0] + h * p.bias.stride[1]) * static_cast<int64_t>(size_of(p.bias.dtype));
          if (p.mask.data) alone.mask.data += b * p.mask.stride[0] + h * p.mask.stride[1];
          const Rows part(testing::run_forward(alone));
          for (int32_t g = 0; g < group; ++g)
            for (int32_t i = 0; i < p.Nq; i += 7)
              ASSERT_EQ(part.row(0, g, i), whole.row(b, h + g, i)) << b << " " << h + g << " " << i;
        }
      }
    });
  }
}

// The first queries by themselves, a tile of few rows, against the same rows of a wide tile that sees the same keys.
TEST_F(CpuDeterminism, ARowDoesNotDependOnTheWidthOfItsTile) {
  Random random(36);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t Dv : {8, 64, 72, 77, 128}) {
      for (int variant = 0; variant < 4; ++variant) {
        CaseSpec spec;
        spec.dtype = dtype;
        spec.D = 64;
        spec.Dv = Dv;
        spec.Nq = 150;
        spec.Nk = random.pick({5, 16, 77, 128, 300});
        if (variant == 1) spec.kv_lengths = spec.sinks = true;
        if (variant == 2) spec.mask.axes = 3;
        if (variant == 3) spec.window_right = 3;
        const AttentionCase c(spec, random.bits());
        testing::for_each_isa([&](const std::string& isa) {
          SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
          const Rows whole(testing::run_forward(c.problem));
          for (int32_t queries : {9, 13, 16, 24, 41, 48}) {
            AttentionProblem few = c.problem;
            few.Nq = queries;
            if (variant == 3 && few.Nk > few.Nq) continue;  // its window would be another
            const Rows part(testing::run_forward(few));
            for (int32_t i = 0; i < queries; ++i)
              ASSERT_EQ(part.row(0, 0, i), whole.row(0, 0, i)) << queries << " " << i;
          }
        });
      }
    }
  }
}

// A causal prefill at once, in chunks that append to a cache, and row by row as decode does.
TEST_F(CpuDeterminism, ChunksAndDecodeStepsGiveTheBitsOfOnePrefill) {
  Random random(33);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t D : {40, 64, 128, 77}) {
      for (int variant = 0; variant < 3; ++variant) {
        CaseSpec spec;
        spec.dtype = dtype;
        spec.Hkv = 2;
        spec.Hq = random.pick({2, 8});
        spec.Nq = spec.Nk = 600;
        spec.D = D;
        spec.Dv = random.pick({D, 64});
        spec.causal = true;
        spec.poison = false;
        if (variant == 1) spec.window_left = 270;
        if (variant == 2) {
          spec.softcap = 5.f;
          spec.alibi = spec.sinks = true;
        }
        const AttentionCase c(spec, random.bits());
        testing::for_each_isa([&](const std::string& isa) {
          SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
          const AttentionProblem& p = c.problem;
          const Rows whole(testing::run_forward(p));
          const auto check_chunk = [&](int32_t begin, int32_t end, bool cache_is_longer) {
            AttentionProblem chunk = p;
            chunk.Nq = end - begin;
            chunk.q = at(p.q, p.dtype, 0, 0, begin);
            // Either the keys end with the chunk, or the cache has room for more and a length says where they end.
            const int32_t length = end;
            if (cache_is_longer)
              chunk.kv_lengths = &length;
            else
              chunk.Nk = end;
            const Rows part(testing::run_forward(chunk));
            for (int32_t h = 0; h < p.Hq; ++h)
              for (int32_t i = begin; i < end; ++i)
                ASSERT_EQ(part.row(0, h, i - begin), whole.row(0, h, i))
                    << "head " << h << ", row " << i << " in chunk " << begin << " to " << end;
          };
          for (int32_t begin = 0; begin < 600;) {
            const int32_t end = std::min(600, begin + random.pick({1, 3, 17, 64, 130, 200}));
            check_chunk(begin, end, random.chance(0.5));
            begin = end;
          }
          for (int32_t row : {0, 1, 63, 64, 255, 256, 257, 300, 511, 512, 599}) {
            check_chunk(row, row + 1, false);
            check_chunk(row, row + 1, true);
          }
        });
      }
    }
  }
}

// What else is computed must not matter: probabilities, lse, or single gradients.
TEST_F(CpuDeterminism, TheSetOfWantedResultsDoesNotChangeTheirBits) {
  Random random(34);
  for (const CaseSpec& spec : specs()) {
    const AttentionCase c(spec, random.bits());
    const AttentionProblem& p = c.problem;
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
      const ForwardResults forward = testing::run_forward(p);
      const ForwardResults with_probs = testing::run_forward(p, true);
      EXPECT_EQ(with_probs.o.bytes(), forward.o.bytes());
      EXPECT_EQ(with_probs.lse, forward.lse);
      testing::Tensor o(p.dtype, forward.o.shape(), testing::Layout::dense);
      cpu::attention_forward(p, {o.mutable_ref(), nullptr, nullptr});
      EXPECT_EQ(o.bytes(), forward.o.bytes());

      const BackwardResults all = testing::run_backward(p, forward, c.d_o.ref(), c.dlse_or_null());
      const AttentionGradientInputs in{forward.o.ref(), c.d_o.ref(), forward.lse.data(), c.dlse_or_null()};
      for (int wanted = 0; wanted < 6; ++wanted) {
        BackwardResults one = all;
        AttentionGradients out;
        if (wanted == 0) out.dq = one.dq.mutable_ref();
        if (wanted == 1) out.dk = one.dk.mutable_ref();
        if (wanted == 2) out.dv = one.dv.mutable_ref();
        if (wanted == 3 && p.bias.data) out.dbias = one.dbias.data();
        if (wanted == 4 && p.sinks) out.dsinks = one.dsinks.data();
        if (wanted == 5 && p.alibi_slopes) out.dalibi_slopes = one.dalibi_slopes.data();
        cpu::attention_backward(p, in, out);
        EXPECT_EQ(testing::bytes_of(one), testing::bytes_of(all)) << "gradient " << wanted;
      }
    });
  }
}

// Dropout with probability 0 is no dropout, and neutral options leave the bits alone.
TEST_F(CpuDeterminism, NeutralOptionsLeaveTheBitsAlone) {
  Random random(35);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (int32_t Nq : {1, 200}) {
      CaseSpec spec;
      spec.dtype = dtype;
      spec.Hq = 2;
      spec.Hkv = 1;
      spec.D = spec.Dv = 64;
      spec.Nq = Nq;
      spec.Nk = 600;
      const AttentionCase c(spec, random.bits());
      testing::for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
        const std::vector<uint8_t> plain = testing::bytes_of(testing::run_forward(c.problem));
        AttentionProblem p = c.problem;
        p.dropout_seed ^= 5;
        p.window_left = p.window_right = 1 << 30;
        const int32_t length = 600;
        p.kv_lengths = &length;
        EXPECT_EQ(testing::bytes_of(testing::run_forward(p)), plain);
        const uint8_t visible = 1;
        p.mask.data = &visible;
        EXPECT_EQ(testing::bytes_of(testing::run_forward(p)), plain);
      });
    }
  }
}

}  // namespace
}  // namespace mfa
