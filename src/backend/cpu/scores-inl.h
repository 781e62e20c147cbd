// scores-inl.h: what happens to the scores of a tile between the two products: softcap, ALiBi, bias, visibility,
// dropout. Scores are in base-2 units (natural units times log2 e), transposed: S[entry][row], where entry c of a block
// is key list.key[c].
#include "common/philox.h"

namespace mfa::cpu::MFA_ISA {
namespace {

// The entries [lo, hi) of a block that some row of lanes [r0, r0 + width) sees, and whether their intervals have them
// all. Entry c of a run of keys is key k0 + c; otherwise the block is a list and entries are numbered from 0.
struct BlockKeys {
  int lo = 0, hi = 0;
  bool full = true;
  bool empty() const { return hi <= lo; }
};
// The intervals of lanes [r0, r0 + width), whole vectors: what some lane sees, and what all of them see.
struct LaneIntervals {
  int32_t first, last, all_from, all_to;
  LaneIntervals(const RowTile& t, int r0, int width) {
    HWY_DASSERT(r0 % kLanes == 0 && width % kLanes == 0);
    VI low = hn::Set(di, INT32_MAX), high = hn::Zero(di), most = high, least = low;
    for (int r = r0; r < r0 + width; r += kLanes) {
      const VI begin = hn::Load(di, t.begin + r), end = hn::Load(di, t.end + r);
      const auto sees = hn::Lt(begin, end);
      most = hn::Max(most, begin);
      least = hn::Min(least, end);
      low = hn::Min(low, hn::IfThenElse(sees, begin, hn::Set(di, INT32_MAX)));
      high = hn::Max(high, hn::IfThenElseZero(sees, end));
    }
    first = hn::GetLane(hn::MinOfLanes(di, low));
    last = hn::GetLane(hn::MaxOfLanes(di, high));
    all_from = hn::GetLane(hn::MaxOfLanes(di, most));
    all_to = hn::GetLane(hn::MinOfLanes(di, least));
  }
};
HWY_INLINE BlockKeys KeysOfBlock(const RowTile& t, int r0, int width, int64_t k0, int keys) {
  const LaneIntervals seen(t, r0, width);
  BlockKeys out;
  out.lo = static_cast<int>(Min<int64_t>(Max<int64_t>(seen.first - k0, 0), keys));
  out.hi = static_cast<int>(Min<int64_t>(seen.last - k0, keys));
  out.full = seen.all_from <= k0 + out.lo && k0 + out.hi <= seen.all_to;
  return out;
}

// The windows of lanes [r0, r0 + width) along axis x of a neighbourhood: the positions that some lane sees lie in
// [first, last), all lanes see [all_from, all_to). Lanes up to the next whole vector repeat the last row.
struct LaneWindows {
  int32_t first, last, all_from, all_to;
  LaneWindows(const RowTile& t, int x, int r0, int width) {
    VI low = hn::Load(di, t.from[x] + r0), high = hn::Load(di, t.to[x] + r0), most = low, least = high;
    for (int r = r0 + kLanes; r < r0 + width; r += kLanes) {
      const VI from = hn::Load(di, t.from[x] + r), to = hn::Load(di, t.to[x] + r);
      low = hn::Min(low, from);
      most = hn::Max(most, from);
      high = hn::Max(high, to);
      least = hn::Min(least, to);
    }
    first = hn::GetLane(hn::MinOfLanes(di, low));
    all_from = hn::GetLane(hn::MaxOfLanes(di, most));
    last = hn::GetLane(hn::MaxOfLanes(di, high));
    all_to = hn::GetLane(hn::MinOfLanes(di, least));
  }
};

// The keys of one block for the rows of a tile.
struct TileBlock {
  int64_t k0 = 0;
  BlockKeys all;        // entries that some row of the tile sees
  bool listed = false;  // entries are a list, not a run of keys
  bool uneven = false;  // rows may see different entries within their intervals
  KeyList list;         // list.key[c] for c in [all.lo, all.hi), and beyond to whole pairs of a run
  int axes = 0;         // of the neighbourhood
  alignas(64) int32_t position[3][kKeyBlock];  // of the entries, along its axes

  // The entries that lanes [r0, r0 + width) see, whole vectors of them.
  HWY_INLINE BlockKeys Of(const RowTile& t, int r0, int width) const {
    BlockKeys keys;
    if (listed) {
      keys = EntriesOf(t, r0, width);
    } else {
      keys = KeysOfBlock(t, r0, width, k0, all.hi);
      keys.lo = Max(keys.lo, all.lo);
    }
    if (axes > 0) DropBeyondWindows(t, r0, width, keys);
    return keys;
  }

 private:
  HWY_INLINE BlockKeys EntriesOf(const RowTile& t, int r0, int width) const {
    const LaneIntervals seen(t, r0, width);
    BlockKeys out = all;
    while (out.lo < out.hi && list.key[out.lo] < seen.first) ++out.lo;
    while (out.lo < out.hi && list.key[out.hi - 1] >= seen.last) --out.hi;
    out.full = out.empty() || (seen.all_from <= list.key[out.lo] && list.key[out.hi - 1] < seen.all_to);
    return out;
  }

  // Leaves out the entries at both ends that are outside of all the lanes' windows.
  void DropBeyondWindows(const RowTile& t, int r0, int width, BlockKeys& keys) const {
    int32_t from[3], to[3];
    for (int x = 0; x < axes; ++x) {
      const LaneWindows windows(t, x, r0, width);
      from[x] = windows.first;
      to[x] = windows.last;
    }
    const auto within = [&](int c) {
      bool in = true;
      for (int x = 0; x < axes; ++x) in = in && position[x][c] >= from[x] && position[x][c] < to[x];
      return in;
    };
    const auto some_within = [&](int c) HWY_ATTR {  // of a vector of entries
      auto in = hn::Eq(hn::Zero(di), hn::Zero(di));
      for (int x = 0; x < axes; ++x) {
        const VI u = hn::LoadU(di, position[x] + c);
        in = hn::And(in, hn::AndNot(hn::Lt(u, hn::Set(di, from[x])), hn::Lt(u, hn::Set(di, to[x]))));
      }
      return !hn::AllFalse(di, in);
    };
    while (keys.lo + kLanes <= keys.hi && !some_within(keys.lo)) keys.lo += kLanes;
    while (keys.lo < keys.hi && !within(keys.lo)) ++keys.lo;
    while (keys.lo + kLanes <= keys.hi && !some_within(keys.hi - kLanes)) keys.hi -= kLanes;
    while (keys.lo < keys.hi && !within(keys.hi - 1)) --keys.hi;
  }
};

// Which keys of the blocks the rows of a tile see.
class BlockFinder {
 public:
  explicit BlockFinder(const AttentionProblem& p, bool pairs)
      : p_(p), pairs_(pairs), cuts_(TileKeys::cuts(p)), cut_keys_(p) {}

  void Select(const RowTile& t) {
    if (cuts_) cut_keys_.select(t.b, t.query, t.head, t.count);
  }

  // The keys of the block at k0, of `keys` that the sequence has, for `width` lanes of the tile.
  void Find(const RowTile& t, int width, int64_t k0, int keys, TileBlock& out) const {
    out.k0 = k0;
    out.all = KeysOfBlock(t, 0, width, k0, keys);
    out.listed = out.uneven = out.list.has_padding = false;
    if (out.all.empty()) return;
    if (!cuts_) return NumberKeys(out);
    cut_keys_.list(k0 + out.all.lo, k0 + out.all.hi, pairs_, out.list);
    const int count = out.list.count;
    if (count == 0) {
      out.all.hi = out.all.lo;
      return;
    }
    out.listed = !out.list.contiguous;
    if (out.listed) {
      out.all = {0, count, out.all.full};
    } else {
      out.all.lo = static_cast<int>(out.list.key[0] - k0);
      out.all.hi = out.all.lo + count;
      NumberKeys(out);
    }
    out.axes = p_.neighbourhood.axes;
    out.uneven = cut_keys_.lists_differ() || (out.list.has_padding && out.axes == 0);
    if (out.axes > 0) PlaceKeys(out);
  }

 private:
  static HWY_INLINE void NumberKeys(TileBlock& out) {
    const VI lane = hn::Iota(di, 0);
    for (int c = out.all.lo / kLanes * kLanes; c < out.all.hi; c += kLanes)
      hn::Store(hn::Add(lane, hn::Set(di, static_cast<int32_t>(out.k0) + c)), di, out.list.key + c);
  }

  void PlaceKeys(TileBlock& out) const {
    int32_t* const u[3] = {out.position[0] + out.all.lo, out.position[1] + out.all.lo, out.position[2] + out.all.lo};
    key_positions(p_.neighbourhood, out.list.key + out.all.lo, out.all.hi - out.all.lo, u);
    for (int c = out.all.lo; out.list.has_padding && c < out.all.hi; ++c)  // padding is beyond every window
      if (out.list.padding[c]) out.position[out.axes - 1][c] = INT32_MAX;
  }

  const AttentionProblem& p_;
  const bool pairs_, cuts_;
  TileKeys cut_keys_;
};

// Whether all of lanes [r0, r0 + width) see all of `keys`, beyond their intervals.
HWY_INLINE bool NeighboursAll(const AttentionProblem& p, const RowTile& t, int r0, int width, const TileBlock& block,
                              const BlockKeys& keys) {
  for (int x = 0; x < p.neighbourhood.axes; ++x) {
    const LaneWindows windows(t, x, r0, width);
    const int32_t* u = block.position[x];
    if (u[keys.lo] < windows.all_from || u[keys.hi - 1] >= windows.all_to) return false;  // mostly so
    for (int c = keys.lo; c < keys.hi; ++c)
      if (u[c] < windows.all_from || u[c] >= windows.all_to) return false;
  }
  return true;
}

// Which steps the scores of a problem need beyond the product and the intervals.
struct ScoreSteps {
  bool softcap, alibi, bias, mask, floor;
  bool cuts;  // keys may be hidden by lists or a neighbourhood
  explicit ScoreSteps(const AttentionProblem& p)
      : softcap(p.softcap > 0.f),
        alibi(p.alibi_slopes),
        bias(p.bias.data),
        mask(p.mask.data),
        floor(p.score_floor),
        cuts(TileKeys::cuts(p)) {}
  bool any() const { return softcap || alibi || bias || mask || floor; }
  bool hides() const { return bias || mask || floor; }
  // Whether only the neighbourhood hides any of `keys`, which the rows' intervals have.
  bool only_windows(const TileBlock& block, const BlockKeys& keys) const {
    return block.axes > 0 && keys.full && !block.uneven && !any();
  }
  // Whether entries must be looked at one by one for lanes [r0, r0 + width).
  HWY_INLINE bool Masked(const AttentionProblem& p, const RowTile& t, int r0, int width, const TileBlock& block,
                         const BlockKeys& keys) const {
    return mask || (cuts && (block.uneven || !NeighboursAll(p, t, r0, width, block, keys)));
  }
};

template <class T>
HWY_INLINE void PackBiasRows(const AttentionProblem& p, const RowTile& t, int r0, const TileBlock& block, int lo, int n,
                             float* out, ptrdiff_t ld) {
  const T* rows[kLanes];
  const int32_t* key = block.list.key + lo;
  const int64_t step = p.bias.stride[3];
  bool same = true;
  for (int r = 0; r < kLanes; ++r) {
    rows[r] = static_cast<const T*>(p.bias.data) + t.b * p.bias.stride[0] + t.head[r0 + r] * p.bias.stride[1] +
              t.query[r0 + r] * p.bias.stride[2];
    same = same && rows[r] == rows[0];
  }
  if (block.listed) {
    for (int k = 0; k < n; ++k) {
      const bool padding = block.list.has_padding && block.list.padding[lo + k];
      for (int r = 0; r < kLanes; ++r) out[k * ld + r] = padding ? 0.f : to_float(rows[r][key[k] * step]) * kLog2e;
    }
  } else if (same) {
    for (int k = 0; k < n; ++k) hn::Store(hn::Set(df, to_float(rows[0][key[k] * step]) * kLog2e), df, out + k * ld);
  } else if (step == 1) {
    for (const T*& row : rows) row += key[0];
    PackTransposed(rows, n, kLog2e, out, ld);
  } else {
    for (int k = 0; k < n; ++k)
      for (int r = 0; r < kLanes; ++r) out[k * ld + r] = to_float(rows[r][key[k] * step]) * kLog2e;
  }
}

// bias[k][lane] in base-2 units for the entries [lo, lo + n), kLanes rows from r0.
HWY_INLINE void PackBias(const AttentionProblem& p, const RowTile& t, int r0, const TileBlock& block, int lo, int n,
                         float* out, ptrdiff_t ld) {
  if (p.bias.dtype == DType::f32) return PackBiasRows<float>(p, t, r0, block, lo, n, out, ld);
  if (p.bias.dtype == DType::f16) return PackBiasRows<float16>(p, t, r0, block, lo, n, out, ld);
  PackBiasRows<bfloat16>(p, t, r0, block, lo, n, out, ld);
}

// out[k][lane] = all ones where lists, neighbourhood and boolean mask show the entry lo + k, else 0.
HWY_INLINE void PackCuts(const AttentionProblem& p, const RowTile& t, int r0, const TileBlock& block, int lo, int n,
                         int32_t* out, ptrdiff_t ld) {
  const int axes = p.neighbourhood.axes;
  for (int k = 0; k < n; ++k) {
    auto visible = hn::Eq(hn::Zero(di), hn::Set(di, block.list.has_padding && block.list.padding[lo + k] ? 1 : 0));
    for (int x = 0; x < axes; ++x) {
      const VI u = hn::Set(di, block.position[x][lo + k]);
      visible =
          hn::And(visible, hn::AndNot(hn::Lt(u, hn::Load(di, t.from[x] + r0)), hn::Lt(u, hn::Load(di, t.to[x] + r0))));
    }
    hn::Store(hn::VecFromMask(di, visible), di, out + k * ld);
  }
}
HWY_NOINLINE void PackDifferingLists(const AttentionProblem& p, const RowTile& t, int r0, const TileBlock& block,
                                     int lo, int n, int32_t* out, ptrdiff_t ld) {
  for (int k = 0; k < n; ++k)
    for (int r = 0; r < kLanes; ++r) {
      int32_t& visible = out[k * ld + r];
      if (visible && !lists_show(p, t.b, t.head[r0 + r], t.query[r0 + r], block.list.key[lo + k])) visible = 0;
    }
}

// The same for every reason to hide an entry. Returns whether any is visible.
HWY_INLINE bool PackMask(const AttentionProblem& p, const RowTile& t, int r0, const TileBlock& block, int lo, int n,
                         int32_t* out, ptrdiff_t ld) {
  const bool cuts = TileKeys::cuts(p);
  const int32_t* key = block.list.key + lo;
  bool any = false;
  if (cuts) {
    PackCuts(p, t, r0, block, lo, n, out, ld);
    if (p.blocks.offsets && block.uneven) PackDifferingLists(p, t, r0, block, lo, n, out, ld);
    if (!p.mask.data) return true;
  }
  const uint8_t* rows[kLanes];
  bool same = true;
  for (int r = 0; r < kLanes; ++r) {
    rows[r] =
        p.mask.data + t.b * p.mask.stride[0] + t.head[r0 + r] * p.mask.stride[1] + t.query[r0 + r] * p.mask.stride[2];
    same = same && rows[r] == rows[0];
  }
  const int64_t step = p.mask.stride[3];
  if (cuts) {
    for (int k = 0; k < n; ++k)
      for (int r = 0; r < kLanes; ++r) {
        int32_t& visible = out[k * ld + r];
        if (visible && rows[r][key[k] * step] == 0) visible = 0;
        any |= visible != 0;
      }
  } else if (same) {
    for (int k = 0; k < n; ++k) {
      const bool visible = rows[0][key[k] * step] != 0;
      any |= visible;
      hn::Store(hn::Set(di, visible ? -1 : 0), di, out + k * ld);
    }
  } else {
    for (int k = 0; k < n; ++k)
      for (int r = 0; r < kLanes; ++r) {
        const bool visible = rows[r][key[k] * step] != 0;
        any |= visible;
        out[k * ld + r] = visible ? -1 : 0;
      }
  }
  return any;
}

// The per-element step, shared by every layout: `key_minus_pos` and the terms are vectors of matching lanes.
struct ScoreTerms {
  VF softcap, inverse_softcap;  // base-2 units
  explicit ScoreTerms(const AttentionProblem& p)
      : softcap(hn::Set(df, p.softcap * kLog2e)), inverse_softcap(hn::Set(df, 1.f / (p.softcap * kLog2e))) {}
};

// Applies the steps to S[k * ld + c * kLanes ...] for entries [lo, hi) of a block, whose keys are key[k], and NR
// vectors of rows from r0, hides what is not visible, and raises `row_max`. `bias` and `mask` (null: none) are panels
// whose entry 0 is `lo`, with leading dimension NR * kLanes. With `derivative`, stores there d(capped score) / d(score)
// for the backward (leading dimension ld).
template <int NR>
HWY_INLINE void ApplyScoreSteps(const AttentionProblem& p, const ScoreSteps& steps, const RowTile& t, int r0,
                                const int32_t* key_of, int lo, int hi, const float* bias, const int32_t* mask, float* S,
                                ptrdiff_t ld, VF (&row_max)[NR], float* derivative) {
  const ScoreTerms terms(p);
  for (int c = 0; c < NR; ++c) {
    const int r = r0 + c * kLanes;
    const VI begin = hn::Load(di, t.begin + r), end = hn::Load(di, t.end + r), pos = hn::Load(di, t.pos + r);
    const VF slope = hn::Load(df, t.slope + r);
    const VF floor = steps.floor ? hn::Load(df, t.floor + r) : hn::Set(df, -kInf);
    VF max = row_max[c];
    for (int k = lo; k < hi; ++k) {
      const VI key = hn::Set(di, key_of[k]);
      float* at = S + k * ld + c * kLanes;
      VF s = hn::Load(df, at);
      if (steps.softcap) {
        const VF th = Tanh(hn::Mul(s, terms.inverse_softcap));
        s = hn::Mul(th, terms.softcap);
        if (derivative) hn::Store(hn::NegMulAdd(th, th, hn::Set(df, 1.f)), df, derivative + k * ld + c * kLanes);
      }
      if (steps.alibi) s = hn::MulAdd(slope, hn::ConvertTo(df, hn::Sub(key, pos)), s);
      auto visible = hn::AndNot(hn::Lt(key, begin), hn::Lt(key, end));
      if (steps.bias) {
        const VF term = hn::Load(df, bias + (k - lo) * NR * kLanes + c * kLanes);
        s = hn::Add(s, term);
        visible = hn::And(visible, hn::RebindMask(di, hn::Ne(term, hn::Set(df, -kInf))));
      }
      if (mask) visible = hn::And(visible, hn::MaskFromVec(hn::Load(di, mask + (k - lo) * NR * kLanes + c * kLanes)));
      if (steps.floor) visible = hn::AndNot(hn::RebindMask(di, hn::Lt(s, floor)), visible);
      s = hn::IfThenElse(hn::RebindMask(df, visible), s, hn::Set(df, -kInf));
      hn::Store(s, df, at);
      max = hn::Max(s, max);
    }
    row_max[c] = max;
  }
}

// The same where only the rows' intervals hide keys: those in the middle that all rows see are not compared.
template <int NR>
HWY_INLINE void HideBeyondIntervals(const RowTile& t, int r0, const int32_t* key_of, int lo, int hi, float* S,
                                    ptrdiff_t ld, VF (&row_max)[NR]) {
  VI begin[NR], end[NR];
  for (int c = 0; c < NR; ++c) {
    begin[c] = hn::Load(di, t.begin + r0 + c * kLanes);
    end[c] = hn::Load(di, t.end + r0 + c * kLanes);
  }
  const LaneIntervals seen(t, r0, NR * kLanes);
  const auto compare = [&](int k) HWY_ATTR {
    const VI key = hn::Set(di, key_of[k]);
    for (int c = 0; c < NR; ++c) {
      float* at = S + k * ld + c * kLanes;
      const auto visible = hn::AndNot(hn::Lt(key, begin[c]), hn::Lt(key, end[c]));
      const VF s = hn::IfThenElse(hn::RebindMask(df, visible), hn::Load(df, at), hn::Set(df, -kInf));
      hn::Store(s, df, at);
      row_max[c] = hn::Max(s, row_max[c]);
    }
  };
  int k = lo;
  for (; k < hi && key_of[k] < seen.all_from; ++k) compare(k);
  for (; k < hi && key_of[k] < seen.all_to; ++k)
    for (int c = 0; c < NR; ++c) row_max[c] = hn::Max(hn::Load(df, S + k * ld + c * kLanes), row_max[c]);
  for (; k < hi; ++k) compare(k);
}

// The same where only the neighbourhood hides keys: entries [lo, hi) outside of a row's window.
template <int NR>
HWY_INLINE void HideBeyondWindows(const RowTile& t, int r0, const TileBlock& block, int lo, int hi, float* S,
                                  ptrdiff_t ld, VF (&row_max)[NR]) {
  const int last = block.axes - 1;
  // `size`: of the rows' windows along the last axis, 0 where they do not see the line of the entries.
  VU from[NR], size[NR];
  MFA_UNROLL
  for (int c = 0; c < NR; ++c) from[c] = hn::BitCast(du, hn::Load(di, t.from[last] + r0 + c * kLanes));
  for (int k = lo; k < hi; ++k) {
    bool same = k > lo;
    for (int x = 0; x < last; ++x) same = same && block.position[x][k] == block.position[x][k - 1];
    if (!same) {
      VI line[NR];
      MFA_UNROLL
      for (int c = 0; c < NR; ++c)
        line[c] = hn::Sub(hn::Load(di, t.to[last] + r0 + c * kLanes), hn::BitCast(di, from[c]));
      for (int x = 0; x < last; ++x) {
        const VI u = hn::Set(di, block.position[x][k]);
        MFA_UNROLL
        for (int c = 0; c < NR; ++c) {
          const int r = r0 + c * kLanes;
          const auto in = hn::AndNot(hn::Lt(u, hn::Load(di, t.from[x] + r)), hn::Lt(u, hn::Load(di, t.to[x] + r)));
          line[c] = hn::IfThenElseZero(in, line[c]);
        }
      }
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) size[c] = hn::BitCast(du, line[c]);
    }
    const VU u = hn::Set(du, static_cast<uint32_t>(block.position[last][k]));
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      float* at = S + k * ld + c * kLanes;
      const auto in = hn::Lt(hn::Sub(u, from[c]), size[c]);
      const VF s = hn::IfThenElse(hn::RebindMask(df, in), hn::Load(df, at), hn::Set(df, -kInf));
      hn::Store(s, df, at);
      row_max[c] = hn::Max(s, row_max[c]);
    }
  }
}

// Multiplies P[k * ld + r] by the dropout factor of its (row, key): 0 or 1 / (1 - p).
HWY_INLINE void ApplyDropout(const AttentionProblem& p, const RowTile& t, int r0, int rows, const int32_t* key_of,
                             int lo, int hi, float* P, ptrdiff_t ld) {
  const uint64_t threshold = dropout_threshold(p.dropout_p);
  const float keep = p.dropout_p < 1.f ? 1.f / (1.f - p.dropout_p) : 0.f;
  for (int r = 0; r < rows; ++r) {
    const uint32_t row_head = static_cast<uint32_t>(t.b) * static_cast<uint32_t>(p.Hq) + t.head[r0 + r];
    PhiloxWords words{};
    for (int k = lo; k < hi; ++k) {
      const uint32_t key = dropout_key(p, t.b, key_of[k]);
      if (k == lo || key / 4 != dropout_key(p, t.b, key_of[k - 1]) / 4)
        words = dropout_words(p.dropout_seed, row_head, t.query[r0 + r], key);
      float& value = P[k * ld + r];
      value = words[key % 4] >= threshold ? value * keep : 0.f;
    }
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
