// tile-inl.h: the register tile that every matrix product of the CPU backend is made of.
//
//   acc[r][lane] = sum_i a(r, i) * b[i * b_step + lane],  r < MR, lane < NR *
//   kLanes, i < n, in the order of i
//
// a is broadcast from memory, so it is read where it lies: keys and values are never packed. b is a packed panel. With
// bfloat16 operands a step multiplies a pair: a holds them next to each other and b has one pair in each 32-bit lane.

namespace mfa::cpu::MFA_ISA {
namespace {

HWY_INLINE VF BroadcastStep(const float* a) { return hn::Set(df, *a); }
HWY_INLINE VF LoadStep(const float* b) { return hn::LoadU(df, b); }
HWY_INLINE VF LoadStep(const bfloat16* b) { return LoadFloat(b); }
HWY_INLINE VF LoadStep(const float16* b) { return LoadFloat(b); }
HWY_INLINE VF Accumulate(VF a, VF b, VF acc) { return hn::MulAdd(a, b, acc); }
HWY_INLINE VU BroadcastStep(const bfloat16* a) { return hn::Set(du, PairAt(a)); }
HWY_INLINE VU LoadStep(const uint32_t* b) { return hn::Load(du, b); }
HWY_INLINE VF Accumulate(VU a, VU b, VF acc) { return DotPairs(acc, a, b); }

// Elements of a step: one float or a pair of bfloat16.
template <class A>
constexpr int kPack = sizeof(A) == 2 ? 2 : 1;

// Where a(r, i) lies: rows apart and steps adjacent (a row of K), or rows adjacent and steps apart (a panel of V).
struct StepsAdjacent {
  ptrdiff_t row;  // elements
  template <class A>
  HWY_INLINE const A* At(const A* a, int r) const {
    return a + r * row;
  }
  template <class A>
  HWY_INLINE ptrdiff_t Step() const {
    return kPack<A>;
  }
};
struct RowsAdjacent {
  ptrdiff_t step;  // elements
  template <class A>
  HWY_INLINE const A* At(const A* a, int r) const {
    return a + r * kPack<A>;
  }
  template <class A>
  HWY_INLINE ptrdiff_t Step() const {
    return step;
  }
};
// Rows adjacent in panels of kTileRows, `panel` elements apart.
struct RowsInPanels {
  ptrdiff_t panel;
  template <class A>
  HWY_INLINE const A* At(const A* a, int r) const {
    return a + r / kTileRows * panel + r % kTileRows * kPack<A>;
  }
  template <class A>
  HWY_INLINE ptrdiff_t Step() const {
    return kTileRows * kPack<A>;
  }
};

// Memory that is needed soon, asked for a little before every step: `step` bytes.
struct Ahead {
  const char* at;
  ptrdiff_t step;
  HWY_INLINE void operator()(int) {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};
struct NothingBetween {
  HWY_INLINE void operator()(int) const {}
};

// Runs the tile and hands acc[r][c] to store(r, c, acc). n counts steps; `between`(i) is called before step i, for
// every kEvery-th i that as many steps follow.
template <int MR, int NR, int kEvery = 1, class A, class B, class Layout, class Store, class Between = NothingBetween>
HWY_INLINE void MultiplyTile(const A* HWY_RESTRICT a, Layout layout, const B* HWY_RESTRICT b, ptrdiff_t b_step, int n,
                             const Store& store, Between&& between = {}) {
  VF acc[MR][NR];
  MFA_UNROLL
  for (int r = 0; r < MR; ++r) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) acc[r][c] = hn::Zero(df);
  }
  const auto step = [&]() MFA_INLINE_LAMBDA {
    decltype(LoadStep(b)) bv[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) bv[c] = LoadStep(b + c * kLanes);
    MFA_UNROLL
    for (int r = 0; r < MR; ++r) {
      const auto av = BroadcastStep(layout.At(a, r));
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) acc[r][c] = Accumulate(av, bv[c], acc[r][c]);
    }
    a += layout.template Step<A>();
    b += b_step;
  };
  int i = 0;
  if constexpr (kEvery > 1) {
    for (; i + kEvery <= n; i += kEvery) {
      between(i);
      MFA_UNROLL_4
      for (int j = 0; j < kEvery; ++j) step();
    }
  }
  MFA_UNROLL_4  // for the branch predictor more than for the adder
      for (; i < n; ++i) {
    if constexpr (kEvery == 1) between(i);
    step();
  }
  MFA_UNROLL
  for (int r = 0; r < MR; ++r) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) store(r, c, acc[r][c]);
  }
}

// A panel of columns: out[(c / kTileRows) * panel_stride + r * kTileRows + c % kTileRows] = row r, column c, so that a
// tile that broadcasts kTileRows adjacent columns of each row reads memory in order (rows a power of two apart would
// share a few cache sets). Columns up to the next multiple of kTileRows are zero. Rows are read whole, one after the
// other: that is the order in which memory answers fastest.
constexpr ptrdiff_t PanelStride(int rows) { return static_cast<ptrdiff_t>(rows) * kTileRows + 16; }
constexpr size_t PanelFloats(int rows, int columns) {
  return static_cast<size_t>(PanelStride(rows)) * static_cast<size_t>((columns + kTileRows - 1) / kTileRows);
}
template <class T, class Rows>
HWY_INLINE void PackPanels(const Rows& rows, int lo, int hi, int columns, ptrdiff_t panel_stride, float* out) {
  const hn::CappedTag<float, kTileRows> d;
  const int whole = hn::MaxLanes(d) == kTileRows ? columns / kTileRows : 0;
  for (int r = lo; r < hi; ++r) {
    const T* row = rows.At(r);
    float* to = out + r * kTileRows;
    MFA_UNROLL_4
    for (int i = 0; i < whole; ++i, to += panel_stride) hn::StoreU(LoadFloat(d, row + i * kTileRows), d, to);
    for (int c = whole * kTileRows; c < columns; c += kTileRows, to += panel_stride)
      for (int i = 0; i < kTileRows; ++i) to[i] = c + i < columns ? to_float(row[c + i]) : 0.f;
  }
}
// The same of bfloat16 rows taken in pairs (2t, 2t + 1) for t in [lo / 2, hi / 2), lo and hi even: out[...][(t *
// kTileRows + c % kTileRows) * 2 + i] = rows[2t + i][c]. Rows outside [first, last) count as zero.
template <class Rows>
HWY_INLINE void PackPairPanels(const Rows& rows, int lo, int hi, int first, int last, int columns,
                               ptrdiff_t panel_stride, bfloat16* out) {
  const hn::CappedTag<uint32_t, kTileRows> d;
  static constexpr bfloat16 kZeros[640] = {};
  const int whole = hn::MaxLanes(d) == kTileRows ? columns / kTileRows : 0;
  for (int r = lo; r < hi; r += 2) {
    const bfloat16* even = r >= first ? rows.At(r) : kZeros;
    const bfloat16* odd = r + 1 < last ? rows.At(r + 1) : kZeros;
    bfloat16* to = out + r * kTileRows;
    int c = 0;
    if constexpr (kInterleavesRows && 2 * kTileRows == kLanes) {
      const hn::Half<DU> half;
      MFA_UNROLL_4
      for (; c + 4 <= whole; c += 4) {
        VU pairs[2];
        InterleaveRows(even + c * kTileRows, odd + c * kTileRows, pairs[0], pairs[1]);
        for (const VU x : pairs) {
          hn::StoreU(hn::LowerHalf(half, x), half, reinterpret_cast<uint32_t*>(to));
          hn::StoreU(hn::UpperHalf(half, x), half, reinterpret_cast<uint32_t*>(to + panel_stride));
          to += 2 * panel_stride;
        }
      }
    }
    for (; c < whole; ++c, to += panel_stride)
      hn::StoreU(LoadPairs(d, even + c * kTileRows, odd + c * kTileRows), d, reinterpret_cast<uint32_t*>(to));
    for (c *= kTileRows; c < columns; c += kTileRows, to += panel_stride)
      for (int i = 0; i < kTileRows; ++i) {
        to[2 * i] = c + i < columns ? even[c + i] : bfloat16{0};
        to[2 * i + 1] = c + i < columns ? odd[c + i] : bfloat16{0};
      }
  }
}

// Calls f.template operator()<MR>(r) for row tiles that cover [r, n): full tiles, then powers of two.
template <int MR, class F>
HWY_INLINE void ForRowTiles(int r, int n, const F& f) {
  for (; r + MR <= n; r += MR) f.template operator()<MR>(r);
  if constexpr (MR > 1) ForRowTiles<(MR > 8 ? 8 : MR > 4 ? 4 : MR > 2 ? 2 : 1)>(r, n, f);
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
