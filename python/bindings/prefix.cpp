// prefix.cpp: mfa::attention_cascade for Python.
#include "mfa/prefix.h"

#include "bindings.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {

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
}

}  // namespace mfa::python
