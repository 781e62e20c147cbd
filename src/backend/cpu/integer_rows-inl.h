// integer_rows-inl.h: rows of x as 16-bit integers with one scale a group of quantised weights, as linear/problem.h
// defines them, and the sums of their products with codes.

namespace mfa::cpu::MFA_ISA {
namespace {

using D16 = hn::ScalableTag<int16_t>;
using V16 = hn::Vec<D16>;
constexpr D16 d16;
constexpr int kLargestGroup = 128;
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
}
HWY_INLINE VI Total(const PairSums& sums) { return hn::RearrangeToOddPlusEven(sums.a, sums.b); }

// ---- rows of x ------------------------------------------------------------------------------------------------------
// Part of some rows of x. `first` and `rest` have the order in which the codes of a 32-bit word come as pairs: codes j
// and j + h of a word, j < h, h half of its codes. `rest` is written in groups that have one.
struct IntegerRows {
  int16_t *first = nullptr, *rest = nullptr;          // [rows, stride]
  float *scale = nullptr, *sum = nullptr;             // [rows, groups]
  float* rest_sum = nullptr;                          // likewise
  uint8_t* has_rest = nullptr;                        // likewise
  ptrdiff_t stride = 0;
  int groups = 0;

  // The stride keeps rows a power of two apart out of the same cache set.
  static ptrdiff_t Stride(int terms) { return RoundUp(terms, 16 * kLanes) + 32; }
  static size_t Bytes(int rows, int terms, int groups) {
    return static_cast<size_t>(rows) * (static_cast<size_t>(Stride(terms)) * 4 + static_cast<size_t>(groups) * 13) + 64;
  }
  IntegerRows() = default;
  IntegerRows(int rows, int terms, int groups, char* scratch) : stride(Stride(terms)), groups(groups) {
    first = reinterpret_cast<int16_t*>(scratch);
    rest = first + rows * stride;
    scale = reinterpret_cast<float*>(rest + rows * stride);
    sum = scale + rows * groups;
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
  const int e = static_cast<int>(std::bit_cast<uint32_t>(tiny ? largest * 0x1p64f : largest) >> 23) - (tiny ? 191 : 127);
  const int up = 14 - e, half = up / 2;
  return {PowerOf2(-up), {PowerOf2(half), PowerOf2(up - half)}};
}

// Writes n integers in the order of IntegerRows.
template <int kBits>
HWY_INLINE void StoreAsPairs(const int16_t* in, int n, int16_t* out) {
  static_assert(kBits == 4 || kBits == 8);
  HWY_ALIGN static constexpr uint8_t kOrder[2][16] = {{0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15},
                                                      {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15}};
  const hn::Repartition<uint8_t, D16> d8;
  const auto order = hn::LoadDup128(d8, kOrder[kBits / 8]);
  for (int i = 0; i < n; i += 2 * kLanes)
    hn::StoreU(hn::TableLookupBytes(hn::Load(d16, in + i), hn::BitCast(d16, order)), d16, out + i);
}

// Group g of row r from the n elements at `in`.
template <int kBits, class T>
HWY_INLINE void QuantiseGroup(const T* in, int n, IntegerRows& x, int r, int g) {
  constexpr bool kHalf = std::is_same_v<T, float16>;
  constexpr float kExact = kHalf ? 0x1p10f : 0x1p7f;  // from here on y has no digits after the point
  const hn::RebindToUnsigned<D16> du16;
  const hn::Rebind<int16_t, DF> dh;
  const int at = r * x.groups + g;
  int16_t* first = x.first + r * x.stride + g * n;
  HWY_ALIGN int16_t integers[kLargestGroup];

  auto most = hn::Zero(du16);
  for (int i = 0; i < n; i += 2 * kLanes)
    most = hn::Max(most, hn::And(hn::LoadU(du16, reinterpret_cast<const uint16_t*>(in) + i), hn::Set(du16, 0x7fff)));
  const uint16_t bits = hn::GetLane(hn::MaxOfLanes(du16, most));
  x.sum[at] = x.rest_sum[at] = x.scale[at] = 0.f;
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
  const auto load = [&](int i) { return hn::Mul(hn::Mul(LoadFloat(in + i), up0), up1); };
  VI sum = hn::Zero(di), small = hn::Zero(di);
  for (int i = 0; i < n; i += kLanes) {
    const VF y = load(i);
    const VI q = hn::NearestInt(y);
    hn::Store(hn::DemoteTo(dh, q), dh, integers + i);
    sum = hn::Add(sum, q);
    // Twice the elements that may lose digits, less the zeros: more than n if those are the half of all others.
    const VI inexact = hn::VecFromMask(di, hn::RebindMask(di, hn::Lt(hn::Abs(y), hn::Set(df, kExact))));
    const VI zero = hn::VecFromMask(di, hn::RebindMask(di, hn::Eq(y, hn::Zero(df))));
    small = hn::Add(small, hn::Sub(zero, hn::Add(inexact, inexact)));
  }
  StoreAsPairs<kBits>(integers, n, first);
  x.sum[at] = static_cast<float>(hn::GetLane(hn::SumOfLanes(di, sum)));
  if (HWY_LIKELY(hn::GetLane(hn::SumOfLanes(di, small)) <= n)) return;

  sum = hn::Zero(di);
  for (int i = 0; i < n; i += kLanes) {
    const VF y = load(i);
    const VI q = hn::NearestInt(hn::Mul(hn::Sub(y, hn::ConvertTo(df, hn::NearestInt(y))), hn::Set(df, 1 / kRestScale)));
    hn::Store(hn::DemoteTo(dh, q), dh, integers + i);
    sum = hn::Add(sum, q);
  }
  x.has_rest[at] = 1;
  StoreAsPairs<kBits>(integers, n, x.rest + r * x.stride + g * n);
  x.rest_sum[at] = static_cast<float>(hn::GetLane(hn::SumOfLanes(di, sum)));
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
  for (int g = 0; g < groups; ++g) any |= x.has_rest[r * x.groups + g];
  if (HWY_LIKELY(!any)) return false;
  for (int g = 0; g < groups; ++g)
    if (!x.has_rest[r * x.groups + g])
      std::memset(x.rest + r * x.stride + g * n, 0, static_cast<size_t>(n) * sizeof(*x.rest));
  return true;
}

// ---- sums of groups -------------------------------------------------------------------------------------------------
// total + x_scale * (scale * dot + bias * sum), lane by lane: what a group adds to a sum.
template <class D, class V = hn::Vec<D>, class VInt>
HWY_INLINE V AddGroup(D d, V total, V x_scale, V scale, VInt dot, V bias, V sum) {
  return hn::MulAdd(x_scale, hn::MulAdd(scale, hn::ConvertTo(d, dot), hn::Mul(bias, sum)), total);
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
