// block_masks.h: visible tiles from Python: a BlockMask, or a bool array with the size of its tiles.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <variant>

#include "mfa/masks.h"

namespace mfa::python {

using MaskArgument = std::variant<BlockMask, mlx::core::array>;
using TileArgument = std::optional<std::pair<int64_t, int64_t>>;

BlockMask block_mask_of(const MaskArgument& mask, const TileArgument& block_size, int64_t Nq, int64_t Nk, int head_dim,
                        const char* function);

}  // namespace mfa::python
