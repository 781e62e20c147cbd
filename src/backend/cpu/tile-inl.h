// tile-inl.h: the register tile that every matrix product of the CPU backend is made of.
//
//   acc[r][lane] = sum_i a(r, i) * b[i * b_step + lane],  r < MR, lane < NR * kLanes, i < n, in the order of i
//
// a is broadcast from memory, so it is read where it lies: keys and values are never packed. b is a packed panel.

namespace mfa::cpu::MFA_ISA {
namespace {

// Where a(r, i) lies: rows apart and steps adjacent (a row of K), or rows adjacent and steps apart (a column of V).
struct StepsAdjacent {
  ptrdiff_t row;
  template <int MR>
  static HWY_INLINE const float* At(const float* a, const StepsAdjacent& s, int r) {
    return a + r * s.row;
  }
  HWY_INLINE ptrdiff_t Step() const { return 1; }
};
struct RowsAdjacent {
  ptrdiff_t step;
  template <int MR>
  static HWY_INLINE const float* At(const float* a, const RowsAdjacent&, int r) {
    return a + r;
  }
  HWY_INLINE ptrdiff_t Step() const { return step; }
};

// Runs the tile and hands acc[r][c] to store(r, c, acc).
template <int MR, int NR, class Layout, class Store>
HWY_INLINE void MultiplyTile(const float* HWY_RESTRICT a, Layout layout, const float* HWY_RESTRICT b, ptrdiff_t b_step,
                             int n, const Store& store) {
  VF acc[MR][NR];
  MFA_UNROLL
  for (int r = 0; r < MR; ++r) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) acc[r][c] = hn::Zero(df);
  }
  MFA_NO_UNROLL
  for (int i = 0; i < n; ++i) {
    VF bv[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) bv[c] = hn::Load(df, b + c * kLanes);
    MFA_UNROLL
    for (int r = 0; r < MR; ++r) {
      const VF av = hn::Set(df, *Layout::template At<MR>(a, layout, r));
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) acc[r][c] = hn::MulAdd(av, bv[c], acc[r][c]);
    }
    a += layout.Step();
    b += b_step;
  }
  MFA_UNROLL
  for (int r = 0; r < MR; ++r) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) store(r, c, acc[r][c]);
  }
}

// A panel of columns: out[(c / kTileRows) * panel_stride + r * kTileRows + c % kTileRows] = rows[r][c], so that a tile
// that broadcasts kTileRows adjacent columns of each row reads memory in order (rows a power of two apart would share
// a few cache sets). Columns up to the next multiple of kTileRows are zero. Writes kLanes floats past a panel's end.
constexpr ptrdiff_t PanelStride(int rows) { return static_cast<ptrdiff_t>(rows) * kTileRows + 16; }
constexpr size_t PanelFloats(int rows, int columns) {
  return static_cast<size_t>(PanelStride(rows)) * static_cast<size_t>((columns + kTileRows - 1) / kTileRows);
}
template <class T>
HWY_INLINE void PackPanels(const T* in, ptrdiff_t stride, int lo, int hi, int columns, ptrdiff_t panel_stride,
                           float* out) {
  static_assert(kTileRows <= 8);
  const hn::CappedTag<float, 8> d8;
  for (int r = lo; r < hi; ++r) {
    const T* row = in + r * stride;
    float* to = out + r * kTileRows;
    int c = 0;
    if constexpr (hn::MaxLanes(d8) >= kTileRows) {
      // Whole vectors: what runs over into the next row of the panel is overwritten when that row comes.
      for (; c + 8 <= columns; c += kTileRows, to += panel_stride) hn::StoreU(LoadFloat(d8, row + c), d8, to);
    }
    for (; c < columns; c += kTileRows, to += panel_stride)
      for (int i = 0; i < kTileRows; ++i) to[i] = c + i < columns ? to_float(row[c + i]) : 0.f;
  }
}

// Calls f.template operator()<MR>(r) for row tiles that cover [0, n): full tiles, then halves.
template <int MR, class F>
HWY_INLINE void ForRowTiles(int r, int n, const F& f) {
  for (; r + MR <= n; r += MR) f.template operator()<MR>(r);
  if constexpr (MR > 1) ForRowTiles<MR / 2>(r, n, f);
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
