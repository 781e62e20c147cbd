// key_mean-inl.h: an average of the keys that a row sees, to correct its query gradient by.
//
// dQ = scale dS K. Each row of dS sums to dlse + delta P_sink when delta is exact, but delta comes from the rounded
// output, so the sum is off by some E and dQ by scale E (P K): large where keys share an offset. The average of a few
// visible keys stands for P K, whose common part it has.

namespace mfa::cpu::MFA_ISA {
namespace {

// The mean of up to kMeanKeys keys, evenly spaced among those that row `r` of the tile sees, into `out` [D]. Returns
// false if it sees none of the keys looked at. Only visible keys are read.
constexpr int kMeanKeys = 8;
template <class T>
HWY_INLINE bool MeanOfVisibleKeys(const AttentionProblem& p, const RowTile& t, int r, float* out) {
  const int64_t begin = t.begin[r], count = Max<int64_t>(0, int64_t{t.end[r]} - begin);
  const T* rows[kMeanKeys];
  int64_t keys[kMeanKeys];
  int n = 0;
  for (int64_t i = 0; i < Min<int64_t>(count, kMeanKeys); ++i) {
    const int64_t key = begin + count * i / Min<int64_t>(count, kMeanKeys);
    if (p.mask.data && !p.mask.data[t.b * p.mask.stride[0] + t.head[r] * p.mask.stride[1] +
                                    t.query[r] * p.mask.stride[2] + key * p.mask.stride[3]])
      continue;
    if (p.bias.data && load_as_float(p.bias.data, p.bias.dtype,
                                     t.b * p.bias.stride[0] + t.head[r] * p.bias.stride[1] +
                                         t.query[r] * p.bias.stride[2] + key * p.bias.stride[3]) == -kInf)
      continue;
    if (TileKeys::cuts(p) && !row_sees(p, t.b, t.head[r], t.query[r], static_cast<int32_t>(key))) continue;
    keys[n] = key;
    rows[n++] = KeyRow<T>(p, p.k, t.b, t.kv_head, key);
  }
  if (n == 0) return false;
  const float factor = 1.f / static_cast<float>(n);
  if (RotatesKeys(p)) {
    alignas(64) float row[640];
    for (int d = 0; d < p.D; ++d) out[d] = 0.f;
    for (int i = 0; i < n; ++i) {
      WidenRow(rows[i], p.D, row);
      RotateKey(p, t.b, keys[i], row);
      for (int d = 0; d < p.D; ++d) out[d] += row[d] * factor;
    }
    return true;
  }
  int d = 0;
  for (; d + kLanes <= p.D; d += kLanes) {
    VF sum = hn::Zero(df);
    for (int i = 0; i < n; ++i) sum = hn::Add(sum, LoadFloat(rows[i] + d));
    hn::StoreU(hn::Mul(sum, hn::Set(df, factor)), df, out + d);
  }
  for (; d < p.D; ++d) {
    float sum = 0.f;
    for (int i = 0; i < n; ++i) sum += to_float(rows[i][d]);
    out[d] = sum * factor;
  }
  return true;
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
