// output_rows-inl.h: the second product of a few rows whose keys are all in one block, with lanes = channels.

namespace mfa::cpu::MFA_ISA {
namespace {

// Rows of a tile: with as many as of other products with lanes = channels the compiler would run out of 32 registers.
constexpr int kOutputRows = kTileRows == 8 ? 4 : kChannelRows;

// rows[r] = (sum_k P[k][r] v[k]) * weight[r] * inverse[r] for r < count, k < keys: values are read where they lie and
// rows are written as they are, where the product with lanes = rows needs panels of values and transposes its result.
// Each element has the same operations in the same order in both. `channels` is a multiple of kLanes; `between`(n) is
// called before n elements are computed.
template <class T, class Between>
HWY_INLINE void OutputRows(const float* P, ptrdiff_t width, const StridedRows<T>& v, int keys, int channels,
                           const float* weight, const float* inverse, T* const* rows, int count,
                           const Between& between) {
  ForRowTiles<kOutputRows>(0, count, [&]<int MR>(int r0) HWY_ATTR {
    ForRowTiles<kChannelVectors>(0, channels / kLanes, [&]<int NR>(int c0) HWY_ATTR {
      between(MR * NR * kLanes);
      MultiplyTile<MR, NR>(P + r0, RowsAdjacent{width}, v.first + c0 * kLanes, v.step, keys,
                           [&](int r, int c, VF acc) HWY_ATTR {
                             const VF w = hn::Set(df, weight[r0 + r]), i = hn::Set(df, inverse[r0 + r]);
                             acc = hn::MulAdd(hn::Mul(acc, w), i, hn::Zero(df));
                             StoreFloat(acc, rows[r0 + r] + (c0 + c) * kLanes);
                           });
    });
  });
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
