// prefix.cpp: mfa::attention_cascade and mfa::attention_together for Python.
#include "mfa/prefix.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "mfa/together.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {
namespace {

constexpr const char* kSplitfuse = "flash_attention_splitfuse";

}  // namespace

void bind_prefix(nb::module_& m) {
  m.def(
      "attention_cascade",
      [](const mx::array& q, const mx::array& k_prefix, const mx::array& v_prefix, const mx::array& k,
         const mx::array& v, const AttentionOptions& options, mx::StreamOrDevice stream) {
        const auto result = attention_cascade(q, k_prefix, v_prefix, k, v, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k_prefix"_a, "v_prefix"_a, "k"_a, "v"_a, "options"_a, "stream"_a = nb::none(), R"(
Attention over a shared prefix and own keys. As :func:`mlx_mfa.flash_attention_cascade`.

Returns:
    tuple: ``(out, lse)``, natural logarithms.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_cascade`.
)");
  m.def(
      "attention_together",
      [](const std::vector<std::tuple<mx::array, mx::array, mx::array, AttentionOptions>>& given, bool wants_lse,
         mx::StreamOrDevice stream) {
        std::vector<AttentionCall> calls;
        for (const auto& [q, k, v, options] : given) calls.push_back({q, k, v, options});
        std::vector<std::pair<mx::array, OptionalArray>> results;
        if (wants_lse) {
          for (const auto& r : attention_together_with_lse(calls, stream, kSplitfuse))
            results.emplace_back(r.out, r.lse);
        } else {
          for (const auto& out : attention_together(calls, stream, kSplitfuse)) results.emplace_back(out, std::nullopt);
        }
        return results;
      },
      "calls"_a, "wants_lse"_a, "stream"_a = nb::none(), R"(
Several attentions in one launch, each given as ``(q, k, v, options)``. As :func:`mlx_mfa.flash_attention_splitfuse`.

Returns:
    list of tuple: ``(out, lse)`` of each, natural logarithms; None in the place of lse unless wanted.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_splitfuse`.
)");
}

}  // namespace mfa::python
