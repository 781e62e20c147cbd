// masks.cpp: mfa::BlockMask for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <limits>

#include "bindings.h"
#include "mfa/masks.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace mfa::python {
namespace {

using Pair = std::pair<int64_t, int64_t>;

TileSize tile_size(const Pair& size) { return {size.first, size.second}; }

// The tokens of whole blocks along an axis. What the mask may not be, from_dense refuses.
int64_t whole_length(const mx::array& mask, int axis, int64_t block) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return mask.ndim() < 2 || block < 1 || block > kMost ? 0 : block * mask.shape(axis);
}

std::string repr(const BlockMask& mask) {
  const TileGrid& g = mask.grid();
  return "BlockMask(batch=" + std::to_string(mask.batch()) + ", heads=" + std::to_string(mask.heads()) +
         ", q_len=" + std::to_string(g.Nq) + ", kv_len=" + std::to_string(g.Nk) + ", block_size=(" +
         std::to_string(g.block_q) + ", " + std::to_string(g.block_k) + "), count=" + std::to_string(mask.count()) +
         ")";
}

void bind_block_mask(nb::module_& m) {
  nb::class_<BlockMask>(m, "BlockMask", R"(
The visible tiles of block-sparse attention as lists, built once and reusable in any number of calls. Immutable.

Args:
    mask (array): bool ``[NQ, NK]``, ``[H, NQ, NK]`` or ``[B, H, NQ, NK]``; True tiles are computed. ``NQ`` and ``NK``
        are ``ceil(q_len / block_q)`` and ``ceil(kv_len / block_k)``. Evaluated and read at once.
    block_size (tuple of int): ``(block_q, block_k)``, queries and keys of a tile.
    q_len, kv_len (int, optional): Tokens; the last tile of an axis may be shorter. Default: all tiles are whole.

Raises:
    ValueError: If the mask is not bool, or its shape does not fit the lengths and the block size.
)")
      .def(
          "__init__",
          [](BlockMask* self, const mx::array& mask, const Pair& block_size, std::optional<int64_t> q_len,
             std::optional<int64_t> kv_len) {
            new (self) BlockMask(BlockMask::from_dense(mask, q_len.value_or(whole_length(mask, -2, block_size.first)),
                                                       kv_len.value_or(whole_length(mask, -1, block_size.second)),
                                                       tile_size(block_size)));
          },
          "mask"_a, "block_size"_a, nb::kw_only(), "q_len"_a = nb::none(), "kv_len"_a = nb::none())
      .def_prop_ro("batch", &BlockMask::batch, "int: Batch entries with lists of their own; 1: all have the same.")
      .def_prop_ro("heads", &BlockMask::heads, "int: Heads with lists of their own; 1: all have the same.")
      .def_prop_ro(
          "block_size", [](const BlockMask& b) { return std::pair(b.grid().block_q, b.grid().block_k); },
          "tuple: Queries and keys of a tile.")
      .def_prop_ro(
          "q_len", [](const BlockMask& b) { return b.grid().Nq; }, "int: Query tokens.")
      .def_prop_ro(
          "kv_len", [](const BlockMask& b) { return b.grid().Nk; }, "int: Key tokens.")
      .def_prop_ro(
          "shape",
          [](const BlockMask& b) {
            return nb::make_tuple(b.batch(), b.heads(), b.grid().query_blocks(), b.grid().key_blocks());
          },
          "tuple: ``(batch, heads, NQ, NK)``.")
      .def_prop_ro("count", &BlockMask::count, "int: Visible tiles of all lists.")
      .def_prop_ro("density", &BlockMask::density, "float: Visible tiles by all tiles.")
      .def("counts", &BlockMask::counts,
           "Visible key blocks of each query block.\n\nReturns:\n    array: int32 ``[batch, heads, NQ]``.\n")
      .def("to_dense", &BlockMask::to_dense,
           "The mask as a tensor.\n\nReturns:\n    array: bool ``[NQ, NK]``, or ``[H, NQ, NK]`` if heads differ, or "
           "``[B, H, NQ, NK]`` if batch entries do.\n")
      .def(
          "refine", [](const BlockMask& b, const Pair& size) { return b.refined(tile_size(size)); }, "block_size"_a,
          "The same pairs of tokens in smaller tiles.\n\nArgs:\n    block_size (tuple of int): Its sides divide those "
          "of this mask.\n\nReturns:\n    BlockMask: With the same visible pairs of tokens.\n\nRaises:\n    "
          "ValueError: If a side does not divide.\n")
      .def_prop_ro("offsets", &BlockMask::offsets,
                   "array: int64; query block r of list l has the entries ``offsets[i]`` to ``offsets[i + 1]`` of "
                   "``key_ids``, ``i = l * (NQ + 1) + r``.")
      .def_prop_ro("key_ids", &BlockMask::key_ids, "array: int32, ascending within a query block.")
      .def_prop_ro("transposed_offsets", &BlockMask::transposed_offsets,
                   "array: int64; as ``offsets``, of key blocks into ``query_ids``.")
      .def_prop_ro("query_ids", &BlockMask::query_ids, "array: int32, ascending within a key block.")
      .def("__repr__", &repr);
}

}  // namespace

void bind_masks(nb::module_& m) { bind_block_mask(m); }

}  // namespace mfa::python
