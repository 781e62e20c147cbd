// forward_decode-inl.h: attention forward for few query rows: lanes = keys for the scores, channels for the output.
//
// Memory-bound: the values of a block are fetched while its scores are computed, and the keys of the next block, also
// that of another tile, while the values are added up.

namespace mfa::cpu::MFA_ISA {
namespace {

// kPairs: products of bfloat16 pairs.
template <class T, bool kPairs>
class DecodeForward {
 public:
  DecodeForward(const ForwardJob& job, void* scratch)
      : job_(job), p_(*job.problem), together_(job.plan.together), finder_(p_, kPairs), tile_(job, scratch) {}

  // Blocks [first, last) of the keys for tile number `index`, or those that are computed together with it. `next`: what
  // follows, or null.
  void Run(int64_t index, const TileMap::Place& place, int first, int last, const Upcoming* next) {
    const bool in_pages = p_.pages.table && !TileKeys::cuts(p_);
    for (int t = together_ - 1; t >= 0; --t) {
      Select(index, place, t);
      tile_.Begin();
    }
    finder_.Select(tile_.tile());
    if (TakesTokens()) GatherQueries();
    const int keys = key_count(p_, place.b);
    last = Min(last, (keys + kKeyBlock - 1) / kKeyBlock);
    for (int i = first; i < last; ++i) {
      const Upcoming after{place, i + 1};
      const Upcoming* upcoming = i + 1 < last ? &after : next;
      const int64_t k0 = int64_t{i} * kKeyBlock;
      finder_.Find(tile_.tile(), RoundUp(tile_.rows(), kLanes), k0,
                   static_cast<int>(Min<int64_t>(kKeyBlock, keys - k0)), tile_.block);
      if (tile_.block.all.empty()) {
        MarkUnseen(index, place, i);
      } else if (in_pages) {
        PagedBlock(index, place, i, upcoming);
      } else {
        Block(i, upcoming);
      }
    }
    for (int t = 0; t < together_ && job_.plan.key_splits == 1; ++t) {
      Select(index, place, t);
      tile_.Finish();
    }
  }

  void Merge(int64_t index, const TileMap::Place& place) {
    tile_.Select(0, index, place);
    tile_.Begin();
    tile_.MergeBlocks((key_count(p_, place.b) + kKeyBlock - 1) / kKeyBlock);
    tile_.Finish();
  }

  size_t scratch_bytes() const { return tile_.scratch().bytes; }

 private:
  // Tile `t` of those that are computed together from `index` on.
  void Select(int64_t index, const TileMap::Place& place, int t) {
    tile_.Select(t, index + t, {place.b, place.kv_head + t, place.tile});
  }
  void MarkUnseen(int64_t index, const TileMap::Place& place, int block) {
    if (job_.plan.key_splits == 1) return;
    for (int t = together_ - 1; t >= 0; --t) {
      Select(index, place, t);
      tile_.MarkUnseen(block);
    }
  }

  // Rows of the block: a fixed step apart, or found one by one. `next`: what follows, or null.
  void Block(int index, const Upcoming* next) {
    const int b = tile_.tile().b, h = tile_.tile().kv_head;
    if (tile_.block.listed || GathersRows(p_)) {
      FindRows(b, h);
      return Attend(index, RowTable<T>{k_}, RowTable<T>{v_}, RowTable<T>{}, false);
    }
    const StridedRows<T> k{KeyRow<T>(p_, p_.k, b, h, tile_.block.k0), p_.k.stride[2]};
    const StridedRows<T> v{KeyRow<T>(p_, p_.v, b, h, tile_.block.k0), p_.v.stride[2]};
    StridedRows<T> next_k = k;
    const bool fetches = Fetches(next);
    if (fetches)
      next_k.first = KeyRow<T>(p_, p_.k, next->place.b, next->place.kv_head, int64_t{next->block} * kKeyBlock);
    Attend(index, k, v, next_k, fetches);
  }

  // Where the rows of the entries lie, for one head: those of another head lie as far from them everywhere.
  void FindRows(int b, int head) {
    const TileBlock& block = tile_.block;
    KeyRows(p_, p_.k, b, head, block.list, block.all.lo, block.all.hi, k_);
    KeyRows(p_, p_.v, b, head, block.list, block.all.lo, block.all.hi, v_);
  }

  // Whether all of this block is computed, so that all of the next is fetched, which must be a whole one.
  bool Fetches(const Upcoming* next) const {
    return next && tile_.block.all.hi - tile_.block.all.lo == kKeyBlock &&
           (int64_t{next->block} + 1) * kKeyBlock <= key_count(p_, next->place.b);
  }

  template <class Rows>
  void Attend(int index, const Rows& k, const Rows& v, const Rows& next_k, bool fetches) {
    const int lo = tile_.block.all.lo, hi = tile_.block.all.hi;
    UpcomingRows& upcoming = tile_.upcoming;
    upcoming.Clear();
    AddRows(v, lo, hi, p_.Dv);
    upcoming.Spread(tile_.FetchesOfScores(hi - lo));
    tile_.Scores(k, lo, hi);
    if (HWY_UNLIKELY(tile_.Weights(v))) {
      tile_.VisibleValues(v);
    } else {
      upcoming.Clear();
      if (fetches) AddRows(next_k, 0, kKeyBlock, p_.D);
      upcoming.Spread(tile_.FetchesOfValues(hi - lo));
      tile_.Values(v);
    }
    tile_.Keep(index);
  }
  // The rows of entries [lo, hi) of a block are read soon.
  void AddRows(const StridedRows<T>& rows, int lo, int hi, int width) {
    tile_.upcoming.Add(rows.At(lo), hi - lo, rows.step * kSize, static_cast<size_t>(width) * sizeof(T));
  }
  void AddRows(const RowTable<T>& rows, int lo, int hi, int width) {
    for (int c = lo; c < hi; ++c) tile_.upcoming.Add(rows.At(c), 1, 0, static_cast<size_t>(width) * sizeof(T));
  }
  static constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(T));

  // A block of a sequence in pages. The heads of a token lie together, or those of a page: each step of the keys, and
  // then of the values, is taken for all tiles, so that memory is read in its order.
  void PagedBlock(int64_t first_tile, const TileMap::Place& place, int index, const Upcoming* next) {
    const int64_t k0 = tile_.block.k0;
    const int lo = tile_.block.all.lo, hi = tile_.block.all.hi;
    FindRows(place.b, place.kv_head);
    const auto keys = [&](int t) { return RowTable<T>{k_, t * p_.k.stride[1]}; };
    const auto values = [&](int t) { return RowTable<T>{v_, t * p_.v.stride[1]}; };
    const auto fetch = [&](const TensorRef& x, const TileMap::Place& at, int64_t from, int64_t to, int width) {
      AddTokens(x, at, from, Min<int64_t>(to, key_count(p_, at.b)), width);
    };
    UpcomingRows& upcoming = tile_.upcoming;
    const int step = KeyStep(), value_step = ValueStep();
    for (int first = lo, last; first < hi; first = last) {
      last = Min(hi, (first / step + 1) * step);
      upcoming.Clear();
      if (last < hi) {
        fetch(p_.k, place, k0 + last, k0 + Min(hi, last + step), p_.D);
      } else {
        fetch(p_.v, place, k0 + lo, k0 + Min(hi, (lo / value_step + 1) * value_step), p_.Dv);
      }
      upcoming.Spread(int64_t{together_} * tile_.FetchesOfScores(last - first));
      if (TakesTokens()) {
        ScoresOfTokens(first, last);
        continue;
      }
      for (int t = 0; t < together_; ++t) {
        tile_.Resume(t);
        tile_.Scores(keys(t), first, last);
      }
    }
    bool skips[kMostTogether];  // tiles whose values are added up one row at a time
    for (int t = 0; t < together_; ++t) {
      Select(first_tile, place, t);
      skips[t] = tile_.Weights(values(t));
      if (HWY_UNLIKELY(skips[t])) tile_.VisibleValues(values(t));
    }
    for (int first = lo, last; first < hi; first = last) {
      last = Min(hi, (first / value_step + 1) * value_step);
      upcoming.Clear();
      if (last < hi) {
        fetch(p_.v, place, k0 + last, k0 + Min(hi, last + value_step), p_.Dv);
      } else if (next) {
        fetch(p_.k, next->place, int64_t{next->block} * kKeyBlock, int64_t{next->block} * kKeyBlock + step, p_.D);
      }
      upcoming.Spread(int64_t{together_} * tile_.FetchesOfValues(last - first));
      for (int t = 0; t < together_; ++t) {
        tile_.Resume(t);
        if (!skips[t]) tile_.AddValues(values(t), first, last, 0, tile_.rows());
      }
    }
    for (int t = together_ - 1; t >= 0; --t) {
      Select(first_tile, place, t);
      if (!skips[t]) tile_.EndValues(values(t), 0, tile_.rows());
      tile_.Keep(index);
    }
  }

  // Keys, and values, of a step of PagedBlock(). Few, so that this step and the next stay in the second cache; where
  // heads lie first, what a head has of a page of 64.
  int KeyStep() const {
    if (tile_.rows() > kFewRows) return 2 * KeyVectors(tile_.rows()) * kLanes;
    return TakesTokens() ? 32 : KeyVectors(1) * kLanes;
  }
  int ValueStep() const { return TokensFirst(p_.v) || p_.pages.page_size % 64 != 0 ? 32 : 64; }
  static bool TokensFirst(const TensorRef& x) { return std::abs(x.stride[1]) < std::abs(x.stride[2]); }

  // The tokens [from, to) of the heads from that of `at` on are read soon.
  void AddTokens(const TensorRef& x, const TileMap::Place& at, int64_t from, int64_t to, int width) {
    const int64_t page = p_.pages.page_size;
    auto bytes = static_cast<size_t>(width) * sizeof(T);
    int runs = together_;
    if (x.stride[1] == width) {  // heads of a token side by side
      bytes *= static_cast<size_t>(together_);
      runs = 1;
    }
    for (int64_t j = from, end; j < to; j = end) {
      end = Min(to, (j / page + 1) * page);
      const T* row = KeyRow<T>(p_, x, at.b, at.kv_head, j);
      for (int h = 0; h < runs; ++h, row += x.stride[1])
        tile_.upcoming.Add(row, static_cast<int>(end - j), x.stride[2] * kSize, bytes);
    }
  }

  // Whether ScoresOfTokens() computes the scores.
  bool TakesTokens() const {
    return together_ > 1 && tile_.rows() <= kFewRows && !RotatesKeys(p_) && TokensFirst(p_.k);
  }
  // Scores() of all tiles for entries [lo, hi), where the heads of a token lie together: lanes are the heads of tokens,
  // in the order of memory. Keys of one head lie so far apart that few fit in the first cache.
  void ScoresOfTokens(int lo, int hi) {
    const auto take = [&]<int G>() HWY_ATTR {
      if (together_ == kLanes) return ScoresOfLanes<G, true>(lo, hi);
      ScoresOfLanes<G, false>(lo, hi);
    };
    if (tile_.rows() == 1) return take.template operator()<1>();
    take.template operator()<2>();
  }
  // kWhole: a vector is a token.
  template <int G, bool kWhole>
  void ScoresOfLanes(int lo, int hi) {
    using Query = std::conditional_t<kPairs, uint32_t, float>;
    constexpr int kVectors = KeyVectors(G), kRows = kVectors * kLanes;
    const int width = kWhole ? kLanes : DecodeScratch::QueryWidth(together_), row_size = Terms() * width;
    const Query* queries = reinterpret_cast<const Query*>(tile_.scratch().queries);
    const VF scale = hn::Set(df, p_.scale * kLog2e);
    const int64_t step = p_.k.stride[1];
    const int count = (hi - lo) * together_;  // lanes
    for (int first = 0; first < count; first += kRows) {
      const int begin = lo + first / together_;
      const T* rows[kRows];  // those past the end repeat keys of the last
      int heads[kVectors];   // of the first lanes
      if constexpr (kWhole) {
        for (int i = 0; i < kRows; ++i) rows[i] = k_[Min(begin + i / kLanes, hi - 1)] + i % kLanes * step;
      } else {
        for (int i = 0, key = begin, head = first % together_; i < kRows; ++i) {
          if (i % kLanes == 0) heads[i / kLanes] = head;
          rows[i] = k_[Min(key, hi - 1)] + head * step;
          if (++head == together_) {
            head = 0;
            ++key;
          }
        }
      }
      alignas(64) float sums[G][kRows];
      DecodeScores<G, kVectors, kPairs>(
          rows, tile_.upcoming, p_.D,
          [&](int n, int g, int term) MFA_INLINE_LAMBDA {
            const Query* q = queries + g * row_size + term * width + (kWhole ? 0 : heads[n]);
            return hn::LoadU(hn::ScalableTag<Query>(), q);
          },
          [&](int n, int g, VF s)
              MFA_INLINE_LAMBDA { hn::Store(kPairs ? hn::Mul(s, scale) : s, df, sums[g] + n * kLanes); });
      if constexpr (kWhole) {
        for (int t = 0; t < kLanes; ++t) {
          float* s = tile_.scratch().Rows(t).s + begin;
          for (int g = 0; g < G; ++g)
            for (int n = 0; n < kVectors; ++n) s[g * kScoreStride + n] = sums[g][n * kLanes + t];
        }
      } else {
        const int end = Min(kRows, count - first);
        for (int i = 0, key = begin, head = first % together_; i < end; ++i) {
          for (int g = 0; g < G; ++g) tile_.scratch().Rows(head).s[g * kScoreStride + key] = sums[g][i];
          if (++head == together_) {
            head = 0;
            ++key;
          }
        }
      }
    }
  }
  // Writes down the queries as ScoresOfTokens() reads them.
  void GatherQueries() {
    const int width = DecodeScratch::QueryWidth(together_), terms = Terms();
    for (int t = 0; t < width; ++t) {
      const float* q = tile_.scratch().Rows(t % together_).q;
      for (int g = 0; g < tile_.rows(); ++g)
        for (int term = 0; term < terms; ++term)
          tile_.scratch().queries[(g * terms + term) * width + t] = q[g * RoundUp(p_.D, kLanes) + term];
    }
  }
  int Terms() const { return kPairs ? p_.D / 2 : p_.D; }

  const ForwardJob& job_;
  const AttentionProblem& p_;
  const int together_;
  BlockFinder finder_;
  DecodeTile<T, kPairs> tile_;
  const T *k_[kKeyBlock], *v_[kKeyBlock];  // where the rows of the block lie, where they are found one by one
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
