#include "mlx/rotary.h"
#include "mlx/integers.h"

#include "common/check.h"
#include "mlx/ops.h"
#include "mlx/route.h"

namespace mfa {
namespace {

constexpr const char* kFunction = "flash_attention_rope";

mx::array float_table(const mx::array& x, const char* name, const char* function, mx::Stream s) {
  check(mx::issubdtype(x.dtype(), mx::floating), function, name, " must have a floating dtype; got ", x.dtype());
  check(x.ndim() == 2, function, name, " must have 2 dimensions [positions, rotary_dim / 2]; got shape ", x.shape());
  return x.dtype() == mx::float32 ? x : mx::astype(x, mx::float32, s);
}

std::optional<mx::array> positions(const std::optional<mx::array>& x, int batch, const char* name, const char* function,
                                   mx::Stream s) {
  if (!x) return std::nullopt;
  if (x->ndim() == 0) {  // one for all
    const auto one = to_int32(*x, 0, name, function, s);
    return is_known(one, s) ? repeated(one.item<int32_t>(), batch) : mx::broadcast_to(one, {batch}, s);
  }
  auto result = to_int32(*x, 1, name, function, s);
  check(result.shape(0) == batch, function, name, " must have one position for each of the ", batch,
        " batch entries; got ", result.shape(0));
  return result;
}

AttentionResult run(const mx::array& q, const mx::array& k, const mx::array& v, const RotaryEmbedding& rope,
                    const AttentionOptions& options, mx::StreamOrDevice stream_or_device) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  const char* function = name_of(options, kFunction);
  check(q.ndim() == 4, function, "q must have 4 dimensions [B, Hq, Nq, D]; got shape ", q.shape());
  AttentionSources sources;
  sources.function = function;
  sources.rotary = make_rotary(rope, q.shape(0), q.shape(3), function, s);
  auto outputs = launch(make_request(q, k, v, options, options.return_probs, s, sources), options.backend,
                        WantedOutputs{.lse = true});
  return {outputs[0], outputs[1], std::nullopt};
}

}  // namespace

Rotary make_rotary(const RotaryEmbedding& rope, int batch, int D, const char* function, mx::Stream s) {
  auto cos = float_table(rope.cos, "rotary_cos", function, s), sin = float_table(rope.sin, "rotary_sin", function, s);
  check(cos.shape() == sin.shape(), function, "rotary_cos and rotary_sin must have one shape; got ", cos.shape(),
        " and ", sin.shape());
  const int turned = 2 * cos.shape(1);
  check(turned >= 2 && turned <= D, function, "the rotary tables must have 1 to D / 2 = ", D / 2, " columns; got ",
        cos.shape(1));
  check(!rope.rotary_dim || *rope.rotary_dim == turned, function,
        "rotary_dim must be twice the columns of the rotary tables, ", turned, "; got ", rope.rotary_dim.value_or(0));
  return {cos,
          sin,
          rope.interleaved,
          rope.rotates_k,
          positions(rope.q_positions, batch, "cache_seqlens", function, s),
          positions(rope.k_positions, batch, "k_offset", function, s)};
}

mx::array attention_rope(const mx::array& q, const mx::array& k, const mx::array& v, const RotaryEmbedding& rope,
                         const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, rope, options, s).out;
}

AttentionResult attention_rope_with_lse(const mx::array& q, const mx::array& k, const mx::array& v,
                                        const RotaryEmbedding& rope, const AttentionOptions& options,
                                        mx::StreamOrDevice s) {
  return run(q, k, v, rope, options, s);
}

}  // namespace mfa
