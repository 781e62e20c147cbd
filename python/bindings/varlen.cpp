// varlen.cpp: mfa::attention_varlen for Python.
#include "mfa/varlen.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>

#include <algorithm>

#include "bindings.h"
#include "block_masks.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {

void bind_varlen(nb::module_& m) {
  m.def(
      "attention_varlen",
      [](const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& cu_seqlens_q,
         const mx::array& cu_seqlens_k, const AttentionOptions& options, std::optional<int> max_seqlen_q,
         std::optional<int> max_seqlen_k, const std::optional<MaskArgument>& block_mask, const TileArgument& block_size,
         bool return_lse, mx::StreamOrDevice stream) -> nb::object {
        PackedSequences sequences{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, std::nullopt};
        if (block_mask) {
          const auto longest = [](const mx::array& x, std::optional<int> most) {
            const int rows = x.ndim() == 4 ? x.shape(2) : 0;
            return std::min(most.value_or(rows), rows);
          };
          sequences.block_mask =
              block_mask_of(*block_mask, block_size, longest(q, max_seqlen_q), longest(k, max_seqlen_k),
                            q.ndim() == 4 ? q.shape(3) : 0, options.function);
        }
        if (!return_lse) return nb::cast(attention_varlen(q, k, v, sequences, options, stream));
        const auto result = attention_varlen_with_lse(q, k, v, sequences, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k"_a, "v"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a, "options"_a, "max_seqlen_q"_a = nb::none(),
      "max_seqlen_k"_a = nb::none(), "block_mask"_a = nb::none(), "block_size"_a = nb::none(), "return_lse"_a = false,
      "stream"_a = nb::none(), R"(
Attention within each of several packed sequences. As :func:`mlx_mfa.flash_attention_varlen`.

Returns:
    array or tuple: ``out`` ``[1, Hq, packed queries, Dv]``; with ``return_lse`` ``(out, lse)``, natural logarithms.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_varlen`.
)");
}

}  // namespace mfa::python
