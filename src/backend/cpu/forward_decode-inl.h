// forward_decode-inl.h: attention forward for few query rows: lanes = keys for the scores, channels for the output.
//
// Memory-bound: the values of a block are fetched while its scores are computed, and the keys of the next block, also
// that of another tile, while the values are added up.

namespace mfa::cpu::MFA_ISA {
namespace {

struct DecodeScratch {
  RowTile tile;
  TileBlock block;
  KeyList keys;  // of a whole block
  float m[kMaxDecodeRows], l[kMaxDecodeRows];
  float* q;        // [rows][padded D], scaled to base-2 units
  float* o;        // [rows][padded Dv]
  float* s;        // [rows][kScoreStride]
  float* block_o;  // [rows][padded Dv]
  float* k;        // [kLanes][padded D], rotated keys
  float* columns;  // [D][vectors of keys], transposed keys
  size_t bytes;

  DecodeScratch(const AttentionProblem& p, int rows, char* base) {
    const size_t d = RoundUp(p.D, kLanes), dv = RoundUp(p.Dv, kLanes);
    float* at = reinterpret_cast<float*>(base);
    q = at;
    o = q + rows * d;
    s = o + rows * dv;
    block_o = s + static_cast<size_t>(rows) * kScoreStride;
    k = block_o + rows * dv;
    columns = k + (RotatesKeys(p) ? kLanes * d : 0);
    const size_t keys = rows > kFewRows ? kTileVectors * kLanes : 0;
    bytes = static_cast<size_t>(columns + keys * p.D - reinterpret_cast<float*>(base)) * sizeof(float);
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
    const TileMap::Place* place = Fetches(next) ? &next->place : nullptr;
    next_k0_ = next ? int64_t{next->block} * kKeyBlock : 0;
    if (!x_.block.listed && !GathersRows(p_)) {
      const StridedRows<T> k{KeyRow<T>(p_, p_.k, b, h, k0), p_.k.stride[2]};
      const StridedRows<T> v{KeyRow<T>(p_, p_.v, b, h, k0), p_.v.stride[2]};
      StridedRows<T> next_k = k;
      if (place) next_k.first = KeyRow<T>(p_, p_.k, place->b, place->kv_head, next_k0_);
      return Attend(index, k, v, next_k, place);
    }
    if (x_.block.listed) {
      Table& table = tables_[table_];
      table.b = -1;  // of these keys only
      KeyRows(p_, p_.k, b, h, x_.block.list, x_.block.all.lo, x_.block.all.hi, table.k);
      KeyRows(p_, p_.v, b, h, x_.block.list, x_.block.all.lo, x_.block.all.hi, table.v);
      return Attend(index, RowTable<T>{table.k}, RowTable<T>{table.v}, RowTable<T>{}, false);
    }
    if (tables_[table_ ^ 1].IsOf(b, index)) table_ ^= 1;
    Table& table = tables_[table_];
    if (!table.IsOf(b, index)) Fill(b, h, index, count, table);
    RowTable<T> next_k{table.k};
    if (place) {
      Table& other = tables_[table_ ^ 1];
      const bool same = table.IsOf(place->b, next->block);
      if (!same) Fill(place->b, place->kv_head, next->block, kKeyBlock, other);
      next_k = KeysOf(same ? table : other, place->kv_head);
    }
    Attend(index, KeysOf(table, h), RowTable<T>{table.v, (h - table.head) * p_.v.stride[1]}, next_k, place);
  }

  // Where the rows of a block lie in pages, for one head: those of another head lie as far from them everywhere.
  struct Table {
    int b = -1, block = 0, head = 0;
    const T *k[kKeyBlock], *v[kKeyBlock];
    bool IsOf(int b_asked, int block_asked) const { return b == b_asked && block == block_asked; }
  };
  void Fill(int b, int head, int block, int count, Table& table) {
    table.b = b;
    table.block = block;
    table.head = head;
    for (int c = 0; c < kKeyBlock; ++c) x_.keys.key[c] = block * kKeyBlock + c;
    KeyRows(p_, p_.k, b, head, x_.keys, 0, count, table.k);
    KeyRows(p_, p_.v, b, head, x_.keys, 0, count, table.v);
  }
  RowTable<T> KeysOf(const Table& table, int head) const { return {table.k, (head - table.head) * p_.k.stride[1]}; }

  // Whether all of this block is computed, so that all of the next is fetched, which must be a whole one.
  bool Fetches(const Upcoming* next) const {
    return next && x_.block.all.hi - x_.block.all.lo == kKeyBlock &&
           (int64_t{next->block} + 1) * kKeyBlock <= key_count(p_, next->place.b);
  }

  template <class Rows>
  void Attend(int index, const Rows& k, const Rows& v, const Rows& next_k, bool fetches) {
    const BlockKeys& seen = x_.block.all;
    const int lo = seen.lo, hi = seen.hi;
    upcoming_.Clear();
    AddRows(v, x_.block.k0, lo, hi, p_.Dv, p_.v.stride[2]);
    upcoming_.Spread(FetchesOfScores(hi - lo));
    for (int k_lo = lo, vectors = 0; k_lo < hi; k_lo += vectors * kLanes) {
      vectors = VectorsOf(hi - k_lo);
      const T* rows[kMostVectors * kLanes];
      const int count = Min(vectors * kLanes, hi - k_lo);
      for (int i = 0; i < count; ++i) rows[i] = k.At(k_lo + i);
      for (int i = count; i < vectors * kLanes; ++i) rows[i] = rows[count - 1];
      if (RotatesKeys(p_)) {
        RotateKeys(rows, k_lo, hi);
      } else {
        Products(rows, vectors, k_lo);
      }
    }
    float m[kMaxDecodeRows], l[kMaxDecodeRows];
    const bool masked = steps_.Masked(p_, x_.tile, 0, rows_, x_.block, seen);
    const bool hidden = !seen.full || masked || steps_.hides();
    for (int g = 0; g < rows_; ++g) {
      if (!seen.full || masked || steps_.any())
        ApplyRowSteps(p_, steps_, x_.tile, g, x_.block, masked, lo, hi, scores_at(g, 0));
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
      Values(v, next_k, 0, rows_, lo, hi, fetches);
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

  static constexpr int kMostVectors = KeyVectors(1);
  static_assert(kTileVectors == 3);
  // The vectors of keys that are taken together when `left` keys are left.
  int VectorsOf(int left) const {
    if (RotatesKeys(p_)) return 1;
    const int most = KeyVectors(rows_), whole = left / kLanes;
    if (rows_ > kFewRows) return Min(most, RoundUp(left, kLanes) / kLanes);
    return whole >= most ? most : whole >= 2 ? 2 : 1;
  }

  // How often Products() fetches in all for `keys` keys.
  int FetchesOfScores(int keys) const {
    const int vectors = RoundUp(keys, kLanes) / kLanes, most = KeyVectors(rows_);
    const int columns = vectors * Max(1, p_.D / KeyColumns<T, kPairs>::kStep);
    if (rows_ <= kFewRows) return columns;
    const int tiles = (rows_ + kTileRows - 1) / kTileRows * ((vectors + most - 1) / most);
    return columns + tiles * (p_.D / KeyColumns<T, kPairs>::kTerm / kTermsOfFetch);
  }
  static constexpr int kTermsOfFetch = 16;

  // The scores of all rows for `vectors` vectors of keys, rows[0] .. from entry `entry`.
  template <class R>
  void Products(const R* const* rows, int vectors, int entry) {
    const auto take = [&]<int G, int NK>() HWY_ATTR {
      constexpr bool kTerms = kPairs && std::is_same_v<R, bfloat16>;
      const auto* q = reinterpret_cast<const std::conditional_t<kTerms, uint32_t, float>*>(x_.q);
      DecodeScores<G, NK, kTerms>(rows, upcoming_, q, d_padded_, p_.D, hn::Set(df, p_.scale * kLog2e),
                                  scores_at(0, entry), kScoreStride);
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
    PackColumns<NK, kTerms>(rows, upcoming_, p_.D, x_.columns);
    ForRowTiles<kTileRows>(0, rows_, [&]<int G>(int g) HWY_ATTR {
      const float* q = x_.q + g * d_padded_;
      const auto store = [&](int r, int n, VF s) HWY_ATTR {
        if constexpr (kTerms) s = hn::Mul(s, scale);
        hn::StoreU(s, df, scores_at(g + r, entry) + n * kLanes);
      };
      const auto fetch = [&](int) MFA_INLINE_LAMBDA { upcoming_.Fetch(1); };
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
  void RotateKeys(const T* const* keys, int entry, int hi) {
    const KeyList& list = x_.block.list;
    const float* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      float* row = x_.k + i * d_padded_;
      const int c = Min(entry + i, hi - 1);
      WidenRow(keys[i], p_.D, row);
      if (!(list.has_padding && list.padding[c])) RotateKey(p_, x_.tile.b, list.key[c], row);
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

  float* scores_at(int g, int k) { return x_.s + g * kScoreStride + k; }

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
    for (int k = pair_lo; k < pair_hi; k += 2) {
      const uint32_t pair = to_bfloat16(S[k]).bits | uint32_t{to_bfloat16(S[k + 1]).bits} << 16;
      __builtin_memcpy(out + k / 2, &pair, sizeof(pair));
    }
  }

  // block_o = P V for the rows [g0, g1). The keys are taken in chunks, so that the passes over the channels find their
  // values in the first cache.
  template <class Rows>
  void Values(const Rows& v, const Rows& next_k, int g0, int g1, int lo, int hi, bool fetches) {
    const int whole = p_.Dv / kLanes;
    int passes = 0;
    ForRowTiles<kTileRows>(g0, g1, [&]<int G>(int) { passes += ValuePasses<G>(whole); });
    upcoming_.Clear();
    if (fetches) AddRows(next_k, next_k0_, 0, kKeyBlock, p_.D, p_.k.stride[2]);
    upcoming_.Spread(passes * (hi - lo));
    for (int first = lo, last; first < hi; first = last) {
      last = Min(hi, (first / kValueChunk<T> + 1) * kValueChunk<T>);
      ForRowTiles<kTileRows>(g0, g1, [&]<int G>(int g) HWY_ATTR {
        float* out = x_.block_o + g * dv_padded_;
        if constexpr (kPairs) {
          ForRowTiles<kValueVectors<G>>(0, whole, [&]<int NV>(int c) HWY_ATTR {
            DecodePairValues<G, NV>(v.Columns(c * kLanes), first & ~1, RoundUp(last, 2), lo, hi, first == lo,
                                    reinterpret_cast<const uint32_t*>(scores_at(g, 0)), out + c * kLanes, dv_padded_,
                                    upcoming_);
          });
        } else {
          DecodeAllValues<G>(v, whole, first, last, first == lo, scores_at(g, 0), out, dv_padded_, upcoming_);
        }
      });
    }
    for (int g = g0; g < g1; ++g) {
      float* out = x_.block_o + g * dv_padded_;
      if constexpr (!kPairs && kSplitsChannels<T>) {
        for (int c = 0; c + 2 <= whole; c += 2) InOrder(out + c * kLanes);
      }
      if (whole * kLanes < p_.Dv) LastValues(v, g, lo, hi, whole * kLanes, out);
    }
  }
  // The rows of entries [lo, hi) of the block at k0 are needed next.
  void AddRows(const StridedRows<T>& rows, int64_t, int lo, int hi, int width, int64_t step) {
    upcoming_.Add(rows.At(lo), hi - lo, step * kSize, static_cast<size_t>(width) * sizeof(T));
  }
  void AddRows(const RowTable<T>& rows, int64_t k0, int lo, int hi, int width, int64_t step) {
    const int64_t page = x_.block.listed ? 1 : p_.pages.page_size;  // rows of a page are `step` apart
    for (int c = lo, end; c < hi; c = end) {
      end = static_cast<int>(Min<int64_t>(hi, c + page - (k0 + c) % page));
      upcoming_.Add(rows.At(c), end - c, step * kSize, static_cast<size_t>(width) * sizeof(T));
    }
  }
  static constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(T));

  // The channels from d on, less than a vector.
  template <class Rows>
  void LastValues(const Rows& v, int g, int lo, int hi, int d, float* out) {
    hn::Store(hn::Zero(df), df, out + d);
    if constexpr (kPairs) {
      bfloat16 tail[kKeyBlock * kLanes] = {};
      for (int k = lo; k < hi; ++k) __builtin_memcpy(tail + k * kLanes, v.At(k) + d, (p_.Dv - d) * sizeof(T));
      const StridedRows<T> rows{tail, kLanes};
      DecodePairValues<1, 1>(rows, lo & ~1, RoundUp(hi, 2), lo, hi, true,
                             reinterpret_cast<const uint32_t*>(scores_at(g, 0)), out + d, dv_padded_, upcoming_);
    } else {
      for (int c = d; c < p_.Dv; ++c) {
        float sum = 0.f;
        for (int k = lo; k < hi; ++k) sum = __builtin_fmaf(to_float(v.At(k)[c]), scores_at(g, 0)[k], sum);
        out[c] = sum;
      }
    }
  }

  // For blocks that hold non-finite values: those of keys that the row does not see are replaced by zero, which leaves
  // the order and the rounding of the others as they are.
  template <class Rows>
  void VisibleValues(const Rows& v, int g, int lo, int hi) {
    const T* rows[kKeyBlock];
    for (int k = lo; k < hi; ++k) rows[k] = visible_[g][k] ? v.At(k) : ZeroRow<T>();
    Values(RowTable<T>{rows}, RowTable<T>{rows}, g, g + 1, lo, hi, false);
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
  UpcomingRows upcoming_;
  int64_t tile_index_ = 0, next_k0_ = 0;
  int rows_ = 0;
  Table tables_[2];  // this block and the next, where rows are found one by one
  int table_ = 0;
  bool visible_[kMaxDecodeRows][kKeyBlock];
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
