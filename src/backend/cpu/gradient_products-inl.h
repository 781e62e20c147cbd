// gradient_products-inl.h: the backward's sums over rows, for dK and dV, and over keys, for dQ. Weights (P or dS) are
// [kBackwardKeys][kBackwardRowTile]; zero is what a row does not see.

namespace mfa::cpu::MFA_ISA {
namespace {

// Rows of a tile: `count` of them, `stride` apart, `width` channels wide.
struct TileRows {
  const float* data;
  int stride, count, width;
};

template <int NR, class KeyOf>
HWY_NOINLINE void AddKeyColumns(const float* weights, const TileRows& rows, int c0, const BlockKeys& keys,
                                const KeyOf& key_of, float* out, int padded) {
  ForRowTiles<kChannelRows>(keys.lo, keys.hi, [&]<int MR>(int k) MFA_INLINE_LAMBDA {
    float* to[MR];  // looked up at once: the compiler must take it that a stored vector changes what key_of reads
    MFA_UNROLL
    for (int r = 0; r < MR; ++r) to[r] = out + key_of(k + r) * padded + c0;
    MultiplyTile<MR, NR>(weights + k * kBackwardRowTile, StepsAdjacent{kBackwardRowTile}, rows.data + c0, rows.stride,
                         rows.count, [&](int r, int c, VF acc) HWY_ATTR {
                           float* at = to[r] + c * kLanes;
                           hn::Store(hn::Add(hn::Load(df, at), acc), df, at);
                         });
  });
}

// out[key_of(k)][d] += sum_r weights[k][r] * rows[r][d]. `skip_zero`: non-finite rows must not reach keys that do not
// see them; the sums are the tile's.
template <class KeyOf>
void AddKeyGradients(const float* weights, const TileRows& rows, const BlockKeys& keys, bool skip_zero,
                     const KeyOf& key_of, float* out) {
  const int padded = RoundUp(rows.width, kLanes);
  if (HWY_UNLIKELY(skip_zero)) {
    for (int k = keys.lo; k < keys.hi; ++k)
      for (int d = 0; d < rows.width; ++d) {
        float sum = 0.f;
        for (int r = 0; r < rows.count; ++r) {
          const float weight = weights[k * kBackwardRowTile + r];
          if (weight != 0.f) sum = __builtin_fmaf(weight, rows.data[r * rows.stride + d], sum);
        }
        out[key_of(k) * padded + d] += sum;
      }
    return;
  }
  ForRowTiles<kChannelVectors>(0, padded / kLanes, [&]<int NR>(int c0) HWY_ATTR {
    AddKeyColumns<NR>(weights, rows, c0 * kLanes, keys, key_of, out, padded);
  });
}

// out[d][r] += sum_k k[k][d] * weights[k][r], r < width, where non-finite keys must not reach rows that do not see
// them; the sums are those of AddQueryGradients.
inline void AddVisibleQueryGradients(const float* weights, int width, const BlockKeys& keys, const float* k,
                                     ptrdiff_t k_stride, int D, float* out) {
  for (int d = 0; d < D; ++d)
    for (int r = 0; r < width; ++r) {
      float sum = 0.f;
      for (int i = keys.lo; i < keys.hi; ++i) {
        const float weight = weights[i * kBackwardRowTile + r];
        if (weight != 0.f) sum = __builtin_fmaf(k[i * k_stride + d], weight, sum);
      }
      out[static_cast<ptrdiff_t>(d) * width + r] += sum;
    }
}

// The same for finite keys, in panels. `first`: `out` holds nothing yet.
template <int NR>
HWY_NOINLINE void AddQueryGradients(const float* weights, const BlockKeys& keys, const float* panels, int D, bool first,
                                    float* out) {
  constexpr int kWidth = NR * kLanes;
  ForRowTiles<kTileRows>(0, D, [&]<int MR>(int d) MFA_INLINE_LAMBDA {
    const float* k = panels + d / kTileRows * kKeyPanel + keys.lo * kTileRows + d % kTileRows;
    MultiplyTile<MR, NR>(k, RowsAdjacent{kTileRows}, weights + keys.lo * kBackwardRowTile, kBackwardRowTile,
                         keys.hi - keys.lo, [&](int r, int c, VF acc) HWY_ATTR {
                           float* at = out + (d + r) * kWidth + c * kLanes;
                           hn::Store(first ? acc : hn::Add(hn::Load(df, at), acc), df, at);
                         });
  });
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
