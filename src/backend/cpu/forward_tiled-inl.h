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
  RowState state;
  float* q;       // [group][D][width]
  float* o;       // [group][Dv][width]
  float* s;       // [kKeyBlock][width], scores, then probabilities
  float* bias;    // [kKeyBlock][width]
  int32_t* mask;  // [kKeyBlock][width]
  uint8_t* seen;  // [kKeyBlock][width], which scores are visible; only for non-finite values
  float* k;       // [kKeyBlock][padded D], widened keys
  float* v;       // panels of [kKeyBlock] rows, Dv columns
  size_t bytes;

  ForwardScratch(const AttentionProblem& p, char* base) {
    size_t at = 0;
    const auto take = [&](size_t count, size_t size) {
      char* out = base + at;
      at += (count * size + 63) / 64 * 64;
      return out;
    };
    const size_t block_rows = static_cast<size_t>(kKeyBlock) * kGroupRows;
    const bool wide = p.dtype != DType::f32;
    const ScoreSteps steps(p);
    q = reinterpret_cast<float*>(take(static_cast<size_t>(p.D) * kMaxRowTile, 4));
    o = reinterpret_cast<float*>(take(static_cast<size_t>(p.Dv) * kMaxRowTile, 4));
    s = reinterpret_cast<float*>(take(block_rows, 4));
    bias = reinterpret_cast<float*>(take(steps.bias ? block_rows : 0, 4));
    mask = reinterpret_cast<int32_t*>(take(steps.mask ? block_rows : 0, 4));
    seen = reinterpret_cast<uint8_t*>(take(block_rows, 1));
    k = reinterpret_cast<float*>(take(wide ? static_cast<size_t>(kKeyBlock) * RoundUp(p.D, kLanes) : 0, 4));
    v = reinterpret_cast<float*>(take(PanelFloats(kKeyBlock, p.Dv), 4));
    bytes = at;
  }
};

// Keys or values of a block as float rows: in place for float32, else widened into `scratch`.
template <class T>
HWY_INLINE const float* WidenBlock(const TensorRef& x, int b, int h, int64_t k0, int lo, int hi, int width,
                                   float* scratch, ptrdiff_t* stride) {
  if constexpr (sizeof(T) == 4) {
    *stride = x.stride[2];
    return RowPointer<float>(x, b, h, k0);
  } else {
    *stride = RoundUp(width, kLanes);
    for (int k = lo; k < hi; ++k) WidenRow(RowPointer<T>(x, b, h, k0 + k), width, scratch + k * *stride);
    return scratch;
  }
}

// One block of keys as the tiles read it.
struct KeyBlock {
  int64_t k0;
  int index;  // of the block
  int keys;
  const float* k;  // rows of D
  ptrdiff_t k_stride;
  const float* v;       // panels
  const bfloat16* k16;  // the same for native bfloat16: rows in place and panels of pairs
  ptrdiff_t k16_stride;
  const bfloat16* v16;
  // The next block in memory, fetched into the cache while this one is computed; null at the end.
  const char *next_k, *next_v;
  ptrdiff_t next_k_stride, next_v_stride;  // bytes
  int k_bytes, v_bytes;                    // of a row
};
constexpr ptrdiff_t kValuePanel = PanelStride(kKeyBlock);
template <class A>
HWY_INLINE const A* PanelColumn(const A* panels, int key, int channel) {
  return panels + channel / kTileRows * kValuePanel + key * kTileRows + channel % kTileRows * kPack<A>;
}

// MultiplyTile for a block that holds non-finite values: for each row (lane) the values of keys that it does not see
// are replaced by zero, which leaves the order and the rounding of the others as they are.
template <int MR, int NR, class A, class B, class Store>
HWY_INLINE void MultiplyVisibleTile(const A* a, int lo, const B* b, int n, const uint8_t* seen, const Store& store) {
  constexpr int kWidth = NR * kLanes;
  alignas(64) A clean[kKeyBlock * MR];
  alignas(64) float out[MR][kWidth], lanes[kLanes];
  for (int r = 0; r < kWidth; ++r) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < MR * kPack<A>; ++j) {
        const int key = lo + i * kPack<A> + j % kPack<A>;
        const A* from = RowsInPanels{kValuePanel}.At(a, j / kPack<A>) + i * kTileRows * kPack<A> + j % kPack<A>;
        clean[i * MR * kPack<A> + j] = seen[key * kWidth + r] ? *from : A{};
      }
    MultiplyTile<MR, 1>(clean, RowsAdjacent{MR * kPack<A>}, b + r / kLanes * kLanes, kWidth, n,
                        [&](int i, int, VF acc) HWY_ATTR {
                          hn::Store(acc, df, lanes);
                          out[i][r] = lanes[r % kLanes];
                        });
  }
  for (int i = 0; i < MR; ++i)
    for (int c = 0; c < NR; ++c) store(i, c, hn::Load(df, out[i] + c * kLanes));
}

class TiledForward {
 public:
  TiledForward(const ForwardJob& job, void* scratch)
      : job_(job), p_(*job.problem), steps_(p_), x_(p_, static_cast<char*>(scratch)) {}

  size_t scratch_bytes() const { return x_.bytes; }

  void Run(int64_t task) {
    const ForwardPlan& plan = job_.plan;
    // Tiles in descending order: under a causal mask the last rows see the most keys, so they start first.
    const int split = static_cast<int>(task % plan.key_splits);
    const int64_t head_tile = task / plan.key_splits;
    SelectRows(head_tile / plan.row_tiles, plan.row_tiles - 1 - static_cast<int>(head_tile % plan.row_tiles));
    PackQueries();
    const int blocks = (p_.Nk + kKeyBlock - 1) / kKeyBlock;
    const int first = split * plan.split_blocks, last = Min(blocks, first + plan.split_blocks);
    for (int i = first; i < last; ++i) Block(i);
    if (plan.key_splits == 1) Finish();
  }

  // Merges the partial results of a row tile in the order of the blocks and writes the outputs.
  void Merge(int64_t tile) {
    SelectRows(tile / job_.plan.row_tiles, static_cast<int>(tile % job_.plan.row_tiles));
    MergePartials();
    Finish();
  }

 private:
  void SelectRows(int64_t head, int tile) {
    const int64_t first = int64_t{tile} * job_.plan.row_tile;
    const int count = static_cast<int>(Min<int64_t>(job_.plan.row_tile, job_.plan.rows - first));
    head_ = head;
    row_tile_ = tile;
    tile_width_ = RoundUp(count, kLanes);
    FillRowTile(p_, static_cast<int>(head / p_.Hkv), static_cast<int>(head % p_.Hkv), first, count, tile_width_,
                x_.tile);
    for (int r = 0; r < tile_width_; ++r) {  // a sink is a key without a value, merged before the first block
      x_.state.m[r] = p_.sinks ? p_.sinks[x_.tile.head[r]] * kLog2e : -kInf;
      x_.state.l[r] = x_.state.m[r] == -kInf ? 0.f : 1.f;
    }
    const VF zero = hn::Zero(df);
    for (int i = 0; i < tile_width_ * p_.Dv; i += kLanes) hn::Store(zero, df, x_.o + i);
    if (job_.out->probs) HideAllProbabilities();
  }

  void PackQueries() {
    if constexpr (kNativeBf16) {
      if (job_.plan.native_bf16) return PackQueryPairs();
    }
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) {
        const int width = Min(kGroupRows, tile_width_ - g0);
        for (int r = 0; r < width; r += kLanes) {
          const T* rows[kLanes];
          for (int i = 0; i < kLanes; ++i)
            rows[i] = RowPointer<T>(p_.q, x_.tile.b, x_.tile.head[g0 + r + i], x_.tile.query[g0 + r + i]);
          PackTransposed(rows, p_.D, p_.scale * kLog2e, x_.q + static_cast<ptrdiff_t>(g0) * p_.D + r, width);
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
        const bfloat16* row = RowPointer<bfloat16>(p_.q, x_.tile.b, x_.tile.head[g0 + r], x_.tile.query[g0 + r]);
        for (int i = 0; i < p_.D / 2; ++i) to[i * width + r] = PairAt(row + 2 * i);
      }
    }
  }

  void Block(int index) {
    KeyBlock block{};
    block.index = index;
    block.k0 = int64_t{index} * kKeyBlock;
    block.keys = static_cast<int>(Min<int64_t>(kKeyBlock, p_.Nk - block.k0));
    const BlockKeys all = KeysOfBlock(x_.tile, 0, tile_width_, block.k0, block.keys);
    if (!all.empty()) {
      WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
        const int b = x_.tile.b, h = x_.tile.kv_head;
        LoadBlock<T>(b, h, all, block);
        if (block.k0 + 2 * kKeyBlock > p_.Nk) return;
        block.next_k = reinterpret_cast<const char*>(RowPointer<T>(p_.k, b, h, block.k0 + kKeyBlock));
        block.next_v = reinterpret_cast<const char*>(RowPointer<T>(p_.v, b, h, block.k0 + kKeyBlock));
        block.next_k_stride = p_.k.stride[2] * static_cast<ptrdiff_t>(sizeof(T));
        block.next_v_stride = p_.v.stride[2] * static_cast<ptrdiff_t>(sizeof(T));
        block.k_bytes = p_.D * static_cast<int>(sizeof(T));
        block.v_bytes = p_.Dv * static_cast<int>(sizeof(T));
      });
    }
    Attend(block, all);
  }

  template <class T>
  void LoadBlock(int b, int h, const BlockKeys& all, KeyBlock& block) {
    const T* v = RowPointer<T>(p_.v, b, h, block.k0);
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (job_.plan.native_bf16) {
        bfloat16* panels = reinterpret_cast<bfloat16*>(x_.v);
        PackPairPanels(v, p_.v.stride[2], all.lo & ~1, RoundUp(all.hi, 2), all.lo, all.hi, p_.Dv, kValuePanel, panels);
        block.k16 = RowPointer<T>(p_.k, b, h, block.k0);
        block.k16_stride = p_.k.stride[2];
        block.v16 = panels;
        return;
      }
    }
    block.k = WidenBlock<T>(p_.k, b, h, block.k0, all.lo, all.hi, p_.D, x_.k, &block.k_stride);
    PackPanels(v, p_.v.stride[2], all.lo, all.hi, p_.Dv, kValuePanel, x_.v);
    block.v = x_.v;
  }

  // Attends every column group to a loaded block.
  void Attend(const KeyBlock& block, const BlockKeys& all) {
    int nonfinite = -1;  // not looked at yet
    for (int g0 = 0; g0 < tile_width_; g0 += kGroupRows) {
      const int vectors = Min(kGroupRows, tile_width_ - g0) / kLanes;
      const BlockKeys keys = KeysOfBlock(x_.tile, g0, vectors * kLanes, block.k0, block.keys);
      if (keys.empty()) {
        MarkUnseen(block.index, g0);
        continue;
      }
      // An odd bound of a pair lets the product touch a key that the group does not see.
      const bool odd = block.v16 && (keys.lo % 2 || keys.hi % 2);
      const bool hides = !keys.full || steps_.mask || steps_.bias || odd;
      if (hides && nonfinite < 0) nonfinite = NonFiniteValues(block, all);
      const bool skip_hidden = hides && nonfinite > 0;
      if constexpr (kNativeBf16) {
        if (block.v16) {
          GroupOf<true>(vectors, block, g0, keys, skip_hidden);
          continue;
        }
      }
      GroupOf<false>(vectors, block, g0, keys, skip_hidden);
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
  HWY_INLINE void GroupOf(int vectors, const KeyBlock& block, int g0, const BlockKeys& keys, bool skip_hidden) {
    if (vectors == 1) {
      Group<1, kPairs>(block, g0, keys, skip_hidden);
    } else if (vectors == 2) {
      Group<2, kPairs>(block, g0, keys, skip_hidden);
    } else {
      Group<kTileVectors, kPairs>(block, g0, keys, skip_hidden);
    }
  }

  // Merges the partial results of the selected rows in the order of the blocks.
  void MergePartials() {
    for (int i = 0; i < job_.partials.blocks; ++i) {
      const int64_t at = PartialIndex(i);
      const float* m = job_.partials.m + at * job_.partials.row_width;
      const float* l = job_.partials.l + at * job_.partials.row_width;
      const float* o = job_.partials.o + at * job_.partials.row_width * p_.Dv;
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
            rows[i] = RowPointer<T>(job_.out->o, t.b, t.head[g0 + r + i], t.query[g0 + r + i]);
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
  HWY_NOINLINE void Group(const KeyBlock& block, int g0, const BlockKeys& keys, bool skip_hidden) {
    constexpr int kWidth = NR * kLanes;
    float* S = x_.s;
    const int lo = keys.lo, hi = keys.hi;
    // The keys of the second product: with pairs, whole pairs.
    const int pair_lo = kPairs ? lo & ~1 : lo, pair_hi = kPairs ? RoundUp(hi, 2) : hi;
    VF block_m[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) block_m[c] = hn::Set(df, -kInf);

    if (steps_.mask) {
      bool any = false;
      for (int c = 0; c < NR; ++c)
        any |= PackMask(p_, x_.tile, g0 + c * kLanes, block.k0 + lo, hi - lo, x_.mask + c * kLanes, kWidth);
      if (!any) return MarkUnseen(block.index, g0);
    }
    if (steps_.bias)
      for (int c = 0; c < NR; ++c)
        PackBias(p_, x_.tile, g0 + c * kLanes, block.k0 + lo, hi - lo, x_.bias + c * kLanes, kWidth);

    // S = K Q^T
    const bool plain = keys.full && !steps_.any();
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
      ApplyScoreSteps<NR>(p_, steps_, x_.tile, g0, block.k0, lo, hi, x_.bias, x_.mask, S, kWidth, block_m, nullptr);
    }
    if (job_.out->probs) StoreScores(block, g0, lo, hi, kWidth);
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
      ApplyDropout(p_, x_.tile, g0, kWidth, block.k0, lo, hi, S, kWidth);
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
      o = job_.partials.o + at * p_.Dv + static_cast<ptrdiff_t>(g0) * p_.Dv;
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

  // Each of the `groups` column groups fetches its share of the next block's rows, a few lines between two tiles: more
  // at once would fill the queue of outstanding misses and hold up the loads of the products.
  HWY_INLINE void PrefetchNext(const KeyBlock& block, int g0, int k, int rows) const {
    if (!block.next_k) return;
    const int groups = (tile_width_ + kGroupRows - 1) / kGroupRows, group = g0 / kGroupRows;
    const auto share = [&](const char* row, int bytes) HWY_ATTR {
      const int lines = (bytes + 63) / 64;
      for (int i = lines * group / groups; i < lines * (group + 1) / groups; ++i)
        __builtin_prefetch(row + i * 64, 0, 2);
    };
    for (int r = k; r < k + rows; ++r) {
      share(block.next_k + r * block.next_k_stride, block.k_bytes);
      share(block.next_v + r * block.next_v_stride, block.v_bytes);
    }
  }

  int64_t PartialIndex(int block) const {
    return (head_ * job_.plan.row_tiles + row_tile_) * job_.partials.blocks + block;
  }

  int64_t LseIndex(int r) const { return (int64_t{x_.tile.b} * p_.Hq + x_.tile.head[r]) * p_.Nq + x_.tile.query[r]; }
  float* ProbabilityRow(int r) const { return job_.out->probs + LseIndex(r) * p_.Nk; }

  void HideAllProbabilities() {
    for (int r = 0; r < x_.tile.count; ++r) {
      float* row = ProbabilityRow(r);
      for (int k = 0; k < p_.Nk; ++k) row[k] = -kInf;
    }
  }
  void StoreScores(const KeyBlock& block, int g0, int lo, int hi, int width) {
    for (int r = 0; r < width && g0 + r < x_.tile.count; ++r) {
      float* row = ProbabilityRow(g0 + r) + block.k0;
      for (int k = lo; k < hi; ++k) row[k] = x_.s[k * width + r];
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
  ForwardScratch x_;
  int64_t head_ = 0;
  int row_tile_ = 0;
  int tile_width_ = 0;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
