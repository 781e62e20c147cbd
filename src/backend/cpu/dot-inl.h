// dot-inl.h: products of bfloat16 pairs where the processor has them. Highway 1.0.3 lacks the instruction.
//
// A pair is two bfloat16 in the 32 bits of a lane, the first in the low half. The packed results round to nearest even.

namespace mfa::cpu::MFA_ISA {
namespace {

using VU = hn::Vec<DU>;

#if defined(__AVX512BF16__) && HWY_TARGET <= HWY_AVX3
#define MFA_NATIVE_BF16 1
// acc + a.first * b.first + a.second * b.second in each lane.
HWY_INLINE VF DotPairs(VF acc, VU a, VU b) {
  return VF{_mm512_dpbf16_ps(acc.raw, reinterpret_cast<__m512bh>(a.raw), reinterpret_cast<__m512bh>(b.raw))};
}
HWY_INLINE hn::Vec256<float> DotPairs(hn::Vec256<float> acc, hn::Vec256<uint32_t> a, hn::Vec256<uint32_t> b) {
  return hn::Vec256<float>{
      _mm256_dpbf16_ps(acc.raw, reinterpret_cast<__m256bh>(a.raw), reinterpret_cast<__m256bh>(b.raw))};
}
// Both rounded to bfloat16, one after the other; and as pairs.
HWY_INLINE __m512i RoundBoth(VF first, VF second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.raw, first.raw));
}
HWY_INLINE VU Interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return VU{_mm512_permutexvar_epi16(order, halves)};
}
// Lane i: (first[i], second[i]) rounded to bfloat16.
HWY_INLINE VU PackPairs(VF first, VF second) { return Interleave(RoundBoth(first, second)); }
// The same, and stores both as rows of kLanes, aligned to their size.
HWY_INLINE VU PackPairsAndRows(VF first, VF second, bfloat16* first_row, bfloat16* second_row) {
  const __m512i halves = RoundBoth(first, second);
  _mm256_store_si256(reinterpret_cast<__m256i*>(first_row), _mm512_castsi512_si256(halves));
  _mm256_store_si256(reinterpret_cast<__m256i*>(second_row), _mm512_extracti64x4_epi64(halves, 1));
  return Interleave(halves);
}
// Elements 2i and 2i + 1 of (first, second) rounded, in lane i.
HWY_INLINE VU PackNeighbours(VF first, VF second) { return VU{RoundBoth(first, second)}; }
// 32 elements of two rows, interleaved.
constexpr bool kInterleavesRows = true;
HWY_INLINE void InterleaveRows(const bfloat16* first, const bfloat16* second, VU& low, VU& high) {
  const __m512i from = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  low = VU{_mm512_permutex2var_epi16(a, from, b)};
  high = VU{_mm512_permutex2var_epi16(a, _mm512_or_si512(from, _mm512_set1_epi16(16)), b)};
}
#else
constexpr bool kInterleavesRows = false;
HWY_INLINE void InterleaveRows(const bfloat16*, const bfloat16*, VU&, VU&) {}
#ifndef MFA_NATIVE_BF16  // 1, by the compiler's flags: test what uses pairs on a processor without them
#define MFA_NATIVE_BF16 0
#endif
// The same results, slower: for code that is compiled for every instruction set.
HWY_INLINE VF DotPairs(VF acc, VU a, VU b) {
  const auto first = [](VU x) { return hn::BitCast(df, hn::ShiftLeft<16>(x)); };
  const auto second = [](VU x) { return hn::BitCast(df, hn::And(x, hn::Set(du, 0xffff0000u))); };
  return hn::MulAdd(first(a), first(b), hn::MulAdd(second(a), second(b), acc));
}
HWY_INLINE VU RoundToBf16(VF x) {  // in the high half
  const VU bits = hn::BitCast(du, x);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const VU rounded = hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd);
  const VU chosen = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), hn::Or(bits, hn::Set(du, 0x400000u)), rounded);
  return hn::And(chosen, hn::Set(du, 0xffff0000u));
}
HWY_INLINE VU PackPairs(VF first, VF second) {
  return hn::Or(hn::ShiftRight<16>(RoundToBf16(first)), RoundToBf16(second));
}
HWY_INLINE VU PackPairsAndRows(VF first, VF second, bfloat16* first_row, bfloat16* second_row) {
  StoreFloat(first, first_row);
  StoreFloat(second, second_row);
  return PackPairs(first, second);
}
HWY_INLINE VU PackNeighbours(VF first, VF second) {
  return PackPairs(hn::ConcatEven(df, second, first), hn::ConcatOdd(df, second, first));
}
#endif
constexpr bool kNativeBf16 = MFA_NATIVE_BF16;

// The elements of two rows, interleaved: lane i is (first[i], second[i]).
template <class D32>
HWY_INLINE hn::Vec<D32> LoadPairs(D32 d32, const bfloat16* first, const bfloat16* second) {
  const hn::Rebind<uint16_t, D32> d16;
  const auto a = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(first)));
  const auto b = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(second)));
  return hn::Or(a, hn::ShiftLeft<16>(b));
}

// NV vectors of them.
template <int NV>
HWY_INLINE void LoadPairVectors(const bfloat16* first, const bfloat16* second, VU (&pairs)[NV]) {
  if constexpr (kInterleavesRows && NV % 2 == 0) {
    MFA_UNROLL
    for (int c = 0; c < NV; c += 2) InterleaveRows(first + c * kLanes, second + c * kLanes, pairs[c], pairs[c + 1]);
  } else {
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) pairs[c] = LoadPairs(du, first + c * kLanes, second + c * kLanes);
  }
}

// Two neighbours of a row as one pair; rows are only 2-byte aligned.
HWY_INLINE uint32_t PairAt(const bfloat16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return pair;
}

// out[c * ld + r] = (rows[r][2c], rows[r][2c + 1]) for r < kLanes, c < n.
HWY_INLINE void PackTransposedPairs(const bfloat16* const* rows, int n, uint32_t* out, ptrdiff_t ld) {
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    VF v[kLanes];  // only moved: what the bits mean as floats does not matter
    MFA_UNROLL
    for (int r = 0; r < kLanes; ++r)
      v[r] = hn::BitCast(df, hn::LoadU(du, reinterpret_cast<const uint32_t*>(rows[r] + 2 * c)));
    Transpose(v);
    MFA_UNROLL
    for (int r = 0; r < kLanes; ++r) hn::Store(hn::BitCast(du, v[r]), du, out + (c + r) * ld);
  }
  for (; c < n; ++c)
    for (int r = 0; r < kLanes; ++r) out[c * ld + r] = PairAt(rows[r] + 2 * c);
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
