// packed.cpp: mfa::unpack_qkv and mfa::unpack_kv for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/variant.h>

#include "bindings.h"
#include "mfa/packed.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {

void bind_packed(nb::module_& m) {
  m.def(
      "unpack_qkv",
      [](const mlx::core::array& qkv, std::optional<int> num_heads, std::optional<int> num_kv_heads,
         std::string_view function, mlx::core::StreamOrDevice stream) {
        const auto [q, k, v] = unpack_qkv(qkv, num_heads, num_kv_heads, stream, function);
        return nb::make_tuple(q, k, v);
      },
      "qkv"_a, "num_heads"_a.none(), "num_kv_heads"_a.none(), "function"_a, "stream"_a = nb::none(), R"(
Views of q, k and v in a packed array; as :func:`mlx_mfa.flash_attention_qkv_packed` takes it apart.

Returns:
    tuple: ``(q, k, v)``: ``[B, Hq, N, D]`` and twice ``[B, Hkv, N, D]``.

Raises:
    ValueError: If the sizes do not fit; the message names ``function``.
)");
  m.def(
      "unpack_kv",
      [](const mlx::core::array& kv, std::optional<int> num_kv_heads, std::string_view function,
         mlx::core::StreamOrDevice stream) {
        const auto [k, v] = unpack_kv(kv, num_kv_heads, stream, function);
        return nb::make_tuple(k, v);
      },
      "kv"_a, "num_kv_heads"_a.none(), "function"_a, "stream"_a = nb::none(), R"(
Views of k and v in a packed array; as :func:`mlx_mfa.flash_attention_kv_packed` takes it apart.

Returns:
    tuple: ``(k, v)``, each ``[B, Hkv, N, D]``.

Raises:
    ValueError: If the sizes do not fit; the message names ``function``.
)");
}

}  // namespace mfa::python
