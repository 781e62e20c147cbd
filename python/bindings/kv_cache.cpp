// kv_cache.cpp: mfa::attention_kvcache, append_to_cache and attention_rope for Python.
#include "mfa/kv_cache.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>

#include "bindings.h"
#include "mfa/rope.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {
void bind_kv_cache(nb::module_& m) {
  m.def(
      "attention_kvcache",
      [](const mx::array& q, const OptionalArray& k_cache, const OptionalArray& v_cache, const OptionalArray& k_new,
         const OptionalArray& v_new, const OptionalArray& block_table, const OptionalArray& seq_lens,
         const OptionalArray& cache_batch_idx, const OptionalArray& rotary_cos, const OptionalArray& rotary_sin,
         bool interleaved, std::optional<int> rotary_dim, const OptionalArray& positions, std::optional<bool> rotates_k,
         bool wants_lse, const AttentionOptions& options, mx::StreamOrDevice stream) {
        std::optional<NewKeys> added;
        if (k_new && v_new) added = NewKeys{*k_new, *v_new};
        std::optional<CacheRotation> rotation;
        if (rotary_cos && rotary_sin)
          rotation = CacheRotation{*rotary_cos, *rotary_sin, interleaved, rotary_dim, positions, rotates_k};
        const auto result = attention_kvcache(q, {k_cache, v_cache, block_table, seq_lens, cache_batch_idx}, added,
                                              rotation, options, wants_lse, stream);
        return nb::make_tuple(result.out, result.lse, result.k, result.v);
      },
      "q"_a, "k_cache"_a.none(), "v_cache"_a.none(), "k_new"_a.none(), "v_new"_a.none(), "block_table"_a.none(),
      "seq_lens"_a.none(), "cache_batch_idx"_a.none(), "rotary_cos"_a.none(), "rotary_sin"_a.none(), "interleaved"_a,
      "rotary_dim"_a.none(), "positions"_a.none(), "rotates_k"_a.none(), "wants_lse"_a, "options"_a,
      "stream"_a = nb::none(), R"(
Attention over a cache, with new keys appended. As :func:`mlx_mfa.flash_attention_kvcache`.

Returns:
    tuple: ``(out, lse, k_cache, v_cache)``: ``lse`` in natural logarithms or None, the caches None without new keys.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_kvcache`.
)");

  m.def(
      "append_to_cache",
      [](const mx::array& cache, const mx::array& rows, const mx::array& starts, const OptionalArray& block_table,
         mx::StreamOrDevice stream) { return append_to_cache(cache, rows, starts, block_table, stream); },
      "cache"_a, "rows"_a, "starts"_a, "block_table"_a = nb::none(), "stream"_a = nb::none(), R"(
Writes rows into a cache, in place if nothing else holds it. As :func:`mlx_mfa.append_to_cache`.

Returns:
    array: The cache with the rows.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.append_to_cache`.
)");

  m.def(
      "attention_rope",
      [](const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& rotary_cos,
         const mx::array& rotary_sin, bool interleaved, std::optional<int> rotary_dim, const OptionalArray& q_positions,
         const OptionalArray& k_positions, bool rotates_k, const AttentionOptions& options, mx::StreamOrDevice stream) {
        const auto result = attention_rope_with_lse(
            q, k, v, {rotary_cos, rotary_sin, interleaved, rotary_dim, q_positions, k_positions, rotates_k}, options,
            stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k"_a, "v"_a, "rotary_cos"_a, "rotary_sin"_a, "interleaved"_a, "rotary_dim"_a.none(),
      "q_positions"_a.none(), "k_positions"_a.none(), "rotates_k"_a, "options"_a, "stream"_a = nb::none(), R"(
Attention of rotated queries and keys. As :func:`mlx_mfa.flash_attention_rope`.

Returns:
    tuple: ``(out, lse)``, natural logarithms.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_rope`.
)");
}

}  // namespace mfa::python
