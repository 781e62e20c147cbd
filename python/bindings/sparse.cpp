// sparse.cpp: block-sparse, neighbourhood and top-k attention for Python.
#include "mfa/sparse.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "block_masks.h"
#include "mfa/neighbourhood.h"
#include "mfa/topk.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {
namespace {

std::optional<TileSize> tile_of(const TileArgument& block_size) {
  if (!block_size) return std::nullopt;
  return TileSize{block_size->first, block_size->second};
}

BlockMask block_mask_of(const MaskArgument& mask, const TileArgument& block_size, const mx::array& q,
                        const mx::array& k, const char* function) {
  const auto* array = std::get_if<mx::array>(&mask);
  return array ? to_block_mask(*array, q, k, tile_of(block_size), function) : std::get<BlockMask>(mask);
}

}  // namespace

BlockMask block_mask_of(const MaskArgument& mask, const TileArgument& block_size, int64_t Nq, int64_t Nk, int head_dim,
                        const char* function) {
  const auto* array = std::get_if<mx::array>(&mask);
  return array ? to_block_mask(*array, Nq, Nk, head_dim, tile_of(block_size), function) : std::get<BlockMask>(mask);
}

void bind_sparse(nb::module_& m) {
  m.def(
      "attention_sparse",
      [](const mx::array& q, const mx::array& k, const mx::array& v, const MaskArgument& mask,
         const TileArgument& block_size, const AttentionOptions& options, bool return_lse, mx::StreamOrDevice stream) {
        const BlockMask blocks = block_mask_of(mask, block_size, q, k, options.function);
        if (!return_lse) return nb::make_tuple(attention_sparse(q, k, v, blocks, options, stream), nb::none());
        const auto result = attention_sparse_with_lse(q, k, v, blocks, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k"_a, "v"_a, "block_mask"_a, "block_size"_a.none(), "options"_a, "return_lse"_a, "stream"_a = nb::none(),
      R"(
Attention over the visible tiles of a mask. As :func:`mlx_mfa.flash_attention_sparse`.

Returns:
    tuple: ``(out, lse)``, natural logarithms; None without ``return_lse``.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_sparse`.
)");
  m.def(
      "attention_gna",
      [](const mx::array& q, const mx::array& k, const mx::array& v, const std::vector<int>& shape,
         const std::vector<int>& window, const std::vector<int>& stride, const std::vector<int>& dilation,
         const std::vector<bool>& causal, bool shifts, bool leans_left, const AttentionOptions& options,
         bool return_lse, mx::StreamOrDevice stream) {
        const NeighbourhoodSpec spec{shape, window, stride, dilation, causal, shifts, leans_left};
        if (!return_lse) return nb::make_tuple(attention_gna(q, k, v, spec, options, stream), nb::none());
        const auto result = attention_gna_with_lse(q, k, v, spec, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k"_a, "v"_a, "shape"_a, "window"_a, "stride"_a, "dilation"_a, "causal"_a, "shifts"_a, "leans_left"_a,
      "options"_a, "return_lse"_a, "stream"_a = nb::none(), R"(
Attention of each token of a grid to a window around it. As :func:`mlx_mfa.flash_attention_gna`.

Returns:
    tuple: ``(out, lse)``, natural logarithms; None without ``return_lse``.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_gna`.
)");
  m.def(
      "attention_topk",
      [](const mx::array& q, const mx::array& k, const mx::array& v, double ratio,
         const std::optional<MaskArgument>& mask, const TileArgument& block_size, const AttentionOptions& options,
         bool return_lse, mx::StreamOrDevice stream) {
        std::optional<BlockMask> blocks;
        if (mask) blocks = block_mask_of(*mask, block_size, q, k, "flash_attention_topk");
        if (!return_lse) return nb::make_tuple(attention_topk(q, k, v, ratio, blocks, options, stream), nb::none());
        const auto result = attention_topk_with_lse(q, k, v, ratio, blocks, options, stream);
        return nb::make_tuple(result.out, result.lse);
      },
      "q"_a, "k"_a, "v"_a, "topk_ratio"_a, "mask"_a.none(), "block_size"_a.none(), "options"_a, "return_lse"_a,
      "stream"_a = nb::none(), R"(
Attention to the keys of the largest scores. As :func:`mlx_mfa.flash_attention_topk`.

Returns:
    tuple: ``(out, lse)``, natural logarithms; None without ``return_lse``.

Raises:
    ValueError, RuntimeError: As :func:`mlx_mfa.flash_attention_topk`.
)");
}

}  // namespace mfa::python
