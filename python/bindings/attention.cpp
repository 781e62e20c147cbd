// attention.cpp: mfa::attention, attention_with_lse, merge_attention_states and explain for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/variant.h>

#include <string_view>

#include "bindings.h"
#include "mfa/attention.h"
#include "mfa/diagnostics.h"
#include "options.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace mfa::python {
namespace {

nb::dict to_dict(const Explanation& e) {
  nb::list refusals;
  for (const Refusal& refusal : e.refusals) {
    nb::dict entry;
    entry["route"] = refusal.route;
    entry["reason"] = refusal.reason;
    refusals.append(entry);
  }
  nb::dict result;
  result["function"] = e.function;
  result["route"] = e.route;
  result["kernel"] = e.kernel;
  result["isa"] = e.isa;
  result["tiles"] = nb::make_tuple(e.row_tile, e.key_block);
  result["splits"] = e.splits;
  result["tasks"] = e.tasks;
  result["threads"] = e.threads;
  result["native_bf16"] = e.native_bf16;
  result["refusals"] = refusals;
  return result;
}

}  // namespace

void bind_attention(nb::module_& m) {
  // The arguments that the three functions share, in the order of mlx_mfa.flash_attention with its window split in two.
  m.def(
      "attention",
      [](const mx::array& q, const mx::array& k, const mx::array& v, std::optional<double> scale, bool causal,
         double softcap, const OptionalArray& alibi_slopes, double dropout_p, int window_left, int window_right,
         const OptionalArray& attn_bias, std::string_view backend, const OptionalArray& mask,
         const OptionalArray& sinks, const OptionalArray& kv_lengths, const Seed& dropout_seed,
         mx::StreamOrDevice stream) {
        return attention(q, k, v,
                         make_options(scale, causal, softcap, alibi_slopes, dropout_p, window_left, window_right,
                                      attn_bias, backend, mask, sinks, kv_lengths, dropout_seed, false),
                         stream);
      },
      "q"_a, "k"_a, "v"_a, "scale"_a = nb::none(), "causal"_a = false, "softcap"_a = 0.0, "alibi_slopes"_a = nb::none(),
      "dropout_p"_a = 0.0, "window_left"_a = -1, "window_right"_a = -1, "attn_bias"_a = nb::none(),
      "backend"_a = "auto", "mask"_a = nb::none(), "sinks"_a = nb::none(), "kv_lengths"_a = nb::none(),
      "dropout_seed"_a = nb::none(), "stream"_a = nb::none(), R"(
Softmax attention without storing the scores (arXiv:2205.14135).

Arguments as :func:`mlx_mfa.flash_attention`, with ``window_size`` as two integers.

Returns:
    array: ``[B, Hq, Nq, Dv]``, dtype of ``q``.

Raises:
    ValueError: If shapes, dtypes or options do not fit; the message says what was expected and what was received.
    RuntimeError: If ``backend="mfa"`` cannot run the problem; the message says why.
)");

  m.def(
      "attention_with_lse",
      [](const mx::array& q, const mx::array& k, const mx::array& v, std::optional<double> scale, bool causal,
         double softcap, const OptionalArray& alibi_slopes, double dropout_p, int window_left, int window_right,
         const OptionalArray& attn_bias, std::string_view backend, const OptionalArray& mask,
         const OptionalArray& sinks, const OptionalArray& kv_lengths, const Seed& dropout_seed,
         mx::StreamOrDevice stream, bool return_probs) {
        auto result =
            attention_with_lse(q, k, v,
                               make_options(scale, causal, softcap, alibi_slopes, dropout_p, window_left, window_right,
                                            attn_bias, backend, mask, sinks, kv_lengths, dropout_seed, return_probs),
                               stream);
        return nb::make_tuple(result.out, result.lse, result.probs);
      },
      "q"_a, "k"_a, "v"_a, "scale"_a = nb::none(), "causal"_a = false, "softcap"_a = 0.0, "alibi_slopes"_a = nb::none(),
      "dropout_p"_a = 0.0, "window_left"_a = -1, "window_right"_a = -1, "attn_bias"_a = nb::none(),
      "backend"_a = "auto", "mask"_a = nb::none(), "sinks"_a = nb::none(), "kv_lengths"_a = nb::none(),
      "dropout_seed"_a = nb::none(), "stream"_a = nb::none(), "return_probs"_a = false, R"(
As :func:`attention`, with the log-sum-exp of each row and, if ``return_probs``, the probabilities before dropout.

Returns:
    tuple: ``(out, lse, probs)``: ``lse`` is the natural logarithm, float32 ``[B, Hq, Nq]``; ``probs`` is float32
    ``[B, Hq, Nq, Nk]`` or None.

Raises:
    ValueError, RuntimeError: As :func:`attention`.
)");

  m.def(
      "attention_with_options",
      [](const mx::array& q, const mx::array& k, const mx::array& v, AttentionOptions options, bool return_lse,
         bool return_probs, mx::StreamOrDevice stream) {
        options.return_probs = return_probs;
        if (!return_lse && !return_probs) {
          return nb::make_tuple(attention(q, k, v, options, stream), nb::none(), nb::none());
        }
        auto result = attention_with_lse(q, k, v, options, stream);
        return nb::make_tuple(result.out, result.lse, result.probs);
      },
      "q"_a, "k"_a, "v"_a, "options"_a, "return_lse"_a, "return_probs"_a, "stream"_a = nb::none(), R"(
:func:`attention` for an entry point whose name the options give.

Returns:
    tuple: ``(out, lse, probs)`` as :func:`attention_with_lse`; None for what is not wanted.

Raises:
    ValueError, RuntimeError: As :func:`attention`.
)");

  m.def(
      "explain",
      [](const mx::array& q, const mx::array& k, const mx::array& v, std::optional<double> scale, bool causal,
         double softcap, const OptionalArray& alibi_slopes, double dropout_p, int window_left, int window_right,
         const OptionalArray& attn_bias, std::string_view backend, const OptionalArray& mask,
         const OptionalArray& sinks, const OptionalArray& kv_lengths, const Seed& dropout_seed,
         mx::StreamOrDevice stream, bool return_probs, bool return_lse) {
        return to_dict(explain(q, k, v,
                               make_options(scale, causal, softcap, alibi_slopes, dropout_p, window_left, window_right,
                                            attn_bias, backend, mask, sinks, kv_lengths, dropout_seed, return_probs),
                               stream, return_lse));
      },
      "q"_a, "k"_a, "v"_a, "scale"_a = nb::none(), "causal"_a = false, "softcap"_a = 0.0, "alibi_slopes"_a = nb::none(),
      "dropout_p"_a = 0.0, "window_left"_a = -1, "window_right"_a = -1, "attn_bias"_a = nb::none(),
      "backend"_a = "auto", "mask"_a = nb::none(), "sinks"_a = nb::none(), "kv_lengths"_a = nb::none(),
      "dropout_seed"_a = nb::none(), "stream"_a = nb::none(), "return_probs"_a = false, "return_lse"_a = false, R"(
Which implementation would run this call of :func:`attention`, and why. Runs nothing.

Returns:
    dict: As :func:`mlx_mfa.explain` says.

Raises:
    ValueError, RuntimeError: As :func:`attention`.
)");

  m.def(
      "explain_calls",
      [](const nb::callable& function) {
        RouteRecorder recorder;
        function();
        nb::list calls;
        for (const Explanation& call : recorder.calls()) calls.append(to_dict(call));
        return calls;
      },
      "function"_a, R"(
What runs the attention calls that ``function()`` builds. As :func:`mlx_mfa.explain_calls`.

Returns:
    list: A dict for each call, as :func:`mlx_mfa.explain` says.
)");

  m.def(
      "merge_attention_states",
      [](const mx::array& o_a, const mx::array& lse_a, const mx::array& o_b, const mx::array& lse_b, bool base_2,
         mx::StreamOrDevice stream) {
        return merge_attention_states(o_a, lse_a, o_b, lse_b, stream, base_2 ? LogBase::two : LogBase::e);
      },
      "o_a"_a, "lse_a"_a, "o_b"_a, "lse_b"_a, "base_2"_a = false, "stream"_a = nb::none(), R"(
The attention over the union of two disjoint sets of keys from the attention over each (arXiv:1805.02867).

Args:
    o_a, o_b (array): ``[..., Dv]``, one floating dtype.
    lse_a, lse_b (array): ``[...]``, floating logarithms; -inf marks an empty part.
    base_2 (bool): The logarithms, given and returned, are of base 2 instead of natural.
    stream (Stream or Device, optional): Where it runs. Default: MLX's default stream.

Returns:
    tuple: ``(o, lse)``, in the dtype of ``o_a`` and float32. Both parts empty gives 0 and -inf.

Raises:
    ValueError: If shapes or dtypes disagree.
)");
}

}  // namespace mfa::python
