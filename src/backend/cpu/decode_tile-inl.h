// decode_tile-inl.h: what the decode kernel does with a block of keys for the few query rows of one KV head.

namespace mfa::cpu::MFA_ISA {
namespace {

// One tile at a time; several may be under way, all of which see the same keys. kPairs: products of bfloat16 pairs.
template <class T, bool kPairs>
class DecodeTile {
 public:
  DecodeTile(const ForwardJob& job, void* scratch)
      : job_(job),
        p_(*job.problem),
        steps_(p_),
        d_padded_(RoundUp(p_.D, kLanes)),
        dv_padded_(RoundUp(p_.Dv, kLanes)),
        x_(p_, job.plan.tiling.decode_rows, job.plan.together, scratch),
        r_(x_.Rows(0)) {}

  const DecodeScratch& scratch() const { return x_; }
  const RowTile& tile() const { return tile_; }
  int rows() const { return rows_; }

  // Goes to number `at` of the tiles that are under way, and to its rows: those of tile `index`, which lies at `place`.
  void Resume(int at) { r_ = x_.Rows(at); }
  void Select(int at, int64_t index, const TileMap::Place& place) {
    Resume(at);
    tile_index_ = index;
    rows_ = fill_rows(job_.plan.tiling, p_, place.b, place.kv_head, place.tile, tile_.query, tile_.head);
    CompleteRowTile(p_, place.b, place.kv_head, rows_, RoundUp(rows_, kLanes), tile_);
  }
  // Starts the tile.
  void Begin() {
    for (int g = 0; g < rows_; ++g) {
      r_.m[g] = p_.sinks ? p_.sinks[tile_.head[g]] * kLog2e : -kInf;
      r_.l[g] = r_.m[g] == -kInf ? 0.f : 1.f;
      float* q = r_.q + g * d_padded_;
      if constexpr (kPairs) {
        __builtin_memcpy(q, QueryRow<T>(p_, p_.q, tile_.b, tile_.head[g], tile_.query[g]), p_.D * sizeof(T));
        continue;
      }
      LoadQuery<T>(p_, tile_.b, tile_.head[g], tile_.query[g], q);
      const VF scale = hn::Set(df, p_.scale * kLog2e);
      for (int d = 0; d < d_padded_; d += kLanes) hn::Store(hn::Mul(hn::Load(df, q + d), scale), df, q + d);
    }
    for (int i = 0; i < rows_ * dv_padded_; i += kLanes) hn::Store(hn::Zero(df), df, r_.o + i);
  }

  // The scores of entries [lo, hi) of the block.
  template <class Rows>
  void Scores(const Rows& k, int lo, int hi) {
    for (int k_lo = lo, vectors = 0; k_lo < hi; k_lo += vectors * kLanes) {
      vectors = VectorsOf(hi - k_lo);
      const T* rows[KeyVectors(1) * kLanes];
      const int count = Min(vectors * kLanes, hi - k_lo);
      for (int i = 0; i < count; ++i) rows[i] = k.At(k_lo + i);
      for (int i = count; i < vectors * kLanes; ++i) rows[i] = rows[count - 1];
      if (RotatesKeys(p_)) {
        RotateKeys(rows, k_lo);
      } else {
        Products(rows, vectors, k_lo);
      }
    }
  }

  // Turns the scores of the block into weights. Returns whether values of hidden keys must be kept out.
  template <class Rows>
  bool Weights(const Rows& v) {
    const BlockKeys& seen = block.all;
    const int lo = seen.lo, hi = seen.hi;
    const bool masked = steps_.Masked(p_, tile_, 0, rows_, block, seen);
    const bool hidden = !seen.full || masked || steps_.hides();
    for (int g = 0; g < rows_; ++g) {
      if (!seen.full || masked || steps_.any())
        ApplyRowSteps(p_, steps_, tile_, g, block, masked, lo, hi, scores_at(g, 0));
      r_.block_m[g] = RowMax(scores_at(g, 0), lo, hi);
    }
    const bool skip_hidden = hidden && NonFiniteValues(v, lo, hi);
    if (skip_hidden)
      for (int g = 0; g < rows_; ++g)
        for (int i = lo; i < hi; ++i) visible_[g][i] = scores_at(g, 0)[i] != -kInf;
    for (int g = 0; g < rows_; ++g) Exponentials(scores_at(g, 0), lo, hi, r_.block_m[g]);
    SumRows(lo, hi, r_.block_l);
    for (int g = 0; g < rows_; ++g) {
      if (p_.dropout_p > 0.f) ApplyDropout(p_, tile_, g, 1, block.list.key, lo, hi, scores_at(g, 0), 1);
      if constexpr (kPairs) PackProbabilities(scores_at(g, 0), lo, hi);
    }
    return skip_hidden;
  }

  // block_o = P V.
  template <class Rows>
  void Values(const Rows& v) {
    AddValues(v, block.all.lo, block.all.hi, 0, rows_);
    EndValues(v, 0, rows_);
  }
  // Values() in steps: entries [begin, end), in order, the whole vectors of channels of the rows [g0, g1). The keys are
  // taken in chunks, so that the passes over the channels find their values in the first cache.
  template <class Rows>
  void AddValues(const Rows& v, int begin, int end, int g0, int g1) {
    const int lo = block.all.lo, hi = block.all.hi;
    for (int first = begin, last; first < end; first = last) {
      last = Min(end, (first / kValueChunk<T> + 1) * kValueChunk<T>);
      ForRowTiles<kTileRows>(g0, g1, [&]<int G>(int g) HWY_ATTR {
        float* out = r_.block_o + g * dv_padded_;
        const int whole = p_.Dv / kLanes;
        if constexpr (kPairs) {
          ForRowTiles<kValueVectors<G>>(0, whole, [&]<int NV>(int c) HWY_ATTR {
            DecodePairValues<G, NV>(v.Columns(c * kLanes), first & ~1, RoundUp(last, 2), lo, hi, first == lo,
                                    reinterpret_cast<const uint32_t*>(scores_at(g, 0)), out + c * kLanes, dv_padded_,
                                    upcoming);
          });
        } else {
          DecodeAllValues<G>(v, whole, first, last, first == lo, scores_at(g, 0), out, dv_padded_, upcoming);
        }
      });
    }
  }
  // What is left when all entries are added up.
  template <class Rows>
  void EndValues(const Rows& v, int g0, int g1) {
    const int whole = p_.Dv / kLanes;
    for (int g = g0; g < g1; ++g) {
      float* out = r_.block_o + g * dv_padded_;
      if constexpr (!kPairs && kSplitsChannels<T>) {
        for (int c = 0; c + 2 <= whole; c += 2) InOrder(out + c * kLanes);
      }
      if (whole * kLanes < p_.Dv) LastValues(v, g, whole * kLanes, out);
    }
  }
  // Values() for blocks that hold non-finite ones: those of keys that a row does not see are replaced by zero, which
  // leaves the order and the rounding of the others as they are.
  template <class Rows>
  void VisibleValues(const Rows& v) {
    const int lo = block.all.lo, hi = block.all.hi;
    const T* rows[kKeyBlock];
    upcoming.Clear();
    upcoming.Spread(1);
    for (int g = 0; g < rows_; ++g) {
      for (int k = lo; k < hi; ++k) rows[k] = visible_[g][k] ? v.At(k) : ZeroRow<T>();
      AddValues(RowTable<T>{rows}, lo, hi, g, g + 1);
      EndValues(RowTable<T>{rows}, g, g + 1);
    }
  }

  // Merges the block's result, or stores it for MergeBlocks().
  void Keep(int index) {
    if (job_.plan.key_splits == 1) {
      for (int g = 0; g < rows_; ++g) MergeRow(g, r_.block_m[g], r_.block_l[g], r_.block_o + g * dv_padded_);
      return;
    }
    const int64_t at = PartialIndex(index);
    for (int g = 0; g < rows_; ++g) {
      job_.partials.m[at + g] = r_.block_m[g];
      job_.partials.l[at + g] = r_.block_l[g];
      float* o = job_.partials.o + (at + g) * job_.partials.o_stride;
      for (int d = 0; d < dv_padded_; d += kLanes) hn::StoreU(hn::Load(df, r_.block_o + g * dv_padded_ + d), df, o + d);
    }
  }

  // Says that no row sees a key of the block.
  void MarkUnseen(int index) {
    if (job_.plan.key_splits > 1) job_.partials.l[PartialIndex(index)] = -1.f;
  }
  // Merges what Keep() stored of blocks [0, blocks).
  void MergeBlocks(int blocks) {
    for (int i = 0; i < blocks; ++i) {
      const int64_t at = PartialIndex(i);
      if (job_.partials.l[at] == -1.f) continue;  // the mark of a block without visible keys
      for (int g = 0; g < rows_; ++g)
        MergeRow(g, job_.partials.m[at + g], job_.partials.l[at + g],
                 job_.partials.o + (at + g) * job_.partials.o_stride);
    }
  }
  // Writes the rows' results.
  void Finish() {
    const RowTile& t = tile_;
    for (int g = 0; g < rows_; ++g) {
      const float inverse = r_.l[g] == 0.f ? 0.f : 1.f / r_.l[g];
      T* out = QueryRow<T>(p_, job_.out->o, t.b, t.head[g], t.query[g]);
      const float* o = r_.o + g * dv_padded_;
      const VF f = hn::Set(df, inverse);
      int d = 0;
      for (; d + kLanes <= p_.Dv; d += kLanes) StoreFloat(hn::MulAdd(hn::Load(df, o + d), f, hn::Zero(df)), out + d);
      for (; d < p_.Dv; ++d) StoreScalar(o[d] * inverse + 0.f, out + d);
      if (job_.out->lse) {
        const float lse2 = r_.l[g] == 0.f ? -kInf : r_.m[g] + ::log2f(r_.l[g]);
        job_.out->lse[row_index(p_, t.b, t.head[g], t.query[g])] = job_.out->lse_base2 ? lse2 : NaturalLse(lse2);
      }
    }
  }

  // How often Scores() fetches in all for `keys` keys.
  int FetchesOfScores(int keys) const {
    const int vectors = RoundUp(keys, kLanes) / kLanes, most = KeyVectors(rows_);
    const int columns = vectors * Max(1, p_.D / KeyColumns<T, kPairs>::kStep);
    if (rows_ <= kFewRows) return columns;
    const int tiles = (rows_ + kTileRows - 1) / kTileRows * ((vectors + most - 1) / most);
    return columns + tiles * (p_.D / KeyColumns<T, kPairs>::kTerm / kTermsOfFetch);
  }
  // How often Values() fetches in all for `keys` keys.
  int FetchesOfValues(int keys) const {
    const int whole = p_.Dv / kLanes;
    int passes = 0;
    ForRowTiles<kTileRows>(0, rows_, [&]<int G>(int) { passes += ValuePasses<G>(whole); });
    return passes * keys;
  }

  TileBlock block;  // the keys
  UpcomingRows upcoming;

 private:
  static_assert(kTileVectors == 3);

  // The vectors of keys that are taken together when `left` keys are left.
  int VectorsOf(int left) const {
    if (RotatesKeys(p_)) return 1;
    const int most = KeyVectors(rows_), whole = left / kLanes;
    if (rows_ > kFewRows) return Min(most, RoundUp(left, kLanes) / kLanes);
    return whole >= most ? most : whole >= 2 ? 2 : 1;
  }
  static constexpr int kTermsOfFetch = 16;

  // The scores of all rows for `vectors` vectors of keys, rows[0] .. from entry `entry`.
  template <class R>
  void Products(const R* const* rows, int vectors, int entry) {
    const auto take = [&]<int G, int NK>() HWY_ATTR {
      constexpr bool kTerms = kPairs && std::is_same_v<R, bfloat16>;
      const auto* q = reinterpret_cast<const std::conditional_t<kTerms, uint32_t, float>*>(r_.q);
      const VF scale = hn::Set(df, p_.scale * kLog2e);
      DecodeScores<G, NK, kTerms>(
          rows, upcoming, p_.D,
          [&](int, int g, int term) MFA_INLINE_LAMBDA { return BroadcastTerm(q + g * d_padded_ + term); },
          [&](int n, int g, VF s)
              MFA_INLINE_LAMBDA { hn::StoreU(kTerms ? hn::Mul(s, scale) : s, df, scores_at(g, entry) + n * kLanes); });
    };
    if (rows_ > kFewRows) {
      if (vectors == 1) return TileProducts<1>(rows, entry);
      if (vectors == 2) return TileProducts<2>(rows, entry);
      return TileProducts<3>(rows, entry);
    }
    if (rows_ == 1) {
      if (vectors == 1) return take.template operator()<1, 1>();
      if (vectors == 2) return take.template operator()<1, 2>();
      return take.template operator()<1, 8>();
    }
    if (vectors == 1) return take.template operator()<2, 1>();
    if (vectors == 2) return take.template operator()<2, 2>();
    take.template operator()<2, 4>();
  }
  // Writes the transposed keys down and multiplies tiles of rows with them.
  template <int NK, class R>
  HWY_INLINE void TileProducts(const R* const* rows, int entry) {
    constexpr int kWidth = NK * kLanes;
    constexpr bool kTerms = kPairs && std::is_same_v<R, bfloat16>;
    const VF scale = hn::Set(df, p_.scale * kLog2e);
    PackColumns<NK, kTerms>(rows, upcoming, p_.D, x_.columns);
    ForRowTiles<kTileRows>(0, rows_, [&]<int G>(int g) HWY_ATTR {
      const float* q = r_.q + g * d_padded_;
      const auto store = [&](int r, int n, VF s) HWY_ATTR {
        if constexpr (kTerms) s = hn::Mul(s, scale);
        hn::StoreU(s, df, scores_at(g + r, entry) + n * kLanes);
      };
      const auto fetch = [&](int) MFA_INLINE_LAMBDA { upcoming.FetchNear(1); };
      if constexpr (kTerms) {
        MultiplyTile<G, NK, kTermsOfFetch>(reinterpret_cast<const bfloat16*>(q), StepsAdjacent{2 * d_padded_},
                                           reinterpret_cast<const uint32_t*>(x_.columns), kWidth, p_.D / 2, store,
                                           fetch);
      } else {
        MultiplyTile<G, NK, kTermsOfFetch>(q, StepsAdjacent{d_padded_}, x_.columns, kWidth, p_.D, store, fetch);
      }
    });
  }

  // Products() of keys that are rotated first.
  void RotateKeys(const T* const* keys, int entry) {
    const KeyList& list = block.list;
    const float* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      float* row = x_.k + i * d_padded_;
      const int c = Min(entry + i, block.all.hi - 1);
      WidenRow(keys[i], p_.D, row);
      if (!(list.has_padding && list.padding[c])) RotateKey(p_, tile_.b, list.key[c], row);
      rows[i] = row;
    }
    Products(rows, 1, entry);
  }

  template <class Rows>
  bool NonFiniteValues(const Rows& v, int lo, int hi) const {
    for (int c = lo; c < hi; ++c)
      if (AnyNonFinite(v.At(c), 0, 1, p_.Dv)) return true;
    return false;
  }

  float* scores_at(int g, int k) { return r_.s + g * kScoreStride + k; }

  static float RowMax(const float* S, int lo, int hi) {
    VF max = hn::Set(df, -kInf);
    int k = lo;
    for (; k + kLanes <= hi; k += kLanes) max = hn::Max(hn::LoadU(df, S + k), max);
    float out = hn::GetLane(hn::MaxOfLanes(df, max));
    for (; k < hi; ++k) out = S[k] > out ? S[k] : out;
    return out;
  }

  // S becomes exp2(S - m).
  static void Exponentials(float* S, int lo, int hi, float m) {
    constexpr bool kHalf = sizeof(T) == 2;
    const VF safe = hn::Set(df, m == -kInf ? 0.f : m);
    int k = lo;
    for (; k + kLanes <= hi; k += kLanes) hn::StoreU(Exp2<kHalf>(hn::Sub(hn::LoadU(df, S + k), safe)), df, S + k);
    for (; k < hi; ++k) S[k] = hn::GetLane(Exp2<kHalf>(hn::Sub(hn::Set(df, S[k]), safe)));
  }

  // The sum of each row in the order of the keys; the rows side by side hide the latency of the additions.
  void SumRows(int lo, int hi, float* sums) {
    ForRowTiles<kMaxDecodeRows>(0, rows_, [&]<int G>(int g) HWY_ATTR {
      float sum[G] = {};
      for (int k = lo; k < hi; ++k) {
        MFA_UNROLL
        for (int i = 0; i < G; ++i) sum[i] += scores_at(g + i, 0)[k];
      }
      for (int i = 0; i < G; ++i) sums[g + i] = sum[i];
    });
  }

  // S becomes pairs of bfloat16, pair t in place t; keys outside [lo, hi) count as zero.
  static void PackProbabilities(float* S, int lo, int hi) {
    const int pair_lo = lo & ~1, pair_hi = RoundUp(hi, 2);
    if (pair_lo < lo) S[pair_lo] = 0.f;
    if (pair_hi > hi) S[hi] = 0.f;
    uint32_t* out = reinterpret_cast<uint32_t*>(S);
    int k = pair_lo;
    for (; k + 2 * kLanes <= pair_hi; k += 2 * kLanes)
      hn::StoreU(PackNeighbours(hn::LoadU(df, S + k), hn::LoadU(df, S + k + kLanes)), du, out + k / 2);
    for (; k < pair_hi; k += 2) {
      const uint32_t pair = to_bfloat16(S[k]).bits | uint32_t{to_bfloat16(S[k + 1]).bits} << 16;
      __builtin_memcpy(out + k / 2, &pair, sizeof(pair));
    }
  }

  // The channels from d on, less than a vector.
  template <class Rows>
  void LastValues(const Rows& v, int g, int d, float* out) {
    const int lo = block.all.lo, hi = block.all.hi;
    hn::Store(hn::Zero(df), df, out + d);
    if constexpr (kPairs) {
      bfloat16 tail[kKeyBlock * kLanes] = {};
      for (int k = lo; k < hi; ++k) __builtin_memcpy(tail + k * kLanes, v.At(k) + d, (p_.Dv - d) * sizeof(T));
      const StridedRows<T> rows{tail, kLanes};
      DecodePairValues<1, 1>(rows, lo & ~1, RoundUp(hi, 2), lo, hi, true,
                             reinterpret_cast<const uint32_t*>(scores_at(g, 0)), out + d, dv_padded_, upcoming);
    } else {
      for (int c = d; c < p_.Dv; ++c) {
        float sum = 0.f;
        for (int k = lo; k < hi; ++k) sum = __builtin_fmaf(to_float(v.At(k)[c]), scores_at(g, 0)[k], sum);
        out[c] = sum;
      }
    }
  }

  void MergeRow(int g, float block_m, float block_l, const float* block_o) {
    alignas(64) float m[kLanes], l[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      m[i] = r_.m[g];
      l[i] = r_.l[g];
    }
    VF a, b;
    MergeState(m, l, hn::Set(df, block_m), hn::Set(df, block_l), a, b);
    r_.m[g] = m[0];
    r_.l[g] = l[0];
    float* o = r_.o + g * dv_padded_;
    for (int d = 0; d < dv_padded_; d += kLanes)
      hn::Store(hn::MulAdd(hn::Load(df, o + d), a, hn::Mul(hn::LoadU(df, block_o + d), b)), df, o + d);
  }

  int64_t PartialIndex(int index) const {
    return (tile_index_ * job_.partials.blocks + index) * job_.partials.row_width;
  }

  const ForwardJob& job_;
  const AttentionProblem& p_;
  const ScoreSteps steps_;
  const int d_padded_, dv_padded_;
  DecodeScratch x_;
  DecodeRows r_;
  RowTile tile_;
  int64_t tile_index_ = 0;
  int rows_ = 0;
  bool visible_[kMaxDecodeRows][kKeyBlock];
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
