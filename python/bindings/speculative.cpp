// speculative.cpp: trees of draft tokens for Python.
#include "mfa/speculative.h"

#include "bindings.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {

void bind_speculative(nb::module_& m) {
  m.def(
      "tree_mask",
      [](const mx::array& parents, mx::StreamOrDevice stream) {
        const TreeMask tree = tree_mask(parents, stream);
        return nb::make_tuple(tree.depths, tree.visible, tree.bits);
      },
      "parents"_a, "stream"_a = nb::none(), R"(
Which nodes of draft trees see which. As :func:`mlx_mfa.make_tree_mask`.

Returns:
    tuple: ``(depths, visible, bits)``.

Raises:
    ValueError: If ``parents`` are not those of trees.
)");
  m.def(
      "attention_tree",
      [](const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& parents,
         const AttentionOptions& options, mx::StreamOrDevice stream) {
        const auto result = attention_tree(q, k, v, parents, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k"_a, "v"_a, "parents"_a, "options"_a, "stream"_a = nb::none(), R"(
Attention of draft trees over a cache and themselves. As :func:`mlx_mfa.flash_attention_tree`.

Returns:
    tuple: ``(out, lse)``, natural logarithms.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_tree`.
)");
  m.def(
      "draft_proxy_logprobs",
      [](const mx::array& out, const mx::array& draft_ids, float temperature, std::string_view function,
         mx::StreamOrDevice stream) { return draft_proxy_logprobs(out, draft_ids, temperature, stream, function); },
      "out"_a, "draft_ids"_a, "temperature"_a, "function"_a, "stream"_a = nb::none(), R"(
Log-softmax over the channels of the mean over heads, at ``draft_ids``. As
:func:`mlx_mfa.flash_attention_speculative_verify`.

Returns:
    array: float32 ``[B, N]``.

Raises:
    ValueError: If shapes or dtypes disagree or ``temperature`` is not positive; the message names ``function``.
)");
}

}  // namespace mfa::python
