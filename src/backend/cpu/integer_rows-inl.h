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

// Of the 2 * kLanes terms from `in` on: lane i of `a` and `b` is what pair i of IntegerRows is made of.
template <int kBits, class T>
HWY_INLINE void LoadPairTerms(const T* in, VF& a, VF& b) {
  const hn::RebindToUnsigned<D16> du16;
  // Each 128-bit block has the terms of `a` below those of `b`.
  auto v = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(in));
  if constexpr (kBits == 8) {  // so far those of whole words
    HWY_ALIGN static constexpr uint8_t kOrder[16] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
    v = hn::TableLookupBytes(v, hn::BitCast(du16, hn::LoadDup128(hn::Repartition<uint8_t, D16>(), kOrder)));
  }
  if constexpr (std::is_same_v<T, bfloat16>) {
    a = hn::BitCast(df, hn::InterleaveLower(du16, hn::Zero(du16), v));
    b = hn::BitCast(df, hn::InterleaveUpper(du16, hn::Zero(du16), v));
  } else {
    const hn::Repartition<uint64_t, D16> d64;
    const hn::Rebind<hwy::float16_t, DF> df16;
    const auto halves = hn::BitCast(d64, v);
    const auto widen = [&](auto terms) MFA_INLINE_LAMBDA {
      return hn::PromoteTo(df, hn::BitCast(df16, hn::LowerHalf(hn::Half<decltype(d64)>(), terms)));
    };
    a = widen(hn::ConcatEven(d64, halves, halves));
    b = widen(hn::ConcatOdd(d64, halves, halves));
  }
}

// Writes f(terms) of n terms, rounded to integers, in the order of IntegerRows; returns their sum.
template <int kBits, class T, class F>
HWY_INLINE int32_t StoreIntegers(const T* in, int n, int16_t* out, const F& f) {
  static_assert(kBits == 4 || kBits == 8);
  PairSums sum;
  for (int i = 0; i < n; i += 2 * kLanes) {
    VF a, b;
    LoadPairTerms<kBits>(in + i, a, b);
    const VU low = hn::BitCast(du, RoundToIntegers(f(a))), high = hn::BitCast(du, RoundToIntegers(f(b)));
    const V16 pairs = hn::OddEven(hn::BitCast(d16, hn::ShiftLeft<16>(high)), hn::BitCast(d16, low));
    AddPairs(sum, pairs, hn::Set(d16, 1));
    hn::StoreU(pairs, d16, out + i);
  }
  return hn::GetLane(hn::SumOfLanes(di, Total(sum)));
}

// 2^(e - n) as the bits of a T, e being the exponent of the number with these bits; the smallest number if that is 0.
template <class T>
HWY_INLINE uint16_t BitsBelow(uint16_t bits, int n) {
  constexpr int kMantissa = std::is_same_v<T, float16> ? 10 : 7;
  const int exponent = bits >> kMantissa;
  if (HWY_LIKELY(exponent > n)) return static_cast<uint16_t>((exponent - n) << kMantissa);
  // Subnormal, where a place is the exponent.
  const int place = (exponent > 0 ? exponent - 1 + kMantissa : std::bit_width(bits) - 1) - n;
  return static_cast<uint16_t>(1 << Max(0, place));
}

// Group g of row r from the n elements at `in`; whether it has a rest.
template <int kBits, class T>
HWY_INLINE bool QuantiseGroup(const T* in, int n, IntegerRows& x, int r, int g) {
  constexpr bool kHalf = std::is_same_v<T, float16>;
  constexpr int kSmall = kHalf ? 5 : 7;  // elements below 2^-kSmall of the largest are small
  const hn::RebindToUnsigned<D16> du16;
  const auto magnitudes = [&](int i) MFA_INLINE_LAMBDA {
    return hn::And(hn::LoadU(du16, reinterpret_cast<const uint16_t*>(in) + i), hn::Set(du16, 0x7fff));
  };
  const int at = x.At(g, r);
  int16_t* first = x.first + r * x.stride + g * n;
  x.rest_sum[at] = 0;
  x.has_rest[at] = 0;

  auto most = hn::Zero(du16);
  for (int i = 0; i < n; i += 2 * kLanes) most = hn::Max(most, magnitudes(i));
  const uint16_t bits = hn::GetLane(hn::MaxOfLanes(du16, most));
  if (HWY_UNLIKELY(bits == 0 || bits >= (kHalf ? 0x7c00 : 0x7f80))) {
    // The sums of a row with a NaN or an infinity become NaN, and are computed again term by term.
    x.scale[at] = bits == 0 ? 0.f : std::numeric_limits<float>::quiet_NaN();
    x.sum[at] = 0;
    std::memset(first, 0, static_cast<size_t>(n) * sizeof(*first));
    return false;
  }
  const GroupScale s = ScaleOf(to_float(T{bits}));
  x.scale[at] = s.scale;
  const VF up0 = hn::Set(df, s.inverse[0]), up1 = hn::Set(df, s.inverse[1]);
  x.sum[at] = StoreIntegers<kBits>(in, n, first, [&](VF v) MFA_INLINE_LAMBDA { return hn::Mul(hn::Mul(v, up0), up1); });
  size_t small = 0, none = 0;  // small elements, zeros too, and zeros
  const auto limit = hn::Set(du16, BitsBelow<T>(bits, kSmall));
  for (int i = 0; i < n; i += 2 * kLanes) {
    const V16 magnitude = hn::BitCast(d16, magnitudes(i));
    small += hn::CountTrue(d16, hn::Lt(magnitude, hn::BitCast(d16, limit)));
    none += hn::CountTrue(d16, hn::Eq(magnitude, hn::Zero(d16)));
  }
  // More than half of those that are not zero?
  if (HWY_LIKELY(2 * (small - none) <= static_cast<size_t>(n) - none)) return false;
  x.has_rest[at] = 1;
  x.rest_sum[at] = StoreIntegers<kBits>(in, n, x.rest + r * x.stride + g * n, [&](VF v) MFA_INLINE_LAMBDA {
    const VF y = hn::Mul(hn::Mul(v, up0), up1);
    return hn::Mul(hn::Sub(y, hn::Sub(RoundToIntegers(y), hn::Set(df, kIntegers))), hn::Set(df, 1 / kRestScale));
  });
  return true;
}

// `groups` groups of n terms each, from term k0 on, of row `row` of the problem as row r of `x`. Whether any has a
// rest: then the others' rests are zero.
template <int kBits>
HWY_NOINLINE bool QuantiseRow(const MatmulProblem& p, int64_t row, int k0, int groups, int n, IntegerRows& x, int r) {
  bool any = false;
  WithHalf(p.dtype, [&]<class T>(T*) {
    const T* in = static_cast<const T*>(p.x.data) + p.x.at(row) + k0;
    for (int g = 0; g < groups; ++g) any |= QuantiseGroup<kBits>(in + g * n, n, x, r, g);
  });
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
// What a group adds to a sum, divided by the scale of x: scale * dot + centre * sum, where `dot` is the sum of products
// with codes that count from the middle and `sum` that of a row of x.
template <class D, class V = hn::Vec<D>, class VInt>
HWY_INLINE V GroupProduct(D d, V scale, VInt dot, V centre, VInt sum) {
  return hn::MulAdd(scale, hn::ConvertTo(d, dot), hn::Mul(centre, hn::ConvertTo(d, sum)));
}
// Such a sum from one of products with the codes as they are stored.
template <int kBits, class VInt>
HWY_INLINE VInt FromMiddle(VInt dot, VInt sum) {
  return hn::Sub(dot, hn::ShiftLeft<kBits - 1>(sum));
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
