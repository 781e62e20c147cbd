// gradient_products-inl.h: the backward's sums over rows, for dK and dV, and over keys, for dQ. Weights (P or dS) are
// [kBackwardKeys][kBackwardRowTile]; zero is what a row does not see. Elements are those of BackwardScratch.

namespace mfa::cpu::MFA_ISA {
namespace {

// Rows of a tile: `count` of them, whole vectors, their steps `stride` lanes apart, `width` channels wide. `seen`: the
// keys of each column group of rows.
template <class A>
struct TileRows {
  const Lane<A>* data;
  int stride, count, width;
  const BlockKeys* seen;

  // The rows whose groups see some of the keys [k, end).
  HWY_INLINE void Seeing(int k, int end, int& first, int& last) const {
    const auto sees = [&](int r) { return seen[r / kGroupRows].lo < end && seen[r / kGroupRows].hi > k; };
    first = 0;
    last = count;
    while (first < last && !sees(first)) first += kGroupRows;
    while (last > first && !sees(last - 1)) last = (last - 1) / kGroupRows * kGroupRows;
    last = Max(first, last);
  }
};

template <int NR, class A, class KeyOf>
HWY_NOINLINE void AddKeyColumns(const A* weights, const TileRows<A>& rows, int c0, const BlockKeys& keys,
                                const KeyOf& key_of, float* out, int padded) {
  ForRowTiles<kChannelRows>(keys.lo, keys.hi, [&]<int MR>(int k) MFA_INLINE_LAMBDA {
    float* to[MR];  // looked up at once: the compiler must take it that a stored vector changes what key_of reads
    MFA_UNROLL
    for (int r = 0; r < MR; ++r) to[r] = out + key_of(k + r) * padded + c0;
    int first, last;
    rows.Seeing(k, k + MR, first, last);
    MultiplyTile<MR, NR>(weights + k * kBackwardRowTile + first, StepsAdjacent{kBackwardRowTile},
                         rows.data + first / kPack<A> * rows.stride + c0, rows.stride, (last - first) / kPack<A>,
                         [&](int r, int c, VF acc) HWY_ATTR {
                           float* at = to[r] + c * kLanes;
                           hn::Store(hn::Add(hn::Load(df, at), acc), df, at);
                         });
  });
}

// x where the weight, of each half of a pair on its own, is not zero, and zero elsewhere.
HWY_INLINE VF Weighted(VF weight, VF x) { return hn::IfThenZeroElse(hn::Eq(weight, hn::Zero(df)), x); }
HWY_INLINE VU Weighted(VU weight, VU x) {
  const hn::Repartition<uint16_t, DU> d16;
  const auto size = hn::Add(hn::BitCast(d16, weight), hn::BitCast(d16, weight));  // without the sign
  return hn::BitCast(du, hn::IfThenZeroElse(hn::Eq(size, hn::Zero(d16)), hn::BitCast(d16, x)));
}

// out[key_of(k)][d] += sum_r weights[k][r] * rows[r][d]. `skip_zero`: non-finite rows must not reach keys that do not
// see them; the sums are the tile's.
template <class A, class KeyOf>
void AddKeyGradients(const A* weights, const TileRows<A>& rows, const BlockKeys& keys, bool skip_zero,
                     const KeyOf& key_of, float* out) {
  const int padded = RoundUp(rows.width, kLanes);
  if (HWY_UNLIKELY(skip_zero)) {
    for (int k = keys.lo; k < keys.hi; ++k)
      for (int d = 0; d < padded; d += kLanes) {
        VF sum = hn::Zero(df);
        for (int r = 0; r < rows.count; r += kPack<A>) {
          const auto weight = BroadcastStep(weights + k * kBackwardRowTile + r);
          const auto x = LoadStep(rows.data + r / kPack<A> * rows.stride + d);
          sum = Accumulate(weight, Weighted(weight, x), sum);
        }
        float* at = out + key_of(k) * padded + d;
        hn::Store(hn::Add(hn::Load(df, at), sum), df, at);
      }
    return;
  }
  ForRowTiles<kChannelVectors>(0, padded / kLanes, [&]<int NR>(int c0) HWY_ATTR {
    AddKeyColumns<NR>(weights, rows, c0 * kLanes, keys, key_of, out, padded);
  });
}

// Column d of the key panels, from entry `key` on.
template <class A>
HWY_INLINE const A* KeyColumn(const A* panels, int key, int d) {
  return panels + d / kTileRows * kKeyPanel + key * kTileRows + d % kTileRows * kPack<A>;
}

// out[d][r] += sum_k k[k][d] * weights[k][r] for finite keys in whole steps, r < NR * kLanes; `weights` has its steps
// along the keys. `first`: `out` holds nothing yet.
template <int NR, class A>
HWY_NOINLINE void AddQueryGradients(const Lane<A>* weights, const BlockKeys& keys, const A* panels, int D, bool first,
                                    float* out) {
  constexpr int kWidth = NR * kLanes;
  const int lo = keys.lo / kPack<A>, hi = (keys.hi + kPack<A> - 1) / kPack<A>;
  ForRowTiles<kTileRows>(0, D, [&]<int MR>(int d) MFA_INLINE_LAMBDA {
    MultiplyTile<MR, NR>(KeyColumn(panels, lo * kPack<A>, d), RowsAdjacent{kTileRows * kPack<A>},
                         weights + lo * kBackwardRowTile, kBackwardRowTile, hi - lo,
                         [&](int r, int c, VF acc) HWY_ATTR {
                           float* at = out + (d + r) * kWidth + c * kLanes;
                           hn::Store(first ? acc : hn::Add(hn::Load(df, at), acc), df, at);
                         });
  });
}

// The same for `width` rows where non-finite keys must not reach rows that do not see them; `out` holds something.
template <class A>
void AddVisibleQueryGradients(const Lane<A>* weights, int width, const BlockKeys& keys, const A* panels, int D,
                              float* out) {
  const int lo = keys.lo / kPack<A>, hi = (keys.hi + kPack<A> - 1) / kPack<A>;
  for (int d = 0; d < D; ++d)
    for (int r = 0; r < width; r += kLanes) {
      VF sum = hn::Zero(df);
      for (int i = lo; i < hi; ++i) {
        const auto weight = LoadStep(weights + i * kBackwardRowTile + r);
        sum = Accumulate(Weighted(weight, BroadcastStep(KeyColumn(panels, i * kPack<A>, d))), weight, sum);
      }
      float* at = out + static_cast<ptrdiff_t>(d) * width + r;
      hn::Store(hn::Add(hn::Load(df, at), sum), df, at);
    }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
