// request.cpp: the public boundary. Every check of attention's arguments is here.
#include "mlx/request.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "mfa/diagnostics.h"
#include "mlx/ops.h"
#include "mlx/random.h"

namespace mfa {
namespace {

constexpr const char* kFunction = "flash_attention";

bool is_floating(mx::Dtype dtype) { return mx::issubdtype(dtype, mx::floating); }
bool is_integer(mx::Dtype dtype) { return mx::issubdtype(dtype, mx::integer); }
bool is_attention_dtype(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

mx::array cast(const mx::array& x, mx::Dtype dtype, mx::Stream s) {
  return x.dtype() == dtype ? x : mx::astype(x, dtype, s);
}

void check_tensors(const mx::array& q, const mx::array& k, const mx::array& v) {
  check(q.ndim() == 4, kFunction, "q must have 4 dimensions [B, Hq, Nq, D]; got shape ", q.shape());
  check(k.ndim() == 4, kFunction, "k must have 4 dimensions [B, Hkv, Nk, D]; got shape ", k.shape());
  check(v.ndim() == 4, kFunction, "v must have 4 dimensions [B, Hkv, Nk, Dv]; got shape ", v.shape());
  check(is_attention_dtype(q.dtype()), kFunction, "q must be float32, float16 or bfloat16; got ", q.dtype());
  check(is_floating(k.dtype()), kFunction, "k must have a floating dtype; got ", k.dtype());
  check(is_floating(v.dtype()), kFunction, "v must have a floating dtype; got ", v.dtype());

  const mx::Shape &qs = q.shape(), &ks = k.shape(), &vs = v.shape();
  check(qs[0] == ks[0] && qs[0] == vs[0], kFunction, "q, k and v must have the same batch size; got ", qs[0], ", ",
        ks[0], " and ", vs[0]);
  check(ks[1] == vs[1], kFunction, "k and v must have the same number of heads; got ", ks[1], " and ", vs[1]);
  check(ks[2] == vs[2], kFunction, "k and v must have the same length; got ", ks[2], " and ", vs[2]);
  check(qs[3] == ks[3], kFunction, "q and k must have the same head dimension; got ", qs[3], " and ", ks[3]);
  check(qs[1] > 0 && ks[1] > 0, kFunction, "q and k must have at least one head; got ", qs[1], " and ", ks[1]);
  check(qs[1] % ks[1] == 0, kFunction, "the heads of q must be a multiple of the heads of k; got ", qs[1], " and ",
        ks[1]);
  for (const auto& [name, D] : {std::pair{"q and k", qs[3]}, std::pair{"v", vs[3]}}) {
    check(D >= kMinHeadDim && D <= kMaxHeadDim, kFunction, "the head dimension of ", name, " must be ", kMinHeadDim,
          " to ", kMaxHeadDim, "; got ", D);
  }
}

void check_scalars(const AttentionOptions& o, float scale) {
  check(std::isfinite(scale), kFunction, "scale must be finite; got ", scale);
  check(std::isfinite(o.softcap) && o.softcap >= 0.f, kFunction, "softcap must be finite and not negative; got ",
        o.softcap);
  check(o.dropout_p >= 0.f && o.dropout_p <= 1.f, kFunction, "dropout_p must be in [0, 1]; got ", o.dropout_p);
  check(o.window_left >= -1 && o.window_right >= -1, kFunction,
        "window_size must be at least 0 on each side, or -1 for no limit; got (", o.window_left, ", ", o.window_right,
        ")");
}

void check_per_head(const mx::array& x, const char* name, int Hq) {
  check(is_floating(x.dtype()) || is_integer(x.dtype()), kFunction, name, " must have a real dtype; got ", x.dtype());
  check(x.ndim() == 1 && x.shape(0) == Hq, kFunction, name, " must have shape (", Hq,
        ",), one value for each head of q; got ", x.shape());
}

// Whether `x` broadcasts to [B, Hq, Nq, Nk] without adding to any of these extents.
void check_broadcasts(const mx::array& x, const char* name, const mx::Shape& scores) {
  bool fits = x.ndim() <= 4;
  for (int i = 1; fits && i <= static_cast<int>(x.ndim()); ++i) {
    fits = x.shape(-i) == 1 || x.shape(-i) == scores[4 - i];
  }
  check(fits, kFunction, name, " must be broadcastable to [B, Hq, Nq, Nk] = ", scores, "; got shape ", x.shape());
}

// Adds leading axes up to rank 4. An extent of 1 that stands for more is left as it is.
mx::array with_rank_4(const mx::array& x, mx::Stream s) {
  if (x.ndim() == 4) return x;
  std::vector<int> axes(4 - x.ndim());
  for (size_t i = 0; i < axes.size(); ++i) axes[i] = static_cast<int>(i);
  return mx::expand_dims(x, axes, s);
}

template <typename T>
void check_length_values(const mx::array& lengths, int Nk) {
  const T* values = lengths.data<T>();
  const int64_t stride = lengths.strides(0);
  for (int b = 0; b < lengths.shape(0); ++b) {
    const T n = values[b * stride];
    const bool in_range = !(n < T{0}) && static_cast<uint64_t>(n) <= static_cast<uint64_t>(Nk);
    check(in_range, kFunction, "kv_lengths must be in [0, Nk] = [0, ", Nk, "]; got ", +n, " for batch entry ", b);
  }
}

void check_lengths(const mx::array& lengths, int B, int Nk, mx::Stream s) {
  check(is_integer(lengths.dtype()), kFunction, "kv_lengths must have an integer dtype; got ", lengths.dtype());
  check(lengths.ndim() == 1 && lengths.shape(0) == B, kFunction, "kv_lengths must have shape (", B,
        ",), one length for each batch entry; got ", lengths.shape());
  // Values are looked at only where that neither computes nor copies anything.
  if (s.device != mx::Device::cpu || lengths.is_tracer() || !lengths.is_available()) return;
  switch (lengths.dtype()) {
    case mx::int8:
      return check_length_values<int8_t>(lengths, Nk);
    case mx::int16:
      return check_length_values<int16_t>(lengths, Nk);
    case mx::int32:
      return check_length_values<int32_t>(lengths, Nk);
    case mx::int64:
      return check_length_values<int64_t>(lengths, Nk);
    case mx::uint8:
      return check_length_values<uint8_t>(lengths, Nk);
    case mx::uint16:
      return check_length_values<uint16_t>(lengths, Nk);
    case mx::uint32:
      return check_length_values<uint32_t>(lengths, Nk);
    case mx::uint64:
      return check_length_values<uint64_t>(lengths, Nk);
    default:
      return;
  }
}

// int32, clamped first where the values might not fit.
mx::array to_int32_lengths(const mx::array& lengths, int Nk, mx::Stream s) {
  if (lengths.dtype() == mx::int32) return lengths;
  if (lengths.itemsize() < 4) return mx::astype(lengths, mx::int32, s);
  const auto clamped = mx::clip(lengths, mx::array(0, lengths.dtype()), mx::array(Nk, lengths.dtype()), s);
  return mx::astype(clamped, mx::int32, s);
}

}  // namespace

Request make_request(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& o,
                     bool returns_probs, mx::StreamOrDevice stream_or_device) {
  check_tensors(q, k, v);
  const float scale = o.scale ? *o.scale : 1.f / std::sqrt(static_cast<float>(q.shape(3)));
  check_scalars(o, scale);

  const mx::Stream s = mx::to_stream(stream_or_device);
  const int B = q.shape(0), Hq = q.shape(1), Nk = k.shape(2);
  const bool drops = o.dropout_p > 0.f;
  if (o.alibi_slopes) check_per_head(*o.alibi_slopes, "alibi_slopes", Hq);
  if (o.sinks) check_per_head(*o.sinks, "sinks", Hq);
  if (o.bias || o.mask) {
    const mx::Shape scores = {B, Hq, q.shape(2), Nk};
    if (o.bias) {
      check(is_floating(o.bias->dtype()), kFunction, "attn_bias must have a floating dtype; got ", o.bias->dtype());
      check_broadcasts(*o.bias, "attn_bias", scores);
    }
    if (o.mask) {
      check(o.mask->dtype() == mx::bool_, kFunction, "mask must have dtype bool; got ", o.mask->dtype());
      check_broadcasts(*o.mask, "mask", scores);
    }
  }
  if (o.kv_lengths) check_lengths(*o.kv_lengths, B, Nk, s);
  if (o.dropout_seed) {
    check(o.dropout_seed->dtype() == mx::uint32 && o.dropout_seed->ndim() == 1 && o.dropout_seed->shape(0) == 2,
          kFunction, "dropout_seed must be uint32 of shape (2,); got ", o.dropout_seed->dtype(), " of shape ",
          o.dropout_seed->shape());
  }

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
  std::vector<mx::array> inputs;
  inputs.reserve(InputLayout(params).count);
  inputs.push_back(q);
  inputs.push_back(cast(k, q.dtype(), s));
  inputs.push_back(cast(v, q.dtype(), s));
  if (o.alibi_slopes) inputs.push_back(cast(*o.alibi_slopes, mx::float32, s));
  if (o.sinks) inputs.push_back(cast(*o.sinks, mx::float32, s));
  if (o.bias) {
    inputs.push_back(with_rank_4(is_attention_dtype(o.bias->dtype()) ? *o.bias : cast(*o.bias, mx::float32, s), s));
  }
  if (o.mask) inputs.push_back(with_rank_4(*o.mask, s));
  if (o.kv_lengths) inputs.push_back(to_int32_lengths(*o.kv_lengths, Nk, s));
  if (drops) inputs.push_back(o.dropout_seed ? *o.dropout_seed : mx::random::bits({2}, std::nullopt, s));
  return {params, std::move(inputs), s};
}

AttentionProblem describe(const AttentionParams& params, const std::vector<mx::array>& inputs) {
  const mx::Shape &q = inputs[0].shape(), &k = inputs[1].shape(), &v = inputs[2].shape();
  AttentionProblem p;
  p.B = q[0];
  p.Hq = q[1];
  p.Hkv = k[1];
  p.Nq = q[2];
  p.Nk = k[2];
  p.D = q[3];
  p.Dv = v[3];
  p.dtype = to_dtype(inputs[0].dtype());
  p.scale = params.scale;
  p.softcap = params.softcap;
  p.causal = params.causal;
  // A window that reaches past both ends is none.
  const int longest = std::max(p.Nq, p.Nk);
  p.window_left = params.window_left < longest ? params.window_left : -1;
  p.window_right = params.window_right < longest ? params.window_right : -1;
  p.dropout_p = params.dropout_p;
  return p;
}

}  // namespace mfa
