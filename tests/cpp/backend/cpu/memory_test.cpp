// Memory stays linear in the lengths, and offsets are 64-bit.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "support/kernels.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::CaseSpec;
using testing::Random;

int64_t peak_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  return usage.ru_maxrss;
#else
  return usage.ru_maxrss * int64_t{1024};
#endif
}

// 65536 x 65536 scores would be 16 GiB; the window only saves time, not memory, as every row tile and key block is met.
TEST(CpuMemory, ScratchIsLinearInTheLengths) {
  constexpr int32_t N = 65536;
  CaseSpec spec;
  spec.D = spec.Dv = 8;
  spec.Nq = spec.Nk = N;
  spec.causal = true;
  spec.window_left = testing::case_count(1000) > 500 ? 1500 : 100;
  spec.alibi = spec.dlse = true;
  spec.poison = false;
  spec.bias.axes = 1;
  spec.mask.axes = 1;
  AttentionCase c(spec, 51);
  testing::ForwardResults forward = testing::run_forward(c.problem);  // its own outputs are not scratch
  testing::BackwardResults backward;
  const int64_t before = peak_bytes();
  forward = testing::run_forward(c.problem);
  backward = testing::run_backward(c.problem, forward, c.d_o.ref(), c.dlse_or_null());
  const int64_t grown = peak_bytes() - before;
  // The gradients are 6 MiB; dq has up to 8 partial sums; each thread has tiles of its own.
  EXPECT_LT(grown, int64_t{128} << 20);
  for (float x : backward.dq.values()) ASSERT_TRUE(std::isfinite(x));
}

TEST(CpuMemory, DecodeScratchIsLinearInTheKeys) {
  CaseSpec spec;
  spec.dtype = DType::bf16;
  spec.D = spec.Dv = 8;
  spec.Hq = 8;
  spec.Nq = 1;
  spec.Nk = 1 << 20;
  const AttentionCase c(spec, 52);
  const int64_t before = peak_bytes();
  const testing::ForwardResults forward = testing::run_forward(c.problem);
  EXPECT_LT(peak_bytes() - before, int64_t{32} << 20);
  for (float x : forward.o.values()) ASSERT_TRUE(std::isfinite(x));
}

// Address space without memory behind it, of which a few pages are touched.
class SparseRegion {
 public:
  explicit SparseRegion(int64_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~SparseRegion() {
    if (is_mapped()) munmap(data_, bytes_);
  }
  bool is_mapped() const { return data_ != MAP_FAILED; }
  void* data() const { return data_; }

 private:
  void* data_;
  int64_t bytes_;
};

constexpr int64_t kFar = (int64_t{1} << 31) + 4096;  // elements

// A copy of `x` [B, H, N, D] whose axis `axis` has stride kFar, or -kFar; owns its address space.
struct FarTensor {
  FarTensor(const testing::Tensor& x, int axis, bool backwards)
      : shape(x.shape()), region((shape[axis] * kFar + 65536) * static_cast<int64_t>(size_of(x.dtype()))) {
    if (!region.is_mapped()) return;
    const int64_t size = static_cast<int64_t>(size_of(x.dtype()));
    int64_t dense = shape[3];
    for (int a = 2; a >= 0; --a) {
      stride[a] = a == axis ? (backwards ? -kFar : kFar) : dense;
      if (a != axis) dense *= shape[a];
    }
    origin = static_cast<uint8_t*>(region.data()) + (backwards ? (shape[axis] - 1) * kFar * size : 0);
    for (int64_t b = 0; b < shape[0]; ++b)
      for (int64_t h = 0; h < shape[1]; ++h)
        for (int64_t n = 0; n < shape[2]; ++n)
          for (int64_t d = 0; d < shape[3]; ++d)
            store_from_float(origin + (b * stride[0] + h * stride[1] + n * stride[2]) * size, x.dtype(), d,
                             x.get(b, h, n, d));
  }
  TensorRef ref() const { return {origin, {stride[0], stride[1], stride[2]}}; }
  MutableTensorRef mutable_ref() { return {origin, {stride[0], stride[1], stride[2]}}; }
  std::vector<float> values(DType dtype) const {
    std::vector<float> result;
    for (int64_t b = 0; b < shape[0]; ++b)
      for (int64_t h = 0; h < shape[1]; ++h)
        for (int64_t n = 0; n < shape[2]; ++n)
          for (int64_t d = 0; d < shape[3]; ++d)
            result.push_back(load_as_float(
                origin + (b * stride[0] + h * stride[1] + n * stride[2]) * static_cast<int64_t>(size_of(dtype)), dtype,
                d));
    return result;
  }

  std::array<int64_t, 4> shape;
  SparseRegion region;
  int64_t stride[3] = {};
  uint8_t* origin = nullptr;
};

class CpuOffsets : public ::testing::TestWithParam<int> {};

TEST_P(CpuOffsets, StridesPast2To31ElementsAreFollowed) {
  const int axis = GetParam();
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (int32_t Nq : {1, 3}) {
      CaseSpec spec;
      spec.dtype = dtype;
      spec.B = 2;
      spec.Hq = 4;
      spec.Hkv = 2;
      spec.Nq = Nq;
      spec.Nk = 3;
      spec.D = spec.Dv = 64;
      spec.sinks = spec.causal = true;
      const AttentionCase c(spec, 53);
      for (bool backwards : {false, true}) {
        AttentionProblem far = c.problem;
        const FarTensor q(c.q, axis, backwards), k(c.k, axis, backwards), v(c.v, axis, backwards);
        const FarTensor d_o(c.d_o, axis, backwards);
        FarTensor o(c.d_o, axis, backwards);
        FarTensor dq(c.q, axis, backwards), dk(c.k, axis, backwards), dv(c.v, axis, backwards);
        for (const FarTensor* x : std::initializer_list<const FarTensor*>{&q, &k, &v, &d_o, &o, &dq, &dk, &dv})
          if (!x->region.is_mapped()) GTEST_SKIP() << "no address space of this size here";
        far.q = q.ref();
        far.k = k.ref();
        far.v = v.ref();
        testing::for_each_isa([&](const std::string& isa) {
          SCOPED_TRACE(testing::describe(spec) + " isa " + isa);
          const testing::ForwardResults near = testing::run_forward(c.problem);
          const testing::BackwardResults near_grad = testing::run_backward(c.problem, near, c.d_o.ref(), nullptr);
          std::vector<float> lse(near.lse.size());
          cpu::attention_forward(far, {o.mutable_ref(), lse.data(), nullptr});
          EXPECT_EQ(o.values(dtype), near.o.values());
          EXPECT_EQ(lse, near.lse);
          AttentionGradients out;
          out.dq = dq.mutable_ref();
          out.dk = dk.mutable_ref();
          out.dv = dv.mutable_ref();
          cpu::attention_backward(far, {o.ref(), d_o.ref(), lse.data(), nullptr}, out);
          EXPECT_EQ(dq.values(dtype), near_grad.dq.values());
          EXPECT_EQ(dk.values(dtype), near_grad.dk.values());
          EXPECT_EQ(dv.values(dtype), near_grad.dv.values());
        });
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Axes, CpuOffsets, ::testing::Values(0, 1, 2),
                         [](const auto& info) { return std::string(1, "BHN"[info.param]); });

// A bias and a mask whose rows are far apart.
TEST(CpuOffsetsOfTerms, BiasAndMaskStridesPast2To31AreFollowed) {
  const SparseRegion bias_region(4 * kFar * 4), mask_region(4 * kFar);
  if (!bias_region.is_mapped() || !mask_region.is_mapped()) GTEST_SKIP() << "no address space of this size here";
  for (int32_t Nk : {5, 40}) {
    CaseSpec spec;
    spec.Nq = 3;
    spec.Nk = Nk;
    spec.D = spec.Dv = 16;
    spec.bias.axes = spec.mask.axes = 3;
    spec.poison = false;
    const AttentionCase c(spec, 54);
    AttentionProblem far = c.problem;
    auto* bias = static_cast<float*>(bias_region.data());
    auto* mask = static_cast<uint8_t*>(mask_region.data());
    for (int64_t i = 0; i < spec.Nq; ++i)
      for (int64_t j = 0; j < Nk; ++j) {
        bias[i * kFar + j] = load_as_float(c.problem.bias.data, DType::f32, i * Nk + j);
        mask[i * kFar + j] = c.problem.mask.data[i * Nk + j];
      }
    far.bias.data = bias;
    far.mask.data = mask;
    far.bias.stride[2] = far.mask.stride[2] = kFar;
    testing::for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(isa);
      const testing::ForwardResults near = testing::run_forward(c.problem), other = testing::run_forward(far);
      EXPECT_EQ(testing::bytes_of(other), testing::bytes_of(near));
      EXPECT_EQ(testing::bytes_of(testing::run_backward(far, other, c.d_o.ref(), nullptr)),
                testing::bytes_of(testing::run_backward(c.problem, near, c.d_o.ref(), nullptr)));
    });
  }
}

}  // namespace
}  // namespace mfa
