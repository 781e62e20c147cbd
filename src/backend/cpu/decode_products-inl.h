// decode_products-inl.h: the products of few query rows with a block of keys and of values: lanes = keys for the
// scores, channels for the output.
//
// Keys are transposed in registers and the products accumulate in the same order as in the tiled kernel, so a row has
// the same bits in both.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kMaxDecodeRows = kTileRows;     // the scores of all rows fit in the registers
constexpr int kScoreStride = kKeyBlock + 16;  // room for a whole vector from any key of the block
static_assert(kLanes <= 16);

// Channels [d, d + 2 * kLanes) of kLanes rows as pairs.
HWY_INLINE void LoadPairRows(const bfloat16* const* rows, int d, VF (&pairs)[kLanes]) {
  const hn::Repartition<uint16_t, DF> d16;
  MFA_UNROLL
  for (int i = 0; i < kLanes; ++i)
    pairs[i] = hn::BitCast(df, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(rows[i] + d)));
}

// Vectors of keys that G rows are multiplied with together: the sums of one are a chain, several hide its latency.
template <int G>
constexpr int kKeyVectors = G >= 4 ? 1 : 4 / G;

// S[g][k] for NK vectors of keys: rows[] point at the keys, q[] at the queries.
template <int G, int NK, class T>
HWY_INLINE void DecodeScores(const T* const* rows, const float* q, ptrdiff_t q_stride, int D, float* S,
                             ptrdiff_t s_stride) {
  VF acc[NK][G];
  MFA_UNROLL
  for (int n = 0; n < NK; ++n) {
    MFA_UNROLL
    for (int g = 0; g < G; ++g) acc[n][g] = hn::Zero(df);
  }
  int d = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {  // transposed as pairs, widened afterwards: half the shuffles
    for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
      MFA_UNROLL
      for (int n = 0; n < NK; ++n) {
        VF pairs[kLanes];
        LoadPairRows(rows + n * kLanes, d, pairs);
        Transpose(pairs);
        MFA_UNROLL
        for (int j = 0; j < kLanes; ++j) {
          const VU bits = hn::BitCast(du, pairs[j]);
          const VF even = hn::BitCast(df, hn::ShiftLeft<16>(bits));
          const VF odd = hn::BitCast(df, hn::And(bits, hn::Set(du, 0xffff0000u)));
          MFA_UNROLL
          for (int g = 0; g < G; ++g) {
            acc[n][g] = hn::MulAdd(even, hn::Set(df, q[g * q_stride + d + 2 * j]), acc[n][g]);
            acc[n][g] = hn::MulAdd(odd, hn::Set(df, q[g * q_stride + d + 2 * j + 1]), acc[n][g]);
          }
        }
      }
    }
  }
  for (; d + kLanes <= D; d += kLanes) {
    MFA_UNROLL
    for (int n = 0; n < NK; ++n) {
      VF k[kLanes];
      MFA_UNROLL
      for (int i = 0; i < kLanes; ++i) k[i] = LoadFloat(rows[n * kLanes + i] + d);
      Transpose(k);
      MFA_UNROLL
      for (int j = 0; j < kLanes; ++j) {
        MFA_UNROLL
        for (int g = 0; g < G; ++g) acc[n][g] = hn::MulAdd(k[j], hn::Set(df, q[g * q_stride + d + j]), acc[n][g]);
      }
    }
  }
  for (; d < D; ++d) {
    MFA_UNROLL
    for (int n = 0; n < NK; ++n) {
      alignas(64) float column[kLanes];
      for (int i = 0; i < kLanes; ++i) column[i] = to_float(rows[n * kLanes + i][d]);
      const VF k = hn::Load(df, column);
      MFA_UNROLL
      for (int g = 0; g < G; ++g) acc[n][g] = hn::MulAdd(k, hn::Set(df, q[g * q_stride + d]), acc[n][g]);
    }
  }
  MFA_UNROLL
  for (int n = 0; n < NK; ++n) {
    MFA_UNROLL
    for (int g = 0; g < G; ++g) hn::StoreU(acc[n][g], df, S + g * s_stride + n * kLanes);
  }
}

// The same with pairs of channels: the products of bfloat16 pairs, in the order of the tiled kernel.
template <int G, int NK>
HWY_INLINE void DecodePairScores(const bfloat16* const* rows, const uint32_t* q, ptrdiff_t q_stride, int pairs,
                                 VF scale, float* S, ptrdiff_t s_stride) {
  VF acc[NK][G];
  MFA_UNROLL
  for (int n = 0; n < NK; ++n) {
    MFA_UNROLL
    for (int g = 0; g < G; ++g) acc[n][g] = hn::Zero(df);
  }
  int d = 0;
  for (; d + kLanes <= pairs; d += kLanes) {
    MFA_UNROLL
    for (int n = 0; n < NK; ++n) {
      VF k[kLanes];
      LoadPairRows(rows + n * kLanes, 2 * d, k);
      Transpose(k);
      MFA_UNROLL
      for (int j = 0; j < kLanes; ++j) {
        MFA_UNROLL
        for (int g = 0; g < G; ++g)
          acc[n][g] = DotPairs(acc[n][g], hn::BitCast(du, k[j]), hn::Set(du, q[g * q_stride + d + j]));
      }
    }
  }
  for (; d < pairs; ++d) {
    MFA_UNROLL
    for (int n = 0; n < NK; ++n) {
      alignas(64) uint32_t column[kLanes];
      for (int i = 0; i < kLanes; ++i) column[i] = PairAt(rows[n * kLanes + i] + 2 * d);
      MFA_UNROLL
      for (int g = 0; g < G; ++g)
        acc[n][g] = DotPairs(acc[n][g], hn::Load(du, column), hn::Set(du, q[g * q_stride + d]));
    }
  }
  MFA_UNROLL
  for (int n = 0; n < NK; ++n) {
    MFA_UNROLL
    for (int g = 0; g < G; ++g) hn::StoreU(hn::Mul(acc[n][g], scale), df, S + g * s_stride + n * kLanes);
  }
}

// The values of the next block, fetched evenly by the passes over the channels of this one: pass c of `passes` fetches
// the rows k with k % passes in [c, c + share). None if width is 0.
template <class Rows>
struct NextBlock {
  Rows rows;  // of the entry k of the next block
  int width = 0, passes = 1, pass = 0, share = 1;
  HWY_INLINE void Fetch(int k) const {
    if (width == 0) return;
    const int turn = k % passes;
    if (turn >= pass && turn < pass + share) rows.Fetch(k, width);
  }
};

// out[g][d .. d + NV * kLanes) = sum_k P[g][k] V[k][d ..] for k in [lo, hi); values past `width` are read as zero.
template <int G, int NV, class Rows, class Next>
HWY_INLINE void DecodeValues(const Rows& v, int lo, int hi, const float* P, float* out, ptrdiff_t out_stride,
                             const Next& next) {
  VF acc[G][NV];
  MFA_UNROLL
  for (int g = 0; g < G; ++g) {
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) acc[g][c] = hn::Zero(df);
  }
  for (int k = lo; k < hi; ++k) {
    const auto* row = v.At(k);
    next.Fetch(k);
    VF value[NV];
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) value[c] = LoadFloat(row + c * kLanes);
    MFA_UNROLL
    for (int g = 0; g < G; ++g) {
      const VF w = hn::Set(df, P[g * kScoreStride + k]);
      MFA_UNROLL
      for (int c = 0; c < NV; ++c) acc[g][c] = hn::MulAdd(value[c], w, acc[g][c]);
    }
  }
  MFA_UNROLL
  for (int g = 0; g < G; ++g) {
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) hn::Store(acc[g][c], df, out + g * out_stride + c * kLanes);
  }
}

// The same for pairs of keys [lo, hi), both even; `P` holds a pair of probabilities for each pair of keys. A key
// outside [first, last) is not read.
template <int G, int NV, class Rows, class Next>
HWY_INLINE void DecodePairValues(const Rows& v, int lo, int hi, int first, int last, const uint32_t* P, float* out,
                                 ptrdiff_t out_stride, const Next& next) {
  static constexpr bfloat16 kZeros[NV * kLanes] = {};
  VF acc[G][NV];
  MFA_UNROLL
  for (int g = 0; g < G; ++g) {
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) acc[g][c] = hn::Zero(df);
  }
  for (int k = lo; k < hi; k += 2) {
    const bfloat16* even = k >= first ? v.At(k) : kZeros;
    const bfloat16* odd = k + 1 < last ? v.At(k + 1) : kZeros;
    next.Fetch(k);
    next.Fetch(k + 1);
    VU value[NV];
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) value[c] = LoadPairs(du, even + c * kLanes, odd + c * kLanes);
    MFA_UNROLL
    for (int g = 0; g < G; ++g) {
      const VU w = hn::Set(du, P[g * kScoreStride + k / 2]);
      MFA_UNROLL
      for (int c = 0; c < NV; ++c) acc[g][c] = DotPairs(acc[g][c], value[c], w);
    }
  }
  MFA_UNROLL
  for (int g = 0; g < G; ++g) {
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) hn::Store(acc[g][c], df, out + g * out_stride + c * kLanes);
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
