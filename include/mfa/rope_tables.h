// rope_tables.h: cosines and sines of rotary position embedding for tokens of a video.
#pragma once

#include <optional>
#include <utility>

#include "mfa/api.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mfa {

struct Rope3dWidths {
  std::optional<int> h, w, t;  // channels that turn with the row, the column and the frame of a token; each even
};

// Cosines and sines, float32 [num_frames * grid_h * grid_w, (h + w + t) / 2], of tokens in row-major order of (frame,
// row, column): the columns are the pairs of h, then of w, then of t, and pair p of an axis of width d turns by
// position * theta^(-2 p / d). h and w are head_dim / 3 rounded down to even unless given, t is what is left of
// head_dim. Angles are computed in float64. Throws std::invalid_argument if a size does not fit.
MFA_API std::pair<mlx::core::array, mlx::core::array> rope_3d_tables(int grid_h, int grid_w, int num_frames,
                                                                     const Rope3dWidths& widths = {},
                                                                     int head_dim = 128, double theta = 10000.0);

}  // namespace mfa
