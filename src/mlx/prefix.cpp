// prefix.cpp: cascade attention. Source of the idea: Juravsky et al., "Hydragen", arXiv:2402.05099.
#include "mfa/prefix.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/check.h"
#include "mlx/merge.h"
#include "mlx/ops.h"
#include "mlx/route.h"

namespace mfa {
namespace {

constexpr const char* kFunction = "flash_attention_cascade";

void check_prefix(const mx::array& x, const mx::array& own, const char* name) {
  check(x.ndim() == 4 && x.shape(0) == 1, kFunction, name, " must have shape [1, Hkv, P, head dimension]; got ",
        x.shape());
  check(x.shape(1) == own.shape(1) && x.shape(3) == own.shape(3), kFunction, name,
        " must have the heads and the head dimension of the own keys and values; got ", x.shape(), " and ",
        own.shape());
  check(x.dtype() == own.dtype(), kFunction, name, " must have the dtype of the own keys and values; got ", x.dtype(),
        " and ", own.dtype());
}

AttentionResult run(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                    int dropout_first_key, mx::Stream s) {
  AttentionSources sources;
  sources.function = kFunction;
  if (options.dropout_p > 0.f && dropout_first_key > 0)
    sources.dropout_first_keys = mx::full({q.shape(0)}, dropout_first_key, mx::int32, s);
  auto outputs = launch(make_request(q, k, v, options, false, s, sources), options.backend, {.lse = true});
  return {outputs[0], outputs[1], std::nullopt};
}

mx::array from_token(const mx::array& x, int first, mx::Stream s) {
  if (first == 0) return x;
  return mx::slice(x, {0, 0, first, 0}, x.shape(), s);
}

// Heads of all batch entries as heads of one: each KV head's group is the groups of all entries.
struct Folding {
  int B, Hkv, G, Nq;
  mx::Stream s;

  mx::array queries(const mx::array& q) const {  // [B, Hq, Nq, D] -> [1, Hkv * B * G, Nq, D]
    const auto grouped = mx::reshape(q, {B, Hkv, G, Nq, q.shape(3)}, s);
    return mx::reshape(mx::transpose(grouped, {1, 0, 2, 3, 4}, s), {1, Hkv * B * G, Nq, q.shape(3)}, s);
  }
  mx::array per_head(const mx::array& x) const {  // [Hq] -> [Hkv * B * G]
    return mx::flatten(mx::broadcast_to(mx::reshape(x, {Hkv, 1, G}, s), {Hkv, B, G}, s), s);
  }
  mx::array unfold(const mx::array& x) const {  // [1, Hkv * B * G, Nq, ...] -> [B, Hq, Nq, ...]
    mx::Shape apart = {Hkv, B, G, Nq}, together = {B, Hkv * G, Nq};
    std::vector<int> axes = {1, 0, 2, 3};
    if (x.ndim() == 4) {
      apart.push_back(x.shape(3));
      together.push_back(x.shape(3));
      axes.push_back(4);
    }
    return mx::reshape(mx::transpose(mx::reshape(x, std::move(apart), s), std::move(axes), s), std::move(together), s);
  }
};

}  // namespace

AttentionResult attention_cascade(const mx::array& q, const mx::array& k_prefix, const mx::array& v_prefix,
                                  const mx::array& k, const mx::array& v, const AttentionOptions& options,
                                  mx::StreamOrDevice stream_or_device) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  check(!options.return_probs, kFunction, "return_probs must be false");
  const bool drops = options.dropout_p > 0.f;
  AttentionOptions mine = options;
  mine.sinks = std::nullopt;
  if (drops) mine.dropout_seed = dropout_seed(options, s);
  const AttentionResult own = run(q, k, v, mine, k_prefix.ndim() == 4 ? k_prefix.shape(2) : 0, s);
  if (options.sinks) check_per_head(*options.sinks, "sinks", q.shape(1), kFunction);
  check_prefix(k_prefix, k, "k_prefix");
  check_prefix(v_prefix, v, "v_prefix");
  check(k_prefix.shape(2) == v_prefix.shape(2), kFunction, "k_prefix and v_prefix must have the same length; got ",
        k_prefix.shape(2), " and ", v_prefix.shape(2));

  const int B = q.shape(0), Hq = q.shape(1), Nq = q.shape(2), Hkv = k.shape(1), P = k_prefix.shape(2);
  // pos(0) among the own keys, where it is the same for all entries, and for each entry where it is not.
  const int shift = std::max(0, k.shape(2) - Nq);
  std::optional<mx::array> shifts;
  if (options.kv_lengths) {
    const auto lengths =
        mx::clip(mx::astype(*options.kv_lengths, mx::int32, s), mx::array(0), mx::array(k.shape(2)), s);
    shifts = mx::maximum(mx::subtract(mx::reshape(lengths, {B, 1, 1, 1}, s), mx::array(Nq), s), mx::array(0), s);
  }

  // No query is before the end of the prefix, so of causal and window only the left side of the window limits it:
  // row i sees its keys from P + shift + i - window_left on.
  AttentionOptions shared;
  shared.scale = options.scale;
  shared.softcap = options.softcap;
  shared.alibi_slopes = options.alibi_slopes;
  shared.dropout_p = options.dropout_p;
  shared.dropout_seed = mine.dropout_seed;
  shared.backend = options.backend;
  int first = 0;  // keys of the prefix before it are seen by no row
  if (options.window_left >= 0 && shifts) {
    const auto rows = mx::reshape(mx::arange(0, Nq, mx::int32, s), {1, 1, Nq, 1}, s);
    // Counted from the end of the prefix, so that no sum overflows; compared as they are, so that nothing but the mask
    // has its size.
    const auto keys = mx::reshape(mx::arange(-P, 0, mx::int32, s), {1, 1, 1, P}, s);
    const auto first_seen = mx::subtract(mx::add(rows, *shifts, s), mx::array(options.window_left), s);
    shared.mask = mx::less_equal(first_seen, keys, s);
  } else if (options.window_left >= 0) {
    const int64_t begin = int64_t{P} + shift - options.window_left;  // for row 0
    first = static_cast<int>(std::clamp<int64_t>(begin, 0, P));
    // The kernel counts from row i = 0 at max(0, keys - Nq).
    const int64_t left = std::max(0, P - first - Nq) + first - begin;
    shared.window_left = static_cast<int>(std::clamp<int64_t>(left, 0, std::numeric_limits<int32_t>::max()));
  }
  const auto k_seen = from_token(k_prefix, first, s), v_seen = from_token(v_prefix, first, s);

  std::optional<AttentionResult> prefix;
  if (B > 1 && !shared.mask && !drops) {  // dropout counts batch entries and their heads
    const Folding folding{B, Hkv, Hq / Hkv, Nq, s};
    if (shared.alibi_slopes) shared.alibi_slopes = folding.per_head(*shared.alibi_slopes);
    const AttentionResult folded = run(folding.queries(q), k_seen, v_seen, shared, 0, s);
    prefix = {folding.unfold(folded.out), folding.unfold(folded.lse), std::nullopt};
  } else {
    const auto expand = [&](const mx::array& x) {
      return mx::broadcast_to(x, {B, x.shape(1), x.shape(2), x.shape(3)}, s);
    };
    prefix = run(q, expand(k_seen), expand(v_seen), shared, first, s);
  }
  if (options.alibi_slopes) {
    // The prefix's part counts positions from its own end: a row's scores are off by a constant.
    const int counted = std::max(0, P - first - Nq) - (P - first);
    const auto off = shifts ? mx::subtract(mx::array(counted), *shifts, s) : mx::array(counted - shift);
    const auto slopes = mx::reshape(mx::astype(*options.alibi_slopes, mx::float32, s), {1, Hq, 1}, s);
    const auto shape = shifts ? mx::Shape{B, 1, 1} : mx::Shape{1, 1, 1};
    const auto constant = mx::multiply(slopes, mx::reshape(mx::astype(off, mx::float32, s), shape, s), s);
    prefix->lse = mx::add(prefix->lse, constant, s);
  }
  return merge_parts(*prefix, own, options.sinks, q.dtype(), s);
}

}  // namespace mfa
