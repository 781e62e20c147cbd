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

// S becomes exp2(S - safe); adds the sums in the order of the keys.
template <int NR, bool kHalf>
HWY_INLINE void BlockExponentials(float* S, int lo, int hi, const VF (&safe)[NR], VF (&sum)[NR]) {
  constexpr int kWidth = NR * kLanes;
  for (int c = 0; c < NR; ++c) {  // one vector of rows after the other leaves registers for the constants
    const VF m = safe[c];
    VF l = sum[c];
    ForRowTiles<4>(lo, hi, [&]<int N>(int k) HWY_ATTR {
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
