// row_state-inl.h: the streaming softmax of each row: the exponentials of a block, the state, and how the result of a
// block merges into it.
// Source: Milakov & Gimelshein, arXiv:1805.02867.

namespace mfa::cpu::MFA_ISA {
namespace {

// Running maximum (base-2) and sum of each row, and the weights that a block's merge gives to the old and new parts.
struct RowState {
  alignas(64) float m[kMaxRowTile];
  alignas(64) float l[kMaxRowTile];
};

HWY_INLINE VF FiniteOrZero(VF m) { return hn::IfThenElse(hn::Eq(m, hn::Set(df, -kInf)), hn::Zero(df), m); }

// S becomes exp2(S - safe) at the entries [lo[c], hi[c]) of vector c; adds the sums in the order of the keys. One
// vector of rows after the other leaves registers for the constants.
template <int NR, bool kHalf>
HWY_INLINE void BlockExponentials(float* S, const int (&lo)[NR], const int (&hi)[NR], const VF (&safe)[NR],
                                  VF (&sum)[NR]) {
  constexpr int kWidth = NR * kLanes;
  for (int c = 0; c < NR; ++c) {
    const VF m = safe[c];
    VF l = sum[c];
    ForRowTiles<4>(lo[c], hi[c], [&]<int N>(int k) HWY_ATTR {
      float* at = S + k * kWidth + c * kLanes;
      VF e[N];
      MFA_UNROLL
      for (int i = 0; i < N; ++i) e[i] = hn::Sub(hn::Load(df, at + i * kWidth), m);
      Exp2All<kHalf>(e);
      MFA_UNROLL
      for (int i = 0; i < N; ++i) {
        l = hn::Add(l, e[i]);
        hn::Store(e[i], df, at + i * kWidth);
      }
    });
    sum[c] = l;
  }
}

// The same of the entries that `keys` has: the exponentials become pairs, pair t in row t, which is read before.
template <int NR>
HWY_INLINE void PairExponentials(float* S, const VectorKeys<NR>& keys, const VF (&safe)[NR], VF (&sum)[NR]) {
  constexpr int kWidth = NR * kLanes;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(S);
  keys.ForRuns([&]<int C0, int C1>(int lo, int hi) HWY_ATTR {
    constexpr int N = C1 - C0;
    const int end = keys.template Step<2>(hi);
    MFA_NO_UNROLL
    for (int t = keys.template Step<2>(lo); t < end; ++t) {
      const float* at = S + 2 * t * kWidth + C0 * kLanes;
      VF e[2 * N];  // the first of each pair, then the second
      MFA_UNROLL
      for (int i = 0; i < 2 * N; ++i)
        e[i] = hn::Sub(hn::Load(df, at + i / N * kWidth + i % N * kLanes), safe[C0 + i % N]);
      Exp2All<true>(e);
      MFA_UNROLL
      for (int c = 0; c < N; ++c) {
        sum[C0 + c] = hn::Add(hn::Add(sum[C0 + c], e[c]), e[N + c]);
        hn::Store(PackPairs(e[c], e[N + c]), du, pairs + t * kWidth + (C0 + c) * kLanes);
      }
    }
  });
}

// Merges (block_m, block_l) into the state at `at` and returns the weights.
HWY_INLINE void MergeState(float* m_at, float* l_at, VF block_m, VF block_l, VF& a, VF& b) {
  const VF m = hn::Load(df, m_at);
  const VF m_new = hn::Max(block_m, m);
  const VF safe = FiniteOrZero(m_new);
  a = Exp2(hn::Sub(m, safe));
  b = Exp2(hn::Sub(block_m, safe));
  hn::Store(m_new, df, m_at);
  hn::Store(hn::MulAdd(hn::Load(df, l_at), a, hn::Mul(block_l, b)), df, l_at);
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
