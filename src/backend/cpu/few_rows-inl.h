// few_rows-inl.h: products of a few rows with weights whose columns are dense stored rows. Lanes are the chains of a
// sum (linear/problem.h), so weights are read in the order of memory and multiplied as they come: only sums are
// transposed.

namespace mfa::cpu::MFA_ISA {
namespace {

// Vectors of columns at a time, which hide the latency of a chain of multiply-adds.
template <int R>
constexpr int kFewVectors = kSides >= 4 ? (R > 8 ? 1 : 2)
                            : R >= 8    ? 1
                            : R >= 4    ? 2
                                        : 4;

// Step x of every chain, for each side.
HWY_INLINE VC LoadX(const float* x) { return hn::LoadDup128(dc, x); }
HWY_INLINE hn::Vec<DCU> LoadX(const bfloat16* x) { return hn::LoadDup128(dcu, reinterpret_cast<const uint32_t*>(x)); }

template <bool kPairs, class V>
HWY_INLINE VC AddProducts(V x, V w, VC acc) {
  if constexpr (kPairs) {
    return DotPairs(acc, x, w);
  } else {
    return hn::MulAdd(x, w, acc);
  }
}

// totals[v] += the chains of the four vectors from sums[4 * v] on, one after the other: lane i of a side is vector i.
template <int S>
HWY_INLINE void AddChains(VC (&sums)[S], float (&totals)[S / 4][4 * kSides]) {
  MFA_UNROLL
  for (int v = 0; v < S / 4; ++v) {
    TransposeBlocks(dc, sums + 4 * v);
    VC total = hn::Load(dc, totals[v]);
    MFA_UNROLL
    for (int chain = 0; chain < kChains; ++chain) total = hn::Add(total, sums[4 * v + chain]);
    hn::Store(total, dc, totals[v]);
  }
}

// sums[r * sums_stride + n - n0] = row r of x times column n, n0 <= n < n1. R rows are multiplied, `rows` exist. x is
// what PackWords() makes of them, the words of all chains of one row after those of the other: so one address serves
// all. Columns that are multiplied together lie evenly spread over [n0, n1), each stream walking on from column to
// column (kSpread): so many long streams are what the processor's own prefetchers follow, however short a column is,
// and only a little further than they go is asked for. Scales and biases would be more streams than they follow:
// quantised columns are neighbours, and asked for in the order of memory.
template <bool kPairs, int R, class Weights>
HWY_NOINLINE void MultiplyFewRows(const Weights& weights, int K, const typename Terms<kPairs>::X* x, int rows, int n0,
                                  int n1, float* sums, ptrdiff_t sums_stride) {
  using X = typename Terms<kPairs>::X;
  constexpr int kVectors = kFewVectors<R>, kSums = Max(4, R * kVectors);
  constexpr int kColumns = kVectors * kSides;
  constexpr int kTerms = kChains * Weights::kUnit * Terms<kPairs>::kStep;  // of a word of every chain
  typename Weights::Columns columns[kVectors];
  const int apart = Weights::kSpread ? (n1 - n0 + kColumns - 1) / kColumns : 1;
  const int end = Weights::kSpread ? n0 + apart : n1;
  for (int n = n0; n < end; n += Weights::kSpread ? 1 : kColumns) {
    Prefetch ahead(Weights::kSpread ? nullptr : weights.Begin(n + kColumns));
    for (int c = 0; c < kColumns; ++c) weights.BeginColumn(columns[c / kSides], c % kSides, Min(n + c * apart, n1 - 1));
    HWY_ALIGN float totals[kSums / 4][4 * kSides] = {};
    for (int k0 = 0; k0 < K; k0 += kInnerBlock) {
      const int k1 = Min(k0 + kInnerBlock, K);
      for (int v = 0; v < kVectors; ++v) weights.BeginBlock(columns[v], k1);
      VC acc[kSums];
      MFA_UNROLL
      for (int i = 0; i < kSums; ++i) acc[i] = hn::Zero(dc);
      const auto multiply = [&](int k) MFA_INLINE_LAMBDA {
        return [&, at = x + ptrdiff_t{k} * R](int v, int i, int j, auto w) MFA_INLINE_LAMBDA {
          MFA_UNROLL
          for (int r = 0; r < R; ++r) {
            const X* from = at + (i * R + r) * kTerms + j * kChains * Terms<kPairs>::kStep;
            acc[r * kVectors + v] = AddProducts<kPairs>(LoadX(from), w, acc[r * kVectors + v]);
          }
        };
      };
      int k = k0;
      if constexpr (Weights::kSpread && R > 1) {  // all cores together read a row's weights slower so
        for (; k + kSides * kTerms <= k1; k += kSides * kTerms) weights.Lines(columns, k, multiply(k));
      }
      for (; k + kTerms <= k1; k += kTerms) {
        ahead.Lines<Max(1, kColumns * kChains * 4 / static_cast<int>(kCacheLine))>();
        weights.Words(columns, k, multiply(k));
      }
      if (k < k1) weights.LastWords(columns, k, k1, multiply(k));
      AddChains(acc, totals);
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < kColumns && n + c * apart < n1; ++c) {
        const int i = r * kVectors + c / kSides;
        sums[r * sums_stride + n - n0 + c * apart] = totals[i / 4][c % kSides * 4 + i % 4];
      }
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
