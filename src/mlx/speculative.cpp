// speculative.cpp: attention of trees of draft tokens. Source: Miao et al., "SpecInfer", arXiv:2305.09781.
#include "mfa/speculative.h"

#include <algorithm>
#include <cmath>

#include "attention/tree.h"
#include "common/check.h"
#include "mlx/integers.h"
#include "mlx/merge.h"
#include "mlx/ops.h"
#include "mlx/route.h"
#include "mlx/transforms.h"

namespace mfa {
namespace {

constexpr const char* kFunction = "flash_attention_tree";

TreeMask make_tree_mask(const mx::array& parents, const char* function, mx::Stream s) {
  check(mx::issubdtype(parents.dtype(), mx::integer), function, "parents must have an integer dtype; got ",
        parents.dtype());
  check(parents.ndim() == 1 || parents.ndim() == 2, function, "parents must have shape [N] or [B, N]; got ",
        parents.shape());
  check(!parents.is_tracer(), function, "parents must be known when the graph is built, not traced");
  const int trees = parents.ndim() == 2 ? parents.shape(0) : 1, N = parents.shape(-1), words = (N + 31) / 32;
  auto known = mx::contiguous(mx::astype(parents, mx::int64, s), false, s);
  known.eval();
  const auto tree = tree_visibility({known.data<int64_t>(), known.size()}, trees, N, function);
  const bool batched = parents.ndim() == 2;
  auto shape = [&](mx::Shape one) {
    if (batched) one.insert(one.begin(), trees);
    return one;
  };
  return {mx::array(tree.depths.data(), shape({N}), mx::int32), mx::array(tree.visible.get(), shape({N, N}), mx::bool_),
          mx::array(tree.bits.data(), shape({N, words}), mx::uint32)};
}

AttentionResult run(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                    const std::optional<mx::array>& dropout_first_keys, mx::Stream s) {
  AttentionSources sources;
  sources.function = kFunction;
  if (options.dropout_p > 0.f) sources.dropout_first_keys = dropout_first_keys;
  auto outputs = launch(make_request(q, k, v, options, false, s, sources), options.backend, {.lse = true});
  return {outputs[0], outputs[1], std::nullopt};
}

mx::array both(const std::optional<mx::array>& a, const mx::array& b, mx::Stream s) {
  return a ? mx::logical_and(*a, b, s) : b;
}

// The number of committed tokens of each entry, int32 [B].
mx::array committed_tokens(const mx::array& kv_lengths, int B, int N, int Nk, mx::Stream s) {
  const auto lengths = to_int32(kv_lengths, 1, "kv_lengths", kFunction, s);
  check(lengths.shape(0) == B, kFunction, "kv_lengths must have shape (", B,
        ",), one length for each batch entry; got ", lengths.shape());
  if (is_known(lengths, s)) {
    for (int b = 0; b < B; ++b) {
      const int32_t n = lengths.data<int32_t>()[b];
      check(n >= N && n <= Nk, kFunction, "kv_lengths must be in [N, Nk] = [", N, ", ", Nk, "]; got ", n,
            " for batch entry ", b);
    }
  }
  return mx::clip(mx::subtract(lengths, mx::array(N), s), mx::array(0), mx::array(std::max(0, Nk - N)), s);
}

}  // namespace

TreeMask tree_mask(const mx::array& parents, mx::StreamOrDevice s) {
  return make_tree_mask(parents, "make_tree_mask", mx::to_stream(s));
}

AttentionResult attention_tree(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& parents,
                               const AttentionOptions& options, mx::StreamOrDevice stream_or_device) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  check(!options.return_probs, kFunction, "return_probs must be false");
  check_window(options, kFunction);
  check(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, kFunction,
        "q, k and v must have 4 dimensions [B, H, N, D]; got shapes ", q.shape(), ", ", k.shape(), " and ", v.shape());
  const TreeMask tree = make_tree_mask(parents, kFunction, s);
  const int B = q.shape(0), Hq = q.shape(1), N = q.shape(2), Nk = k.shape(2);
  const int trees = parents.ndim() == 2 ? parents.shape(0) : 1;
  check(parents.shape(-1) == N && (parents.ndim() == 1 || trees == B), kFunction,
        "parents must have shape [N] or [B, N] of q, (", N, ") or (", B, ",", N, "); got ", parents.shape());
  check(k.shape(2) == v.shape(2), kFunction, "k and v must have the same length; got ", Nk, " and ", v.shape(2));
  check(Nk >= N, kFunction, "k and v must hold the ", N, " nodes of the tree; got ", Nk, " tokens");

  std::optional<mx::array> committed;
  if (options.kv_lengths) committed = committed_tokens(*options.kv_lengths, B, N, Nk, s);
  const auto depth = mx::reshape(tree.depths, {trees, 1, N, 1}, s);
  const auto depth_of_key = mx::reshape(tree.depths, {trees, 1, 1, N}, s);
  const int most = committed ? Nk : Nk - N;  // committed tokens of an entry
  const auto tokens = committed ? mx::reshape(*committed, {B, 1, 1, 1}, s) : mx::array(Nk - N);
  // Of arrays whose `axis` counts the keys: those of the committed tokens, and those of the nodes behind them, which
  // are gathered where entries have different lengths.
  const auto is_one_term = [](const mx::array& x, int axis) { return axis == 3 && x.shape(axis) == 1; };
  const auto first_keys = [&](const mx::array& x, int axis) {
    if (most == Nk || is_one_term(x, axis)) return x;
    mx::Shape stop = x.shape();
    stop[axis] = most;
    return mx::slice(x, {0, 0, 0, 0}, stop, s);
  };
  const auto last_keys = [&](const mx::array& x, int axis) {
    if (is_one_term(x, axis)) return x;
    mx::Shape start = {0, 0, 0, 0}, shape = x.shape();
    if (!committed) {
      start[axis] = Nk - N;
      return mx::slice(x, start, shape, s);
    }
    shape[0] = B;
    const auto whole = mx::broadcast_to(x, shape, s);
    mx::Shape one = {1, 1, 1, 1};
    shape[axis] = one[axis] = N;
    const auto at = mx::add(tokens, mx::reshape(mx::arange(0, N, mx::int32, s), one, s), s);
    return mx::take_along_axis(whole, mx::broadcast_to(at, shape, s), axis, s);
  };
  const mx::Shape scores = {B, Hq, N, Nk};
  std::optional<mx::array> bias, mask;
  if (options.bias) bias = checked_bias(*options.bias, scores, kFunction, s);
  if (options.mask) mask = checked_mask(*options.mask, scores, kFunction, s);
  if (options.sinks) check_per_head(*options.sinks, "sinks", Hq, kFunction);
  AttentionOptions part;
  part.scale = options.scale;
  part.softcap = options.softcap;
  part.dropout_p = options.dropout_p;
  if (options.dropout_p > 0.f) part.dropout_seed = dropout_seed(options, s);
  part.backend = options.backend;

  // The committed tokens: no node is before the end of them, so the left side of the window is all that limits them.
  AttentionOptions before = part;
  before.alibi_slopes = options.alibi_slopes;
  if (committed) before.kv_lengths = committed;
  if (bias) before.bias = first_keys(*bias, 3);
  if (mask) before.mask = first_keys(*mask, 3);
  if (options.window_left >= 0) {
    const auto keys = mx::reshape(mx::arange(0, most, mx::int32, s), {1, 1, 1, most}, s);
    const auto first_seen = mx::subtract(mx::add(tokens, depth, s), mx::array(options.window_left), s);
    before.mask = both(before.mask, mx::less_equal(first_seen, keys, s), s);
  }
  AttentionResult past = run(q, first_keys(k, 2), first_keys(v, 2), before, std::nullopt, s);

  AttentionOptions within = part;
  within.mask = mx::reshape(tree.visible, {trees, 1, N, N}, s);
  if (mask) within.mask = both(within.mask, last_keys(*mask, 3), s);
  if (options.window_left >= 0) {
    const auto first_seen = mx::subtract(depth, mx::array(options.window_left), s);
    within.mask = both(within.mask, mx::less_equal(first_seen, depth_of_key, s), s);
  }
  if (bias) within.bias = last_keys(*bias, 3);
  if (options.alibi_slopes) {
    const auto slopes = mx::reshape(mx::astype(*options.alibi_slopes, mx::float32, s), {1, Hq, 1, 1}, s);
    const auto term = mx::multiply(slopes, mx::astype(mx::subtract(depth_of_key, depth, s), mx::float32, s), s);
    within.bias = within.bias ? mx::add(mx::astype(*within.bias, mx::float32, s), term, s) : term;
    // The first part counted its rows from i + max(0, committed - N).
    const auto counted = mx::add(mx::reshape(mx::arange(0, N, mx::int32, s), {1, 1, N, 1}, s),
                                 mx::maximum(mx::subtract(tokens, mx::array(N), s), mx::array(0), s), s);
    const auto off = mx::astype(mx::subtract(counted, mx::add(tokens, depth, s), s), mx::float32, s);
    past.lse = mx::add(past.lse, mx::squeeze(mx::multiply(slopes, off, s), 3, s), s);
  }
  const auto first_nodes = committed ? *committed : mx::full({B}, Nk - N, mx::int32, s);
  const AttentionResult own = run(q, last_keys(k, 2), last_keys(v, 2), within, first_nodes, s);
  return merge_parts(past, own, options.sinks, q.dtype(), s);
}

mx::array draft_proxy_logprobs(const mx::array& out, const mx::array& draft_ids, float temperature,
                               mx::StreamOrDevice stream_or_device, std::string_view function) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  check(out.ndim() == 4, function, "out must have 4 dimensions [B, Hq, N, Dv]; got shape ", out.shape());
  check(mx::issubdtype(draft_ids.dtype(), mx::integer), function, "draft_ids must have an integer dtype; got ",
        draft_ids.dtype());
  check(draft_ids.ndim() == 2 && draft_ids.shape(0) == out.shape(0) && draft_ids.shape(1) == out.shape(2), function,
        "draft_ids must have shape [B, N] of the queries, (", out.shape(0), ",", out.shape(2), "); got ",
        draft_ids.shape());
  check(std::isfinite(temperature) && temperature > 0.f, function, "temperature must be finite and positive; got ",
        temperature);
  if (draft_ids.size() == 0) return mx::zeros(draft_ids.shape(), mx::float32, s);
  const auto mean = mx::mean(mx::astype(out, mx::float32, s), 1, false, s);
  const auto logits = mx::divide(mean, mx::array(temperature), s);
  const auto wide = draft_ids.itemsize() < 4 ? mx::astype(draft_ids, mx::int32, s) : draft_ids;
  const auto ids = mx::clip(wide, mx::array(0, wide.dtype()), mx::array(out.shape(3) - 1, wide.dtype()), s);
  const auto picked = mx::take_along_axis(logits, mx::expand_dims(ids, 2, s), 2, s);
  return mx::squeeze(mx::subtract(picked, mx::logsumexp(logits, 2, true, s), s), 2, s);
}

}  // namespace mfa
