// simd-inl.h: vector helpers of one instruction set: loads and stores of the three element types, transposes, exp2,
// tanh. Included once by each kernels_<isa>.cc, inside which everything has internal linkage or the unit's namespace.
#define HWY_COMPILE_ONLY_STATIC
#include <hwy/highway.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/dtype.h"

#if defined(__clang__)
#define MFA_UNROLL _Pragma("clang loop unroll(full)")
#define MFA_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#define MFA_NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define MFA_UNROLL _Pragma("GCC unroll 32")
#define MFA_UNROLL_4 _Pragma("GCC unroll 4")
#define MFA_NO_UNROLL _Pragma("GCC unroll 1")
#endif
// A lambda that is called from unrolled code must not become a function of its own: its captures would leave registers.
#define MFA_INLINE_LAMBDA __attribute__((always_inline))

namespace mfa::cpu::MFA_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using DI = hn::ScalableTag<int32_t>;
using DU = hn::ScalableTag<uint32_t>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using MF = hn::Mask<DF>;
constexpr DF df;
constexpr DI di;
constexpr DU du;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// Register tiles: kTileRows broadcast rows by kTileVectors vectors leave room for the operands. Head dims and key
// blocks are mostly multiples of kTileRows: the remainders would run at a fraction of the speed.
#if HWY_TARGET == HWY_AVX2
constexpr int kTileRows = 4, kTileVectors = 3;        // 16 registers
constexpr int kChannelRows = 6, kChannelVectors = 2;  // where lanes are channels: head dims are even numbers of vectors
#else
constexpr int kTileRows = 8, kTileVectors = 3;  // 32 registers
constexpr int kChannelRows = 6, kChannelVectors = 4;
#endif

// Rows of a tile of `vectors` vectors: as many multiply-adds in flight whatever its width.
template <int vectors>
constexpr int kTallRows = vectors == kTileVectors ? kTileRows : kTileRows * (kTileVectors / vectors);

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896340736f;

// Conversions in double, since an error of the log-sum-exp is a relative error of every probability recomputed from it.
HWY_INLINE float NaturalLse(float lse2) { return static_cast<float>(lse2 * 0.693147180559945309417); }
HWY_INLINE float Base2Lse(float lse) { return static_cast<float>(lse * 1.44269504088896340736); }

// std::min and std::max would leave weak symbols compiled for this instruction set in the program.
template <class T>
HWY_INLINE constexpr T Min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
HWY_INLINE constexpr T Max(T a, T b) {
  return a < b ? b : a;
}
// Calls f with a null pointer of the element type.
template <class F>
HWY_INLINE auto WithType(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f16:
      return f(static_cast<float16*>(nullptr));
    case DType::bf16:
      return f(static_cast<bfloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}
HWY_INLINE constexpr int RoundUp(int x, int to) { return (x + to - 1) / to * to; }

// ---- loads and stores
// -------------------------------------------------------------------------------------------
template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const float* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const bfloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)));
  return hn::BitCast(d, hn::ShiftLeft<16>(bits));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const float16* p) {
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
}
template <class T>
HWY_INLINE VF LoadFloat(const T* p) {
  return LoadFloat(df, p);
}

HWY_INLINE void StoreFloat(VF x, float* p) { hn::StoreU(x, df, p); }
HWY_INLINE void StoreFloat(VF x, float16* p) {
  const hn::Rebind<hwy::float16_t, DF> d16;
  hn::StoreU(hn::DemoteTo(d16, x), d16, reinterpret_cast<hwy::float16_t*>(p));
}
HWY_INLINE void StoreFloat(VF x, bfloat16* p) {  // round to nearest even; NaN stays a quiet NaN
  const hn::Rebind<uint16_t, DF> d16;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd));
  const auto quiet = hn::ShiftRight<16>(hn::Or(bits, hn::Set(du, 0x400000u)));
  const auto chosen = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), quiet, rounded);
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, chosen)), d16, reinterpret_cast<uint16_t*>(p));
}

HWY_INLINE void StoreScalar(float x, float* p) { *p = x; }
HWY_INLINE void StoreScalar(float x, float16* p) { *p = to_float16(x); }
HWY_INLINE void StoreScalar(float x, bfloat16* p) { *p = to_bfloat16(x); }

// Widens `n` elements; `out` is aligned and padded to whole vectors, the padding is zeroed.
template <class T>
HWY_INLINE void WidenRow(const T* in, int n, float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::Store(LoadFloat(in + i), df, out + i);
  if (i < n) {
    hn::Store(hn::Zero(df), df, out + i);
    for (; i < n; ++i) out[i] = to_float(in[i]);
  }
}

// ---- transposes
// -------------------------------------------------------------------------------------------------
// Transposes the 4 x 4 matrices in the 128-bit blocks of four vectors.
template <class D>
HWY_INLINE void TransposeBlocks(D d, hn::Vec<D>* v) {
  const hn::Repartition<double, D> dd;
  const auto a = hn::BitCast(dd, hn::InterleaveLower(d, v[0], v[1]));
  const auto b = hn::BitCast(dd, hn::InterleaveUpper(d, v[0], v[1]));
  const auto c = hn::BitCast(dd, hn::InterleaveLower(d, v[2], v[3]));
  const auto e = hn::BitCast(dd, hn::InterleaveUpper(d, v[2], v[3]));
  v[0] = hn::BitCast(d, hn::InterleaveLower(dd, a, c));
  v[1] = hn::BitCast(d, hn::InterleaveUpper(dd, a, c));
  v[2] = hn::BitCast(d, hn::InterleaveLower(dd, b, e));
  v[3] = hn::BitCast(d, hn::InterleaveUpper(dd, b, e));
}

// Blocks 0 and 2, or 1 and 3, of `lower`, then those of `upper`.
template <bool kOdd, class D, class V = hn::Vec<D>>
HWY_INLINE V ConcatBlocks(D d, V upper, V lower) {
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  const hn::RebindToFloat<D> dfloat;
  const auto a = hn::BitCast(dfloat, lower), b = hn::BitCast(dfloat, upper);
  return hn::BitCast(d, decltype(a){_mm512_shuffle_f32x4(a.raw, b.raw, kOdd ? 0xdd : 0x88)});
#else
  static_cast<void>(d);
  if constexpr (kOdd) return hn::OddEvenBlocks(hn::SwapAdjacentBlocks(upper), hn::SwapAdjacentBlocks(lower));
  return hn::OddEvenBlocks(upper, lower);
#endif
}

// In: row i of a square matrix of 128-bit blocks in v[i * kPitch]. Out: column i.
template <int kPitch = 1, class D>
HWY_INLINE void TransposeSquare(D d, hn::Vec<D>* v) {
  constexpr int kBlocks = static_cast<int>(hn::MaxLanes(D())) / 4;
  static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4);
  if constexpr (kBlocks == 2) {
    const auto a = v[0], b = v[kPitch];
    v[0] = hn::ConcatLowerLower(d, b, a);
    v[kPitch] = hn::ConcatUpperUpper(d, b, a);
  } else if constexpr (kBlocks == 4) {
    const auto a = v[0], b = v[kPitch], c = v[2 * kPitch], e = v[3 * kPitch];
    const auto ab_lo = hn::ConcatLowerLower(d, b, a), ce_lo = hn::ConcatLowerLower(d, e, c);
    const auto ab_hi = hn::ConcatUpperUpper(d, b, a), ce_hi = hn::ConcatUpperUpper(d, e, c);
    v[0] = ConcatBlocks<false>(d, ce_lo, ab_lo);
    v[kPitch] = ConcatBlocks<true>(d, ce_lo, ab_lo);
    v[2 * kPitch] = ConcatBlocks<false>(d, ce_hi, ab_hi);
    v[3 * kPitch] = ConcatBlocks<true>(d, ce_hi, ab_hi);
  }
}

// In: row i of a square matrix of as many rows as `d` has lanes, in v[i]. Out: column i in v[i].
template <class D, int N = static_cast<int>(hn::MaxLanes(D()))>
HWY_INLINE void Transpose(D d, hn::Vec<D> (&v)[N]) {
  MFA_UNROLL
  for (int g = 0; g < N; g += 4) TransposeBlocks(d, v + g);
  MFA_UNROLL
  for (int j = 0; j < 4; ++j) TransposeSquare<4>(d, v + j);
}
HWY_INLINE void Transpose(VF (&v)[kLanes]) { Transpose(df, v); }

// out[c * ld + r] = rows[r][c] * factor for r < kLanes, c < n: the transpose of kLanes rows, widened.
template <class T>
HWY_INLINE void PackTransposed(const T* const* rows, int n, float factor, float* out, ptrdiff_t ld) {
  const VF f = hn::Set(df, factor);
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    VF v[kLanes];
    MFA_UNROLL
    for (int r = 0; r < kLanes; ++r) v[r] = LoadFloat(rows[r] + c);
    Transpose(v);
    MFA_UNROLL
    for (int r = 0; r < kLanes; ++r) hn::Store(hn::Mul(v[r], f), df, out + (c + r) * ld);
  }
  for (; c < n; ++c)
    for (int r = 0; r < kLanes; ++r) out[c * ld + r] = to_float(rows[r][c]) * factor;
}

// rows[r][c] = in[c * ld + r] * factor[r] for r < count <= kLanes, c < n. The added zero turns -0 into +0, so that a
// row's bits do not depend on blocks that contribute nothing to it.
template <class T>
HWY_INLINE void UnpackTransposed(const float* in, ptrdiff_t ld, int n, const float* factor, T* const* rows, int count) {
  const VF f = hn::LoadU(df, factor);
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    VF v[kLanes];
    MFA_UNROLL
    for (int r = 0; r < kLanes; ++r) v[r] = hn::MulAdd(hn::Load(df, in + (c + r) * ld), f, hn::Zero(df));
    Transpose(v);
    if (HWY_LIKELY(count == kLanes)) {
      MFA_UNROLL
      for (int r = 0; r < kLanes; ++r) StoreFloat(v[r], rows[r] + c);
    } else {  // a static trip count keeps v in registers
      MFA_UNROLL
      for (int r = 0; r < kLanes; ++r)
        if (r < count) StoreFloat(v[r], rows[r] + c);
    }
  }
  for (; c < n; ++c)
    for (int r = 0; r < count; ++r) StoreScalar(in[c * ld + r] * factor[r] + 0.f, rows[r] + c);
}

// ---- functions
// --------------------------------------------------------------------------------------------------
// 2^x of each vector by a minimax polynomial on [-1/2, 1/2], exact at 0: relative error 1e-7, or 3e-6 with `kHalf`,
// which is enough for results in 16 bits. x < inf; results below 2^-126 and x = -inf give 0; NaN stays NaN (the order
// of the operands of Max matters for that on x86). Several vectors go step by step: one alone is a chain of dependent
// operations, longer than the processor looks ahead to the next.
template <bool kHalf = false, int N>
HWY_INLINE void Exp2All(VF (&x)[N]) {
  static constexpr float kTerms[] = {0.001326472731307149f, 0.009671512991189957f, 0.05550733581185341f,
                                     0.24022242426872253f,  0.6931470036506653f,   1.f};
  static constexpr float kHalfTerms[] = {0.009582852944731712f, 0.055906426161527634f, 0.24024099111557007f,
                                         0.6931241750717163f, 1.f};
  constexpr const float* kTerm = kHalf ? kHalfTerms : kTerms;
  constexpr int kDegree = kHalf ? 4 : 5;
  VF f[N], p[N];
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  VF whole[N];
  MFA_UNROLL
  for (int i = 0; i < N; ++i)
    whole[i] = VF{_mm512_roundscale_ps(x[i].raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  MFA_UNROLL
  for (int i = 0; i < N; ++i) f[i] = hn::Sub(x[i], whole[i]);  // NaN of -inf, whose result is masked
#else
  const VF magic = hn::Set(df, 12582912.f + 127.f);  // 1.5 * 2^23 rounds to an integer; 127 is the exponent's bias
  VF shifted[N];
  MFA_UNROLL
  for (int i = 0; i < N; ++i) x[i] = hn::Max(hn::Set(df, -127.f), x[i]);
  MFA_UNROLL
  for (int i = 0; i < N; ++i) shifted[i] = hn::Add(x[i], magic);
  MFA_UNROLL
  for (int i = 0; i < N; ++i) f[i] = hn::Sub(x[i], hn::Sub(shifted[i], magic));
#endif
  MFA_UNROLL
  for (int i = 0; i < N; ++i) p[i] = hn::Set(df, kTerm[0]);
  MFA_UNROLL
  for (int j = 1; j <= kDegree; ++j) {
    MFA_UNROLL
    for (int i = 0; i < N; ++i) p[i] = hn::MulAdd(p[i], f[i], hn::Set(df, kTerm[j]));
  }
  MFA_UNROLL
  for (int i = 0; i < N; ++i) {
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
    const __mmask16 normal = _mm512_cmp_ps_mask(x[i].raw, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    x[i] = VF{_mm512_maskz_scalef_ps(normal, p[i].raw, whole[i].raw)};
#else
    // 127 + n sits in the low bits of `shifted`: in the exponent field it makes 2^n, and 0 for n = -127.
    x[i] = hn::Mul(p[i], hn::BitCast(df, hn::ShiftLeft<23>(hn::BitCast(di, shifted[i]))));
#endif
  }
}
template <bool kHalf = false>
HWY_INLINE VF Exp2(VF x) {
  VF one[1] = {x};
  Exp2All<kHalf>(one);
  return one[0];
}

// tanh to 1.2e-7 relative: an odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
HWY_INLINE VF Tanh(VF x) {
  const VF a = hn::Abs(x), x2 = hn::Mul(x, x);
  VF p = hn::Set(df, -0.005704985931515694f);
  p = hn::MulAdd(p, x2, hn::Set(df, 0.02063908614218235f));
  p = hn::MulAdd(p, x2, hn::Set(df, -0.05373971536755562f));
  p = hn::MulAdd(p, x2, hn::Set(df, 0.13331441581249237f));
  p = hn::MulAdd(p, x2, hn::Set(df, -0.3333328068256378f));
  const VF near = hn::MulAdd(hn::Mul(p, x2), x, x);
  const VF e = Exp2(hn::Mul(a, hn::Set(df, -2.f * kLog2e)));  // in (0, 1]: no overflow for large |x|
  const VF far = hn::Div(hn::Sub(hn::Set(df, 1.f), e), hn::Add(hn::Set(df, 1.f), e));
  return hn::IfThenElse(hn::Lt(a, hn::Set(df, 0.625f)), near, hn::CopySign(far, x));
}

// True if any of the rows [0, n) x [0, width) holds a NaN or an infinity.
template <class T>
HWY_INLINE bool AnyNonFinite(const T* data, ptrdiff_t stride, int n, int width) {
  constexpr int kChains = 4;  // one chain of additions would wait for each of them
  VF sum[kChains];
  for (VF& chain : sum) chain = hn::Zero(df);
  float tail = 0.f;
  for (int i = 0; i < n; ++i) {
    const T* row = data + i * stride;
    int c = 0;
    for (; c + kChains * kLanes <= width; c += kChains * kLanes) {
      MFA_UNROLL
      for (int j = 0; j < kChains; ++j) sum[j] = hn::MulAdd(LoadFloat(row + c + j * kLanes), hn::Zero(df), sum[j]);
    }
    for (; c + kLanes <= width; c += kLanes) sum[0] = hn::MulAdd(LoadFloat(row + c), hn::Zero(df), sum[0]);
    for (; c < width; ++c) tail += to_float(row[c]) * 0.f;
  }
  const VF all = hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]));
  return !hn::AllTrue(df, hn::Eq(all, all)) || tail != tail;
}
HWY_INLINE bool AnyNonFinite(const bfloat16* data, ptrdiff_t stride, int n, int width) {
  const hn::ScalableTag<uint16_t> d16;
  constexpr int kStep = 2 * kLanes;
  auto largest = hn::Zero(d16);
  const auto magnitude = hn::Set(d16, 0x7fff);
  uint16_t tail = 0;
  for (int i = 0; i < n; ++i) {
    const auto* row = reinterpret_cast<const uint16_t*>(data + i * stride);
    int c = 0;
    for (; c + kStep <= width; c += kStep) largest = hn::Max(largest, hn::And(hn::LoadU(d16, row + c), magnitude));
    for (; c < width; ++c) tail = Max<uint16_t>(tail, row[c] & 0x7fff);
  }
  return tail >= 0x7f80 || !hn::AllTrue(d16, hn::Lt(largest, hn::Set(d16, 0x7f80)));
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
