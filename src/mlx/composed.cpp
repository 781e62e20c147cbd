#include "mlx/composed.h"

#include <array>
#include <limits>
#include <memory>
#include <optional>

#include "common/philox.h"
#include "mlx/ops.h"

namespace mfa {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// MLX operations of one call: the stream is given once.
struct Graph {
  mx::Stream s;

  mx::array f32(const mx::array& x) const { return mx::astype(x, mx::float32, s); }
  mx::array add(const mx::array& a, const mx::array& b) const { return mx::add(a, b, s); }
  mx::array sub(const mx::array& a, const mx::array& b) const { return mx::subtract(a, b, s); }
  mx::array mul(const mx::array& a, const mx::array& b) const { return mx::multiply(a, b, s); }
  mx::array where(const mx::array& c, const mx::array& a, const mx::array& b) const { return mx::where(c, a, b, s); }
  mx::array reshape(const mx::array& x, mx::Shape shape) const { return mx::reshape(x, std::move(shape), s); }
};

struct Positions {
  mx::array row;      // pos(i): int32, broadcasts over [B, 1, Nq, 1]
  mx::array key;      // j: int32 [1, 1, 1, Nk]
  mx::array lengths;  // keys of each batch entry: int32, broadcasts over [B, 1, 1, 1]
};

Positions positions(const AttentionProblem& p, const mx::array* kv_lengths, const Graph& g) {
  const auto lengths = kv_lengths ? mx::clip(g.reshape(*kv_lengths, {p.B, 1, 1, 1}), mx::array(0), mx::array(p.Nk), g.s)
                                  : mx::array(p.Nk);
  const auto offset = mx::maximum(g.sub(lengths, mx::array(p.Nq)), mx::array(0), g.s);
  const auto rows = g.reshape(mx::arange(0, p.Nq, mx::int32, g.s), {1, 1, p.Nq, 1});
  const auto keys = g.reshape(mx::arange(0, p.Nk, mx::int32, g.s), {1, 1, 1, p.Nk});
  return {g.add(rows, offset), keys, lengths};
}

// The tiles of block lists as a mask of tokens, [B or 1, Hq or 1, Nq, Nk]. The lists follow one another in memory, so
// that the row of an entry is the number of rows that began before it.
mx::array listed_tiles(const AttentionProblem& p, const AttentionParams& params, const mx::array& offsets,
                       const mx::array& key_ids, const Graph& g) {
  const BlockListRef& l = p.blocks;
  const int B = params.lists_b ? p.B : 1, H = params.lists_h ? p.Hq : 1, rows = B * H * l.query_blocks;
  const mx::Shape tiles = {B, H, l.query_blocks, l.key_blocks};
  auto visible = mx::zeros(tiles, mx::bool_, g.s);
  if (const int entries = key_ids.shape(0); entries > 0) {
    const auto begins = mx::flatten(
        mx::slice(g.reshape(offsets, {B * H, l.query_blocks + 1}), {0, 0}, {B * H, l.query_blocks}, g.s), g.s);
    const auto marks = mx::scatter_add_axis(mx::zeros({entries + 1}, mx::int32, g.s), begins,
                                            mx::ones({rows}, mx::int32, g.s), 0, g.s);
    const auto begun = mx::slice(mx::cumsum(marks, 0, false, true, g.s), {0}, {entries}, g.s);
    const auto row = mx::astype(g.sub(begun, mx::array(1)), mx::int64, g.s);
    const auto tile = g.add(g.mul(row, mx::array(int64_t{l.key_blocks}, mx::int64)), key_ids);
    const auto flat = mx::put_along_axis(mx::zeros({rows * l.key_blocks}, mx::int32, g.s), tile,
                                         mx::ones({entries}, mx::int32, g.s), 0, g.s);
    visible = mx::not_equal(g.reshape(flat, tiles), mx::array(0), g.s);
  }
  visible = mx::repeat(mx::repeat(visible, l.block_q, 2, g.s), l.block_k, 3, g.s);
  return mx::slice(visible, {0, 0, 0, 0}, {B, H, p.Nq, p.Nk}, g.s);
}

// The neighbourhood as a mask of tokens, [1, 1, Nq, Nk]: the product of those of its axes.
mx::array neighbours_of_tokens(const AttentionProblem& p, const Graph& g) {
  const Neighbourhood& n = p.neighbourhood;
  mx::Shape grid(static_cast<size_t>(2 * n.axes), 1);
  std::optional<mx::array> visible;
  for (int x = 0; x < n.axes; ++x) {
    const int size = n.axis[x].size;
    const auto seen = std::make_unique<bool[]>(static_cast<size_t>(size) * size);
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) seen[static_cast<size_t>(i) * size + j] = axis_sees(n, n.axis[x], i, j);
    }
    mx::Shape shape = grid;
    shape[x] = shape[n.axes + x] = size;
    const mx::array axis(seen.get(), shape, mx::bool_);
    visible = visible ? mx::logical_and(*visible, axis, g.s) : axis;
  }
  return g.reshape(*visible, {1, 1, p.Nq, p.Nk});
}

// Which keys each row sees, bool, broadcastable to the scores; nullopt if all rows see all keys.
std::optional<mx::array> visibility(const AttentionProblem& p, const Positions& at, bool has_lengths,
                                    const mx::array* mask, const mx::array* bias, const mx::array* tiles,
                                    const Graph& g) {
  std::optional<mx::array> visible;
  auto require = [&](const mx::array& x) { visible = visible ? mx::logical_and(*visible, x, g.s) : x; };
  if (has_lengths) require(mx::less(at.key, at.lengths, g.s));
  if (p.causal) require(mx::less_equal(at.key, at.row, g.s));
  if (p.window_left >= 0) require(mx::greater_equal(at.key, g.sub(at.row, mx::array(p.window_left)), g.s));
  if (p.window_right >= 0) require(mx::less_equal(at.key, g.add(at.row, mx::array(p.window_right)), g.s));
  if (mask) require(*mask);
  if (tiles) require(*tiles);
  if (p.neighbourhood.axes > 0) require(neighbours_of_tokens(p, g));
  if (bias) require(mx::not_equal(*bias, mx::array(-kInfinity, bias->dtype()), g.s));
  return visible;
}

// `x` [B, Hkv, Nk, *] with zeros for the keys that no row of the group sees, so that what they hold multiplies nothing.
mx::array without_hidden_keys(const mx::array& x, const mx::array& visible, const AttentionProblem& p, const Graph& g) {
  auto seen = mx::any(visible, 2, false, g.s);  // [B or 1, Hq or 1, Nk or 1]
  if (seen.shape(1) == p.Hq && p.Hq != p.Hkv) {
    seen = mx::any(g.reshape(seen, {seen.shape(0), p.Hkv, p.Hq / p.Hkv, seen.shape(2)}), 2, false, g.s);
  }
  return g.where(mx::expand_dims(seen, 3, g.s), x, mx::array(0.f));
}

// a * b as 64 bits: {low word, high word}.
std::pair<mx::array, mx::array> multiply_wide(uint32_t a, const mx::array& b, const Graph& g) {
  const auto product = g.mul(mx::array(uint64_t{a}, mx::uint64), mx::astype(b, mx::uint64, g.s));
  return {mx::astype(mx::bitwise_and(product, mx::array(uint64_t{0xffffffffu}, mx::uint64), g.s), mx::uint32, g.s),
          mx::astype(mx::right_shift(product, mx::array(uint64_t{32}, mx::uint64), g.s), mx::uint32, g.s)};
}

// Which weights dropout keeps, bool [B, Hq, Nq, Nk]: the bits of dropout_words() in common/philox.h.
// `first_keys`, int32 [B] or null: AttentionProblem::dropout_first_keys.
mx::array kept_weights(const AttentionProblem& p, const mx::array& seed, const mx::array* first_keys, const Graph& g) {
  const int groups = (p.Nk + 3) / 4 + (first_keys ? 1 : 0);  // keys need not begin with a group
  auto word = [](uint32_t value) { return mx::array(value, mx::uint32); };
  auto axis = [&](int n, mx::Shape shape) { return g.reshape(mx::arange(0, n, mx::uint32, g.s), std::move(shape)); };
  const auto first = first_keys ? mx::astype(*first_keys, mx::uint32, g.s) : word(0);
  auto group = axis(groups, {1, 1, groups});
  if (first_keys) {
    const auto first_group = g.reshape(mx::right_shift(first, word(2), g.s), {p.B, 1});
    group = g.add(group, g.reshape(mx::broadcast_to(first_group, {p.B, p.Hq}, g.s), {p.B * p.Hq, 1, 1}));
  }
  std::array<mx::array, 4> counter = {group, axis(p.Nq, {1, p.Nq, 1}), axis(p.B * p.Hq, {p.B * p.Hq, 1, 1}), word(0)};
  auto k0 = mx::slice(seed, {0}, {1}, g.s), k1 = mx::slice(seed, {1}, {2}, g.s);
  auto mix = [&](const mx::array& a, const mx::array& b, const mx::array& c) {
    return mx::bitwise_xor(mx::bitwise_xor(a, b, g.s), c, g.s);
  };
  for (int round = 0; round < 10; ++round) {
    const auto [a_low, a_high] = multiply_wide(0xD2511F53u, counter[0], g);
    const auto [b_low, b_high] = multiply_wide(0xCD9E8D57u, counter[2], g);
    counter = {mix(b_high, counter[1], k0), b_low, mix(a_high, counter[3], k1), a_low};
    k0 = g.add(k0, word(0x9E3779B9u));
    k1 = g.add(k1, word(0xBB67AE85u));
  }
  const mx::Shape full = {p.B * p.Hq, p.Nq, groups};
  std::vector<mx::array> words;
  for (const auto& w : counter) words.push_back(mx::broadcast_to(w, full, g.s));
  const auto all = g.reshape(mx::stack(words, -1, g.s), {p.B, p.Hq, p.Nq, 4 * groups});
  const mx::Shape scores = {p.B, p.Hq, p.Nq, p.Nk};
  auto mine = mx::slice(all, {0, 0, 0, 0}, scores, g.s);
  if (first_keys) {
    const auto within = g.reshape(mx::bitwise_and(first, word(3), g.s), {p.B, 1, 1, 1});
    const auto at = g.add(within, axis(p.Nk, {1, 1, 1, p.Nk}));
    mine = mx::take_along_axis(all, mx::broadcast_to(at, scores, g.s), 3, g.s);
  }
  const mx::array threshold(dropout_threshold(p.dropout_p), mx::uint64);
  return mx::greater_equal(mx::astype(mine, mx::uint64, g.s), threshold, g.s);
}

// With no keys the sink is all there is; with no rows, nothing is.
std::vector<mx::array> without_scores(const AttentionProblem& p, const mx::array& q, const mx::array* sinks,
                                      bool returns_probs, const Graph& g) {
  const auto logit = sinks ? g.reshape(*sinks, {1, p.Hq, 1}) : mx::array(-kInfinity);
  std::vector<mx::array> outputs = {mx::zeros({p.B, p.Hq, p.Nq, p.Dv}, q.dtype(), g.s),
                                    mx::broadcast_to(logit, {p.B, p.Hq, p.Nq}, g.s)};
  if (returns_probs) outputs.push_back(mx::zeros({p.B, p.Hq, p.Nq, p.Nk}, mx::float32, g.s));
  return outputs;
}

}  // namespace

std::vector<mx::array> composed_attention(const AttentionParams& params, const std::vector<mx::array>& inputs,
                                          mx::Stream s) {
  const Graph g{s};
  const AttentionProblem p = describe(params, inputs);
  const InputLayout at(params);
  auto input = [&](int i) { return i < 0 ? nullptr : &inputs[i]; };
  const mx::array* sinks = input(at.sinks);
  if (p.Nk == 0 || p.B == 0 || p.Nq == 0) return without_scores(p, inputs[0], sinks, params.returns_probs, g);

  const int group_rows = p.Hq / p.Hkv * p.Nq;
  auto q = g.f32(inputs[0]), k = g.f32(inputs[1]), v = g.f32(inputs[2]);
  const Positions pos = positions(p, input(at.kv_lengths), g);
  std::optional<mx::array> tiles;
  if (params.has_blocks) tiles = listed_tiles(p, params, inputs[at.offsets], inputs[at.key_ids], g);
  const auto visible =
      visibility(p, pos, params.has_lengths, input(at.mask), input(at.bias), tiles ? &*tiles : nullptr, g);
  if (visible) {
    k = without_hidden_keys(k, *visible, p, g);
    v = without_hidden_keys(v, *visible, p, g);
    q = g.where(mx::any(*visible, 3, true, s), q, mx::array(0.f));
  }

  // Scores [B, Hq, Nq, Nk]; the heads of a group are rows of one product, so that K is not repeated.
  q = g.reshape(g.mul(q, mx::array(p.scale)), {p.B, p.Hkv, group_rows, p.D});
  auto scores = g.reshape(mx::matmul(q, mx::swapaxes(k, 2, 3, s), s), {p.B, p.Hq, p.Nq, p.Nk});
  if (p.softcap > 0.f) {
    const mx::array cap(p.softcap);
    scores = g.mul(mx::tanh(mx::divide(scores, cap, s), s), cap);
  }
  if (params.has_alibi) {
    const auto slopes = g.reshape(inputs[at.alibi], {1, p.Hq, 1, 1});
    scores = g.add(scores, g.mul(slopes, g.f32(g.sub(pos.key, pos.row))));
  }
  if (params.has_bias) scores = g.add(scores, g.f32(inputs[at.bias]));
  if (visible) scores = g.where(*visible, scores, mx::array(-kInfinity));

  // Softmax. The maximum cancels, so it carries no gradient; 0 stands for it in rows that see nothing.
  auto m = mx::max(scores, 3, true, s);
  std::optional<mx::array> sink;
  if (sinks) {
    sink = g.reshape(*sinks, {1, p.Hq, 1, 1});
    m = mx::maximum(m, *sink, s);
  }
  m = mx::stop_gradient(g.where(mx::equal(m, mx::array(-kInfinity), s), mx::array(0.f), m), s);
  const auto weights = mx::exp(g.sub(scores, m), s);
  auto sum = mx::sum(weights, 3, true, s);
  if (sink) sum = g.add(sum, mx::exp(g.sub(*sink, m), s));
  const auto empty = mx::equal(sum, mx::array(0.f), s);
  const auto safe_sum = g.where(empty, mx::array(1.f), sum);
  const auto probs = mx::divide(weights, safe_sum, s);
  const auto lse = g.where(empty, mx::array(-kInfinity), g.add(m, mx::log(safe_sum, s)));

  auto kept = probs;
  if (params.has_seed) {
    const float rescale = p.dropout_p < 1.f ? 1.f / (1.f - p.dropout_p) : 0.f;
    kept = g.where(kept_weights(p, inputs[at.seed], input(at.dropout_keys), g), g.mul(probs, mx::array(rescale)),
                   mx::array(0.f));
  }
  const auto o = mx::matmul(g.reshape(kept, {p.B, p.Hkv, group_rows, p.Nk}), v, s);
  std::vector<mx::array> outputs = {mx::astype(g.reshape(o, {p.B, p.Hq, p.Nq, p.Dv}), inputs[0].dtype(), s),
                                    mx::squeeze(lse, 3, s)};
  if (params.returns_probs) outputs.push_back(probs);
  return outputs;
}

}  // namespace mfa
