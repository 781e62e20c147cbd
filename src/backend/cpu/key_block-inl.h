// key_block-inl.h: one block of keys and values as the tiles read it: in place where its rows lie a fixed step apart in
// the type of the products, else brought into scratch, widened, rotated or gathered.

namespace mfa::cpu::MFA_ISA {
namespace {

// Keys or values of a block as float rows: in place for float32, else widened into `scratch`.
template <class T>
HWY_INLINE const float* WidenBlock(const StridedRows<T>& x, int lo, int hi, int width, float* scratch,
                                   ptrdiff_t* stride) {
  if constexpr (sizeof(T) == 4) {
    *stride = x.step;
    return x.first;
  } else {
    *stride = RoundUp(width, kLanes);
    for (int k = lo; k < hi; ++k) WidenRow(x.At(k), width, scratch + k * *stride);
    return scratch;
  }
}

// The keys [lo, hi) of a block as float rows in `scratch`, rotated where the problem says so.
template <class T>
HWY_INLINE void GatherKeys(const AttentionProblem& p, int b, const KeyList& list, const T* const* rows, int lo, int hi,
                           float* scratch, ptrdiff_t stride) {
  for (int c = lo; c < hi; ++c) {
    WidenRow(rows[c], p.D, scratch + c * stride);
    if (RotatesKeys(p) && !(list.has_padding && list.padding[c])) RotateKey(p, b, list.key[c], scratch + c * stride);
  }
}

// Whether rows must be found one by one: those of a list always, others by what the problem is.
HWY_INLINE bool GathersRows(const AttentionProblem& p) { return p.pages.table; }

// One block of a tile and, where its rows are found one by one, where they lie.
struct BlockRows {
  TileBlock block;
  const void* k[kKeyBlock];
  const void* v[kKeyBlock];
};

// A tile and a block of its keys that come after those which are computed.
struct Upcoming {
  TileMap::Place place;
  int block = 0;
};

// The most keys of a tile of the first product.
constexpr int kMostTileRows = kTallRows<1>;

struct KeyBlock {
  int index;       // of the block
  const float* k;  // rows of D; of entry c
  ptrdiff_t k_stride;
  const float* const* k_rows;  // where the rows lie instead, mostly k_stride apart; or null
  const float* v;              // panels
  const void* v_rows;          // or rows of the problem's type, v_step apart, from the first of the block on
  ptrdiff_t v_step;
  const bfloat16* k16;  // the same for native bfloat16: rows and panels of pairs
  ptrdiff_t k16_stride;
  const bfloat16* const* k16_rows;
  const bfloat16* v16;
};
constexpr ptrdiff_t kValuePanel = PanelStride(kKeyBlock);
template <class A>
HWY_INLINE const A* PanelColumn(const A* panels, int key, int channel) {
  return panels + channel / kTileRows * kValuePanel + key * kTileRows + channel % kTileRows * kPack<A>;
}

// MultiplyTile for a block that holds non-finite values: for each row (lane) the values of keys that it does not see
// are replaced by zero, which leaves the order and the rounding of the others as they are.
template <int MR, int NR, class A, class B, class Store>
HWY_INLINE void MultiplyVisibleTile(const A* a, int lo, const B* b, int n, const uint8_t* seen, const Store& store) {
  constexpr int kWidth = NR * kLanes;
  alignas(64) A clean[kKeyBlock * MR];
  alignas(64) float out[MR][kWidth], lanes[kLanes];
  for (int r = 0; r < kWidth; ++r) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < MR * kPack<A>; ++j) {
        const int key = lo + i * kPack<A> + j % kPack<A>;
        const A* from = RowsInPanels{kValuePanel}.At(a, j / kPack<A>) + i * kTileRows * kPack<A> + j % kPack<A>;
        clean[i * MR * kPack<A> + j] = seen[key * kWidth + r] ? *from : A{};
      }
    MultiplyTile<MR, 1>(clean, RowsAdjacent{MR * kPack<A>}, b + r / kLanes * kLanes, kWidth, n,
                        [&](int i, int, VF acc) HWY_ATTR {
                          hn::Store(acc, df, lanes);
                          out[i][r] = lanes[r % kLanes];
                        });
  }
  for (int i = 0; i < MR; ++i)
    for (int c = 0; c < NR; ++c) store(i, c, hn::Load(df, out[i] + c * kLanes));
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
