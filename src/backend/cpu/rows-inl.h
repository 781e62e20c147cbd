// rows-inl.h: the query rows of a tile, and where rows of queries, keys and values lie: strided, packed or in pages,
// rotated as they are loaded where a rotary embedding is asked for.
#include "attention/layout.h"
#include "attention/tile_keys.h"
#include "attention/tiling.h"
#include "attention/visibility.h"

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kMaxRowTile = 384;      // query rows of a task: what they share of keys and values is loaded once
constexpr int kBackwardRowTile = 96;  // of a step of the backward, which keeps more for each row
constexpr int kGroupRows = kLanes * kTileVectors;  // rows of a full column group
static_assert(kMaxRowTile % kGroupRows == 0 && kBackwardRowTile % kGroupRows == 0);

// Rows of one (sequence, KV head), in the order of RowTiling.
struct RowTile {
  int b = 0, kv_head = 0;
  int count = 0;  // real rows; lanes past them repeat the last row
  alignas(64) int32_t query[kMaxRowTile];
  alignas(64) int32_t head[kMaxRowTile];
  alignas(64) int32_t pos[kMaxRowTile];
  alignas(64) int32_t begin[kMaxRowTile];
  alignas(64) int32_t end[kMaxRowTile];
  alignas(64) float slope[kMaxRowTile];  // ALiBi, base-2 units
  alignas(64) float floor[kMaxRowTile];  // scores below are hidden; set where the problem has floors
  // Of the neighbourhood, by axis: keys at positions from .. to - 1 are seen; set where the problem has one.
  alignas(64) int32_t from[3][kMaxRowTile];
  alignas(64) int32_t to[3][kMaxRowTile];
};

// Completes the tile whose first `count` queries and heads are set, padded to `width`.
HWY_INLINE void CompleteRowTile(const AttentionProblem& p, int b, int kv_head, int count, int width, RowTile& t) {
  const VisibleKeys visible(p, b);
  t.b = b;
  t.kv_head = kv_head;
  t.count = count;
  for (int r = count; r < width; ++r) {
    t.query[r] = t.query[count - 1];
    t.head[r] = t.head[count - 1];
  }
  for (int r = 0; r < width; ++r) {
    const KeyRange keys = visible.of(t.query[r]);
    t.pos[r] = visible.position(t.query[r]);
    t.begin[r] = keys.begin;
    t.end[r] = keys.end;
  }
  if (p.alibi_slopes) {
    for (int r = 0; r < width; ++r) t.slope[r] = p.alibi_slopes[t.head[r]] * kLog2e;
  } else {
    for (int r = 0; r < width; ++r) t.slope[r] = 0.f;
  }
  if (p.score_floor)
    for (int r = 0; r < width; ++r) t.floor[r] = p.score_floor[row_index(p, b, t.head[r], t.query[r])];
  if (p.neighbourhood.axes > 0)
    query_spans(p.neighbourhood, t.query, width, {t.from[0], t.from[1], t.from[2]}, {t.to[0], t.to[1], t.to[2]});
}

// Row pointers: of a tensor shaped like q, and of one shaped like k (a key that the sequence has).
template <class T, class Ref>
HWY_INLINE auto QueryRow(const AttentionProblem& p, const Ref& x, int b, int h, int64_t i) {
  using Out = std::conditional_t<std::is_same_v<Ref, TensorRef>, const T, T>;
  return static_cast<Out*>(x.data) + query_element(p, x.stride, b, h, i);
}
template <class T, class Ref>
HWY_INLINE auto KeyRow(const AttentionProblem& p, const Ref& x, int b, int h, int64_t j) {
  using Out = std::conditional_t<std::is_same_v<Ref, TensorRef>, const T, T>;
  return static_cast<Out*>(x.data) + key_element(p, x.stride, b, h, j);
}

// A row of zeros, for keys that do not exist.
template <class T>
HWY_INLINE const T* ZeroRow() {
  alignas(64) static constexpr T kZeros[640] = {};
  return kZeros;
}

// Row pointers of the keys key[c] for c in [lo, hi); padding gets zeros.
template <class T>
HWY_INLINE void KeyRows(const AttentionProblem& p, const TensorRef& x, int b, int h, const KeyList& list, int lo,
                        int hi, const T** rows) {
  const int64_t step = x.stride[2];
  if (!p.pages.table) {
    const T* first = KeyRow<T>(p, x, b, h, 0);
    for (int c = lo; c < hi; ++c) rows[c] = first + list.key[c] * step;
  } else {
    for (int c = lo; c < hi;) {
      if (list.has_padding && list.padding[c]) {  // its key may not exist
        ++c;
        continue;
      }
      const int32_t begin = list.key[c] - list.key[c] % p.pages.page_size;  // the first key of the page
      const T* page = KeyRow<T>(p, x, b, h, begin);
      for (; c < hi && list.key[c] - begin < p.pages.page_size; ++c) rows[c] = page + (list.key[c] - begin) * step;
    }
  }
  if (!list.has_padding) return;
  for (int c = lo; c < hi; ++c)
    if (list.padding[c]) rows[c] = ZeroRow<T>();
}

// Rows as PackPanels and the decode kernel read them: a fixed step apart, or anywhere.
template <class T>
struct StridedRows {
  const T* first;
  ptrdiff_t step;
  HWY_INLINE const T* At(int r) const { return first + r * step; }
  HWY_INLINE StridedRows Columns(int c) const { return {first + c, step}; }
  HWY_INLINE StridedRows From(int r) const { return {At(r), step}; }
};
template <class T>
struct RowTable {
  const T* const* rows;
  ptrdiff_t column = 0;
  HWY_INLINE const T* At(int r) const { return rows[r] + column; }
  HWY_INLINE RowTable Columns(ptrdiff_t c) const { return {rows, column + c}; }
  HWY_INLINE RowTable From(int r) const { return {rows + r, column}; }
};

// Turns the pairs of the float row `x` by the angles of `position`; `back` by their negatives.
HWY_NOINLINE void Rotate(const RopeRef& rope, int64_t position, bool back, float* x) {
  const int pairs = rope.rotary_dim / 2;
  const float *cos = rope.cos + position * pairs, *sin = rope.sin + position * pairs;
  const VF sign = hn::Set(df, back ? -1.f : 1.f);
  int c = 0;
  for (; c + kLanes <= pairs; c += kLanes) {
    const VF co = hn::LoadU(df, cos + c), si = hn::Mul(hn::LoadU(df, sin + c), sign);
    VF a, b;
    if (rope.interleaved) {
      hn::LoadInterleaved2(df, x + 2 * c, a, b);
    } else {
      a = hn::LoadU(df, x + c);
      b = hn::LoadU(df, x + pairs + c);
    }
    const VF first = hn::MulSub(a, co, hn::Mul(b, si)), second = hn::MulAdd(a, si, hn::Mul(b, co));
    if (rope.interleaved) {
      hn::StoreInterleaved2(first, second, df, x + 2 * c);
    } else {
      hn::StoreU(first, df, x + c);
      hn::StoreU(second, df, x + pairs + c);
    }
  }
  for (; c < pairs; ++c) {
    const float si = back ? -sin[c] : sin[c];
    float &a = x[rope.interleaved ? 2 * c : c], &b = x[rope.interleaved ? 2 * c + 1 : c + pairs];
    const float first = __builtin_fmaf(a, cos[c], -(b * si)), second = __builtin_fmaf(a, si, b * cos[c]);
    a = first;
    b = second;
  }
}
HWY_INLINE bool RotatesQueries(const AttentionProblem& p) { return p.rope.cos; }
HWY_INLINE bool RotatesKeys(const AttentionProblem& p) { return p.rope.cos && p.rope.rotates_k; }
HWY_INLINE int64_t QueryPosition(const AttentionProblem& p, int b, int64_t i) {
  return (p.rope.q_positions ? p.rope.q_positions[b] : 0) + i;
}
HWY_INLINE int64_t KeyPosition(const AttentionProblem& p, int b, int64_t j) {
  return (p.rope.k_positions ? p.rope.k_positions[b] : 0) + j;
}

// Query row (h, i) widened, and rotated where the problem says so; `out` as for WidenRow.
template <class T>
HWY_INLINE void LoadQuery(const AttentionProblem& p, int b, int h, int64_t i, float* out) {
  WidenRow(QueryRow<T>(p, p.q, b, h, i), p.D, out);
  if (RotatesQueries(p)) Rotate(p.rope, QueryPosition(p, b, i), false, out);
}
HWY_INLINE void RotateKey(const AttentionProblem& p, int b, int64_t j, float* row) {
  Rotate(p.rope, KeyPosition(p, b, j), false, row);
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
