// scores-inl.h: rows of a tile and what happens to their scores between the two products: softcap, ALiBi, bias,
// visibility, dropout. Scores are in base-2 units (natural units times log2 e), transposed: S[key][row].
#include "attention/visibility.h"
#include "common/philox.h"

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kMaxRowTile = 384;      // query rows of a task: what they share of keys and values is loaded once
constexpr int kBackwardRowTile = 96;  // of a step of the backward, which keeps more for each row
constexpr int kGroupRows = kLanes * kTileVectors;  // rows of a full column group
static_assert(kMaxRowTile % kGroupRows == 0 && kBackwardRowTile % kGroupRows == 0);

// Rows of one (batch entry, KV head): row r is query r / G of head r % G of the group, so that the heads of a group
// share the keys they load and rows next to each other see nearly the same keys.
struct RowTile {
  int b = 0, kv_head = 0;
  int count = 0;  // real rows; lanes past them repeat the last row
  alignas(64) int32_t query[kMaxRowTile];
  alignas(64) int32_t head[kMaxRowTile];
  alignas(64) int32_t pos[kMaxRowTile];
  alignas(64) int32_t begin[kMaxRowTile];
  alignas(64) int32_t end[kMaxRowTile];
  alignas(64) float slope[kMaxRowTile];  // ALiBi, base-2 units
};

// Fills rows [first, first + count) of (b, kv_head), padded to `width`.
HWY_INLINE void FillRowTile(const AttentionProblem& p, int b, int kv_head, int64_t first, int count, int width,
                            RowTile& t) {
  const int G = p.Hq / p.Hkv;
  const int32_t offset = position_offset(p, b);
  t.b = b;
  t.kv_head = kv_head;
  t.count = count;
  for (int r = 0; r < width; ++r) {
    const int64_t row = first + Min(r, count - 1);
    const int32_t i = static_cast<int32_t>(row / G), h = kv_head * G + static_cast<int32_t>(row % G);
    const KeyRange keys = visible_keys(p, b, i);
    t.query[r] = i;
    t.head[r] = h;
    t.pos[r] = i + offset;
    t.begin[r] = keys.begin;
    t.end[r] = keys.end;
    t.slope[r] = p.alibi_slopes ? p.alibi_slopes[h] * kLog2e : 0.f;
  }
}

template <class T>
HWY_INLINE const T* RowPointer(const TensorRef& x, int b, int h, int64_t n) {
  return static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + n * x.stride[2];
}
template <class T>
HWY_INLINE T* RowPointer(const MutableTensorRef& x, int b, int h, int64_t n) {
  return static_cast<T*>(x.data) + b * x.stride[0] + h * x.stride[1] + n * x.stride[2];
}

// The keys [lo, hi) of a block that some row of lanes [r0, r0 + width) sees, and whether all rows see all of them.
struct BlockKeys {
  int lo = 0, hi = 0;  // relative to the block
  bool full = true;
  bool empty() const { return hi <= lo; }
};
HWY_INLINE BlockKeys KeysOfBlock(const RowTile& t, int r0, int width, int64_t k0, int keys) {
  int64_t first = INT64_MAX, last = 0, all_from = 0, all_to = INT64_MAX;
  for (int r = r0; r < r0 + width; ++r) {
    all_from = Max<int64_t>(all_from, t.begin[r]);
    all_to = Min<int64_t>(all_to, t.end[r]);
    if (t.begin[r] >= t.end[r]) continue;
    first = Min<int64_t>(first, t.begin[r]);
    last = Max<int64_t>(last, t.end[r]);
  }
  BlockKeys out;
  out.lo = static_cast<int>(Max<int64_t>(first, k0) - k0 < keys ? Max<int64_t>(first, k0) - k0 : keys);
  out.hi = static_cast<int>(Min<int64_t>(last - k0, keys));
  out.full = all_from <= k0 + out.lo && k0 + out.hi <= all_to;
  return out;
}

// Which steps the scores of a problem need beyond the product and the intervals.
struct ScoreSteps {
  bool softcap, alibi, bias, mask;
  explicit ScoreSteps(const AttentionProblem& p)
      : softcap(p.softcap > 0.f), alibi(p.alibi_slopes), bias(p.bias.data), mask(p.mask.data) {}
  bool any() const { return softcap || alibi || bias || mask; }
};

template <class T>
HWY_INLINE void PackBiasRows(const AttentionProblem& p, const RowTile& t, int r0, int64_t key, int n, float* out,
                             ptrdiff_t ld) {
  const T* rows[kLanes];
  bool same = true;
  for (int r = 0; r < kLanes; ++r) {
    rows[r] = static_cast<const T*>(p.bias.data) + t.b * p.bias.stride[0] + t.head[r0 + r] * p.bias.stride[1] +
              t.query[r0 + r] * p.bias.stride[2] + key * p.bias.stride[3];
    same = same && rows[r] == rows[0];
  }
  const int64_t step = p.bias.stride[3];
  if (same) {
    for (int k = 0; k < n; ++k) hn::Store(hn::Set(df, to_float(rows[0][k * step]) * kLog2e), df, out + k * ld);
  } else if (step == 1) {
    PackTransposed(rows, n, kLog2e, out, ld);
  } else {
    for (int k = 0; k < n; ++k)
      for (int r = 0; r < kLanes; ++r) out[k * ld + r] = to_float(rows[r][k * step]) * kLog2e;
  }
}

// bias[k][lane] in base-2 units for keys [key, key + n), kLanes rows from r0.
HWY_INLINE void PackBias(const AttentionProblem& p, const RowTile& t, int r0, int64_t key, int n, float* out,
                         ptrdiff_t ld) {
  if (p.bias.dtype == DType::f32) return PackBiasRows<float>(p, t, r0, key, n, out, ld);
  if (p.bias.dtype == DType::f16) return PackBiasRows<float16>(p, t, r0, key, n, out, ld);
  PackBiasRows<bfloat16>(p, t, r0, key, n, out, ld);
}

// out[k][lane] = all ones where the boolean mask shows the key, else 0. Returns whether any is visible.
HWY_INLINE bool PackMask(const AttentionProblem& p, const RowTile& t, int r0, int64_t key, int n, int32_t* out,
                         ptrdiff_t ld) {
  const uint8_t* rows[kLanes];
  bool same = true;
  for (int r = 0; r < kLanes; ++r) {
    rows[r] = p.mask.data + t.b * p.mask.stride[0] + t.head[r0 + r] * p.mask.stride[1] +
              t.query[r0 + r] * p.mask.stride[2] + key * p.mask.stride[3];
    same = same && rows[r] == rows[0];
  }
  const int64_t step = p.mask.stride[3];
  bool any = false;
  if (same) {
    for (int k = 0; k < n; ++k) {
      const bool visible = rows[0][k * step] != 0;
      any |= visible;
      hn::Store(hn::Set(di, visible ? -1 : 0), di, out + k * ld);
    }
  } else {
    for (int k = 0; k < n; ++k)
      for (int r = 0; r < kLanes; ++r) {
        const bool visible = rows[r][k * step] != 0;
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

// Applies the steps to S[k * ld + c * kLanes ...] for keys [lo, hi) of the block at k0 and NR vectors of rows from r0,
// hides what is not visible, and raises `row_max`. `bias` and `mask` are panels whose key 0 is `lo`, with leading
// dimension NR * kLanes. With `derivative`, stores there d(capped score) / d(score) for the backward (leading dimension
// ld).
template <int NR>
HWY_INLINE void ApplyScoreSteps(const AttentionProblem& p, const ScoreSteps& steps, const RowTile& t, int r0,
                                int64_t k0, int lo, int hi, const float* bias, const int32_t* mask, float* S,
                                ptrdiff_t ld, VF (&row_max)[NR], float* derivative) {
  const ScoreTerms terms(p);
  for (int c = 0; c < NR; ++c) {
    const int r = r0 + c * kLanes;
    const VI begin = hn::Load(di, t.begin + r), end = hn::Load(di, t.end + r), pos = hn::Load(di, t.pos + r);
    const VF slope = hn::Load(df, t.slope + r);
    VF max = row_max[c];
    for (int k = lo; k < hi; ++k) {
      const VI key = hn::Set(di, static_cast<int32_t>(k0 + k));
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
      if (steps.mask)
        visible = hn::And(visible, hn::MaskFromVec(hn::Load(di, mask + (k - lo) * NR * kLanes + c * kLanes)));
      s = hn::IfThenElse(hn::RebindMask(df, visible), s, hn::Set(df, -kInf));
      hn::Store(s, df, at);
      max = hn::Max(s, max);
    }
    row_max[c] = max;
  }
}

// Multiplies P[k * ld + r] by the dropout factor of its (row, key): 0 or 1 / (1 - p).
HWY_INLINE void ApplyDropout(const AttentionProblem& p, const RowTile& t, int r0, int rows, int64_t k0, int lo, int hi,
                             float* P, ptrdiff_t ld) {
  const uint64_t threshold = dropout_threshold(p.dropout_p);
  const float keep = p.dropout_p < 1.f ? 1.f / (1.f - p.dropout_p) : 0.f;
  for (int r = 0; r < rows; ++r) {
    const uint32_t row_head = static_cast<uint32_t>(t.b) * static_cast<uint32_t>(p.Hq) + t.head[r0 + r];
    PhiloxWords words{};
    for (int k = lo; k < hi; ++k) {
      const uint32_t key = static_cast<uint32_t>(k0 + k);
      if (k == lo || key % 4 == 0) words = dropout_words(p.dropout_seed, row_head, t.query[r0 + r], key);
      float& value = P[k * ld + r];
      value = words[key % 4] >= threshold ? value * keep : 0.f;
    }
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
