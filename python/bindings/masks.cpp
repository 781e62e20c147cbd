// masks.cpp: mfa::BlockMask and the rules of block masks for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>

#include "bindings.h"
#include "mfa/masks.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace mfa::python {
namespace {

using Pair = std::pair<int64_t, int64_t>;

using Triple = std::tuple<int64_t, int64_t, int64_t>;

VideoShape video(const Triple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
VideoRadius video_radius(const Triple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

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

using Integers = std::vector<int64_t>;

void bind_rules(nb::module_& m) {
  nb::class_<BlockRule>(m, "BlockRule", "Who sees whom, by tiles and by tokens: what the mask builders start from.")
      .def("tiles", &tile_mask, "The tiles.\n\nReturns:\n    array: bool ``[NQ, NK]``.\n")
      .def("tokens", &token_mask, "The pairs of tokens.\n\nReturns:\n    array: bool ``[Nq, Nk]``.\n")
      .def("lists", &BlockMask::from_rule, "The tiles as lists.\n\nReturns:\n    BlockMask: The same tiles.\n")
      .def(
          "exact", [](const BlockRule& rule) { return exact(rule); },
          "The rule without tiles that hold no visible pair of tokens.\n\nReturns:\n    BlockRule: The tighter "
          "rule.\n");

  m.def(
      "causal_blocks", [](int64_t tokens, const Pair& size) { return causal_blocks(tokens, tile_size(size)); },
      "tokens"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_causal_block_mask`.");
  m.def(
      "sliding_window_blocks",
      [](int64_t tokens, int64_t window, bool causal, const Pair& size) {
        return sliding_window_blocks(tokens, window, causal, tile_size(size));
      },
      "tokens"_a, "window"_a, "causal"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_sliding_window_mask`.");
  m.def(
      "sink_window_blocks",
      [](int64_t tokens, int64_t window, int64_t sinks, bool causal, const Pair& size) {
        return sink_window_blocks(tokens, window, sinks, causal, tile_size(size));
      },
      "tokens"_a, "window"_a, "sinks"_a, "causal"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_sink_window_mask`.");
  m.def(
      "diagonal_blocks",
      [](int64_t tokens, int64_t block, int64_t reach, const Pair& size) {
        return diagonal_blocks(tokens, block, reach, tile_size(size));
      },
      "tokens"_a, "block"_a, "reach"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_diagonal_mask`.");
  m.def(
      "strided_blocks",
      [](int64_t tokens, int64_t window, int64_t stride, const Pair& size) {
        return strided_blocks(tokens, window, stride, tile_size(size));
      },
      "tokens"_a, "window"_a, "stride"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_strided_mask`.");
  m.def(
      "segment_blocks",
      [](const Integers& queries, const Integers& keys, bool causal, const Pair& size, const std::string& function) {
        return segment_blocks(queries, keys, causal, tile_size(size), function.c_str());
      },
      "query_lengths"_a, "key_lengths"_a, "causal"_a, "block_size"_a, "function"_a,
      "Rule of the masks of segments, for errors in the name of `function`.");
  m.def(
      "full_blocks",
      [](int64_t queries, int64_t keys, const Pair& size, const std::string& function) {
        return full_blocks(queries, keys, tile_size(size), function.c_str());
      },
      "queries"_a, "keys"_a, "block_size"_a, "function"_a, "The rule that shows everything.");
  m.def(
      "cross_frame_blocks",
      [](int64_t queries, int64_t keys, int64_t query_frames, int64_t key_frames, const Pair& size,
         const std::string& function) {
        return cross_frame_blocks(queries, keys, query_frames, key_frames, tile_size(size), function.c_str());
      },
      "queries"_a, "keys"_a, "query_frames"_a, "key_frames"_a, "block_size"_a, "function"_a,
      "Rule of :func:`mlx_mfa.make_cross_stream_mask` with frames.");
  m.def(
      "spatial_blocks",
      [](const Triple& shape, const Triple& radius, const Pair& size, const std::string& function) {
        return spatial_blocks(video(shape), video_radius(radius), tile_size(size), function.c_str());
      },
      "shape"_a, "radius"_a, "block_size"_a, "function"_a,
      "Rule of the spatial masks: (frames, height, width) in tokens and the radius along each, -1 = open.");
  m.def(
      "axial_temporal_blocks",
      [](const Triple& shape, int64_t radius, bool causal, const Pair& size) {
        return axial_temporal_blocks(video(shape), radius, causal, tile_size(size));
      },
      "shape"_a, "radius"_a, "causal"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_axial_temporal_mask`.");
  m.def(
      "dilated_temporal_blocks",
      [](const Triple& shape, int64_t dilation, int64_t local, const Pair& size) {
        return dilated_temporal_blocks(video(shape), dilation, local, tile_size(size));
      },
      "shape"_a, "dilation"_a, "local"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_dilated_temporal_mask`.");
  m.def(
      "reference_frame_blocks",
      [](const Triple& shape, const Integers& references, const Triple& radius, const Pair& size) {
        return reference_frame_blocks(video(shape), references, video_radius(radius), tile_size(size));
      },
      "shape"_a, "references"_a, "radius"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_reference_frame_mask`.");
  m.def(
      "neighbourhood_blocks",
      [](const Integers& shape, const Integers& window, const Integers& stride, const Pair& size) {
        return neighbourhood_blocks(shape, window, stride, tile_size(size));
      },
      "shape"_a, "window"_a, "stride"_a, "block_size"_a, "Rule of :func:`mlx_mfa.make_gna_mask`.");
  m.def(
      "temporal_group_blocks",
      [](int64_t frames, int64_t frame_tokens, const std::vector<std::tuple<int64_t, int64_t, double>>& groups,
         uint32_t seed, const Pair& size) {
        std::vector<DistanceGroup> all;
        for (const auto& [low, high, density] : groups) all.push_back({low, high, density});
        return temporal_group_blocks(frames, frame_tokens, all, seed, tile_size(size));
      },
      "frames"_a, "frame_tokens"_a, "groups"_a, "seed"_a, "block_size"_a,
      "Rule of :func:`mlx_mfa.make_temporal_group_mask`; groups are (low, high, density).");
  m.def(
      "sliding_tile_blocks",
      [](const Integers& tiles, const Integers& window, int64_t tile_tokens, int64_t extra_tokens) {
        return sliding_tile_blocks(tiles, window, tile_tokens, extra_tokens);
      },
      "tiles"_a, "window"_a, "tile_tokens"_a, "extra_tokens"_a, "Rule of :func:`mlx_mfa.make_sliding_tile_mask`.");
  m.def(
      "tile_order",
      [](const Integers& shape, const Integers& tile) {
        const TileOrder order = tile_order(shape, tile);
        const auto array = [](const std::vector<int32_t>& v) {
          return mx::array(v.begin(), {static_cast<int>(v.size())}, mx::int32);
        };
        return std::pair(array(order.order), array(order.sizes));
      },
      "shape"_a, "tile"_a, "As :func:`mlx_mfa.tile_order`.");
  m.def("temporal_distance_bias", &temporal_distance_bias, "frames"_a, "frame_tokens"_a, "rates"_a, "decay"_a,
        "As :func:`mlx_mfa.make_temporal_distance_bias`, with one rate for each head.");
  m.def(
      "bias_blocks",
      [](const mx::array& bias, double threshold, const Pair& size) {
        return bias_blocks(bias, static_cast<float>(threshold), tile_size(size));
      },
      "bias"_a, "threshold"_a, "block_size"_a, "As :func:`mlx_mfa.temporal_distance_bias_to_mask`, as lists.");
}

}  // namespace

void bind_masks(nb::module_& m) {
  bind_block_mask(m);
  bind_rules(m);
}

}  // namespace mfa::python
