// forward_tiled-inl.h: attention forward with lanes = query rows.
//
// A task owns up to kMaxRowTile rows of one KV head and walks the key blocks they see. For each column group of rows
//   S = K Q^T (transposed scores)  ->  P = exp2(S - block max)  ->  O^T = a O^T
//   + b (V^T P)
// Each block is reduced on its own and merged in order with weights a, b, so a row's bits depend on its keys alone.
// Source: Dao et al., arXiv:2205.14135; Milakov & Gimelshein, arXiv:1805.02867.

namespace mfa::cpu::MFA_ISA {
namespace {

// Running maximum (base-2) and sum of each row, and the weights that a block's merge gives to the old and new parts.
struct RowState {
  alignas(64) float m[kMaxRowTile];
  alignas(64) float l[kMaxRowTile];
};

HWY_INLINE VF FiniteOrZero(VF m) { return hn::IfThenElse(hn::Eq(m, hn::Set(df, -kInf)), hn::Zero(df), m); }

// Merges (block_m, block_l) into the state at `at` and returns the weights.
HWY_INLINE void MergeState(float* m_at, float* l_at, VF block_m, VF block_l, VF& a, VF& b) {
  const VF m = hn::Load(df, m_at);
  const VF m_new = hn::Max(block_m, m);
  const VF safe = FiniteOrZero(m_new);
  a = Exp2(hn::Sub(m, safe));
  b = Exp2(hn::Sub(block_m, safe));
  hn::Store(m_new, df, m_at);
  hn::Store(hn::MulAdd(hn::Load(df, l_at), a, hn::Mul(block_l, b)), df, l_at);
}

struct ForwardScratch {
  RowTile tile;
  BlockRows blocks[2];  // the one that is computed and the next
  RowState state;
  float* q;       // [group][D][width]
  float* o;       // [group][Dv][width]
  float* s;       // [kKeyBlock][width], scores, then probabilities
  float* bias;    // [kKeyBlock][width]
  int32_t* mask;  // [kKeyBlock][width]
  uint8_t* seen;  // [kKeyBlock][width], which scores are visible; only for non-finite values
  float* k;       // [kKeyBlock][padded D], keys that are not read in place
  float* v;       // panels of [kKeyBlock] rows, Dv columns
  float* select;  // buffers of ScoreSelector
  size_t bytes;

  ForwardScratch(const ForwardJob& job, char* base) {
    const AttentionProblem& p = *job.problem;
    size_t at = 0;
    const auto take = [&](size_t count, size_t size) {
      char* out = base + at;
      at += (count * size + 63) / 64 * 64;
      return out;
    };
    const size_t block_rows = static_cast<size_t>(kKeyBlock) * kGroupRows;
    const bool wide = p.dtype != DType::f32 || GathersRows(p) || RotatesKeys(p) || TileKeys::cuts(p);
    const ScoreSteps steps(p);
    q = reinterpret_cast<float*>(take(static_cast<size_t>(p.D) * kMaxRowTile, 4));
    o = reinterpret_cast<float*>(take(static_cast<size_t>(p.Dv) * kMaxRowTile, 4));
    s = reinterpret_cast<float*>(take(block_rows, 4));
    bias = reinterpret_cast<float*>(take(steps.bias ? block_rows : 0, 4));
    mask = reinterpret_cast<int32_t*>(take(steps.mask || steps.cuts ? block_rows : 0, 4));
    seen = reinterpret_cast<uint8_t*>(take(block_rows, 1));
    k = reinterpret_cast<float*>(take(wide ? static_cast<size_t>(kKeyBlock) * RoundUp(p.D, kLanes) : 0, 4));
    v = reinterpret_cast<float*>(take(PanelFloats(kKeyBlock, p.Dv), 4));
    select = reinterpret_cast<float*>(
        take(job.floors ? ScoreSelector::Floats(job.most_kept, RoundUp(job.plan.row_width, kLanes)) : 0, 4));
    bytes = at;
  }
};

class TiledForward {
 public:
  TiledForward(const ForwardJob& job, void* scratch)
      : job_(job),
        p_(*job.problem),
        steps_(p_),
        finder_(p_, kNativeBf16 && job.plan.native_bf16),
        x_(job, static_cast<char*>(scratch)) {}

  size_t scratch_bytes() const { return x_.bytes; }

  // Part `split` of the keys for tile number `index`. Rows of the tile at `next`, if any, are fetched meanwhile.
  void Run(int64_t index, const TileMap::Place& place, int split, const TileMap::Place* next) {
    const ForwardPlan& plan = job_.plan;
    if (!SelectRows(index, place)) return;
    PackQueries();
    finder_.Select(x_.tile);
    if (job_.floors) selector_.Begin(x_.select, job_.kept[place.b], tile_width_);
    const int keys = key_count(p_, place.b), blocks = (keys + kKeyBlock - 1) / kKeyBlock;
    const int first = split * plan.split_blocks, last = Min(blocks, first + plan.split_blocks);
    BlockRows *rows = &x_.blocks[0], *other = &x_.blocks[1];
    for (int i = Seek(first, last, keys, *rows); i < last;) {
      const int after = Seek(i + 1, last, keys, *other);
      at_ = rows;
      KeyBlock block{};
      block.index = i;
      block.lo = rows->block.all.lo;
      WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
        LoadBlock<T>(block);
        if (after < last) {
          FetchAfter<T>(*other, block.next);
        } else if (next) {
          FetchKeys<T>(*next, block.next);
        }
      });
      Attend(block);
      i = after;
      BlockRows* done = rows;
      rows = other;
      other = done;
    }
    if (next) FetchQueries(*next);
    if (job_.floors) {
      for (int r = 0; r < x_.tile.count; ++r) job_.floors[LseIndex(r)] = selector_.Floor(r);
    } else if (plan.key_splits == 1) {
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
  // Returns whether the tile has rows.
  bool SelectRows(int64_t index, const TileMap::Place& place) {
    tile_index_ = index;
    const int count = fill_rows(job_.plan.tiling, p_, place.b, place.kv_head, place.tile, x_.tile.query, x_.tile.head);
    if (count == 0) return false;
    tile_width_ = RoundUp(count, kLanes);
    CompleteRowTile(p_, place.b, place.kv_head, count, tile_width_, x_.tile);
    for (int r = 0; r < tile_width_; ++r) {  // a sink is a key without a value, merged before the first block
      x_.state.m[r] = p_.sinks ? p_.sinks[x_.tile.head[r]] * kLog2e : -kInf;
      x_.state.l[r] = x_.state.m[r] == -kInf ? 0.f : 1.f;
    }
    const VF zero = hn::Zero(df);
    for (int i = 0; i < tile_width_ * p_.Dv; i += kLanes) hn::Store(zero, df, x_.o + i);
    if (job_.out && job_.out->probs) HideAllProbabilities();
    return true;
  }

  void PackQueries() {
    if constexpr (kNativeBf16) {
      if (job_.plan.native_bf16) return PackQueryPairs();
    }
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) {
        const int width = Min(kGroupRows, tile_width_ - g0);
        for (int r = 0; r < width; r += kLanes) {
          float* to = x_.q + static_cast<ptrdiff_t>(g0) * p_.D + r;
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

  // Pairs of channels keep their bits; the scale is applied to the scores.
  void PackQueryPairs() {
    for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) {
      const int width = Min(kGroupRows, tile_width_ - g0);
      uint32_t* to = reinterpret_cast<uint32_t*>(x_.q) + static_cast<ptrdiff_t>(g0) * (p_.D / 2);
      for (int r = 0; r < width; ++r) {
        const bfloat16* row = QueryRow<bfloat16>(p_, p_.q, x_.tile.b, x_.tile.head[g0 + r], x_.tile.query[g0 + r]);
        for (int i = 0; i < p_.D / 2; ++i) to[i * width + r] = PairAt(row + 2 * i);
      }
    }
  }

  // The first block from `index` on, before `last`, that some row sees, in `out`; `last` if there is none.
  int Seek(int index, int last, int keys, BlockRows& out) {
    for (; index < last; ++index) {
      const int64_t k0 = int64_t{index} * kKeyBlock;
      finder_.Find(x_.tile, tile_width_, k0, static_cast<int>(Min<int64_t>(kKeyBlock, keys - k0)), out.block);
      if (out.block.all.empty()) {
        for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) MarkUnseen(index, g0);
        continue;
      }
      if (out.block.listed || GathersRows(p_)) {
        WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
          const TileBlock& at = out.block;
          KeyRows(p_, p_.k, x_.tile.b, x_.tile.kv_head, at.list, at.all.lo, at.all.hi,
                  reinterpret_cast<const T**>(out.k));
          KeyRows(p_, p_.v, x_.tile.b, x_.tile.kv_head, at.list, at.all.lo, at.all.hi,
                  reinterpret_cast<const T**>(out.v));
        });
      }
      break;
    }
    return index;
  }

  template <class T>
  void FetchAfter(const BlockRows& rows, NextRows& next) const {
    const TileBlock& at = rows.block;
    next.count = at.all.hi - at.all.lo;
    if (at.listed || GathersRows(p_)) {
      next.k_table = rows.k + at.all.lo;
      next.v_table = rows.v + at.all.lo;
    } else {
      FetchRun<T>(x_.tile.b, x_.tile.kv_head, at.k0 + at.all.lo, next);
    }
  }
  template <class T>
  void FetchRun(int b, int kv_head, int64_t key, NextRows& next) const {
    next.k = reinterpret_cast<const char*>(KeyRow<T>(p_, p_.k, b, kv_head, key));
    next.v = reinterpret_cast<const char*>(KeyRow<T>(p_, p_.v, b, kv_head, key));
    next.k_step = p_.k.stride[2] * static_cast<ptrdiff_t>(sizeof(T));
    next.v_step = p_.v.stride[2] * static_cast<ptrdiff_t>(sizeof(T));
  }
  // The first keys of another tile, and its queries if they are in order.
  template <class T>
  void FetchKeys(const TileMap::Place& place, NextRows& next) const {
    const int keys = Min(key_count(p_, place.b), kKeyBlock);
    if (GathersRows(p_) || steps_.cuts || keys == 0) return;
    next.count = keys;
    FetchRun<T>(place.b, place.kv_head, 0, next);
  }
  void FetchQueries(const TileMap::Place& place) const {
    const int G = p_.Hq / p_.Hkv, rows = Min(query_count(p_, place.b), kGroupRows / G);
    if (steps_.cuts) return;
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int h = 0; h < G; ++h)
        for (int i = 0; i < rows; ++i) PrefetchRow(QueryRow<T>(p_, p_.q, place.b, place.kv_head * G + h, i), p_.D);
    });
  }

  template <class T>
  void LoadBlock(KeyBlock& block) {
    const TileBlock& at = at_->block;
    const int b = x_.tile.b, h = x_.tile.kv_head;
    if (at.listed || GathersRows(p_)) {
      LoadValues<T>(RowTable<T>{reinterpret_cast<const T* const*>(at_->v)}, block);
      return LoadGathered(reinterpret_cast<const T* const*>(at_->k), block);
    }
    LoadValues<T>(StridedRows<T>{KeyRow<T>(p_, p_.v, b, h, at.k0), p_.v.stride[2]}, block);
    const StridedRows<T> k{KeyRow<T>(p_, p_.k, b, h, at.k0), p_.k.stride[2]};
    if (RotatesKeys(p_)) {
      const T* rows[kKeyBlock];
      for (int c = at.all.lo; c < at.all.hi; ++c) rows[c] = k.At(c);
      return LoadGathered(rows, block);
    }
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (job_.plan.native_bf16) {
        block.k16 = k.first;
        block.k16_stride = k.step;
        return;
      }
    }
    block.k = WidenBlock<T>(k, at.all.lo, at.all.hi, p_.D, x_.k, &block.k_stride);
  }

  template <class T, class Rows>
  void LoadValues(const Rows& rows, KeyBlock& block) {
    const int lo = at_->block.all.lo, hi = at_->block.all.hi;
    if (job_.floors) {  // only the scores count: values are not read, and none is NaN
      block.v = x_.v;
      return;
    }
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (job_.plan.native_bf16) {
        bfloat16* panels = reinterpret_cast<bfloat16*>(x_.v);
        PackPairPanels(rows, lo & ~1, RoundUp(hi, 2), lo, hi, p_.Dv, kValuePanel, panels);
        block.v16 = panels;
        return;
      }
    }
    PackPanels<T>(rows, lo, hi, p_.Dv, kValuePanel, x_.v);
    block.v = x_.v;
  }

  template <class T>
  void LoadGathered(const T* const* rows, KeyBlock& block) {
    const TileBlock& at = at_->block;
    const int b = x_.tile.b;
    const ptrdiff_t stride = RoundUp(p_.D, kLanes);
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (job_.plan.native_bf16) {
        bfloat16* out = reinterpret_cast<bfloat16*>(x_.k);
        for (int c = at.all.lo; c < at.all.hi; ++c)
          __builtin_memcpy(out + c * stride, rows[c], static_cast<size_t>(p_.D) * sizeof(T));
        block.k16 = out;
        block.k16_stride = stride;
        return;
      }
    }
    GatherKeys(p_, b, at.list, rows, at.all.lo, at.all.hi, x_.k, stride);
    block.k = x_.k;
    block.k_stride = stride;
  }

  // Attends every column group to a loaded block.
  void Attend(const KeyBlock& block) {
    int nonfinite = -1;  // not looked at yet
    for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) {
      const int vectors = Min(kGroupRows, tile_width_ - g0) / kLanes;
      const BlockKeys keys = at_->block.Of(x_.tile, g0, vectors * kLanes);
      if (keys.empty()) {
        MarkUnseen(block.index, g0);
        continue;
      }
      // An odd bound of a pair lets the product touch a key that the group does not see.
      const bool odd = block.v16 && (keys.lo % 2 || keys.hi % 2);
      const bool masked = steps_.Masked(p_, x_.tile, g0, vectors * kLanes, at_->block, keys);
      const bool hides = !keys.full || masked || steps_.hides() || odd;
      if (hides && nonfinite < 0 && !job_.floors) nonfinite = NonFiniteValues(block, at_->block.all);
      const bool skip_hidden = hides && nonfinite > 0;
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
      for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) {
        const int width = Min(kGroupRows, tile_width_ - g0);
        if (m[g0] == kInf && l[g0] == -1.f) continue;  // the mark of a block that the group does not see
        for (int r = g0; r < g0 + width; r += kLanes) {
          VF a, b;
          MergeState(x_.state.m + r, x_.state.l + r, hn::LoadU(df, m + r), hn::LoadU(df, l + r), a, b);
          float* to = x_.o + static_cast<ptrdiff_t>(g0) * p_.Dv + (r - g0);
          const float* from = o + static_cast<ptrdiff_t>(g0) * p_.Dv + (r - g0);
          for (int d = 0; d < p_.Dv; ++d, to += width, from += width)
            hn::Store(hn::MulAdd(hn::Load(df, to), a, hn::Mul(hn::LoadU(df, from), b)), df, to);
        }
      }
    }
  }

  void Finish() {
    const RowTile& t = x_.tile;
    alignas(64) float inverse[kMaxRowTile];
    for (int r = 0; r < tile_width_; ++r) inverse[r] = x_.state.l[r] == 0.f ? 0.f : 1.f / x_.state.l[r];
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) {
        const int width = Min(kGroupRows, tile_width_ - g0);
        for (int r = 0; r < width; r += kLanes) {
          const int real = Min(kLanes, t.count - g0 - r);
          T* rows[kLanes];
          for (int i = 0; i < real; ++i)
            rows[i] = QueryRow<T>(p_, job_.out->o, t.b, t.head[g0 + r + i], t.query[g0 + r + i]);
          UnpackTransposed(x_.o + static_cast<ptrdiff_t>(g0) * p_.Dv + r, width, p_.Dv, inverse + g0 + r, rows, real);
        }
      }
    });
    for (int r = 0; r < x_.tile.count; ++r) {
      const float lse2 = x_.state.l[r] == 0.f ? -kInf : x_.state.m[r] + ::log2f(x_.state.l[r]);
      if (job_.out->lse) job_.out->lse[LseIndex(r)] = job_.out->lse_base2 ? lse2 : NaturalLse(lse2);
      if (job_.out->probs) NormaliseProbabilities(r, lse2);
    }
  }

  // A block that a group does not see has no partial result: the mark is a pair that no row can have.
  void MarkUnseen(int block, int g0) {
    if (job_.plan.key_splits == 1) return;
    const int64_t at = PartialIndex(block) * job_.partials.row_width + g0;
    job_.partials.m[at] = kInf;
    job_.partials.l[at] = -1.f;
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

    const int32_t* mask = masked ? x_.mask : nullptr;
    if (masked) {
      bool any = false;
      for (int c = 0; c < NR; ++c)
        any |= PackMask(p_, x_.tile, g0 + c * kLanes, at_->block, lo, hi - lo, x_.mask + c * kLanes, kWidth);
      if (!any) return MarkUnseen(block.index, g0);
    }
    if (steps_.bias)
      for (int c = 0; c < NR; ++c)
        PackBias(p_, x_.tile, g0 + c * kLanes, at_->block, lo, hi - lo, x_.bias + c * kLanes, kWidth);

    // S = K Q^T
    const bool plain = keys.full && !masked && !steps_.any();
    const VF scale = hn::Set(df, p_.scale * kLog2e);
    const auto store_scores = [&](int k, int c, VF s) HWY_ATTR {
      if constexpr (kPairs) s = hn::Mul(s, scale);
      hn::Store(s, df, S + k * kWidth + c * kLanes);
      block_m[c] = hn::Max(s, block_m[c]);
    };
    ForRowTiles<kTallRows<NR>>(lo, hi, [&]<int MR>(int k) HWY_ATTR {
      PrefetchNext(block, g0, k, MR);
      const auto store = [&](int r, int c, VF s) HWY_ATTR { store_scores(k + r, c, s); };
      if constexpr (kPairs) {
        const uint32_t* q = reinterpret_cast<const uint32_t*>(x_.q) + static_cast<ptrdiff_t>(g0) * (p_.D / 2);
        MultiplyTile<MR, NR>(block.k16 + k * block.k16_stride, StepsAdjacent{block.k16_stride}, q, kWidth, p_.D / 2,
                             store);
      } else {
        const float* q = x_.q + static_cast<ptrdiff_t>(g0) * p_.D;
        MultiplyTile<MR, NR>(block.k + k * block.k_stride, StepsAdjacent{block.k_stride}, q, kWidth, p_.D, store);
      }
    });
    if (!plain) {
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) block_m[c] = hn::Set(df, -kInf);
      ApplyScoreSteps<NR>(p_, steps_, x_.tile, g0, at_->block.list.key, lo, hi, x_.bias, mask, S, kWidth, block_m,
                          nullptr);
    }
    if (HWY_UNLIKELY(job_.floors != nullptr)) return selector_.Add<NR>(S, g0, lo, hi);
    if (job_.out->probs) StoreScores(g0, lo, hi, kWidth);
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
    uint32_t* pairs = reinterpret_cast<uint32_t*>(S);  // pair t takes the place of row t, read before
    const bool drops = p_.dropout_p > 0.f;
    if constexpr (kPairs) {
      MFA_NO_UNROLL
      for (int k = pair_lo; k < pair_hi; k += 2) {
        MFA_UNROLL
        for (int c = 0; c < NR; ++c) {
          float* at = S + k * kWidth + c * kLanes;
          const VF e = Exp2<true>(hn::Sub(hn::Load(df, at), safe[c]));
          const VF f = Exp2<true>(hn::Sub(hn::Load(df, at + kWidth), safe[c]));
          block_l[c] = hn::Add(hn::Add(block_l[c], e), f);
          if (HWY_UNLIKELY(drops)) {
            hn::Store(e, df, at);
            hn::Store(f, df, at + kWidth);
          } else {
            hn::Store(PackPairs(e, f), du, pairs + k / 2 * kWidth + c * kLanes);
          }
        }
      }
    } else if (p_.dtype == DType::f32) {
      Exponentials<NR, false>(S, lo, hi, safe, block_l);
    } else {
      Exponentials<NR, true>(S, lo, hi, safe, block_l);
    }
    if (drops) {
      ApplyDropout(p_, x_.tile, g0, kWidth, at_->block.list.key, lo, hi, S, kWidth);
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
    const auto merge = [&](int d, int c, VF acc) HWY_ATTR {
      float* at = o + static_cast<ptrdiff_t>(d) * kWidth + c * kLanes;
      hn::Store(apart ? acc : hn::MulAdd(hn::Load(df, at), a[c], hn::Mul(acc, b[c])), df, at);
    };
    const auto multiply = [&]<int MR>(const auto* v, const auto* P, int steps, int d) HWY_ATTR {
      const auto store = [&](int r, int c, VF acc) HWY_ATTR { merge(d + r, c, acc); };
      if (HWY_UNLIKELY(skip_hidden)) {
        MultiplyVisibleTile<MR, NR>(v, pair_lo, P, steps, x_.seen, store);
      } else {
        MultiplyTile<MR, NR>(v, RowsInPanels{kValuePanel}, P, kWidth, steps, store);
      }
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

  // S becomes exp2(S - safe); adds the sums in the order of the keys.
  template <int NR, bool kHalf>
  static HWY_INLINE void Exponentials(float* S, int lo, int hi, const VF (&safe)[NR], VF (&sum)[NR]) {
    constexpr int kWidth = NR * kLanes;
    MFA_NO_UNROLL
    for (int k = lo; k < hi; ++k) {
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) {
        float* at = S + k * kWidth + c * kLanes;
        const VF e = Exp2<kHalf>(hn::Sub(hn::Load(df, at), safe[c]));
        sum[c] = hn::Add(sum[c], e);
        hn::Store(e, df, at);
      }
    }
  }

  // Each of the `groups` column groups fetches its share of the next rows, a few lines between two tiles: more at once
  // would fill the queue of outstanding misses and hold up the loads of the products.
  HWY_INLINE void PrefetchNext(const KeyBlock& block, int g0, int k, int rows) const {
    const NextRows& next = block.next;
    if (next.count == 0) return;
    const int groups = (tile_width_ + kGroupRows - 1) / kGroupRows, group = g0 / kGroupRows;
    const int size = p_.dtype == DType::f32 ? 4 : 2;
    const auto share = [&](const char* row, int bytes) HWY_ATTR {
      const int lines = (bytes + 63) / 64;
      for (int i = lines * group / groups; i < lines * (group + 1) / groups; ++i)
        __builtin_prefetch(row + i * 64, 0, 2);
    };
    const int first = k - block.lo, last = Min(first + rows, next.count);
    const int k_bytes = p_.D * size, v_bytes = p_.Dv * size;
    if (next.k_table) {
      for (int r = first; r < last; ++r) {
        share(static_cast<const char*>(next.k_table[r]), k_bytes);
        share(static_cast<const char*>(next.v_table[r]), v_bytes);
      }
      return;
    }
    const char *key = next.k + first * next.k_step, *value = next.v + first * next.v_step;
    for (int r = first; r < last; ++r, key += next.k_step, value += next.v_step) {
      share(key, k_bytes);
      share(value, v_bytes);
    }
  }

  int64_t PartialIndex(int block) const { return tile_index_ * job_.partials.blocks + block; }

  int64_t LseIndex(int r) const { return row_index(p_, x_.tile.b, x_.tile.head[r], x_.tile.query[r]); }
  float* ProbabilityRow(int r) const { return job_.out->probs + LseIndex(r) * p_.Nk; }

  void HideAllProbabilities() {
    for (int r = 0; r < x_.tile.count; ++r) {
      float* row = ProbabilityRow(r);
      for (int k = 0; k < p_.Nk; ++k) row[k] = -kInf;
    }
  }
  void StoreScores(int g0, int lo, int hi, int width) {
    const KeyList& list = at_->block.list;
    for (int r = 0; r < width && g0 + r < x_.tile.count; ++r) {
      float* row = ProbabilityRow(g0 + r);
      for (int k = lo; k < hi; ++k)
        if (!list.has_padding || !list.padding[k]) row[list.key[k]] = x_.s[k * width + r];
    }
  }
  void NormaliseProbabilities(int r, float lse2) {
    float* row = ProbabilityRow(r);
    const VF shift = hn::Set(df, lse2 == -kInf ? 0.f : lse2);
    int k = 0;
    for (; k + kLanes <= p_.Nk; k += kLanes) hn::StoreU(Exp2(hn::Sub(hn::LoadU(df, row + k), shift)), df, row + k);
    for (; k < p_.Nk; ++k) row[k] = hn::GetLane(Exp2(hn::Sub(hn::Set(df, row[k]), shift)));
  }

  const ForwardJob& job_;
  const AttentionProblem& p_;
  const ScoreSteps steps_;
  BlockFinder finder_;
  ForwardScratch x_;
  ScoreSelector selector_;
  const BlockRows* at_ = nullptr;  // the block that is computed
  int64_t tile_index_ = 0;
  int tile_width_ = 0;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
