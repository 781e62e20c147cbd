// backward-inl.h: gradients of attention, lanes = query rows for the scores, channels for dK and dV.
//
// A task owns a range of keys of one KV head. For each block of keys it walks the row tiles that see them, recomputes
//   P = exp2(S - lse),   dS = P (dP - delta),   dP = dO V^T
// and accumulates dV += P^T dO, dK += dS^T Q and dQ += dS K. dK and dV stay in the task; dQ goes to the task's own
// partial, summed in a fixed order afterwards, so that no result depends on the number of threads. Source: Dao et al.,
// arXiv:2205.14135, section B.

namespace mfa::cpu::MFA_ISA {
namespace {

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
        finder_(p_, false),
        x_(p_, static_cast<char*>(scratch)) {}

  size_t scratch_bytes() const { return x_.bytes; }

  void Run(int64_t task) {
    const BackwardPlan& plan = job_.plan;
    const int64_t heads = int64_t{p_.B} * p_.Hkv;
    const int64_t head = task % heads;
    SelectSequence(plan.tiles.sequence(static_cast<int32_t>(head / p_.Hkv)), static_cast<int>(head % p_.Hkv));
    partition_ = static_cast<int>(task / heads);
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
    float* sum = x_.qt;  // [group][D][width]
    const int64_t size = int64_t{width_} * p_.D;
    for (int part = 0; part < plan.key_partitions; ++part) {
      const float* from = PartialTile(part, place.tile);
      for (int64_t i = 0; i < size; i += kLanes) {
        const VF x = hn::Load(df, from + i);
        hn::Store(part == 0 ? x : hn::Add(hn::Load(df, sum + i), x), df, sum + i);
      }
    }
    if (job_.ds_rows) CorrectQueries(job_, x_.tile, width_, x_.q, sum);
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
            for (int i = 0; i < real; ++i) turned[i] = x_.q + i * q_stride_;
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

  // dbias over one region of the bias: see bias_gradient-inl.h. `row` counts in the default order of RowTiling.
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
    LoadKeys(k0, keys);
    SelectKeys();
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) Scores(g0);
    visit(x_.tile, x_.block, x_.dp);
  }

 private:
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

  // The keys [k0, k0 + keys), all of which the sequence has.
  void LoadKeys(int64_t k0, int keys) {
    const ptrdiff_t d = d_padded_, d_v = dv_padded_;
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      const StridedRows<T> rows{keys > 0 ? KeyRow<T>(p_, p_.k, b_, kv_head_, k0) : nullptr, p_.k.stride[2]};
      const StridedRows<T> values{keys > 0 ? KeyRow<T>(p_, p_.v, b_, kv_head_, k0) : nullptr, p_.v.stride[2]};
      if (GathersRows(p_) || RotatesKeys(p_)) {
        const T* table[kBackwardKeys];
        KeyList list;
        for (int k = 0; k < keys; ++k) list.key[k] = static_cast<int32_t>(k0) + k;
        KeyRows(p_, p_.k, b_, kv_head_, list, 0, keys, table);
        GatherKeys(p_, b_, list, table, 0, keys, x_.k, d);
        k_ = x_.k;
        k_stride_ = d;
        if (GathersRows(p_)) {
          KeyRows(p_, p_.v, b_, kv_head_, list, 0, keys, table);
          for (int k = 0; k < keys; ++k) WidenRow(table[k], p_.Dv, x_.v + k * d_v);
          v_ = x_.v;
          v_stride_ = d_v;
          return;
        }
      } else {
        k_ = WidenBlock<T>(rows, 0, keys, p_.D, x_.k, &k_stride_);
      }
      v_ = WidenBlock<T>(values, 0, keys, p_.Dv, x_.v, &v_stride_);
    });
    block_k_ = k_;
    block_v_ = v_;
    block_k_stride_ = k_stride_;
    block_v_stride_ = v_stride_;
    packed_block_ = false;
  }

  // Makes k_, v_ and the panels those of the entries that the tile sees: of a run the block's own, of a list copies.
  void SelectKeys() {
    const TileBlock& block = x_.block;
    const bool panels = job_.out->dq.data;
    if (!block.listed) {
      k_ = block_k_;
      v_ = block_v_;
      k_stride_ = block_k_stride_;
      v_stride_ = block_v_stride_;
      if (panels && !packed_block_) {
        const int keys = static_cast<int>(Min<int64_t>(kBackwardKeys, keys_ - block.k0));
        PackPanels<float>(StridedRows<float>{k_, k_stride_}, 0, keys, p_.D, kKeyPanel, x_.k_panels);
        packed_block_ = true;
      }
      return;
    }
    for (int c = block.all.lo; c < block.all.hi; ++c) {
      const int64_t k = block.list.key[c] - block.k0;
      WidenRow(block_k_ + k * block_k_stride_, p_.D, x_.listed_k + c * ptrdiff_t{d_padded_});
      WidenRow(block_v_ + k * block_v_stride_, p_.Dv, x_.listed_v + c * ptrdiff_t{dv_padded_});
    }
    k_ = x_.listed_k;
    v_ = x_.listed_v;
    k_stride_ = d_padded_;
    v_stride_ = dv_padded_;
    if (!panels) return;
    PackPanels<float>(StridedRows<float>{k_, k_stride_}, block.all.lo, block.all.hi, p_.D, kKeyPanel, x_.k_panels);
    packed_block_ = false;
  }
  // The number within the block of entry c.
  int BlockKey(int c) const { return x_.block.listed ? static_cast<int>(x_.block.list.key[c] - x_.block.k0) : c; }

  // Packs the rows of the tile. Rows that see no key have no gradient: they are zero here, whatever they hold.
  void LoadRows() {
    const RowTile& t = x_.tile;
    for (int r = 0; r < width_; ++r) {
      float* q = x_.q + r * q_stride_;
      float* d_o = x_.d_o + r * d_o_stride_;
      const int64_t index = row_index(p_, t.b, t.head[r], t.query[r]);
      const float lse = job_.in->lse[index];
      const bool live = r < t.count && t.begin[r] < t.end[r] && lse != -kInf;
      x_.lse[r] = !live ? kInf : job_.in->lse_base2 ? lse : Base2Lse(lse);
      x_.delta[r] = live ? job_.delta[index] : 0.f;
      if (live) {
        WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
          LoadQuery<T>(p_, t.b, t.head[r], t.query[r], q);
          WidenRow(QueryRow<T>(p_, job_.in->d_o, t.b, t.head[r], t.query[r]), p_.Dv, d_o);
        });
      } else {
        for (int i = 0; i < d_padded_; i += kLanes) hn::Store(hn::Zero(df), df, q + i);
        for (int i = 0; i < dv_padded_; i += kLanes) hn::Store(hn::Zero(df), df, d_o + i);
      }
    }
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) {
      const int width = Min(kGroupRows, width_ - g0);
      for (int r = 0; r < width; r += kLanes) {
        const float *q[kLanes], *d_o[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          q[i] = x_.q + (g0 + r + i) * q_stride_;
          d_o[i] = x_.d_o + (g0 + r + i) * d_o_stride_;
        }
        PackTransposed(q, p_.D, p_.scale * kLog2e, x_.qt + static_cast<ptrdiff_t>(g0) * p_.D + r, width);
        PackTransposed(d_o, p_.Dv, 1.f, x_.dot + static_cast<ptrdiff_t>(g0) * p_.Dv + r, width);
      }
    }
  }

  // `first`: the partials of dQ hold nothing yet. `rows` of dk and dv are written; not all have a key.
  void Keys(int64_t k0, int rows, bool first) {
    const int keys = static_cast<int>(Max<int64_t>(0, Min<int64_t>(rows, keys_ - k0)));
    LoadKeys(k0, keys);
    for (int i = 0; i < rows * d_padded_; i += kLanes) hn::Store(hn::Zero(df), df, x_.dk + i);
    for (int i = 0; i < rows * dv_padded_; i += kLanes) hn::Store(hn::Zero(df), df, x_.dv + i);
    nonfinite_ = -1;
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
    SelectKeys();
    bool hides = !seen.full || steps_.hides() || steps_.cuts;
    if (hides && nonfinite_ < 0) nonfinite_ = AnyNonFinite(block_k_, block_k_stride_, keys, p_.D);
    if (hides && nonfinite_ <= 0) {
      hides = AnyNonFinite(x_.q, q_stride_, width_, p_.D) || AnyNonFinite(x_.d_o, d_o_stride_, width_, p_.Dv);
    }
    AddNextTile(seen);
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) Scores(g0);
    const int32_t* key_of = x_.block.list.key;
    const auto key_in_block = [this](int c) { return BlockKey(c); };
    if (job_.dslope_rows)
      AddSlopeTerms(p_, x_.tile, x_.block.list, seen, x_.dp, RowTerms(p_, job_.dslope_rows, partition_));
    if (job_.ds_rows) AddRowSums(p_, x_.tile, width_, seen, x_.dp, RowTerms(p_, job_.ds_rows, partition_));
    if (job_.out->dv.data) {
      if (p_.dropout_p > 0.f) ApplyDropout(p_, x_.tile, 0, width_, key_of, seen.lo, seen.hi, x_.s, kBackwardRowTile);
      AddKeyGradients(x_.s, {x_.d_o, d_o_stride_, width_, p_.Dv}, seen, hides, key_in_block, x_.dv);
    }
    if (steps_.softcap)
      for (int k = seen.lo; k < seen.hi; ++k)
        for (int r = 0; r < width_; r += kLanes) {
          const ptrdiff_t at = k * kBackwardRowTile + r;
          const VF ds = hn::Load(df, x_.dp + at);
          // dS is exactly 0 where nothing is visible, and the derivative there may be NaN.
          hn::Store(hn::IfThenElse(hn::Eq(ds, hn::Zero(df)), ds, hn::Mul(ds, hn::Load(df, x_.dr + at))), df,
                    x_.dp + at);
        }
    if (job_.out->dk.data) AddKeyGradients(x_.dp, {x_.q, q_stride_, width_, p_.D}, seen, hides, key_in_block, x_.dk);
    if (job_.out->dq.data) AccumulateQueries(tile, hides, first);
  }

  // P into s and dS (before softcap's derivative) into dp, for the rows of a column group and the keys that the tile
  // sees; zero where not visible.
  void Scores(int g0) {
    const int vectors = Min(kGroupRows, width_ - g0) / kLanes;
    if (vectors == 1) {
      GroupScores<1>(g0);
    } else if (vectors == 2) {
      GroupScores<2>(g0);
    } else {
      GroupScores<kTileVectors>(g0);
    }
  }

  template <int NR>
  HWY_NOINLINE void GroupScores(int g0) {
    constexpr int kWidth = NR * kLanes;
    float *S = x_.s + g0, *dP = x_.dp + g0;
    const BlockKeys &keys = x_.block.all, seen = x_.block.Of(x_.tile, g0, kWidth);
    const int32_t* key_of = x_.block.list.key;
    const int lo = Min(Max(keys.lo, seen.lo), keys.hi), hi = Max(lo, seen.hi);
    for (int k = keys.lo; k < keys.hi; ++k) {
      if (k == lo) k = hi;
      if (k >= keys.hi) break;
      for (int c = 0; c < NR; ++c) {
        hn::Store(hn::Zero(df), df, S + k * kBackwardRowTile + c * kLanes);
        hn::Store(hn::Zero(df), df, dP + k * kBackwardRowTile + c * kLanes);
      }
    }
    if (lo >= hi) return;
    const float* qt = x_.qt + static_cast<ptrdiff_t>(g0) * p_.D;
    const float* dot = x_.dot + static_cast<ptrdiff_t>(g0) * p_.Dv;
    ForRowTiles<kTileRows>(lo, hi, [&]<int MR>(int k) HWY_ATTR {
      upcoming_.Fetch(MR);
      MultiplyTile<MR, NR>(k_ + k * k_stride_, StepsAdjacent{k_stride_}, qt, kWidth, p_.D,
                           [&](int r, int c, VF s)
                               HWY_ATTR { hn::Store(s, df, S + (k + r) * kBackwardRowTile + c * kLanes); });
      MultiplyTile<MR, NR>(v_ + k * v_stride_, StepsAdjacent{v_stride_}, dot, kWidth, p_.Dv,
                           [&](int r, int c, VF s)
                               HWY_ATTR { hn::Store(s, df, dP + (k + r) * kBackwardRowTile + c * kLanes); });
    });
    if (p_.dropout_p > 0.f) ApplyDropout(p_, x_.tile, g0, kWidth, key_of, lo, hi, dP, kBackwardRowTile);

    const bool masked = steps_.Masked(p_, x_.tile, g0, kWidth, x_.block, {lo, hi, true});
    const bool plain = seen.full && !masked && !steps_.any();
    VF ignored[NR];
    for (int c = 0; c < NR; ++c) ignored[c] = hn::Zero(df);
    if (masked && steps_.only_windows(x_.block, seen)) {
      HideBeyondWindows<NR>(x_.tile, g0, x_.block, lo, hi, S, kBackwardRowTile, ignored);
    } else if (!plain) {
      for (int c = 0; c < NR; ++c) {
        if (masked) PackMask(p_, x_.tile, g0 + c * kLanes, x_.block, lo, hi - lo, x_.mask + c * kLanes, kWidth);
        if (steps_.bias) PackBias(p_, x_.tile, g0 + c * kLanes, x_.block, lo, hi - lo, x_.bias + c * kLanes, kWidth);
      }
      ApplyScoreSteps<NR>(p_, steps_, x_.tile, g0, key_of, lo, hi, x_.bias, masked ? x_.mask : nullptr, S,
                          kBackwardRowTile, ignored, steps_.softcap ? x_.dr + g0 : nullptr);
    }
    VF lse[NR], delta[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      lse[c] = hn::Load(df, x_.lse + g0 + c * kLanes);
      delta[c] = hn::Load(df, x_.delta + g0 + c * kLanes);
    }
    MFA_NO_UNROLL
    for (int k = lo; k < hi; ++k) {
      float *s_at = S + k * kBackwardRowTile, *dp_at = dP + k * kBackwardRowTile;
      VF s[NR], prob[NR];
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) {
        s[c] = hn::Load(df, s_at + c * kLanes);
        prob[c] = hn::Sub(s[c], lse[c]);
      }
      Exp2All(prob);
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) {
        const VF ds = hn::Mul(prob[c], hn::Sub(hn::Load(df, dp_at + c * kLanes), delta[c]));
        // Of a hidden key dP may be NaN, and P too where the row's lse is: both count as zero.
        const MF hidden = hn::Eq(s[c], hn::Set(df, -kInf));
        hn::Store(hn::IfThenZeroElse(hidden, prob[c]), df, s_at + c * kLanes);
        hn::Store(hn::IfThenZeroElse(hidden, ds), df, dp_at + c * kLanes);
      }
    }
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
      const BlockKeys seen = x_.block.Of(x_.tile, g0, vectors * kLanes);
      const bool hidden = seen.empty();
      if (first && (hidden || skip_zero))
        for (int i = 0; i < vectors * p_.D; ++i) hn::Store(hn::Zero(df), df, to + i * kLanes);
      if (hidden) continue;
      if (HWY_UNLIKELY(skip_zero)) {
        AddVisibleQueryGradients(x_.dp + g0, vectors * kLanes, seen, k_, k_stride_, p_.D, to);
        continue;
      }
      if (vectors == 1) {
        AddQueryGradients<1>(x_.dp + g0, seen, x_.k_panels, p_.D, first, to);
      } else if (vectors == 2) {
        AddQueryGradients<2>(x_.dp + g0, seen, x_.k_panels, p_.D, first, to);
      } else {
        AddQueryGradients<kTileVectors>(x_.dp + g0, seen, x_.k_panels, p_.D, first, to);
      }
    }
  }

  void WriteKeys(int64_t k0, int keys) {
    if (job_.out->dk.data && RotatesKeys(p_))
      for (int k = 0; k < Min<int64_t>(keys, keys_ - k0); ++k)
        Rotate(p_.rope, KeyPosition(p_, b_, k0 + k), true, x_.dk + k * d_padded_);
    const auto write = [&](const MutableTensorRef& to, float* apart, const float* from, int width, int padded,
                           float factor) {
      if (!to.data) return;
      if (apart) {  // summed over the sequences that share a page: see page_gradient_task
        const int64_t first = job_.key_offsets[b_] * p_.Hkv + kv_head_ * key_rows_ + k0;
        for (int k = 0; k < keys; ++k) StoreRow(from + k * padded, width, factor, apart + (first + k) * width);
        return;
      }
      WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
        for (int k = 0; k < keys; ++k)
          StoreRow(from + k * padded, width, factor, KeyRow<T>(p_, to, b_, kv_head_, k0 + k));
      });
    };
    write(job_.out->dk, job_.dk_rows, x_.dk, p_.D, d_padded_, p_.scale);
    write(job_.out->dv, job_.dv_rows, x_.dv, p_.Dv, dv_padded_, 1.f);
  }

  const BackwardJob& job_;
  const AttentionProblem& p_;
  const ScoreSteps steps_;
  const int d_padded_, dv_padded_, q_stride_, d_o_stride_;
  BlockFinder finder_;
  BackwardScratch x_;
  UpcomingRows upcoming_;
  int b_ = 0, kv_head_ = 0;
  int64_t tiles_ = 0, keys_ = 0, key_rows_ = 0;  // of the sequence
  int64_t first_row_ = 0;
  int partition_ = 0, width_ = 0;
  int nonfinite_ = -1;  // whether the block's keys are; -1: not looked at
  // Keys and values of the block, and of the entries of the tile.
  const float *block_k_ = nullptr, *block_v_ = nullptr, *k_ = nullptr, *v_ = nullptr;
  ptrdiff_t block_k_stride_ = 0, block_v_stride_ = 0, k_stride_ = 0, v_stride_ = 0;
  bool packed_block_ = false;  // the panels are the block's
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
