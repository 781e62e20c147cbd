// block_selection.cpp: block masks from q and k for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "mfa/block_selection.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace mfa::python {
namespace {

using Pair = std::pair<int64_t, int64_t>;
using Integers = std::vector<int64_t>;

TileSize tile_size(const Pair& size) { return {size.first, size.second}; }

}  // namespace

void bind_block_selection(nb::module_& m) {
  m.def(
      "averaged_top_blocks",
      [](const mx::array& q, const mx::array& k, const BlockRule& allowed, int64_t top_k, const std::string& function) {
        return averaged_top_blocks(q, k, allowed, top_k, function.c_str());
      },
      "q"_a, "k"_a, "allowed"_a, "top_k"_a, "function"_a,
      "Of the tiles of a rule, those with the best products of means; for errors in the name of `function`.");
  m.def(
      "pooled_top_blocks",
      [](const mx::array& q, const mx::array& k, int64_t top_k, bool centred, const Integers& q_sizes,
         const Integers& k_sizes, const Pair& size, const std::string& function) {
        return pooled_top_blocks(q, k, top_k, centred, q_sizes, k_sizes, tile_size(size), function.c_str());
      },
      "q"_a, "k"_a, "top_k"_a, "centred"_a, "q_sizes"_a, "kv_sizes"_a, "block_size"_a, "function"_a,
      "Tiles with the best products of means in each row; for errors in the name of `function`.");
  m.def("draft_blocks", &draft_blocks, "q"_a, "k"_a, "window_rows"_a, "window_columns"_a, "budget"_a, "local_range"_a,
        "window_tokens"_a, "As :func:`mlx_mfa.make_draft_mask`, as lists.");
  m.def(
      "similarity_mass_blocks",
      [](const mx::array& q, const mx::array& k, double mass, std::optional<double> fraction, double similarity,
         bool causal, bool sink, const Pair& size) {
        return similarity_mass_blocks(q, k, mass, fraction, similarity, causal, sink, tile_size(size));
      },
      "q"_a, "k"_a, "mass"_a, "fraction"_a.none(), "similarity"_a, "causal"_a, "sink"_a, "block_size"_a,
      "As :func:`mlx_mfa.make_sparge_mask`, as lists.");
  m.def(
      "antidiagonal_blocks",
      [](const mx::array& q, const mx::array& k, double mass, int64_t stride, bool causal, const Pair& size) {
        return antidiagonal_blocks(q, k, mass, stride, causal, tile_size(size));
      },
      "q"_a, "k"_a, "mass"_a, "stride"_a, "causal"_a, "block_size"_a,
      "As :func:`mlx_mfa.make_xattention_mask`, as lists.");
}

}  // namespace mfa::python
