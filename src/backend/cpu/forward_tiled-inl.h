// forward_tiled-inl.h: attention forward with lanes = query rows.
//
// A task owns up to kMaxRowTile rows of one KV head and walks the key blocks they see. For each column group of rows
//   S = K Q^T (transposed scores)  ->  P = exp2(S - block max)  ->  O^T = a O^T + b (V^T P)
// Each block is reduced on its own and merged in order with weights a, b, so a row's bits depend on its keys alone.
// Source: Dao et al., arXiv:2205.14135.

namespace mfa::cpu::MFA_ISA {
namespace {

class TiledForward {
 public:
  TiledForward(const ForwardJob& job, void* scratch)
      : job_(job), p_(*job.problem), steps_(p_), x_(job, static_cast<char*>(scratch)), reader_(job, x_.k, x_.v) {}

  size_t scratch_bytes() const { return x_.bytes; }

  // Blocks [first, last) of the keys for tile number `index`. First rows of the tile at `next`, if any, are fetched
  // meanwhile.
  void Run(int64_t index, const TileMap::Place& place, int first, int last, const Upcoming* next) {
    if (!SelectRows(index, place)) return;
    PackQueries();
    if (job_.floors) selector_.Begin(x_.select, job_.kept[place.b], tile_width_);
    last = Min(last, (key_count(p_, place.b) + kKeyBlock - 1) / kKeyBlock);
    int seen = first;
    for (reader_.Begin(x_.tile, tile_width_, first, last); reader_.index() < last; reader_.Advance()) {
      MarkUnseen(seen, reader_.index());
      upcoming_.Clear();
      KeyBlock block = reader_.Load(upcoming_);
      if (next && reader_.at_last()) AddTile(next->place);
      Attend(block);
      seen = reader_.index() + 1;
    }
    MarkUnseen(seen, last);
    if (job_.floors) {
      for (int r = 0; r < x_.tile.count; ++r) job_.floors[LseIndex(r)] = selector_.Floor(r);
    } else if (job_.plan.key_splits == 1) {
      Finish();
    }
  }

  // Merges the partial results of a row tile in the order of the blocks and writes the outputs.
  void Merge(int64_t index, const TileMap::Place& place) {
    if (!SelectRows(index, place)) return;
    MergePartials();
    Finish();
  }

 private:
  // Rows of the column group at g0: the last two share what would leave a single vector for one, which takes longer.
  HWY_INLINE int GroupWidth(int g0) const {
    static_assert(kTileVectors == 3);
    const int left = tile_width_ - g0;
    return left == 4 * kLanes ? 2 * kLanes : Min(kGroupRows, left);
  }
  static constexpr int GroupIndex(int g0) { return (g0 + kLanes) / kGroupRows; }

  // Returns whether the tile has rows.
  bool SelectRows(int64_t index, const TileMap::Place& place) {
    tile_index_ = index;
    int count = next_count_;
    if (next_.b == place.b && next_.kv_head == place.kv_head && next_.tile == place.tile) {
      std::memcpy(x_.tile.query, next_query_, sizeof(int32_t) * static_cast<size_t>(count));
      std::memcpy(x_.tile.head, next_head_, sizeof(int32_t) * static_cast<size_t>(count));
    } else {
      count = fill_rows(job_.plan.tiling, p_, place.b, place.kv_head, place.tile, x_.tile.query, x_.tile.head);
    }
    if (count == 0) return false;
    tile_width_ = RoundUp(count, kLanes);
    CompleteRowTile(p_, place.b, place.kv_head, count, tile_width_, x_.tile);
    for (int r = 0; r < tile_width_; r += kLanes) {
      hn::Store(hn::Set(df, -kInf), df, x_.state.m + r);
      hn::Store(hn::Zero(df), df, x_.state.l + r);
    }
    for (int r = 0; p_.sinks && r < tile_width_;
         ++r) {  // a sink is a key without a value, merged before the first block
      x_.state.m[r] = p_.sinks[x_.tile.head[r]] * kLog2e;
      x_.state.l[r] = x_.state.m[r] == -kInf ? 0.f : 1.f;
    }
    for (int g = 0; g < kMostGroups; ++g) holds_[g] = false;
    written_ = false;
    if (job_.out && job_.out->probs) HideAllProbabilities(job_, x_.tile);
    return true;
  }

  void PackQueries() {
    if constexpr (kNativeBf16) {
      if (job_.plan.native_bf16) return PackQueryPairs();
    }
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int g0 = 0; g0 < tile_width_; g0 += GroupWidth(g0)) {
        const int width = GroupWidth(g0);
        for (int r = 0; r < width; r += kLanes) {
          float* to = x_.q + static_cast<ptrdiff_t>(g0) * p_.D + r;
          FetchRows<T>(p_.q, p_.D, g0 + r + kRowsAhead);
          if (RotatesQueries(p_)) {
            const float* rotated[kLanes];
            for (int i = 0; i < kLanes; ++i) {
              float* row = x_.s + i * RoundUp(p_.D, kLanes);
              LoadQuery<T>(p_, x_.tile.b, x_.tile.head[g0 + r + i], x_.tile.query[g0 + r + i], row);
              rotated[i] = row;
            }
            PackTransposed(rotated, p_.D, p_.scale * kLog2e, to, width);
            continue;
          }
          const T* rows[kLanes];
          for (int i = 0; i < kLanes; ++i)
            rows[i] = QueryRow<T>(p_, p_.q, x_.tile.b, x_.tile.head[g0 + r + i], x_.tile.query[g0 + r + i]);
          PackTransposed(rows, p_.D, p_.scale * kLog2e, to, width);
        }
      }
    });
  }

  // Asks for rows [r, r + kLanes) of the tile: those of a whole tile are too many to come all with its last keys.
  static constexpr int kRowsAhead = 2 * kLanes;
  template <class T, class Ref>
  HWY_INLINE void FetchRows(const Ref& x, int width, int r) const {
    for (const int end = Min(r + kLanes, x_.tile.count); r < end; ++r) {
      const auto* row = reinterpret_cast<const char*>(QueryRow<T>(p_, x, x_.tile.b, x_.tile.head[r], x_.tile.query[r]));
      for (size_t i = 0; i < static_cast<size_t>(width) * sizeof(T); i += 64)
        __builtin_prefetch(row + i, std::is_same_v<Ref, MutableTensorRef>, 3);
    }
  }

  // Pairs of channels keep their bits; the scale is applied to the scores.
  void PackQueryPairs() {
    for (int g0 = 0; g0 < tile_width_; g0 += GroupWidth(g0)) {
      const int width = GroupWidth(g0);
      uint32_t* to = reinterpret_cast<uint32_t*>(x_.q) + static_cast<ptrdiff_t>(g0) * (p_.D / 2);
      for (int r = 0; r < width; r += kLanes) {
        FetchRows<bfloat16>(p_.q, p_.D, g0 + r + kRowsAhead);
        const bfloat16* rows[kLanes];
        for (int i = 0; i < kLanes; ++i)
          rows[i] = QueryRow<bfloat16>(p_, p_.q, x_.tile.b, x_.tile.head[g0 + r + i], x_.tile.query[g0 + r + i]);
        PackTransposedPairs(rows, p_.D / 2, to + r, width);
      }
    }
  }

  // The first rows of another tile, of its output and of its keys.
  void AddTile(const TileMap::Place& place) {
    next_ = place;
    next_count_ = fill_rows(job_.plan.tiling, p_, place.b, place.kv_head, place.tile, next_query_, next_head_);
    const int rows = Min(next_count_, kGroupRows);
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      const auto add = [&](const auto& x, int width, int r, int rows) {
        constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(T));
        upcoming_.Add(QueryRow<T>(p_, x, place.b, next_head_[r], next_query_[r]), rows, x.stride[2] * kSize,
                      static_cast<size_t>(width * kSize));
      };
      for (int r = 0, end; r < rows; r = end) {  // a run of rows of one head
        end = r + 1;
        while (end < rows && next_head_[end] == next_head_[r] && next_query_[end] == next_query_[end - 1] + 1) ++end;
        add(p_.q, p_.D, r, end - r);
        if (job_.out) add(job_.out->o, p_.Dv, r, end - r);
      }
    });
    if (rows > 0) reader_.AddFirstKeys(place, next_query_[0], next_head_[0], upcoming_);
  }

  // The work of a column group on keys, on channels of the output, and of rows at the end: how the rows that come next
  // are spread over it. A step of a product counts one.
  int ScoreWork(int keys) const { return keys * (p_.D + 16); }
  int ValueWork(int channels, int keys) const { return channels * (keys + 16); }
  int FinishWork(int rows) const { return rows * p_.Dv; }

  // Attends every column group to a loaded block.
  void Attend(KeyBlock& block) {
    BlockKeys seen[kMostGroups];
    int64_t work = reader_.at_last() && !block.v_rows ? FinishWork(tile_width_) : 0;
    for (int g0 = 0; g0 < tile_width_; g0 += GroupWidth(g0)) {
      BlockKeys& keys = seen[GroupIndex(g0)];
      keys = reader_.block().Of(x_.tile, g0, GroupWidth(g0));
      if (!keys.empty()) work += ScoreWork(keys.hi - keys.lo) + ValueWork(p_.Dv, keys.hi - keys.lo);
    }
    upcoming_.Spread(work);
    int nonfinite = -1;  // not looked at yet
    for (int g0 = 0; g0 < tile_width_; g0 += GroupWidth(g0)) {
      const int vectors = GroupWidth(g0) / kLanes;
      const BlockKeys& keys = seen[GroupIndex(g0)];
      if (keys.empty()) {
        MarkUnseenBy(g0, block.index);
        continue;
      }
      // An odd bound of a pair lets the product touch a key that the group does not see.
      const bool odd = block.v16 && (keys.lo % 2 || keys.hi % 2);
      const bool masked = steps_.Masked(p_, x_.tile, g0, vectors * kLanes, reader_.block(), keys);
      const bool hides = !keys.full || masked || steps_.hides() || odd;
      if (hides && nonfinite < 0 && !job_.floors) nonfinite = NonFiniteValues(block, reader_.block().all);
      const bool skip_hidden = hides && nonfinite > 0;
      if (skip_hidden && block.v_rows) reader_.PackValues(block);
      if constexpr (kNativeBf16) {
        if (block.v16) {
          GroupOf<true>(vectors, block, g0, keys, masked, skip_hidden);
          continue;
        }
      }
      GroupOf<false>(vectors, block, g0, keys, masked, skip_hidden);
    }
  }

  bool NonFiniteValues(const KeyBlock& block, const BlockKeys& all) const {
    if (block.v_rows)
      return WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
        return AnyNonFinite(static_cast<const T*>(block.v_rows) + all.lo * block.v_step, block.v_step, all.hi - all.lo,
                            p_.Dv);
      });
    const int panels = (p_.Dv + kTileRows - 1) / kTileRows;
    if (!block.v16)
      return AnyNonFinite(block.v + all.lo * kTileRows, kValuePanel, panels, (all.hi - all.lo) * kTileRows);
    const int lo = all.lo & ~1;
    return AnyNonFinite(block.v16 + lo * kTileRows, kValuePanel, panels, (RoundUp(all.hi, 2) - lo) * kTileRows);
  }

  template <bool kPairs>
  HWY_INLINE void GroupOf(int vectors, const KeyBlock& block, int g0, const BlockKeys& keys, bool masked,
                          bool skip_hidden) {
    if (vectors == 1) {
      Group<1, kPairs>(block, g0, keys, masked, skip_hidden);
    } else if (vectors == 2) {
      Group<2, kPairs>(block, g0, keys, masked, skip_hidden);
    } else {
      Group<kTileVectors, kPairs>(block, g0, keys, masked, skip_hidden);
    }
  }

  // Merges the partial results of the selected rows in the order of the blocks.
  void MergePartials() {
    const int blocks = (key_count(p_, x_.tile.b) + kKeyBlock - 1) / kKeyBlock;
    for (int i = 0; i < blocks; ++i) {
      const int64_t at = PartialIndex(i);
      const float* m = job_.partials.m + at * job_.partials.row_width;
      const float* l = job_.partials.l + at * job_.partials.row_width;
      const float* o = job_.partials.o + at * job_.partials.row_width * job_.partials.o_stride;
      for (int g0 = 0; g0 < tile_width_; g0 += GroupWidth(g0)) {
        const int width = GroupWidth(g0);
        if (m[g0] == kInf && l[g0] == -1.f) continue;  // the mark of a block that the group does not see
        for (int r = g0; r < g0 + width; r += kLanes) {
          VF a, b;
          MergeState(x_.state.m + r, x_.state.l + r, hn::LoadU(df, m + r), hn::LoadU(df, l + r), a, b);
          float* to = x_.o + static_cast<ptrdiff_t>(g0) * p_.Dv + (r - g0);
          const float* from = o + static_cast<ptrdiff_t>(g0) * p_.Dv + (r - g0);
          const bool holds = holds_[GroupIndex(g0)];
          for (int d = 0; d < p_.Dv; ++d, to += width, from += width) {
            const VF part = hn::Mul(hn::LoadU(df, from), b);
            hn::Store(holds ? hn::MulAdd(hn::Load(df, to), a, part) : part, df, to);
          }
        }
        holds_[GroupIndex(g0)] = true;
      }
    }
  }

  // 1 / l, or 0 for rows that see no key.
  static HWY_INLINE VF Inverse(VF l) {
    return hn::IfThenZeroElse(hn::Eq(l, hn::Zero(df)), hn::Div(hn::Set(df, 1.f), l));
  }

  void Finish() {
    if (!written_) WriteTile();
    for (int r = 0; r < x_.tile.count; ++r) {
      const float lse2 = x_.state.l[r] == 0.f ? -kInf : x_.state.m[r] + ::log2f(x_.state.l[r]);
      if (job_.out->lse) job_.out->lse[LseIndex(r)] = job_.out->lse_base2 ? lse2 : NaturalLse(lse2);
      if (job_.out->probs) NormaliseProbabilities(job_, x_.tile, r, lse2);
    }
  }

  void WriteTile() {
    const RowTile& t = x_.tile;
    alignas(64) float inverse[kMaxRowTile];
    for (int r = 0; r < tile_width_; r += kLanes) hn::Store(Inverse(hn::Load(df, x_.state.l + r)), df, inverse + r);
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int g0 = 0; g0 < tile_width_; g0 += GroupWidth(g0)) {
        const int width = GroupWidth(g0);
        float* o = x_.o + static_cast<ptrdiff_t>(g0) * p_.Dv;
        for (int i = 0; !holds_[GroupIndex(g0)] && i < width * p_.Dv; i += kLanes) hn::Store(hn::Zero(df), df, o + i);
        for (int r = 0; r < width; r += kLanes) {
          const int real = Min(kLanes, t.count - g0 - r);
          T* rows[kLanes];
          for (int i = 0; i < real; ++i)
            rows[i] = QueryRow<T>(p_, job_.out->o, t.b, t.head[g0 + r + i], t.query[g0 + r + i]);
          FetchRows<T>(job_.out->o, p_.Dv, g0 + r + kRowsAhead);
          upcoming_.Fetch(FinishWork(kLanes));
          UnpackTransposed(o + r, width, p_.Dv, inverse + g0 + r, rows, real);
        }
      }
    });
  }

  // Blocks that no group sees.
  void MarkUnseen(int first, int last) {
    if (job_.plan.key_splits == 1) return;
    for (int i = first; i < last; ++i)
      for (int g0 = 0; g0 < tile_width_; g0 += GroupWidth(g0)) MarkUnseenBy(g0, i);
  }
  // A block that a group does not see has no partial result: the mark is a pair that no row can have.
  void MarkUnseenBy(int g0, int block) {
    if (job_.plan.key_splits == 1) return;
    const int64_t at = PartialIndex(block) * job_.partials.row_width + g0;
    job_.partials.m[at] = kInf;
    job_.partials.l[at] = -1.f;
  }

  // S = K Q^T for the entries [lo, hi), W vectors of rows from number c0 of a group of NR on; raises their maxima.
  template <int W, int NR, bool kPairs>
  HWY_NOINLINE void Scores(const KeyBlock& block, int g0, int c0, int lo, int hi, VF (&max)[W]) {
    constexpr int kWidth = NR * kLanes;
    float* S = x_.s + c0 * kLanes;
    const VF scale = hn::Set(df, p_.scale * kLog2e);
    VF m[W];  // of our own: the stores of the scores could change `max`
    MFA_UNROLL
    for (int c = 0; c < W; ++c) m[c] = max[c];
    ForRowTiles<kTallRows<W>>(lo, hi, [&]<int MR>(int k) HWY_ATTR {
      upcoming_.Fetch(ScoreWork(MR));
      const auto store = [&](int r, int c, VF s) HWY_ATTR {
        if constexpr (kPairs) s = hn::Mul(s, scale);
        hn::Store(s, df, S + (k + r) * kWidth + c * kLanes);
        m[c] = hn::Max(s, m[c]);
      };
      if constexpr (kPairs) {
        const uint32_t* q =
            reinterpret_cast<const uint32_t*>(x_.q) + static_cast<ptrdiff_t>(g0) * (p_.D / 2) + c0 * kLanes;
        const StridedRows<bfloat16> rows = reader_.KeyPairs<MR>(block, k);
        MultiplyTile<MR, W>(rows.first, StepsAdjacent{rows.step}, q, kWidth, p_.D / 2, store);
      } else {
        const float* q = x_.q + static_cast<ptrdiff_t>(g0) * p_.D + c0 * kLanes;
        const StridedRows<float> rows = reader_.Keys<MR>(block, k);
        MultiplyTile<MR, W>(rows.first, StepsAdjacent{rows.step}, q, kWidth, p_.D, store);
      }
    });
    MFA_UNROLL
    for (int c = 0; c < W; ++c) max[c] = m[c];
  }

  template <int NR, bool kPairs>
  HWY_NOINLINE void Group(const KeyBlock& block, int g0, const BlockKeys& keys, bool masked, bool skip_hidden) {
    constexpr int kWidth = NR * kLanes;
    float* S = x_.s;
    const int lo = keys.lo, hi = keys.hi;
    // The keys of the second product: with pairs, whole pairs.
    const int pair_lo = kPairs ? lo & ~1 : lo, pair_hi = kPairs ? RoundUp(hi, 2) : hi;
    VF block_m[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) block_m[c] = hn::Set(df, -kInf);

    const bool windows = masked && steps_.only_windows(reader_.block(), keys);
    const int32_t* mask = masked ? x_.mask : nullptr;
    if (masked && !windows) {
      bool any = false;
      for (int c = 0; c < NR; ++c)
        any |= PackMask(p_, x_.tile, g0 + c * kLanes, reader_.block(), lo, hi - lo, x_.mask + c * kLanes, kWidth);
      if (!any) return MarkUnseenBy(g0, block.index);
    }
    if (steps_.bias)
      for (int c = 0; c < NR; ++c)
        PackBias(p_, x_.tile, g0 + c * kLanes, reader_.block(), lo, hi - lo, x_.bias + c * kLanes, kWidth);

    const bool drops = p_.dropout_p > 0.f;
    // What looks at all scores, or takes them all.
    const bool whole = keys.full || masked || skip_hidden || drops || reader_.block().listed || block.v_rows ||
                       job_.floors || job_.out->probs || p_.Dv % kTileRows != 0;
    const VectorKeys<NR> taken = whole ? VectorKeys<NR>(keys) : VectorKeys<NR>(x_.tile, g0, reader_.block().k0, keys);

    // S = K Q^T
    const bool plain = !masked && !steps_.any();
    const int32_t* key_of = reader_.block().list.key;
    const auto scores = [&]<int C0, int C1>(int k, int end, bool ragged) HWY_ATTR {
      if (k >= end) return;
      VF max[C1 - C0], before[C1 - C0];
      MFA_UNROLL
      for (int c = C0; c < C1; ++c) max[c - C0] = before[c - C0] = block_m[c];
      Scores<C1 - C0, NR, kPairs>(block, g0, C0, k, end, max);
      if (ragged)
        HideBeyondIntervals<C1 - C0>(x_.tile, g0 + C0 * kLanes, key_of, k, end, S + C0 * kLanes, kWidth, before);
      MFA_UNROLL
      for (int c = C0; c < C1; ++c) block_m[c] = ragged ? before[c - C0] : max[c - C0];
    };
    taken.ForRuns([&]<int C0, int C1>(int k, int end) HWY_ATTR {
      if constexpr (C1 - C0 == NR) {
        scores.template operator()<C0, C1>(k, taken.from, plain);
        scores.template operator()<C0, C1>(taken.from, taken.to, false);
        scores.template operator()<C0, C1>(taken.to, end, plain);
      } else {
        scores.template operator()<C0, C1>(k, end, plain);
      }
    });
    if (!plain) {
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) block_m[c] = hn::Set(df, -kInf);
      if (windows) {
        HideBeyondWindows<NR>(x_.tile, g0, reader_.block(), lo, hi, S, kWidth, block_m);
      } else {
        ApplyScoreSteps<NR>(p_, steps_, x_.tile, g0, key_of, lo, hi, x_.bias, mask, S, kWidth, block_m, nullptr);
      }
    }
    if (HWY_UNLIKELY(job_.floors != nullptr)) return selector_.Add<NR>(S, g0, lo, hi);
    if (job_.out->probs) StoreScores(job_, x_.tile, reader_.block().list, g0, lo, hi, S, kWidth);
    if constexpr (kPairs) {  // the other halves of odd bounds see nothing
      for (int c = 0; c < NR; ++c) {
        if (pair_lo < lo) hn::Store(hn::Set(df, -kInf), df, S + pair_lo * kWidth + c * kLanes);
        if (pair_hi > hi) hn::Store(hn::Set(df, -kInf), df, S + hi * kWidth + c * kLanes);
      }
    }
    if (skip_hidden)
      for (int i = pair_lo * kWidth; i < pair_hi * kWidth; ++i) x_.seen[i] = S[i] != -kInf;

    // P = exp2(S - block_m), and its row sums
    VF safe[NR], block_l[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      safe[c] = FiniteOrZero(block_m[c]);
      block_l[c] = hn::Zero(df);
    }
    uint32_t* pairs = reinterpret_cast<uint32_t*>(S);
    int from[NR], to[NR];
    taken.template Bounds<kPairs ? 2 : 1>(from, to);
    if (kPairs && HWY_LIKELY(!drops)) {
      PairExponentials<NR>(S, taken, safe, block_l);
    } else if (!kPairs && p_.dtype == DType::f32) {
      BlockExponentials<NR, false>(S, from, to, safe, block_l);
    } else {
      BlockExponentials<NR, true>(S, from, to, safe, block_l);
    }
    if (drops) {
      ApplyDropout(p_, x_.tile, g0, kWidth, reader_.block().list.key, lo, hi, S, kWidth);
      if constexpr (kPairs) {
        for (int k = pair_lo; k < pair_hi; k += 2)
          for (int c = 0; c < NR; ++c) {
            const float* at = S + k * kWidth + c * kLanes;
            hn::Store(PackPairs(hn::Load(df, at), hn::Load(df, at + kWidth)), du, pairs + k / 2 * kWidth + c * kLanes);
          }
      }
    }

    // O^T = a O^T + b V^T P, or the block's own V^T P when it is kept apart
    VF a[NR], b[NR];
    float* o = x_.o + static_cast<ptrdiff_t>(g0) * p_.Dv;
    const bool apart = job_.plan.key_splits > 1;
    if (apart) {
      const int64_t at = PartialIndex(block.index) * job_.partials.row_width;
      for (int c = 0; c < NR; ++c) {
        hn::Store(block_m[c], df, job_.partials.m + at + g0 + c * kLanes);
        hn::Store(block_l[c], df, job_.partials.l + at + g0 + c * kLanes);
        a[c] = hn::Zero(df);
        b[c] = hn::Set(df, 1.f);
      }
      o = job_.partials.o + at * job_.partials.o_stride + static_cast<ptrdiff_t>(g0) * p_.Dv;
    } else {
      for (int c = 0; c < NR; ++c)
        MergeState(x_.state.m + g0 + c * kLanes, x_.state.l + g0 + c * kLanes, block_m[c], block_l[c], a[c], b[c]);
    }
    if (block.v_rows) return WriteRows<NR>(block, lo, hi, b);
    const bool holds = holds_[GroupIndex(g0)];
    if (!apart) holds_[GroupIndex(g0)] = true;
    const auto merge = [&](int d, int c, VF acc) HWY_ATTR {
      float* at = o + static_cast<ptrdiff_t>(d) * kWidth + c * kLanes;
      if (!apart) {
        acc = hn::Mul(acc, b[c]);
        if (holds) acc = hn::MulAdd(hn::Load(df, at), a[c], acc);
      }
      hn::Store(acc, df, at);
    };
    const auto multiply = [&]<int MR>(const auto* v, const auto* P, int steps, int d) HWY_ATTR {
      upcoming_.Fetch(ValueWork(MR, hi - lo));
      const auto store = [&](int r, int c, VF acc) HWY_ATTR { merge(d + r, c, acc); };
      if (HWY_UNLIKELY(skip_hidden)) return MultiplyVisibleTile<MR, NR>(v, pair_lo, P, steps, x_.seen, store);
      if constexpr (NR > 1 && MR == kTileRows) {
        if (!taken.same) return MultiplyStairs<MR, NR>(v, RowsInPanels{kValuePanel}, P, kWidth, taken, store);
      }
      MultiplyTile<MR, NR>(v, RowsInPanels{kValuePanel}, P, kWidth, steps, store);
    };
    ForRowTiles<kTallRows<NR>>(0, p_.Dv, [&]<int MR>(int d) HWY_ATTR {
      if constexpr (kPairs) {
        multiply.template operator()<MR>(PanelColumn(block.v16, pair_lo, d), pairs + pair_lo / 2 * kWidth,
                                         (pair_hi - pair_lo) / 2, d);
      } else {
        multiply.template operator()<MR>(PanelColumn(block.v, lo, d), S + lo * kWidth, hi - lo, d);
      }
    });
  }

  // The outputs of a tile that sees this block alone.
  template <int NR>
  HWY_INLINE void WriteRows(const KeyBlock& block, int lo, int hi, const VF (&b)[NR]) {
    constexpr int kWidth = NR * kLanes;
    const RowTile& t = x_.tile;
    alignas(64) float weight[kWidth], inverse[kWidth];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      hn::Store(b[c], df, weight + c * kLanes);
      hn::Store(Inverse(hn::Load(df, x_.state.l + c * kLanes)), df, inverse + c * kLanes);
    }
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      T* rows[kWidth];
      for (int r = 0; r < t.count; ++r) rows[r] = QueryRow<T>(p_, job_.out->o, t.b, t.head[r], t.query[r]);
      const StridedRows<T> v{static_cast<const T*>(block.v_rows) + lo * block.v_step, block.v_step};
      OutputRows(x_.s + lo * kWidth, kWidth, v, hi - lo, p_.Dv, weight, inverse, rows, t.count,
                 [&](int n) HWY_ATTR { upcoming_.Fetch(ValueWork(n, hi - lo) / kWidth); });
    });
    written_ = true;
  }

  int64_t PartialIndex(int block) const { return tile_index_ * job_.partials.blocks + block; }

  int64_t LseIndex(int r) const { return row_index(p_, x_.tile.b, x_.tile.head[r], x_.tile.query[r]); }

  const ForwardJob& job_;
  const AttentionProblem& p_;
  const ScoreSteps steps_;
  ForwardScratch x_;
  BlockReader reader_;
  UpcomingRows upcoming_;
  ScoreSelector selector_;
  int64_t tile_index_ = 0;
  int tile_width_ = 0;
  // The rows of the tile that comes next, once AddRows() has asked for them.
  TileMap::Place next_{-1};
  int next_count_ = 0;
  int32_t next_query_[kMaxRowTile], next_head_[kMaxRowTile];
  static constexpr int kMostGroups = kMaxRowTile / kGroupRows;
  bool holds_[kMostGroups] = {};  // of each column group: `o` holds what a block has given
  bool written_ = false;          // WriteRows() has written the outputs
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
