// forward_decode-inl.h: attention forward for few query rows: lanes = keys for the scores, channels for the output.
//
// Memory-bound: each key block is prefetched one block ahead, also that of another tile.

namespace mfa::cpu::MFA_ISA {
namespace {

struct DecodeScratch {
  RowTile tile;
  TileBlock block;
  KeyList next;  // entries of the block after it
  float m[kMaxDecodeRows], l[kMaxDecodeRows];
  float* q;        // [rows][padded D], scaled to base-2 units
  float* o;        // [rows][padded Dv]
  float* s;        // [rows][kScoreStride]
  float* block_o;  // [rows][padded Dv]
  float* k;        // [kLanes][padded D], rotated keys
  size_t bytes;

  DecodeScratch(const AttentionProblem& p, int rows, char* base) {
    const size_t d = RoundUp(p.D, kLanes), dv = RoundUp(p.Dv, kLanes);
    float* at = reinterpret_cast<float*>(base);
    q = at;
    o = q + rows * d;
    s = o + rows * dv;
    block_o = s + static_cast<size_t>(rows) * kScoreStride;
    k = block_o + rows * dv;
    bytes = (rows * (d + 2 * dv + kScoreStride) + (RotatesKeys(p) ? kLanes * d : 0)) * sizeof(float);
  }
};

// kPairs: products of bfloat16 pairs.
template <class T, bool kPairs>
class DecodeForward {
 public:
  DecodeForward(const ForwardJob& job, void* scratch)
      : job_(job),
        p_(*job.problem),
        steps_(p_),
        d_padded_(RoundUp(p_.D, kLanes)),
        dv_padded_(RoundUp(p_.Dv, kLanes)),
        finder_(p_, kPairs),
        x_(p_, job.plan.tiling.decode_rows, static_cast<char*>(scratch)) {}

  // Blocks [first, last) of the keys for tile number `index`. `next`: what follows, or null.
  void Run(int64_t index, const TileMap::Place& place, int first, int last, const Upcoming* next) {
    Begin(index, place);
    const int keys = key_count(p_, place.b);
    last = Min(last, (keys + kKeyBlock - 1) / kKeyBlock);
    for (int i = first; i < last; ++i) {
      const Upcoming after{place, i + 1};
      Block(i, keys, i + 1 < last ? &after : next);
    }
    if (job_.plan.key_splits == 1) Finish();
  }

  void Merge(int64_t index, const TileMap::Place& place) {
    Begin(index, place);
    const int blocks = (key_count(p_, place.b) + kKeyBlock - 1) / kKeyBlock;
    for (int i = 0; i < blocks; ++i) {
      const int64_t at = PartialIndex(i);
      if (job_.partials.l[at] == -1.f) continue;  // the mark of a block without visible keys
      for (int g = 0; g < rows_; ++g)
        MergeRow(g, job_.partials.m[at + g], job_.partials.l[at + g],
                 job_.partials.o + (at + g) * job_.partials.o_stride);
    }
    Finish();
  }

  size_t scratch_bytes() const { return x_.bytes; }

 private:
  int64_t PartialIndex(int block) const {
    return (tile_index_ * job_.partials.blocks + block) * job_.partials.row_width;
  }

  void Begin(int64_t index, const TileMap::Place& place) {
    tile_index_ = index;
    rows_ = fill_rows(job_.plan.tiling, p_, place.b, place.kv_head, place.tile, x_.tile.query, x_.tile.head);
    CompleteRowTile(p_, place.b, place.kv_head, rows_, RoundUp(rows_, kLanes), x_.tile);
    finder_.Select(x_.tile);
    for (int g = 0; g < rows_; ++g) {
      x_.m[g] = p_.sinks ? p_.sinks[x_.tile.head[g]] * kLog2e : -kInf;
      x_.l[g] = x_.m[g] == -kInf ? 0.f : 1.f;
      float* q = x_.q + g * d_padded_;
      if constexpr (kPairs) {
        __builtin_memcpy(q, QueryRow<T>(p_, p_.q, x_.tile.b, x_.tile.head[g], x_.tile.query[g]), p_.D * sizeof(T));
        continue;
      }
      LoadQuery<T>(p_, x_.tile.b, x_.tile.head[g], x_.tile.query[g], q);
      const VF scale = hn::Set(df, p_.scale * kLog2e);
      for (int d = 0; d < d_padded_; d += kLanes) hn::Store(hn::Mul(hn::Load(df, q + d), scale), df, q + d);
    }
    for (int i = 0; i < rows_ * dv_padded_; i += kLanes) hn::Store(hn::Zero(df), df, x_.o + i);
  }

  // Rows of the block: a fixed step apart, or found one by one. `next`: what follows, or null.
  void Block(int index, int keys, const Upcoming* next) {
    const int64_t k0 = int64_t{index} * kKeyBlock;
    const int count = static_cast<int>(Min<int64_t>(kKeyBlock, keys - k0));
    finder_.Find(x_.tile, RoundUp(rows_, kLanes), k0, count, x_.block);
    if (x_.block.all.empty()) return MarkUnseen(index);
    const int b = x_.tile.b, h = x_.tile.kv_head;
    if (!x_.block.listed && !GathersRows(p_)) {
      const StridedRows<T> k{KeyRow<T>(p_, p_.k, b, h, k0), p_.k.stride[2]};
      const StridedRows<T> v{KeyRow<T>(p_, p_.v, b, h, k0), p_.v.stride[2]};
      if (!Fetches(next)) return Attend(index, k, v, k, v, false);
      const TileMap::Place& place = next->place;
      const int64_t first = int64_t{next->block} * kKeyBlock;
      return Attend(index, k, v, StridedRows<T>{KeyRow<T>(p_, p_.k, place.b, place.kv_head, first), k.step},
                    StridedRows<T>{KeyRow<T>(p_, p_.v, place.b, place.kv_head, first), v.step}, true);
    }
    const int lo = x_.block.all.lo, hi = x_.block.all.hi;
    if (has_next_table_ && !x_.block.listed) {
      table_ ^= 1;
    } else {
      KeyRows(p_, p_.k, b, h, x_.block.list, lo, hi, k_rows_[table_]);
      KeyRows(p_, p_.v, b, h, x_.block.list, lo, hi, v_rows_[table_]);
    }
    const int other = table_ ^ 1;
    has_next_table_ = !x_.block.listed && Fetches(next);
    if (has_next_table_) {
      const TileMap::Place& place = next->place;
      for (int c = 0; c < kKeyBlock; ++c) x_.next.key[c] = next->block * kKeyBlock + c;
      KeyRows(p_, p_.k, place.b, place.kv_head, x_.next, 0, kKeyBlock, k_rows_[other]);
      KeyRows(p_, p_.v, place.b, place.kv_head, x_.next, 0, kKeyBlock, v_rows_[other]);
    }
    Attend(index, RowTable<T>{k_rows_[table_]}, RowTable<T>{v_rows_[table_]}, RowTable<T>{k_rows_[other]},
           RowTable<T>{v_rows_[other]}, has_next_table_);
  }

  // Whether all of this block is computed, so that all of the next is fetched, which must be a whole one.
  bool Fetches(const Upcoming* next) const {
    return next && x_.block.all.hi - x_.block.all.lo == kKeyBlock &&
           (int64_t{next->block} + 1) * kKeyBlock <= key_count(p_, next->place.b);
  }

  template <class Rows>
  void Attend(int index, const Rows& k, const Rows& v, const Rows& next_k, const Rows& next_v, bool prefetch) {
    const BlockKeys& seen = x_.block.all;
    const int lo = seen.lo, hi = seen.hi;
    const int vectors = RotatesKeys(p_) ? 1 : rows_ == 1 ? kKeyVectors<1> : rows_ == 2 ? kKeyVectors<2> : 1;
    for (int k_lo = lo, step = 0; k_lo < hi; k_lo += step) {
      step = k_lo + vectors * kLanes <= hi ? vectors * kLanes : kLanes;
      for (int i = 0; prefetch && i < step; ++i) next_k.Fetch(Min(k_lo + i, hi - 1), p_.D);
      if (RotatesKeys(p_)) {
        RotateKeys(k, k_lo, hi);
        continue;
      }
      const T* rows[kKeyVectors<1> * kLanes];
      for (int i = 0; i < step; ++i) rows[i] = k.At(Min(k_lo + i, hi - 1));
      if (step == kLanes) {
        Products<1>(rows, k_lo);
      } else {
        Products<0>(rows, k_lo);
      }
    }
    float m[kMaxDecodeRows], l[kMaxDecodeRows];
    const bool masked = steps_.Masked(p_, x_.tile, 0, rows_, x_.block, seen);
    const bool hidden = !seen.full || masked || steps_.hides();
    for (int g = 0; g < rows_; ++g) {
      if (!seen.full || masked || steps_.any()) ApplySteps(g, masked, lo, hi);
      m[g] = RowMax(scores_at(g, 0), lo, hi);
    }
    const bool skip_hidden = hidden && NonFiniteValues(v, lo, hi);
    if (skip_hidden)
      for (int g = 0; g < rows_; ++g)
        for (int i = lo; i < hi; ++i) visible_[g][i] = scores_at(g, 0)[i] != -kInf;
    for (int g = 0; g < rows_; ++g) Exponentials(scores_at(g, 0), lo, hi, m[g]);
    SumRows(lo, hi, l);
    for (int g = 0; g < rows_; ++g) {
      if (p_.dropout_p > 0.f) ApplyDropout(p_, x_.tile, g, 1, x_.block.list.key, lo, hi, scores_at(g, 0), 1);
      if constexpr (kPairs) PackProbabilities(scores_at(g, 0), lo, hi);
    }
    if (HWY_UNLIKELY(skip_hidden)) {
      for (int g = 0; g < rows_; ++g) VisibleValues(v, g, lo, hi);
    } else {
      ForRowTiles<kMaxDecodeRows>(0, rows_,
                                  [&]<int G>(int g) HWY_ATTR { Values<G>(v, next_v, g, lo, hi, prefetch && g == 0); });
    }

    if (job_.plan.key_splits > 1) {
      const int64_t at = PartialIndex(index);
      for (int g = 0; g < rows_; ++g) {
        job_.partials.m[at + g] = m[g];
        job_.partials.l[at + g] = l[g];
        float* o = job_.partials.o + (at + g) * job_.partials.o_stride;
        for (int d = 0; d < dv_padded_; d += kLanes)
          hn::StoreU(hn::Load(df, x_.block_o + g * dv_padded_ + d), df, o + d);
      }
    } else {
      for (int g = 0; g < rows_; ++g) MergeRow(g, m[g], l[g], x_.block_o + g * dv_padded_);
    }
  }

  // The scores of all rows for the keys rows[0] .. from entry `entry`: kVectors vectors of them, 0: as many as suit the
  // number of rows.
  template <int kVectors, class R>
  HWY_INLINE void Products(const R* const* rows, int entry) {
    ForRowTiles<kTileRows>(0, rows_, [&]<int G>(int g) HWY_ATTR {
      constexpr int NK = kVectors > 0 ? kVectors : kKeyVectors<G>;
      if constexpr (kPairs && std::is_same_v<R, bfloat16>) {
        const uint32_t* q = reinterpret_cast<const uint32_t*>(x_.q + g * d_padded_);
        return DecodePairScores<G, NK>(rows, q, d_padded_, p_.D / 2, hn::Set(df, p_.scale * kLog2e),
                                       scores_at(g, entry), kScoreStride);
      }
      DecodeScores<G, NK>(rows, x_.q + g * d_padded_, d_padded_, p_.D, scores_at(g, entry), kScoreStride);
    });
  }

  // Products() of keys that are rotated first.
  template <class Rows>
  void RotateKeys(const Rows& k, int entry, int hi) {
    const KeyList& list = x_.block.list;
    const auto rotate = [&](int i) HWY_ATTR {
      float* row = x_.k + i * d_padded_;
      const int c = Min(entry + i, hi - 1);
      WidenRow(k.At(c), p_.D, row);
      if (!(list.has_padding && list.padding[c])) RotateKey(p_, x_.tile.b, list.key[c], row);
      return row;
    };
    const float* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = rotate(i);
    Products<1>(rows, entry);
  }

  template <class Rows>
  bool NonFiniteValues(const Rows& v, int lo, int hi) const {
    for (int c = lo; c < hi; ++c)
      if (AnyNonFinite(v.At(c), 0, 1, p_.Dv)) return true;
    return false;
  }

  float* scores_at(int g, int k) { return x_.s + g * kScoreStride + k; }

  // The steps of ApplyScoreSteps with lanes = keys: the same operations in the same order.
  void ApplySteps(int g, bool masked, int lo, int hi) {
    const ScoreTerms terms(p_);
    const RowTile& t = x_.tile;
    const int32_t* key_of = x_.block.list.key;
    const VI begin = hn::Set(di, t.begin[g]), end = hn::Set(di, t.end[g]), pos = hn::Set(di, t.pos[g]);
    alignas(64) float bias[kLanes];
    alignas(64) int32_t mask[kLanes];
    for (int k = lo; k < hi; k += kLanes) {
      const int n = Min(kLanes, hi - k);
      const VI key = hn::LoadU(di, key_of + k);
      VF s = hn::LoadU(df, scores_at(g, k));
      if (steps_.softcap) s = hn::Mul(Tanh(hn::Mul(s, terms.inverse_softcap)), terms.softcap);
      if (steps_.alibi) s = hn::MulAdd(hn::Set(df, t.slope[g]), hn::ConvertTo(df, hn::Sub(key, pos)), s);
      auto visible = hn::AndNot(hn::Lt(key, begin), hn::Lt(key, end));
      if (steps_.bias) {
        const int64_t at = t.b * p_.bias.stride[0] + t.head[g] * p_.bias.stride[1] + t.query[g] * p_.bias.stride[2];
        for (int i = 0; i < kLanes; ++i)
          bias[i] = i < n && !(x_.block.list.has_padding && x_.block.list.padding[k + i])
                        ? load_as_float(p_.bias.data, p_.bias.dtype, at + key_of[k + i] * p_.bias.stride[3]) * kLog2e
                        : 0.f;
        const VF term = hn::Load(df, bias);
        s = hn::Add(s, term);
        visible = hn::And(visible, hn::RebindMask(di, hn::Ne(term, hn::Set(df, -kInf))));
      }
      if (masked) {
        for (int i = 0; i < kLanes; ++i) mask[i] = i < n && Shows(g, k + i) ? -1 : 0;
        visible = hn::And(visible, hn::MaskFromVec(hn::Load(di, mask)));
      }
      if (steps_.floor) visible = hn::AndNot(hn::RebindMask(di, hn::Lt(s, hn::Set(df, t.floor[g]))), visible);
      s = hn::IfThenElse(hn::RebindMask(df, visible), s, hn::Set(df, -kInf));
      if (n == kLanes) {
        hn::StoreU(s, df, scores_at(g, k));
      } else {
        alignas(64) float out[kLanes];
        hn::Store(s, df, out);
        for (int i = 0; i < n; ++i) scores_at(g, k)[i] = out[i];
      }
    }
  }

  // Whether lists, neighbourhood and boolean mask show entry c to row g.
  bool Shows(int g, int c) const {
    const RowTile& t = x_.tile;
    const TileBlock& block = x_.block;
    if (block.list.has_padding && block.list.padding[c]) return false;
    const int32_t key = block.list.key[c];
    for (int x = 0; x < p_.neighbourhood.axes; ++x) {
      const int32_t u = block.position[x][c];
      if (u < t.from[x][g] || u >= t.to[x][g]) return false;
    }
    if (p_.blocks.offsets && block.uneven && !lists_show(p_, t.b, t.head[g], t.query[g], key)) return false;
    return !steps_.mask || p_.mask.data[t.b * p_.mask.stride[0] + t.head[g] * p_.mask.stride[1] +
                                        t.query[g] * p_.mask.stride[2] + key * p_.mask.stride[3]] != 0;
  }

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

  // The sum of each row in the order of the keys; four rows at a time hide the latency of the additions.
  void SumRows(int lo, int hi, float* sums) {
    ForRowTiles<4>(0, rows_, [&]<int G>(int g) HWY_ATTR {
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
    for (int k = pair_lo; k < pair_hi; k += 2) {
      const uint32_t pair = to_bfloat16(S[k]).bits | uint32_t{to_bfloat16(S[k + 1]).bits} << 16;
      __builtin_memcpy(out + k / 2, &pair, sizeof(pair));
    }
  }

  template <int G, class Rows>
  void PairValues(const Rows& v, const Rows& next_v, int g, int lo, int hi, bool prefetch) {
    const int pair_lo = lo & ~1, pair_hi = RoundUp(hi, 2), whole = p_.Dv / kLanes;
    const uint32_t* P = reinterpret_cast<const uint32_t*>(scores_at(g, 0));
    float* out = x_.block_o + g * dv_padded_;
    ForRowTiles<kMaxDecodeRows / G>(0, whole, [&]<int NV>(int c) HWY_ATTR {
      DecodePairValues<G, NV>(v.Columns(c * kLanes), pair_lo, pair_hi, lo, hi, P, out + c * kLanes, dv_padded_,
                              NextBlock<Rows>{next_v, prefetch ? p_.Dv : 0, whole, c, NV});
    });
    const int rest = p_.Dv - whole * kLanes;
    if (rest == 0) return;
    bfloat16 tail[kKeyBlock * kLanes] = {};
    for (int k = lo; k < hi; ++k) __builtin_memcpy(tail + k * kLanes, v.At(k) + whole * kLanes, rest * sizeof(T));
    const StridedRows<T> last{tail, kLanes};
    DecodePairValues<G, 1>(last, pair_lo, pair_hi, lo, hi, P, out + whole * kLanes, dv_padded_,
                           NextBlock<StridedRows<T>>{last});
  }

  template <int G, class Rows>
  void Values(const Rows& v, const Rows& next_v, int g, int lo, int hi, bool prefetch) {
    if constexpr (kPairs) return PairValues<G>(v, next_v, g, lo, hi, prefetch);
    constexpr int kAccumulators = kTileRows * kTileVectors;
    constexpr int kVectors = kAccumulators / G < 8 ? kAccumulators / G : 8;
    const int whole = p_.Dv / kLanes;
    const float* P = scores_at(g, 0);
    float* out = x_.block_o + g * dv_padded_;
    ForRowTiles<kVectors>(0, whole, [&]<int NV>(int c) HWY_ATTR {
      DecodeValues<G, NV>(v.Columns(c * kLanes), lo, hi, P, out + c * kLanes, dv_padded_,
                          NextBlock<Rows>{next_v, prefetch ? p_.Dv : 0, whole, c, NV});
    });
    if (whole * kLanes == p_.Dv) return;
    for (int i = g; i < g + G; ++i) {
      hn::Store(hn::Zero(df), df, x_.block_o + i * dv_padded_ + whole * kLanes);
      for (int d = whole * kLanes; d < p_.Dv; ++d) {
        float sum = 0.f;
        for (int k = lo; k < hi; ++k) sum = __builtin_fmaf(to_float(v.At(k)[d]), scores_at(i, 0)[k], sum);
        x_.block_o[i * dv_padded_ + d] = sum;
      }
    }
  }

  // For blocks that hold non-finite values: those of keys that the row does not see are replaced by zero, which leaves
  // the order and the rounding of the others as they are.
  template <class Rows>
  void VisibleValues(const Rows& v, int g, int lo, int hi) {
    const T* rows[kKeyBlock];
    for (int k = lo; k < hi; ++k) rows[k] = visible_[g][k] ? v.At(k) : ZeroRow<T>();
    Values<1>(RowTable<T>{rows}, RowTable<T>{rows}, g, lo, hi, false);
  }

  void MergeRow(int g, float block_m, float block_l, const float* block_o) {
    alignas(64) float m[kLanes], l[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      m[i] = x_.m[g];
      l[i] = x_.l[g];
    }
    VF a, b;
    MergeState(m, l, hn::Set(df, block_m), hn::Set(df, block_l), a, b);
    x_.m[g] = m[0];
    x_.l[g] = l[0];
    float* o = x_.o + g * dv_padded_;
    for (int d = 0; d < dv_padded_; d += kLanes)
      hn::Store(hn::MulAdd(hn::Load(df, o + d), a, hn::Mul(hn::LoadU(df, block_o + d), b)), df, o + d);
  }

  void MarkUnseen(int block) {
    if (job_.plan.key_splits > 1) job_.partials.l[PartialIndex(block)] = -1.f;
  }

  void Finish() {
    const RowTile& t = x_.tile;
    for (int g = 0; g < rows_; ++g) {
      const float inverse = x_.l[g] == 0.f ? 0.f : 1.f / x_.l[g];
      T* out = QueryRow<T>(p_, job_.out->o, t.b, t.head[g], t.query[g]);
      const float* o = x_.o + g * dv_padded_;
      const VF f = hn::Set(df, inverse);
      int d = 0;
      for (; d + kLanes <= p_.Dv; d += kLanes) StoreFloat(hn::MulAdd(hn::Load(df, o + d), f, hn::Zero(df)), out + d);
      for (; d < p_.Dv; ++d) StoreScalar(o[d] * inverse + 0.f, out + d);
      if (job_.out->lse) {
        const float lse2 = x_.l[g] == 0.f ? -kInf : x_.m[g] + ::log2f(x_.l[g]);
        job_.out->lse[row_index(p_, t.b, t.head[g], t.query[g])] = job_.out->lse_base2 ? lse2 : NaturalLse(lse2);
      }
    }
  }

  const ForwardJob& job_;
  const AttentionProblem& p_;
  const ScoreSteps steps_;
  const int d_padded_, dv_padded_;
  BlockFinder finder_;
  DecodeScratch x_;
  int64_t tile_index_ = 0;
  int rows_ = 0;
  // Rows of this block and of the next, where they are found one by one.
  const T *k_rows_[2][kKeyBlock], *v_rows_[2][kKeyBlock];
  int table_ = 0;
  bool has_next_table_ = false;  // the other table has the rows of the block that follows
  bool visible_[kMaxDecodeRows][kKeyBlock];
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
