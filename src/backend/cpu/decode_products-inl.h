// decode_products-inl.h: the products of few query rows with a block of keys and of values: lanes = keys for the
// scores, channels for the output.
//
// Keys are transposed and the products accumulate in the same order as in the tiled kernel, so a row has the same bits
// in both. What is read next is fetched between the multiply-adds.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kMaxDecodeRows = 8;
template <class T>
constexpr int kValueChunk = 128 / sizeof(T);  // keys whose values are added up before the next
constexpr int kKeysOfFetch = 4;               // values that are added between two calls of Fetch()
constexpr int kScoreStride = kKeyBlock + 16;  // room for a whole vector from any key of the block
static_assert(kLanes <= 16);

// Lane i of v[j] is the 32-bit element c + j of rows[i].
template <class T>
HWY_INLINE void LoadColumns(const T* const* rows, int c, VF (&v)[kLanes]) {
  if constexpr (kLanes == 8) {  // halves of two rows in a vector spare half of the transpose's steps
    const hn::Half<DF> half;
    const auto load = [&](int i, int part)
                          HWY_ATTR { return hn::LoadU(half, reinterpret_cast<const float*>(rows[i] + c) + 4 * part); };
    MFA_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] = hn::Combine(df, load(i + 4, 0), load(i, 0));
      v[i + 4] = hn::Combine(df, load(i + 4, 1), load(i, 1));
    }
    TransposeBlocks(df, v);
    TransposeBlocks(df, v + 4);
  } else {
    MFA_UNROLL
    for (int i = 0; i < kLanes; ++i) v[i] = hn::LoadU(df, reinterpret_cast<const float*>(rows[i] + c));
    Transpose(v);
  }
}

HWY_INLINE VF BroadcastTerm(const float* q) { return hn::Set(df, *q); }
HWY_INLINE VU BroadcastTerm(const uint32_t* q) { return hn::Set(du, *q); }

// The keys rows[0 .. kLanes) in steps of some channels. kPairs: pairs of channels stay together.
template <class T, bool kPairs>
struct KeyColumns {
  static constexpr bool kHalves = std::is_same_v<T, bfloat16>;  // transposed as pairs: half the shuffles
  static constexpr int kStep = kHalves ? 2 * kLanes : kLanes;   // channels

  // Channels [d, d + kStep): of halves a pair in each lane.
  static HWY_INLINE void Load(const T* const* rows, int d, VF (&k)[kLanes]) {
    if constexpr (sizeof(T) == 4 || kHalves) {
      LoadColumns(rows, d, k);
    } else {
      MFA_UNROLL
      for (int i = 0; i < kLanes; ++i) k[i] = LoadFloat(rows[i] + d);
      Transpose(k);
    }
  }
  // Calls use(term, x) for the one or two terms of column j of a step.
  template <class Use>
  static HWY_INLINE void Terms(int j, VF k, const Use& use) {
    if constexpr (kPairs) {
      use(j, hn::BitCast(du, k));
    } else if constexpr (kHalves) {
      const VU bits = hn::BitCast(du, k);
      use(2 * j, hn::BitCast(df, hn::ShiftLeft<16>(bits)));
      use(2 * j + 1, hn::BitCast(df, hn::And(bits, hn::Set(du, 0xffff0000u))));
    } else {
      use(j, k);
    }
  }
  // The term at channel d, for channels that fill no step: a channel, or a pair.
  static constexpr int kTerm = kPairs ? 2 : 1;
  static HWY_INLINE auto Last(const T* const* rows, int d) {
    if constexpr (kPairs) {
      alignas(64) uint32_t column[kLanes];
      for (int i = 0; i < kLanes; ++i) column[i] = PairAt(rows[i] + d);
      return hn::Load(du, column);
    } else {
      alignas(64) float column[kLanes];
      for (int i = 0; i < kLanes; ++i) column[i] = to_float(rows[i][d]);
      return hn::Load(df, column);
    }
  }
};

// Up to this many rows are multiplied with a step of the transposed keys at a time, their sums in registers; more, tile
// by tile, with whole keys that are written down.
constexpr int kFewRows = 2;
// Vectors of keys that `rows` rows take together: the sums of one are a chain, several hide its latency.
HWY_INLINE constexpr int KeyVectors(int rows) { return rows <= kFewRows ? 8 / rows : kTileVectors; }

// The scores of NK vectors of keys, rows[i] of lane i: query(n, g, term) is what row g of the queries has for vector n,
// and store(n, g, sums) takes the sums of its products.
template <int G, int NK, bool kPairs, class T, class Query, class Store>
HWY_INLINE void DecodeScores(const T* const* rows, UpcomingRows& upcoming, int D, const Query& query,
                             const Store& store) {
  using Columns = KeyColumns<T, kPairs>;
  VF acc[NK][G];
  MFA_UNROLL
  for (int n = 0; n < NK; ++n) {
    MFA_UNROLL
    for (int g = 0; g < G; ++g) acc[n][g] = hn::Zero(df);
  }
  const auto add = [&](int n, int term, auto k) MFA_INLINE_LAMBDA {
    MFA_UNROLL
    for (int g = 0; g < G; ++g) acc[n][g] = Accumulate(k, query(n, g, term), acc[n][g]);
  };
  int d = 0;
  for (; d + Columns::kStep <= D; d += Columns::kStep) {
    VF k[NK][kLanes];  // more than the registers hold, so that all chains advance together
    MFA_NO_UNROLL
    for (int n = 0; n < NK; ++n) {
      upcoming.FetchNear(1);
      Columns::Load(rows + n * kLanes, d, k[n]);
    }
    MFA_NO_UNROLL
    for (int j = 0; j < kLanes; ++j) {
      MFA_UNROLL
      for (int n = 0; n < NK; ++n)
        Columns::Terms(j, k[n][j], [&](int term, auto x) MFA_INLINE_LAMBDA { add(n, d / Columns::kTerm + term, x); });
    }
  }
  for (; d < D; d += Columns::kTerm) {
    MFA_UNROLL
    for (int n = 0; n < NK; ++n) add(n, d / Columns::kTerm, Columns::Last(rows + n * kLanes, d));
  }
  MFA_UNROLL
  for (int n = 0; n < NK; ++n) {
    MFA_UNROLL
    for (int g = 0; g < G; ++g) store(n, g, acc[n][g]);
  }
}

// out[term][n * kLanes + i] = that term of the key rows[n * kLanes + i]: what MultiplyTile() takes.
template <int NK, bool kPairs, class T>
HWY_INLINE void PackColumns(const T* const* rows, UpcomingRows& upcoming, int D, float* out) {
  using Columns = KeyColumns<T, kPairs>;
  const auto store = [&](int n, int term, auto x)
                         MFA_INLINE_LAMBDA { hn::Store(hn::BitCast(df, x), df, out + (term * NK + n) * kLanes); };
  MFA_NO_UNROLL
  for (int n = 0; n < NK; ++n) {
    int d = 0;
    for (; d + Columns::kStep <= D; d += Columns::kStep) {
      VF k[kLanes];
      upcoming.FetchNear(1);
      Columns::Load(rows + n * kLanes, d, k);
      MFA_UNROLL
      for (int j = 0; j < kLanes; ++j)
        Columns::Terms(j, k[j], [&](int term, auto x) MFA_INLINE_LAMBDA { store(n, d / Columns::kTerm + term, x); });
    }
    for (; d < D; d += Columns::kTerm) store(n, d / Columns::kTerm, Columns::Last(rows + n * kLanes, d));
  }
}

// Vectors of channels of a pass over the values for G rows. Of 16 registers three rows of them take the most.
template <int G>
constexpr int kValueVectors = HWY_TARGET == HWY_AVX2 && G == kTileRows ? kTileVectors : Min(8, 2 * kTileRows / G);

// Values of bfloat16 are widened as pairs of vectors, the even channels and the odd ones: two steps instead of four.
// InOrder() puts the sums right.
template <class T>
constexpr bool kSplitsChannels = std::is_same_v<T, bfloat16>;
// The odd halves of `halves` and the even ones of `zeros`. Highway's OddEven has the operands the other way round, so
// that memory could not be one of them.
HWY_INLINE VF WidenOdd(hn::Vec<hn::Repartition<uint16_t, DF>> halves, VF zeros) {
  const hn::Repartition<uint16_t, DF> d16;
#if HWY_TARGET == HWY_AVX2
  return hn::BitCast(df, decltype(halves){_mm256_blend_epi16(hn::BitCast(d16, zeros).raw, halves.raw, 0xaa)});
#else
  return hn::BitCast(df, hn::OddEven(halves, hn::BitCast(d16, zeros)));
#endif
}
// NV vectors of a row of values from `row` on, of pairs if kSplit; kOdd says whether the first is a second one. The
// even halves of a first vector are the zeros that a second one needs: no mask takes a register.
template <int NV, bool kSplit, bool kOdd, class T>
HWY_INLINE void LoadValues(const T* row, VF (&values)[NV]) {
  if constexpr (kSplit) {
    constexpr int kFirst = kOdd ? 1 : 0;
    const auto pair_of = [&](int i) MFA_INLINE_LAMBDA {
      const int pair = (i + kFirst) / 2 * 2 - kFirst;
      return hn::LoadU(hn::Repartition<uint16_t, DF>(), reinterpret_cast<const uint16_t*>(row) + pair * kLanes);
    };
    MFA_UNROLL
    for (int i = kFirst; i < NV; i += 2) values[i] = hn::BitCast(df, hn::ShiftLeft<16>(hn::BitCast(du, pair_of(i))));
    MFA_UNROLL
    for (int i = 1 - kFirst; i < NV; i += 2) values[i] = WidenOdd(pair_of(i), values[kFirst]);
  } else {
    MFA_UNROLL
    for (int i = 0; i < NV; ++i) values[i] = LoadFloat(row + i * kLanes);
  }
}
HWY_INLINE void InOrder(float* pair) {
  const VF even = hn::Load(df, pair), odd = hn::Load(df, pair + kLanes);
  hn::StoreInterleaved2(even, odd, df, pair);
}

// out[g][c * kLanes ..] = or, unless `begins`, += sum_k P[g][k] V[k][..] for k in [lo, hi) and NV vectors from c on.
template <int G, int NV, bool kSplit, bool kOdd, class Rows>
HWY_INLINE void DecodeValues(const Rows& v, int c, int lo, int hi, bool begins, const float* P, float* out,
                             ptrdiff_t out_stride, UpcomingRows& upcoming) {
  VF acc[G][NV];
  MFA_UNROLL
  for (int g = 0; g < G; ++g) {
    MFA_UNROLL
    for (int i = 0; i < NV; ++i)
      acc[g][i] = begins ? hn::Zero(df) : hn::Load(df, out + g * out_stride + (c + i) * kLanes);
  }
  Rows at = v.Columns(c * kLanes).From(lo);
  const float* w = P + lo;
  const auto add = [&](int k) MFA_INLINE_LAMBDA {
    VF values[NV];
    LoadValues<NV, kSplit, kOdd>(at.At(k), values);
    MFA_UNROLL
    for (int g = 0; g < G; ++g) {
      const VF weight = hn::Set(df, w[g * kScoreStride + k]);
      MFA_UNROLL
      for (int i = 0; i < NV; ++i) acc[g][i] = hn::MulAdd(values[i], weight, acc[g][i]);
    }
  };
  const auto advance = [&](int keys) MFA_INLINE_LAMBDA {
    at = at.From(keys);
    w += keys;
  };
  int left = hi - lo;
  for (; left >= kKeysOfFetch; left -= kKeysOfFetch, advance(kKeysOfFetch)) {
    upcoming.FetchNear(kKeysOfFetch);
    MFA_UNROLL
    for (int i = 0; i < kKeysOfFetch; ++i) add(i);
  }
  for (; left > 0; --left, advance(1)) add(0);
  MFA_UNROLL
  for (int g = 0; g < G; ++g) {
    MFA_UNROLL
    for (int i = 0; i < NV; ++i) hn::Store(acc[g][i], df, out + g * out_stride + (c + i) * kLanes);
  }
}

// The same for all of `vectors` vectors, with as many passes as ValuePasses<G>() says. A vector alone would leave the
// multiply-adds waiting for each other: four are taken as two and two, not as three and one.
template <int G, class Rows>
HWY_INLINE void DecodeAllValues(const Rows& v, int vectors, int lo, int hi, bool begins, const float* P, float* out,
                                ptrdiff_t out_stride, UpcomingRows& upcoming) {
  constexpr int kMost = kValueVectors<G>;
  constexpr bool kSplits = kSplitsChannels<std::remove_cvref_t<decltype(*v.At(0))>>;
  const auto pass = [&]<int NV, bool kSplit, bool kOdd>(int c) HWY_ATTR {
    DecodeValues<G, NV, kSplit, kOdd>(v, c, lo, hi, begins, P, out, out_stride, upcoming);
  };
  const auto take = [&]<int NV>(int c) HWY_ATTR {
    if constexpr (kSplits && NV % 2 == 1 && NV > 1) {
      if (c % 2 == 1) return pass.template operator()<NV, true, true>(c);
    }
    pass.template operator()<NV, kSplits, false>(c);
  };
  const int n = kSplits ? vectors & ~1 : vectors;
  const int twos = kMost == 3 && n % 3 == 1 && n > 1 ? n - 4 : n;
  ForRowTiles<kMost>(0, twos, take);
  ForRowTiles<2>(twos, n, take);
  if (n < vectors) pass.template operator()<1, false, false>(n);
}
template <int G>
constexpr int ValuePasses(int vectors) {
  return (vectors + kValueVectors<G> - 1) / kValueVectors<G>;
}

// The same for pairs of keys [lo, hi), both even; `P` holds a pair of probabilities for each pair of keys. A key
// outside [first, last) is not read.
template <int G, int NV, class Rows>
HWY_INLINE void DecodePairValues(const Rows& v, int lo, int hi, int first, int last, bool begins, const uint32_t* P,
                                 float* out, ptrdiff_t out_stride, UpcomingRows& upcoming) {
  static constexpr bfloat16 kZeros[NV * kLanes] = {};
  VF acc[G][NV];
  MFA_UNROLL
  for (int g = 0; g < G; ++g) {
    MFA_UNROLL
    for (int c = 0; c < NV; ++c) acc[g][c] = begins ? hn::Zero(df) : hn::Load(df, out + g * out_stride + c * kLanes);
  }
  for (int k = lo; k < hi; k += 2) {
    const bfloat16* even = k >= first ? v.At(k) : kZeros;
    const bfloat16* odd = k + 1 < last ? v.At(k + 1) : kZeros;
    if (k % kKeysOfFetch == 0) upcoming.FetchNear(kKeysOfFetch);
    VU w[G];
    MFA_UNROLL
    for (int g = 0; g < G; ++g) w[g] = hn::Set(du, P[g * kScoreStride + k / 2]);
    VU values[NV];
    LoadPairVectors(even, odd, values);
    MFA_UNROLL
    for (int g = 0; g < G; ++g) {
      MFA_UNROLL
      for (int c = 0; c < NV; ++c) acc[g][c] = DotPairs(acc[g][c], values[c], w[g]);
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
