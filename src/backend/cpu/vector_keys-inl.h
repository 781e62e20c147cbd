// vector_keys-inl.h: the keys of a block that each vector of rows of a column group takes.
//
// Under a causal mask or a window later rows see later keys, so the first keys of a group are hidden from its last
// vectors and the last keys from its first ones. Products leave those out:
//
//   vector 0   begin[0] ######################## end[0]
//   vector 1       begin[1] ######################## end[1]
//   vector 2           begin[2] ######################## end[2]

namespace mfa::cpu::MFA_ISA {
namespace {

template <int NR>
struct VectorKeys {
  int begin[NR], end[NR];  // neither falls from a vector to the next, and begin[NR - 1] <= end[0]
  int from, to;            // between those: the entries that all rows see
  bool same = true;        // all vectors take the same entries

  // All vectors take all of `keys`.
  explicit VectorKeys(const BlockKeys& keys) {
    for (int c = 0; c < NR; ++c) {
      begin[c] = keys.lo;
      end[c] = keys.hi;
    }
    from = keys.full ? keys.lo : keys.hi;
    to = keys.hi;
  }

  // What the intervals of the rows from r0 on have of `keys`, a run whose entry c is key k0 + c. Bounds are rounded
  // outwards to kStep entries, so that tiles of keys are whole.
  VectorKeys(const RowTile& t, int r0, int64_t k0, const BlockKeys& keys) : VectorKeys(keys) {
    constexpr int kStep = 8;
    const auto within = [&](int64_t entry) {
      return static_cast<int>(Min<int64_t>(Max<int64_t>(entry, keys.lo), keys.hi));
    };
    int all_from = keys.lo, all_to = keys.hi, first[NR], last[NR];
    bool stairs = true;
    for (int c = 0; c < NR; ++c) {
      const LaneIntervals seen(t, r0 + c * kLanes, kLanes);
      first[c] = within((seen.first - k0) & -kStep);
      last[c] = within((seen.last - k0 + kStep - 1) & -kStep);
      all_from = Max(all_from, within((seen.all_from - k0 + kStep - 1) & -kStep));
      all_to = Min(all_to, within((seen.all_to - k0) & -kStep));
      stairs = stairs && (c == 0 || (first[c - 1] <= first[c] && last[c - 1] <= last[c]));
    }
    if (stairs && first[0] == keys.lo && last[NR - 1] == keys.hi && first[NR - 1] <= last[0]) {
      for (int c = 0; c < NR; ++c) {
        begin[c] = first[c];
        end[c] = last[c];
      }
      same = begin[0] == begin[NR - 1] && end[0] == end[NR - 1];
    }
    from = Min(Max(all_from, begin[NR - 1]), end[0]);
    to = Max(Min(all_to, end[0]), from);
  }

  // The step of a product at `entry`, of kPack entries each; those that share one with the first or the last entry
  // belong to it.
  template <int kPack>
  HWY_INLINE int Step(int entry) const {
    return entry == end[NR - 1] ? (entry + kPack - 1) / kPack : entry / kPack;
  }
  // The same of each vector's bounds, in entries.
  template <int kPack>
  HWY_INLINE void Bounds(int (&lo)[NR], int (&hi)[NR]) const {
    for (int c = 0; c < NR; ++c) {
      lo[c] = Step<kPack>(begin[c]) * kPack;
      hi[c] = Step<kPack>(end[c]) * kPack;
    }
  }

  // Calls f.template operator()<C0, C1>(lo, hi) for the runs of entries that vectors [C0, C1) take, in order.
  template <class F>
  HWY_INLINE void ForRuns(const F& f) const {
    Rise<1>(f);
    f.template operator()<0, NR>(begin[NR - 1], end[0]);
    Fall<1>(f);
  }

 private:
  template <int C, class F>
  HWY_INLINE void Rise(const F& f) const {
    if constexpr (C < NR) {
      f.template operator()<0, C>(begin[C - 1], begin[C]);
      Rise<C + 1>(f);
    }
  }
  template <int C, class F>
  HWY_INLINE void Fall(const F& f) const {
    if constexpr (C < NR) {
      f.template operator()<C, NR>(end[C - 1], end[C]);
      Fall<C + 1>(f);
    }
  }
};

// MultiplyTile where each vector of b takes the steps of its keys; a and b begin at the first of all.
template <int MR, int NR, class A, class B, class Layout, class Store>
HWY_INLINE void MultiplyStairs(const A* HWY_RESTRICT a, Layout layout, const B* HWY_RESTRICT b, ptrdiff_t b_step,
                               const VectorKeys<NR>& keys, const Store& store) {
  VF acc[MR][NR];
  MFA_UNROLL
  for (int r = 0; r < MR; ++r) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) acc[r][c] = hn::Zero(df);
  }
  keys.ForRuns([&]<int C0, int C1>(int lo, int hi) MFA_INLINE_LAMBDA {
    const int n = keys.template Step<kPack<A>>(hi) - keys.template Step<kPack<A>>(lo);
    MFA_UNROLL_4
    for (int i = 0; i < n; ++i) {
      decltype(LoadStep(b)) bv[NR];
      MFA_UNROLL
      for (int c = C0; c < C1; ++c) bv[c] = LoadStep(b + c * kLanes);
      MFA_UNROLL
      for (int r = 0; r < MR; ++r) {
        const auto av = BroadcastStep(layout.At(a, r));
        MFA_UNROLL
        for (int c = C0; c < C1; ++c) acc[r][c] = Accumulate(av, bv[c], acc[r][c]);
      }
      a += layout.template Step<A>();
      b += b_step;
    }
  });
  MFA_UNROLL
  for (int r = 0; r < MR; ++r) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) store(r, c, acc[r][c]);
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
