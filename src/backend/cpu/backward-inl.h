// backward-inl.h: gradients of attention, lanes = query rows for the scores, channels for dK and dV. A is the element
// that the products broadcast: float, or bfloat16 where the processor multiplies pairs; P and dS are rounded for those.
//
// A task owns a range of keys of one KV head. For each block of keys it walks the row tiles that see them, recomputes
//   P = exp2(S - lse),   dS = P (dP - delta),   dP = dO V^T
// and accumulates dV += P^T dO, dK += dS^T Q and dQ += dS K. dK and dV stay in the task; dQ goes to the task's own
// partial, summed in a fixed order afterwards, so that no result depends on the number of threads. Source: Dao et al.,
// arXiv:2205.14135, section B.

namespace mfa::cpu::MFA_ISA {
namespace {

template <class A>
class Backward {
 public:
  Backward(const BackwardJob& job, void* scratch)
      : job_(job),
        p_(*job.problem),
        steps_(p_),
        d_padded_(RoundUp(p_.D, kLanes)),
        dv_padded_(RoundUp(p_.Dv, kLanes)),
        q_stride_(d_padded_ + kRowPad),
        d_o_stride_(dv_padded_ + kRowPad),
        finder_(p_, kPairs),
        x_(p_, static_cast<char*>(scratch)),
        keys_of_block_(p_, job.out->dq.data, x_) {}

  size_t scratch_bytes() const { return x_.bytes; }

  void Run(int64_t task) {
    const BackwardPlan& plan = job_.plan;
    // Key ranges of a head one after the other: they read the same queries, which may still be in a cache.
    const int64_t head = task / plan.key_partitions;
    SelectSequence(plan.tiles.sequence(static_cast<int32_t>(head / p_.Hkv)), static_cast<int>(head % p_.Hkv));
    partition_ = static_cast<int>(task % plan.key_partitions);
    const int64_t partition_keys = int64_t{plan.partition_blocks} * kKeyBlock;
    const int64_t first = Min<int64_t>(key_rows_, partition_ * partition_keys);
    const int64_t last = Min<int64_t>(key_rows_, first + partition_keys);
    for (float* rows : {job_.dslope_rows, job_.ds_rows})
      for (int h = 0; rows && h < p_.Hq / p_.Hkv; ++h)
        __builtin_memset(RowTerms(p_, rows, partition_) + row_index(p_, b_, kv_head_ * (p_.Hq / p_.Hkv) + h, 0), 0,
                         static_cast<size_t>(query_count(p_, b_)) * sizeof(float));
    // Where lists or neighbourhoods leave out most tiles, the partials start as zeros.
    const bool clears = first >= last || steps_.cuts;
    for (int64_t tile = 0; clears && tile < tiles_; ++tile) ClearPartial(tile);
    for (int64_t k0 = first; k0 < last; k0 += kBackwardKeys)
      Keys(k0, static_cast<int>(Min<int64_t>(kBackwardKeys, last - k0)), k0 == first && !clears);
  }

  // Sums the partials of one row tile and writes dq.
  void ReduceQueries(int64_t index) {
    const BackwardPlan& plan = job_.plan;
    const TileMap::Place place = plan.tiles.locate(index);
    SelectSequence(place.b, place.kv_head);
    if (!FillTile(place.tile)) return;
    float* sum = x_.dq;
    float* row = reinterpret_cast<float*>(x_.q);  // rows of dQ, unpacked
    const int64_t size = int64_t{width_} * p_.D;
    for (int part = 0; part < plan.key_partitions; ++part) {
      const float* from = PartialTile(part, place.tile);
      for (int64_t i = 0; i < size; i += kLanes) {
        const VF x = hn::Load(df, from + i);
        hn::Store(part == 0 ? x : hn::Add(hn::Load(df, sum + i), x), df, sum + i);
      }
    }
    if (job_.ds_rows) CorrectQueries(job_, x_.tile, width_, row, sum);
    alignas(64) float scale[kLanes];
    for (float& f : scale) f = p_.scale;
    const RowTile& t = x_.tile;
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int g0 = 0; g0 < width_; g0 += kGroupRows) {
        const int width = Min(kGroupRows, width_ - g0);
        for (int r = 0; r < width; r += kLanes) {
          const int real = Min(kLanes, t.count - g0 - r);
          const float* from = sum + static_cast<ptrdiff_t>(g0) * p_.D + r;
          if (RotatesQueries(p_)) {
            float* turned[kLanes];
            for (int i = 0; i < real; ++i) turned[i] = row + i * q_stride_;
            UnpackTransposed(from, width, p_.D, scale, turned, real);
            for (int i = 0; i < real; ++i) {
              Rotate(p_.rope, QueryPosition(p_, t.b, t.query[g0 + r + i]), true, turned[i]);
              StoreRow(turned[i], p_.D, 1.f,
                       QueryRow<T>(p_, job_.out->dq, t.b, t.head[g0 + r + i], t.query[g0 + r + i]));
            }
            continue;
          }
          T* rows[kLanes];
          for (int i = 0; i < real; ++i)
            rows[i] = QueryRow<T>(p_, job_.out->dq, t.b, t.head[g0 + r + i], t.query[g0 + r + i]);
          UnpackTransposed(from, width, p_.D, scale, rows, real);
        }
      }
    });
  }

  // Leading dimension of the scores that VisitScores() shows.
  static constexpr ptrdiff_t kScoreStride = BackwardScratch<A>::kScoreRows;

  // dbias over one region of the bias: see bias_gradient-inl.h. `row` counts in the default order of RowTiling. Calls
  // visit(tile, block, r0, rows, keys, dS) for the rows from r0 on and the keys that they see.
  template <class Visit>
  void VisitScores(int b, int head, int64_t row, int count, int64_t k0, int keys, const Visit& visit) {
    SelectSequence(b, head);
    const int G = p_.Hq / p_.Hkv;
    for (int r = 0; r < count; ++r) {
      x_.tile.query[r] = static_cast<int32_t>((row + r) / G);
      x_.tile.head[r] = head * G + static_cast<int32_t>((row + r) % G);
    }
    width_ = RoundUp(count, kLanes);
    CompleteRowTile(p_, b, head, count, width_, x_.tile);
    finder_.Select(x_.tile);
    finder_.Find(x_.tile, width_, k0, keys, x_.block);
    if (x_.block.all.empty()) return;
    upcoming_.Clear();
    upcoming_.Spread(1);  // nothing follows
    LoadRows();
    keys_of_block_.Load(b, head, k0, keys);
    keys_of_block_.Select();
    for (int g0 = 0; g0 < width_; g0 += kGroupRows)
      Scores(g0, true, [&](const BlockKeys& seen, int width) {
        visit(x_.tile, x_.block, g0, Min(width, count - g0), seen, x_.dp + Column(g0));
      });
  }

 private:
  static constexpr bool kPairs = kPack<A> == 2;
  // Calls f for the number of vectors of a column group.
  template <class F>
  static HWY_INLINE void ForVectors(int vectors, const F& f) {
    if (vectors == 1) return f.template operator()<1>();
    if (vectors == 2) return f.template operator()<2>();
    f.template operator()<kTileVectors>();
  }
  // Where the scores of a column group lie in a row of them.
  static constexpr int Column(int g0) { return kPairs ? 0 : g0; }

  void SelectSequence(int b, int kv_head) {
    b_ = b;
    kv_head_ = kv_head;
    tiles_ = tile_count(job_.plan.tiling, p_.neighbourhood, query_count(p_, b));
    keys_ = key_count(p_, b);
    // Rows of dk and dv, beyond the keys zero; of pages the keys alone.
    key_rows_ = p_.pages.table ? keys_ : p_.key_starts ? p_.key_starts[b + 1] - p_.key_starts[b] : p_.Nk;
  }

  float* PartialTile(int partition, int64_t tile) const {
    return job_.dq_partials + job_.plan.partial_row(p_, b_, kv_head_, partition, tile) * int64_t{p_.D};
  }

  void ClearPartial(int64_t tile) {
    if (!job_.out->dq.data) return;
    const int64_t part = part_rows(job_.plan.tiling, query_count(p_, b_));
    const int64_t rows = tiles_ == 1 ? RoundUp(static_cast<int>(Min<int64_t>(part, job_.plan.row_tile)), kLanes)
                                     : RoundUp(job_.plan.row_tile, kLanes);
    __builtin_memset(PartialTile(partition_, tile), 0, static_cast<size_t>(rows * p_.D) * sizeof(float));
  }

  // Returns whether the tile has rows.
  bool FillTile(int64_t tile) {
    const int count = fill_rows(job_.plan.tiling, p_, b_, kv_head_, tile, x_.tile.query, x_.tile.head);
    first_row_ = tile * job_.plan.row_tile;
    width_ = RoundUp(count, kLanes);
    if (count > 0) CompleteRowTile(p_, b_, kv_head_, count, width_, x_.tile);
    return count > 0;
  }

  // The number within the block of entry c.
  int BlockKey(int c) const { return x_.block.listed ? static_cast<int>(x_.block.list.key[c] - x_.block.k0) : c; }

  // Packs the rows of the tile. Rows that see no key have no gradient: they are zero here, whatever they hold.
  void LoadRows() {
    const RowTile& t = x_.tile;
    bool live[kBackwardRowTile];
    for (int r = 0; r < width_; ++r) {
      const int64_t index = row_index(p_, t.b, t.head[r], t.query[r]);
      const float lse = job_.in->lse[index];
      live[r] = r < t.count && t.begin[r] < t.end[r] && lse != -kInf;
      x_.lse[r] = !live[r] ? kInf : job_.in->lse_base2 ? lse : Base2Lse(lse);
      x_.delta[r] = live[r] ? job_.delta[index] : 0.f;
    }
    WithElement<A>(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      const auto row = [&](const TensorRef& x, int r) {
        return live[r] ? QueryRow<T>(p_, x, t.b, t.head[r], t.query[r]) : ZeroRow<T>();
      };
      if constexpr (kPairs) {
        PackRows([&](int r) { return row(p_.q, r); }, width_, p_.D, 1.f, x_.qt, x_.q, q_stride_);
        PackRows([&](int r) { return row(job_.in->d_o, r); }, width_, p_.Dv, 1.f, x_.dot, x_.d_o, d_o_stride_);
      } else {
        const auto load_q = [&](int r, float* out) HWY_ATTR {
          WidenRow(row(p_.q, r), p_.D, out);
          if (live[r] && RotatesQueries(p_)) Rotate(p_.rope, QueryPosition(p_, t.b, t.query[r]), false, out);
        };
        const auto load_d_o = [&](int r, float* out) HWY_ATTR { WidenRow(row(job_.in->d_o, r), p_.Dv, out); };
        PackRows(load_q, width_, p_.D, p_.scale * kLog2e, x_.qt, x_.q, q_stride_);
        PackRows(load_d_o, width_, p_.Dv, 1.f, x_.dot, x_.d_o, d_o_stride_);
      }
    });
  }
  bool AnyNonFiniteRow() const {
    const auto any = [&](const Lane<A>* rows, int stride, int width) {
      return AnyNonFinite(reinterpret_cast<const A*>(rows), ptrdiff_t{stride} * kPack<A>, width_ / kPack<A>,
                          width * kPack<A>);
    };
    return any(x_.q, q_stride_, p_.D) || any(x_.d_o, d_o_stride_, p_.Dv);
  }

  // `first`: the partials of dQ hold nothing yet. `rows` of dk and dv are written; not all have a key.
  void Keys(int64_t k0, int rows, bool first) {
    const int keys = static_cast<int>(Max<int64_t>(0, Min<int64_t>(rows, keys_ - k0)));
    keys_of_block_.Load(b_, kv_head_, k0, keys);
    for (int i = 0; i < rows * d_padded_; i += kLanes) hn::Store(hn::Zero(df), df, x_.dk + i);
    for (int i = 0; i < rows * dv_padded_; i += kLanes) hn::Store(hn::Zero(df), df, x_.dv + i);
    if (p_.blocks.offsets && keys > 0) {
      ForListedTiles(k0, keys, [&](int64_t tile) { Tile(tile, k0, keys, first); });
    } else {
      for (int64_t tile = 0; tile < tiles_; ++tile) Tile(tile, k0, keys, first);
    }
    WriteKeys(k0, rows);
  }

  // Calls f for the row tiles, ascending, of the query blocks that the transposed lists have for these keys.
  template <class F>
  void ForListedTiles(int64_t k0, int keys, const F& f) {
    const RowTiling& t = job_.plan.tiling;
    const int64_t tiles = tiles_ / t.parts, pieces = (t.unit + t.tile - 1) / t.tile;
    for (int part = 0; part < t.parts; ++part) {
      const int head = kv_head_ * (p_.Hq / p_.Hkv) + part * t.heads;
      for (int64_t block = 0; (block = listed_query_block(p_, b_, head, k0, keys, block)) * pieces < tiles; ++block)
        for (int64_t tile = block * pieces; tile < Min(tiles, (block + 1) * pieces); ++tile) f(part * tiles + tile);
    }
  }

  void Tile(int64_t tile, int64_t k0, int keys, bool first) {
    if (!FillTile(tile)) return;
    finder_.Select(x_.tile);
    finder_.Find(x_.tile, width_, k0, keys, x_.block);
    const BlockKeys& seen = x_.block.all;
    if (keys <= 0 || seen.empty()) {
      if (first) ClearPartial(tile);
      return;
    }
    LoadRows();
    keys_of_block_.Select();
    // An odd bound of a pair lets a product touch a key that no row sees.
    bool hides = !seen.full || steps_.hides() || steps_.cuts || (kPairs && (seen.lo % 2 || seen.hi % 2));
    if (hides) hides = keys_of_block_.AnyNonFiniteKey() || AnyNonFiniteRow();
    AddNextTile(seen);
    const bool drops = p_.dropout_p > 0.f && job_.out->dv.data;
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) {
      Scores(g0, drops || steps_.softcap || job_.dslope_rows,
             [&](const BlockKeys& keys, int width) HWY_ATTR { AdjustScores(g0, width, keys, drops); });
      if (job_.ds_rows) AddRowSums(p_, x_.tile, g0, row_sums_, RowTerms(p_, job_.ds_rows, partition_));
    }
    const auto key_in_block = [this](int c) { return BlockKey(c); };
    if (job_.out->dv.data)
      AddKeyGradients(x_.p, TileRows<A>{x_.d_o, d_o_stride_, width_, p_.Dv, group_keys_}, seen, hides, key_in_block,
                      x_.dv);
    if (job_.out->dk.data)
      AddKeyGradients(x_.ds, TileRows<A>{x_.q, q_stride_, width_, p_.D, group_keys_}, seen, hides, key_in_block, x_.dk);
    if (job_.out->dq.data) AccumulateQueries(tile, hides, first);
  }

  // P and dS for the rows of a column group and the keys that the tile sees, zero where not visible, as the products
  // read them. With `keeps`, calls then(keys of the group, rows) while P and dS, before softcap's derivative, are in s
  // and dp for the keys of the group.
  template <class Then>
  void Scores(int g0, bool keeps, const Then& then) {
    const int vectors = Min(kGroupRows, width_ - g0) / kLanes;
    BlockKeys& keys = group_keys_[g0 / kGroupRows];
    keys = x_.block.Of(x_.tile, g0, vectors * kLanes);
    if (keys.empty()) keys = {x_.block.all.lo, x_.block.all.lo, true};
    ClearHidden(g0, vectors * kLanes, x_.block.all.lo, keys.lo);
    ClearHidden(g0, vectors * kLanes, keys.hi, x_.block.all.hi);
    for (int r = 0; r < vectors * kLanes; r += kLanes) hn::Store(hn::Zero(df), df, row_sums_ + r);
    if (keys.empty()) return;
    ForVectors(vectors, [&]<int NR>() HWY_ATTR { GroupScores<NR>(g0, keys, keeps); });
    if (!keeps) return;
    then(keys, vectors * kLanes);
    if constexpr (kPairs)
      for (int r = 0; r < vectors * kLanes; r += kLanes) {
        VF sum = hn::Zero(df);
        for (int k = keys.lo & ~1; k < keys.hi; k += 2) {
          const float *P = x_.s + k * kScoreStride + r, *dS = x_.dp + k * kScoreStride + r;
          RoundPair(k, g0 + r, hn::Load(df, P), hn::Load(df, P + kScoreStride), hn::Load(df, dS),
                    hn::Load(df, dS + kScoreStride), sum);
        }
        hn::Store(sum, df, row_sums_ + r);
      }
  }

  // Zero for entries [lo, hi), which the column group does not see.
  void ClearHidden(int g0, int width, int lo, int hi) {
    for (int k = lo; k < hi; ++k)
      for (A* row : {x_.p + k * kBackwardRowTile + g0, x_.ds + k * kBackwardRowTile + g0})
        __builtin_memset(row, 0, static_cast<size_t>(width) * sizeof(A));
  }

  // P and dS of entries k and k + 1, k even, and a vector of rows, as the products read them. What they read of dS is
  // added to `sum`: the gradient of the queries has the same rounding.
  HWY_INLINE void RoundPair(int k, int row, VF p, VF next_p, VF ds, VF next_ds, VF& sum) {
    if constexpr (kPairs) {
      const ptrdiff_t at = k * kBackwardRowTile + row;
      PackPairsAndRows(p, next_p, x_.p + at, x_.p + at + kBackwardRowTile);
      const VU pairs = PackPairsAndRows(ds, next_ds, x_.ds + at, x_.ds + at + kBackwardRowTile);
      hn::Store(pairs, du, x_.ds_t + k / 2 * kBackwardRowTile + row);
      const VU ones = hn::Set(du, 0x3f803f80u);
      sum = Accumulate(pairs, ones, sum);
    }
  }

  // What is made of the scores of a column group beyond the products, and dropout and softcap's derivative.
  void AdjustScores(int g0, int width, const BlockKeys& keys, bool drops) {
    float* dS = x_.dp + Column(g0);
    if (job_.dslope_rows)
      AddSlopeTerms(p_, x_.tile, x_.block.list, g0, width, keys, dS, kScoreStride,
                    RowTerms(p_, job_.dslope_rows, partition_));
    if (drops)
      ApplyDropout(p_, x_.tile, g0, width, x_.block.list.key, keys.lo, keys.hi, x_.s + Column(g0), kScoreStride);
    if (!steps_.softcap) return;
    const float* derivative = x_.dr + Column(g0);
    for (int k = keys.lo; k < keys.hi; ++k)
      for (int r = 0; r < width; r += kLanes) {
        const ptrdiff_t at = k * kScoreStride + r;
        const VF ds = hn::Load(df, dS + at);
        // dS is exactly 0 where nothing is visible, and the derivative there may be NaN.
        hn::Store(hn::IfThenElse(hn::Eq(ds, hn::Zero(df)), ds, hn::Mul(ds, hn::Load(df, derivative + at))), df,
                  dS + at);
      }
  }

  template <int NR>
  HWY_NOINLINE void GroupScores(int g0, const BlockKeys& seen, bool keeps) {
    const bool masked = steps_.Masked(p_, x_.tile, g0, NR * kLanes, x_.block, {seen.lo, seen.hi, true});
    // A few keys at a time, whose scores stay in the first cache.
    constexpr int kStep = 64;
    for (int lo = seen.lo, hi; lo < seen.hi; lo = hi) {
      hi = Min(seen.hi, (lo + kStep) & ~1);
      ScoreStep<NR>(g0, seen, lo, hi, masked, keeps);
    }
  }

  template <int NR>
  HWY_INLINE void ScoreStep(int g0, const BlockKeys& seen, int lo, int hi, bool masked, bool keeps) {
    constexpr int kWidth = NR * kLanes;
    constexpr ptrdiff_t ld = kScoreStride;
    // Scores that nothing reads again may be overwritten by those of the next keys.
    const ptrdiff_t base = Column(g0) - (kPairs && !keeps ? (lo & ~1) * ld : 0);
    float *S = x_.s + base, *dP = x_.dp + base;
    const int32_t* key_of = x_.block.list.key;
    const Lane<A>* qt = x_.qt + static_cast<ptrdiff_t>(g0) * (p_.D / kPack<A>);
    const Lane<A>* dot = x_.dot + static_cast<ptrdiff_t>(g0) * (p_.Dv / kPack<A>);
    const VF scale = hn::Set(df, p_.scale * kLog2e);
    ForRowTiles<kTallRows<NR>>(lo, hi, [&]<int MR>(int k) HWY_ATTR {
      upcoming_.Fetch(MR);
      const BackwardKeys<A>& from = keys_of_block_;
      MultiplyTile<MR, NR>(from.k + k * from.k_stride, StepsAdjacent{from.k_stride}, qt, kWidth, p_.D / kPack<A>,
                           [&](int r, int c, VF s) HWY_ATTR {
                             if constexpr (kPairs) s = hn::Mul(s, scale);
                             hn::Store(s, df, S + (k + r) * ld + c * kLanes);
                           });
      MultiplyTile<MR, NR>(from.v + k * from.v_stride, StepsAdjacent{from.v_stride}, dot, kWidth, p_.Dv / kPack<A>,
                           [&](int r, int c, VF s) HWY_ATTR { hn::Store(s, df, dP + (k + r) * ld + c * kLanes); });
    });
    if (p_.dropout_p > 0.f) ApplyDropout(p_, x_.tile, g0, kWidth, key_of, lo, hi, dP, ld);

    const bool plain = seen.full && !masked && !steps_.any();
    VF ignored[NR];
    for (int c = 0; c < NR; ++c) ignored[c] = hn::Zero(df);
    if (masked && steps_.only_windows(x_.block, seen)) {
      HideBeyondWindows<NR>(x_.tile, g0, x_.block, lo, hi, S, ld, ignored);
    } else if (!plain) {
      for (int c = 0; c < NR; ++c) {
        if (masked) PackMask(p_, x_.tile, g0 + c * kLanes, x_.block, lo, hi - lo, x_.mask + c * kLanes, kWidth);
        if (steps_.bias) PackBias(p_, x_.tile, g0 + c * kLanes, x_.block, lo, hi - lo, x_.bias + c * kLanes, kWidth);
      }
      ApplyScoreSteps<NR>(p_, steps_, x_.tile, g0, key_of, lo, hi, x_.bias, masked ? x_.mask : nullptr, S, ld, ignored,
                          steps_.softcap ? x_.dr + Column(g0) : nullptr);
    }
    VF lse[NR], delta[NR], sums[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      sums[c] = hn::Load(df, row_sums_ + c * kLanes);
      lse[c] = hn::Load(df, x_.lse + g0 + c * kLanes);
      delta[c] = hn::Load(df, x_.delta + g0 + c * kLanes);
    }
    // N rows of scores into P and dS. Of a hidden key dP may be NaN, and P too where the row's lse is: both are zero.
    const auto finish = [&]<int N>(int k, VF(&P)[N], VF(&dS)[N]) MFA_INLINE_LAMBDA {
      MF hidden[N];
      MFA_UNROLL
      for (int i = 0; i < N; ++i) {
        const VF s = hn::Load(df, S + (k + i / NR) * ld + i % NR * kLanes);
        hidden[i] = hn::Eq(s, hn::Set(df, -kInf));
        P[i] = hn::Sub(s, lse[i % NR]);
      }
      Exp2All<kPairs>(P);
      MFA_UNROLL
      for (int i = 0; i < N; ++i) {
        const VF dp = hn::Load(df, dP + (k + i / NR) * ld + i % NR * kLanes);
        dS[i] = hn::IfThenZeroElse(hidden[i], hn::Mul(P[i], hn::Sub(dp, delta[i % NR])));
        P[i] = hn::IfThenZeroElse(hidden[i], P[i]);
      }
    };
    const auto keep = [&]<int N>(int k, const VF(&P)[N], const VF(&dS)[N]) MFA_INLINE_LAMBDA {
      MFA_UNROLL
      for (int i = 0; i < N; ++i) {
        hn::Store(P[i], df, S + (k + i / NR) * ld + i % NR * kLanes);
        hn::Store(dS[i], df, dP + (k + i / NR) * ld + i % NR * kLanes);
      }
    };
    if constexpr (!kPairs) {
      MFA_NO_UNROLL
      for (int k = lo; k < hi; ++k) {
        VF P[NR], dS[NR];
        finish(k, P, dS);
        keep(k, P, dS);
        MFA_UNROLL
        for (int c = 0; c < NR; ++c) sums[c] = hn::Add(sums[c], dS[c]);
      }
    } else {
      for (int c = 0; c < NR; ++c) {  // the other halves of odd bounds see nothing
        if (lo % 2) hn::Store(hn::Set(df, -kInf), df, S + (lo - 1) * ld + c * kLanes);
        if (hi % 2) hn::Store(hn::Set(df, -kInf), df, S + hi * ld + c * kLanes);
      }
      MFA_NO_UNROLL
      for (int k = lo & ~1; k < hi; k += 2) {
        VF P[2 * NR], dS[2 * NR];
        finish(k, P, dS);
        if (HWY_UNLIKELY(keeps)) {
          keep(k, P, dS);
          continue;
        }
        MFA_UNROLL
        for (int c = 0; c < NR; ++c) RoundPair(k, g0 + c * kLanes, P[c], P[NR + c], dS[c], dS[NR + c], sums[c]);
      }
    }
    for (int c = 0; c < NR; ++c) hn::Store(sums[c], df, row_sums_ + c * kLanes);
  }

  // The rows of the next tile, and its dQ, come in during the products of this one.
  void AddNextTile(const BlockKeys& keys) {
    upcoming_.Clear();
    const int G = p_.Hq / p_.Hkv;
    const int64_t next = first_row_ + job_.plan.row_tile;
    const int rows = static_cast<int>(Min<int64_t>(job_.plan.row_tile, int64_t{query_count(p_, b_)} * G - next));
    if (rows > 0 && !steps_.cuts) {
      WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
        const auto add = [&](const TensorRef& x, int width) {
          constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(T));
          for (int r = 0; r < Min(rows, G); ++r)  // head by head
            upcoming_.Add(QueryRow<T>(p_, x, b_, kv_head_ * G + static_cast<int>((next + r) % G), (next + r) / G),
                          (rows - r + G - 1) / G, x.stride[2] * kSize, static_cast<size_t>(width * kSize));
        };
        add(p_.q, p_.D);
        add(job_.in->d_o, p_.Dv);
      });
      if (job_.out->dq.data)
        upcoming_.Add(PartialTile(partition_, next / job_.plan.row_tile), 1, 0,
                      static_cast<size_t>(rows * p_.D) * sizeof(float));
    }
    upcoming_.Spread((width_ + kGroupRows - 1) / kGroupRows * (keys.hi - keys.lo));
  }

  // dQ^T[d][r] += sum_k K[k][d] dS[k][r]
  void AccumulateQueries(int64_t tile, bool skip_zero, bool first) {
    float* out = PartialTile(partition_, tile);
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) {
      const int vectors = Min(kGroupRows, width_ - g0) / kLanes;
      float* to = out + static_cast<ptrdiff_t>(g0) * p_.D;
      const BlockKeys& seen = group_keys_[g0 / kGroupRows];
      const bool hidden = seen.empty();
      if (first && (hidden || skip_zero))
        for (int i = 0; i < vectors * p_.D; ++i) hn::Store(hn::Zero(df), df, to + i * kLanes);
      if (hidden) continue;
      if (HWY_UNLIKELY(skip_zero)) {
        AddVisibleQueryGradients(x_.ds_t + g0, vectors * kLanes, seen, x_.k_panels, p_.D, to);
        continue;
      }
      ForVectors(vectors,
                 [&]<int NR>() HWY_ATTR { AddQueryGradients<NR>(x_.ds_t + g0, seen, x_.k_panels, p_.D, first, to); });
    }
  }

  void WriteKeys(int64_t k0, int keys) {
    if (job_.out->dk.data && RotatesKeys(p_))
      for (int k = 0; k < Min<int64_t>(keys, keys_ - k0); ++k)
        Rotate(p_.rope, KeyPosition(p_, b_, k0 + k), true, x_.dk + k * d_padded_);
    const KeyGradientRows rows{b_, kv_head_, k0, keys, key_rows_};
    rows.Write(job_, job_.out->dk, job_.dk_rows, x_.dk, p_.D, p_.scale);
    rows.Write(job_, job_.out->dv, job_.dv_rows, x_.dv, p_.Dv, 1.f);
  }

  const BackwardJob& job_;
  const AttentionProblem& p_;
  const ScoreSteps steps_;
  const int d_padded_, dv_padded_, q_stride_, d_o_stride_;
  BlockFinder finder_;
  BackwardScratch<A> x_;
  BackwardKeys<A> keys_of_block_;
  BlockKeys group_keys_[kBackwardRowTile / kGroupRows];  // of the block, those that each column group sees
  alignas(64) float row_sums_[kGroupRows];  // of a group: the sums of dS over the keys, before softcap's derivative
  UpcomingRows upcoming_;
  int b_ = 0, kv_head_ = 0;
  int64_t tiles_ = 0, keys_ = 0, key_rows_ = 0;  // of the sequence
  int64_t first_row_ = 0;
  int partition_ = 0, width_ = 0;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
