// request.cpp: the public boundary. Every check of attention's arguments is here.
#include "mlx/request.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "mfa/diagnostics.h"
#include "mlx/dtypes.h"
#include "mlx/evaluate.h"
#include "mlx/integers.h"
#include "mlx/ops.h"
#include "mlx/random.h"

namespace mfa {
namespace {

bool is_floating(mx::Dtype dtype) { return mx::issubdtype(dtype, mx::floating); }
bool is_integer(mx::Dtype dtype) { return mx::issubdtype(dtype, mx::integer); }

void check_tensors(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSources& sources) {
  const char* function = sources.function;
  const bool paged = sources.paged.has_value();
  check(q.ndim() == 4, function, "q must have 4 dimensions [B, Hq, Nq, D]; got shape ", q.shape());
  const char *k_layout = paged ? "[pages, page_size, Hkv, D]" : "[B, Hkv, Nk, D]",
             *v_layout = paged ? "[pages, page_size, Hkv, Dv]" : "[B, Hkv, Nk, Dv]";
  check(k.ndim() == 4, function, "k must have 4 dimensions ", k_layout, "; got shape ", k.shape());
  check(v.ndim() == 4, function, "v must have 4 dimensions ", v_layout, "; got shape ", v.shape());
  check(is_kernel_dtype(q.dtype()), function, "q must be float32, float16 or bfloat16; got ", q.dtype());
  check(is_floating(k.dtype()), function, "k must have a floating dtype; got ", k.dtype());
  check(is_floating(v.dtype()), function, "v must have a floating dtype; got ", v.dtype());

  const mx::Shape &qs = q.shape(), &ks = k.shape(), &vs = v.shape();
  const int head_axis = paged ? 2 : 1;
  check(!sources.packed || qs[0] == 1, function, "packed q must have batch size 1; got ", qs[0]);
  if (paged) {
    check(ks[0] == vs[0] && ks[1] == vs[1], function, "k and v must have the same pages; got ", ks[0], " of ", ks[1],
          " tokens and ", vs[0], " of ", vs[1]);
  } else if (sources.packed) {
    check(ks[0] == vs[0] && (ks[0] == 1 || !sources.packed->key_starts), function,
          "packed k and v must have batch size 1; got ", ks[0], " and ", vs[0]);
  } else {
    check(qs[0] == ks[0] && qs[0] == vs[0], function, "q, k and v must have the same batch size; got ", qs[0], ", ",
          ks[0], " and ", vs[0]);
  }
  check(ks[head_axis] == vs[head_axis], function, "k and v must have the same number of heads; got ", ks[head_axis],
        " and ", vs[head_axis]);
  check(paged || ks[2] == vs[2], function, "k and v must have the same length; got ", ks[2], " and ", vs[2]);
  check(qs[3] == ks[3], function, "q and k must have the same head dimension; got ", qs[3], " and ", ks[3]);
  const int Hkv = ks[head_axis];
  check(qs[1] > 0 && Hkv > 0, function, "q and k must have at least one head; got ", qs[1], " and ", Hkv);
  check(qs[1] % Hkv == 0, function, "the heads of q must be a multiple of the heads of k; got ", qs[1], " and ", Hkv);
  for (const auto& [name, D] : {std::pair{"q and k", qs[3]}, std::pair{"v", vs[3]}}) {
    check(D >= kMinHeadDim && D <= kMaxHeadDim, function, "the head dimension of ", name, " must be ", kMinHeadDim,
          " to ", kMaxHeadDim, "; got ", D);
  }
}

void check_scalars(const AttentionOptions& o, float scale, const char* function) {
  check(std::isfinite(scale), function, "scale must be finite; got ", scale);
  check(std::isfinite(o.softcap) && o.softcap >= 0.f, function, "softcap must be finite and not negative; got ",
        o.softcap);
  check(o.dropout_p >= 0.f && o.dropout_p <= 1.f, function, "dropout_p must be in [0, 1]; got ", o.dropout_p);
  check_window(o, function);
}

// Whether `x` broadcasts to [B, Hq, Nq, Nk] without adding to any of these extents.
void check_broadcasts(const mx::array& x, const char* name, const mx::Shape& scores, const char* function) {
  bool fits = x.ndim() <= 4;
  for (int i = 1; fits && i <= static_cast<int>(x.ndim()); ++i) {
    fits = x.shape(-i) == 1 || x.shape(-i) == scores[4 - i];
  }
  check(fits, function, name, " must be broadcastable to [B, Hq, Nq, Nk] = ", scores, "; got shape ", x.shape());
}

// Adds leading axes up to rank 4. An extent of 1 that stands for more is left as it is.
mx::array with_rank_4(const mx::array& x, mx::Stream s) {
  if (x.ndim() == 4) return x;
  std::vector<int> axes(4 - x.ndim());
  for (size_t i = 0; i < axes.size(); ++i) axes[i] = static_cast<int>(i);
  return mx::expand_dims(x, axes, s);
}

// kv_lengths as int32: refused outside of [0, Nk] where they are known, clamped otherwise.
mx::array to_lengths(const mx::array& given, int B, int Nk, mx::Stream s, const char* name, const char* function) {
  check(is_integer(given.dtype()), function, name, " must have an integer dtype; got ", given.dtype());
  check(given.ndim() == 1 && given.shape(0) == B, function, name, " must have shape (", B,
        ",), one length for each batch entry; got ", given.shape());
  if (is_known(given, s)) {
    int b = 0;
    Integers(given).each([&](auto n) {
      check(is_index(n, int64_t{Nk} + 1), function, name, " must be in [0, Nk] = [0, ", Nk, "]; got ", +n,
            " for batch entry ", b);
      ++b;
    });
  }
  return to_int32(given, 1, name, function, s);
}

// That no known length is more than its sequence has keys. The starts have been checked.
void check_packed_lengths(const Request& r, const mx::array& lengths) {
  const mx::array& starts = r.inputs[InputLayout(r.params).key_starts];
  if (!is_known(lengths, r.stream) || !is_known(starts, r.stream)) return;
  const auto *length = lengths.data<int32_t>(), *start = starts.data<int32_t>();
  for (int b = 0; b < lengths.shape(0); ++b) {
    const int32_t keys = start[b + 1] - start[b];
    check(length[b] <= keys, r.params.function, "kv_lengths must be in [0, ", keys, "], the keys of sequence ", b,
          "; got ", length[b]);
  }
}

void add_sources(const AttentionSources& sources, AttentionParams& params, std::vector<mx::array>& inputs) {
  params.function = sources.function;
  if (const auto& packed = sources.packed) {
    params.packs_queries = true;
    params.packs_keys = packed->key_starts.has_value();
    params.longest_query = packed->longest_query;
    params.longest_key = packed->longest_key;
    inputs.push_back(packed->query_starts);
    if (packed->key_starts) inputs.push_back(*packed->key_starts);
  }
  if (const auto& paged = sources.paged) {
    params.paged = true;
    inputs.push_back(paged->table);
  }
  if (const auto& rotary = sources.rotary) {
    params.rotary = true;
    params.interleaved = rotary->interleaved;
    params.rotates_k = rotary->rotates_k;
    params.has_q_positions = rotary->q_positions.has_value();
    params.has_k_positions = rotary->k_positions.has_value();
    inputs.insert(inputs.end(), {rotary->cos, rotary->sin});
    if (rotary->q_positions) inputs.push_back(*rotary->q_positions);
    if (rotary->k_positions) inputs.push_back(*rotary->k_positions);
  }
  if (const auto& blocks = sources.blocks) {
    params.has_blocks = true;
    params.lists_b = blocks->lists_b;
    params.lists_h = blocks->lists_h;
    params.block_q = blocks->block_q;
    params.block_k = blocks->block_k;
    inputs.insert(inputs.end(), {blocks->offsets, blocks->key_ids, blocks->transposed_offsets, blocks->query_ids});
  }
  params.neighbourhood = sources.neighbourhood;
  if (sources.score_floor) {
    params.has_floor = true;
    inputs.push_back(*sources.score_floor);
  }
  if (sources.dropout_first_keys) {
    params.has_dropout_keys = true;
    inputs.push_back(*sources.dropout_first_keys);
  }
}

}  // namespace

void check_window(const AttentionOptions& o, const char* function) {
  check(o.window_left >= -1 && o.window_right >= -1, function,
        "window_size must be at least 0 on each side, or -1 for no limit; got (", o.window_left, ", ", o.window_right,
        ")");
}

void check_per_head(const mx::array& x, const char* name, int Hq, const char* function) {
  check(is_floating(x.dtype()) || is_integer(x.dtype()), function, name, " must have a real dtype; got ", x.dtype());
  check(x.ndim() == 1 && x.shape(0) == Hq, function, name, " must have shape (", Hq,
        ",), one value for each head of q; got ", x.shape());
}

mx::array checked_bias(const mx::array& bias, const mx::Shape& scores, const char* function, mx::Stream s) {
  check(is_floating(bias.dtype()), function, "attn_bias must have a floating dtype; got ", bias.dtype());
  check_broadcasts(bias, "attn_bias", scores, function);
  return with_rank_4(is_kernel_dtype(bias.dtype()) ? bias : cast_to(bias, mx::float32, s), s);
}

mx::array checked_mask(const mx::array& mask, const mx::Shape& scores, const char* function, mx::Stream s) {
  check(mask.dtype() == mx::bool_, function, "mask must have dtype bool; got ", mask.dtype());
  check_broadcasts(mask, "mask", scores, function);
  return with_rank_4(mask, s);
}

mx::array dropout_seed(const AttentionOptions& options, mx::Stream s) {
  return options.dropout_seed ? *options.dropout_seed : mx::random::bits({2}, std::nullopt, s);
}

Request make_request(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& o,
                     bool returns_probs, mx::StreamOrDevice stream_or_device, const AttentionSources& given) {
  AttentionSources sources = given;
  const char* function = sources.function = name_of(o, given.function);
  check_tensors(q, k, v, sources);
  const float scale = o.scale ? *o.scale : 1.f / std::sqrt(static_cast<float>(q.shape(3)));
  check_scalars(o, scale, function);

  const mx::Stream s = mx::to_stream(stream_or_device);
  const bool drops = o.dropout_p > 0.f;
  AttentionParams params{.scale = scale,
                         .softcap = o.softcap,
                         .dropout_p = o.dropout_p,
                         .window_left = o.window_left,
                         .window_right = o.window_right,
                         .causal = o.causal,
                         .has_alibi = o.alibi_slopes.has_value(),
                         .has_sinks = o.sinks.has_value(),
                         .has_bias = o.bias.has_value(),
                         .has_mask = o.mask.has_value(),
                         .has_lengths = o.kv_lengths.has_value(),
                         .has_seed = drops,
                         .returns_probs = returns_probs};
  std::vector<mx::array> inputs = {q, cast_to(k, q.dtype(), s), cast_to(v, q.dtype(), s)};
  add_sources(sources, params, inputs);
  inputs.reserve(InputLayout(params).count);
  const AttentionProblem p = describe(params, inputs);
  check(!sources.packed || sources.paged || sources.packed->key_starts || k.shape(0) == p.B, function,
        "k and v must have one batch entry for each of the ", p.B, " sequences; got ", k.shape(0));
  check(!returns_probs || params.plain(), function, "probabilities are returned for batched, dense calls only");

  if (o.alibi_slopes) check_per_head(*o.alibi_slopes, "alibi_slopes", p.Hq, function);
  if (o.sinks) check_per_head(*o.sinks, "sinks", p.Hq, function);
  const mx::Shape scores = {p.B, p.Hq, p.Nq, p.Nk};
  std::optional<mx::array> bias, mask;
  if (o.bias) bias = checked_bias(*o.bias, scores, function, s);
  if (o.mask) mask = checked_mask(*o.mask, scores, function, s);
  std::optional<mx::array> lengths;
  if (o.kv_lengths) lengths = to_lengths(*o.kv_lengths, p.B, p.Nk, s, sources.lengths_name, function);
  if (o.dropout_seed) {
    check(o.dropout_seed->dtype() == mx::uint32 && o.dropout_seed->ndim() == 1 && o.dropout_seed->shape(0) == 2,
          function, "dropout_seed must be uint32 of shape (2,); got ", o.dropout_seed->dtype(), " of shape ",
          o.dropout_seed->shape());
  }

  if (o.alibi_slopes) inputs.push_back(cast_to(*o.alibi_slopes, mx::float32, s));
  if (o.sinks) inputs.push_back(cast_to(*o.sinks, mx::float32, s));
  if (bias) inputs.push_back(*bias);
  if (mask) inputs.push_back(*mask);
  if (lengths) inputs.push_back(*lengths);
  if (drops) inputs.push_back(dropout_seed(o, s));
  Request request{params, std::move(inputs), s};
  if (!params.plain()) validate_known(request);
  if (params.packs_keys && lengths) check_packed_lengths(request, *lengths);
  return request;
}

}  // namespace mfa
