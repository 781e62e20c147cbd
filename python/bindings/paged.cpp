// paged.cpp: mfa::attention_paged and mfa::attention_paged_varlen for Python.
#include "mfa/paged.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>

#include "bindings.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {

void bind_paged(nb::module_& m) {
  m.def(
      "attention_paged",
      [](const mx::array& q, const mx::array& k_pages, const mx::array& v_pages, const mx::array& block_table,
         const mx::array& seq_lens, const OptionalArray& cache_batch_idx, const AttentionOptions& options,
         mx::StreamOrDevice stream) {
        const auto result =
            attention_paged_with_lse(q, k_pages, v_pages, {block_table, seq_lens, cache_batch_idx}, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k_pages"_a, "v_pages"_a, "block_table"_a, "seq_lens"_a, "cache_batch_idx"_a.none(), "options"_a,
      "stream"_a = nb::none(), R"(
Attention over keys in pages. As :func:`mlx_mfa.flash_attention_paged`.

Returns:
    tuple: ``(out, lse)``, natural logarithms.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_paged`.
)");

  m.def(
      "attention_paged_varlen",
      [](const mx::array& q, const mx::array& k_pages, const mx::array& v_pages, const mx::array& block_table,
         const mx::array& seq_lens, const OptionalArray& cache_batch_idx, const mx::array& cu_seqlens_q,
         std::optional<int> max_seqlen_q, const AttentionOptions& options, mx::StreamOrDevice stream) {
        const auto result =
            attention_paged_varlen_with_lse(q, k_pages, v_pages, {block_table, seq_lens, cache_batch_idx},
                                            {cu_seqlens_q, max_seqlen_q}, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k_pages"_a, "v_pages"_a, "block_table"_a, "seq_lens"_a, "cache_batch_idx"_a.none(), "cu_seqlens_q"_a,
      "max_seqlen_q"_a.none(), "options"_a, "stream"_a = nb::none(), R"(
Attention of packed queries over keys in pages. As :func:`mlx_mfa.flash_attention_paged_varlen`.

Returns:
    tuple: ``(out, lse)``, natural logarithms.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_paged_varlen`.
)");
}

}  // namespace mfa::python
