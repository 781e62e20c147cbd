// integer_rows-inl.h: rows of x as 16-bit integers with one scale a group of quantised weights, as linear/problem.h
// defines them, and the sums of their products with codes.

namespace mfa::cpu::MFA_ISA {
namespace {

using D16 = hn::ScalableTag<int16_t>;
using V16 = hn::Vec<D16>;
constexpr D16 d16;
constexpr float kRestScale = 0x1p-15f;  // of a rest, times that of its group

// Calls f with a null pointer of the element type, which has 16 bits.
template <class F>
HWY_INLINE auto WithHalf(DType dtype, const F& f) {
  return dtype == DType::f16 ? f(static_cast<float16*>(nullptr)) : f(static_cast<bfloat16*>(nullptr));
}

// ---- sums of products -----------------------------------------------------------------------------------------------
// A sum in each 32-bit lane. Processors that do not multiply and add pairs at once keep two halves until the end.
struct PairSums {
  VI a = hn::Zero(di), b = hn::Zero(di);
};
// Adds x[2i] * y[2i] + x[2i + 1] * y[2i + 1] to lane i.
HWY_INLINE void AddPairs(PairSums& sums, V16 x, V16 y) {
#if defined(__AVX512VNNI__) && HWY_TARGET <= HWY_AVX3
  sums.a = VI{_mm512_dpwssd_epi32(sums.a.raw, x.raw, y.raw)};
#else
  sums.a = hn::ReorderWidenMulAccumulate(di, x, y, sums.a, sums.b);
#endif
#if HWY_ARCH_X86
  // Else compilers reorder sums of integers, or copy them, so that they do not fit the registers.
  asm("" : "+v"(sums.a.raw));
#endif
}
HWY_INLINE VI Total(const PairSums& sums) { return hn::RearrangeToOddPlusEven(sums.a, sums.b); }

// ---- rows of x ------------------------------------------------------------------------------------------------------
// Part of some rows of x. `first` and `rest` have the order in which the codes of a 32-bit word come as pairs: codes j
// and j + h of a word, j < h, h half of its codes. `rest` is written in rows that have one.
struct IntegerRows {
  int16_t *first = nullptr, *rest = nullptr;    // [rows, stride]
  float* scale = nullptr;                       // of group g of row r at At(g, r)
  int32_t *sum = nullptr, *rest_sum = nullptr;  // likewise, of first and rest
  uint8_t* has_rest = nullptr;                  // likewise
  ptrdiff_t stride = 0;
  int group_step = 0, row_step = 0;
  int At(int g, int r) const { return g * group_step + r * row_step; }

  // The stride keeps rows a power of two apart out of the same cache set.
  static ptrdiff_t Stride(int terms) { return RoundUp(terms, 16 * kLanes) + 32; }
  static size_t Bytes(int rows, int terms, int groups) {
    const size_t bytes = static_cast<size_t>(rows) * (static_cast<size_t>(Stride(terms)) * 4 + size_t{13} * groups);
    return (bytes + 16 + 63) / 64 * 64;  // vectors of groups are looked at past the last
  }
  IntegerRows() = default;
  IntegerRows(int rows, int terms, int groups, bool rows_adjacent, char* scratch)
      : stride(Stride(terms)), group_step(rows_adjacent ? rows : 1), row_step(rows_adjacent ? 1 : groups) {
    first = reinterpret_cast<int16_t*>(scratch);
    rest = first + rows * stride;
    scale = reinterpret_cast<float*>(rest + rows * stride);
    sum = reinterpret_cast<int32_t*>(scale + rows * groups);
    rest_sum = sum + rows * groups;
    has_rest = reinterpret_cast<uint8_t*>(rest_sum + rows * groups);
  }
};

// A group of x as y = x / scale in float32, |y| < 2^15. The scale, 2^(e - 14) for a largest element of exponent e, may
// be subnormal and its reciprocal too large: two factors make that.
struct GroupScale {
  float scale, inverse[2];
};
HWY_INLINE float PowerOf2(int e) {
  return std::bit_cast<float>(e >= -126 ? static_cast<uint32_t>(e + 127) << 23 : 1u << (e + 149));
}
HWY_INLINE GroupScale ScaleOf(float largest) {
  const bool tiny = largest < 0x1p-100f;
  const int e =
      static_cast<int>(std::bit_cast<uint32_t>(tiny ? largest * 0x1p64f : largest) >> 23) - (tiny ? 191 : 127);
  const int up = 14 - e, half = up / 2;
  return {PowerOf2(-up), {PowerOf2(half), PowerOf2(up - half)}};
}

// y rounded to whole numbers, half to even, as float32 that holds it in its low bits; |y| < 2^22.
constexpr float kIntegers = 12582912.f;  // 1.5 * 2^23
HWY_INLINE VF RoundToIntegers(VF y) { return hn::Add(y, hn::Set(df, kIntegers)); }
HWY_INLINE VI IntegersOf(VF rounded) {
  return hn::Sub(hn::BitCast(di, rounded), hn::BitCast(di, hn::Set(df, kIntegers)));
}

// Writes n integers y(i) in the order of IntegerRows; returns their sum.
template <int kBits, class F>
HWY_INLINE int32_t StoreIntegers(int n, int16_t* out, const F& y) {
  static_assert(kBits == 4 || kBits == 8);
  HWY_ALIGN static constexpr uint8_t kOrder[2][16] = {{0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15},
                                                      {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15}};
  const auto order = hn::BitCast(d16, hn::LoadDup128(hn::Repartition<uint8_t, D16>(), kOrder[kBits / 8]));
  VI sum = hn::Zero(di);
  for (int i = 0; i < n; i += 2 * kLanes) {
    const VI low = IntegersOf(RoundToIntegers(y(i))), high = IntegersOf(RoundToIntegers(y(i + kLanes)));
    sum = hn::Add(sum, hn::Add(low, high));
    const V16 both = hn::Combine(d16, hn::DemoteTo(hn::Half<D16>(), high), hn::DemoteTo(hn::Half<D16>(), low));
    hn::StoreU(hn::TableLookupBytes(both, order), d16, out + i);
  }
  return hn::GetLane(hn::SumOfLanes(di, sum));
}

// Group g of row r from the n elements at `in`.
template <int kBits, class T>
HWY_INLINE void QuantiseGroup(const T* in, int n, IntegerRows& x, int r, int g) {
  constexpr bool kHalf = std::is_same_v<T, float16>;
  constexpr float kSmall = kHalf ? 0x1p9f : 0x1p7f;
  const hn::RebindToUnsigned<D16> du16;
  const int at = x.At(g, r);
  int16_t* first = x.first + r * x.stride + g * n;

  auto most = hn::Zero(du16);
  V16 zeros = hn::Zero(d16);
  for (int i = 0; i < n; i += 2 * kLanes) {
    const auto bits = hn::And(hn::LoadU(du16, reinterpret_cast<const uint16_t*>(in) + i), hn::Set(du16, 0x7fff));
    most = hn::Max(most, bits);
    zeros = hn::Sub(zeros, hn::VecFromMask(d16, hn::Eq(hn::BitCast(d16, bits), hn::Zero(d16))));
  }
  const uint16_t bits = hn::GetLane(hn::MaxOfLanes(du16, most));
  x.scale[at] = 0.f;
  x.sum[at] = x.rest_sum[at] = 0;
  x.has_rest[at] = 0;
  if (bits == 0 || bits >= (kHalf ? 0x7c00 : 0x7f80)) {
    // The sums of a row with a NaN or an infinity become NaN, and are computed again term by term.
    if (bits != 0) x.scale[at] = std::numeric_limits<float>::quiet_NaN();
    std::memset(first, 0, static_cast<size_t>(n) * sizeof(*first));
    return;
  }
  const GroupScale s = ScaleOf(to_float(T{bits}));
  x.scale[at] = s.scale;
  const VF up0 = hn::Set(df, s.inverse[0]), up1 = hn::Set(df, s.inverse[1]);
  VI small = hn::Zero(di);  // elements below kSmall, zeros too
  x.sum[at] = StoreIntegers<kBits>(n, first, [&](int i) MFA_INLINE_LAMBDA {
    const VF y = hn::Mul(hn::Mul(LoadFloat(in + i), up0), up1);
    small = hn::Sub(small, hn::VecFromMask(di, hn::RebindMask(di, hn::Lt(hn::Abs(y), hn::Set(df, kSmall)))));
    return y;
  });
  // More than half of those that are not zero?
  const int count = hn::GetLane(hn::SumOfLanes(di, small)), none = hn::GetLane(hn::SumOfLanes(d16, zeros));
  if (HWY_LIKELY(2 * (count - none) <= n - none)) return;
  x.has_rest[at] = 1;
  int16_t* rest = x.rest + r * x.stride + g * n;
  x.rest_sum[at] = StoreIntegers<kBits>(n, rest, [&](int i) MFA_INLINE_LAMBDA {
    const VF y = hn::Mul(hn::Mul(LoadFloat(in + i), up0), up1);
    return hn::Mul(hn::Sub(y, hn::Sub(RoundToIntegers(y), hn::Set(df, kIntegers))), hn::Set(df, 1 / kRestScale));
  });
}

// `groups` groups of n terms each, from term k0 on, of row `row` of the problem as row r of `x`. Whether any has a
// rest: then the others' rests are zero.
template <int kBits>
HWY_NOINLINE bool QuantiseRow(const MatmulProblem& p, int64_t row, int k0, int groups, int n, IntegerRows& x, int r) {
  uint8_t any = 0;
  WithHalf(p.dtype, [&]<class T>(T*) {
    const T* in = static_cast<const T*>(p.x.data) + p.x.at(row) + k0;
    for (int g = 0; g < groups; ++g) QuantiseGroup<kBits>(in + g * n, n, x, r, g);
  });
  for (int g = 0; g < groups; ++g) any |= x.has_rest[x.At(g, r)];
  if (HWY_LIKELY(!any)) return false;
  for (int g = 0; g < groups; ++g)
    if (!x.has_rest[x.At(g, r)])
      std::memset(x.rest + r * x.stride + g * n, 0, static_cast<size_t>(n) * sizeof(*x.rest));
  return true;
}

// ---- sums of groups -------------------------------------------------------------------------------------------------
// Codes count from the middle of their range, which is near zero for most weights: scale * (code - middle) + centre.
template <int kBits>
constexpr int kMiddle = 1 << (kBits - 1);
template <int kBits, class D, class V = hn::Vec<D>>
HWY_INLINE V CentreOf(D d, V scale, V bias) {
  return hn::MulAdd(hn::Set(d, static_cast<float>(kMiddle<kBits>)), scale, bias);
}
// What a group adds to a sum, divided by the scale of x: scale * (dot - middle * sum) + centre * sum, where `dot` is
// the sum of products with codes and `sum` that of a row of x.
template <int kBits, class D, class V = hn::Vec<D>, class VInt>
HWY_INLINE V GroupProduct(D d, V scale, VInt dot, V centre, VInt sum) {
  const V offset = hn::Mul(centre, hn::ConvertTo(d, sum));
  return hn::MulAdd(scale, hn::ConvertTo(d, hn::Sub(dot, hn::ShiftLeft<kBits - 1>(sum))), offset);
}

// Element (r, n) of the product, term by term in float32: for sums that are not finite.
HWY_NOINLINE float PlainSum(const MatmulProblem& p, int64_t r, int n) {
  const AffineRef& a = p.w.affine;
  const auto* codes = reinterpret_cast<const uint8_t*>(static_cast<const uint32_t*>(p.w.data) + n * p.w.stride);
  float total = 0.f;
  for (int k = 0; k < p.K && total == total; ++k) {
    const int code = a.bits == 8 ? codes[k] : codes[k / 2] >> (k % 2 * 4) & 15;
    const int64_t group = k / a.group_size;
    const float scale = load_as_float(a.scales, p.dtype, n * a.scale_stride + group);
    const float bias = load_as_float(a.biases, p.dtype, n * a.bias_stride + group);
    total += load_as_float(p.x.data, p.dtype, p.x.at(r) + k) * (scale * static_cast<float>(code) + bias);
  }
  return total;
}
// An infinity among scales or in x, or a group past the range of float32, makes a sum infinite or NaN, if not always
// the one that it should be.
HWY_INLINE void MendSums(const MatmulProblem& p, int64_t r, int n0, int count, float* sums) {
  VF bad = hn::Zero(df);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) bad = hn::MulAdd(hn::LoadU(df, sums + i), hn::Zero(df), bad);
  float rest = 0.f;
  for (; i < count; ++i) rest += sums[i] * 0.f;
  if (HWY_LIKELY(hn::AllTrue(df, hn::Eq(bad, hn::Zero(df))) && rest == 0.f)) return;
  for (i = 0; i < count; ++i)
    if (!(sums[i] - sums[i] == 0.f)) sums[i] = PlainSum(p, r, n0 + i);
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
