// rope_tables.cpp: tables of rotary embedding. Source: Su et al., arXiv:2104.09864, an axis of the grid at a time.
#include "mfa/rope_tables.h"

#include <cmath>
#include <limits>
#include <vector>

#include "common/check.h"

namespace mfa {
namespace mx = mlx::core;
namespace {

constexpr const char* kFunction = "make_rope_3d_tables";

// cos and sin of every position and pair of one axis, [positions, width / 2].
struct AxisTable {
  AxisTable(int positions, int width, double theta) : pairs(width / 2) {
    cos.reserve(static_cast<size_t>(positions) * pairs);
    sin.reserve(static_cast<size_t>(positions) * pairs);
    for (int position = 0; position < positions; ++position) {
      for (int p = 0; p < pairs; ++p) {
        const double angle = position * std::pow(theta, -2.0 * p / width);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }

  int pairs;
  std::vector<float> cos, sin;
};

}  // namespace

std::pair<mx::array, mx::array> rope_3d_tables(int grid_h, int grid_w, int num_frames, const Rope3dWidths& widths,
                                               int head_dim, double theta) {
  check(grid_h > 0 && grid_w > 0 && num_frames > 0, kFunction, "grid_h, grid_w and num_frames must be positive; got ",
        grid_h, ", ", grid_w, " and ", num_frames);
  check(head_dim > 0, kFunction, "head_dim must be positive; got ", head_dim);
  check(std::isfinite(theta) && theta > 0, kFunction, "theta must be finite and positive; got ", theta);
  const int third = head_dim / 3 / 2 * 2;
  const int h = widths.h.value_or(third), w = widths.w.value_or(third);
  const int64_t left = int64_t{head_dim} - h - w;
  check(widths.t || left >= 0, kFunction, "d_h + d_w must be at most head_dim = ", head_dim, "; got ", h, " + ", w);
  const int t = widths.t ? *widths.t : static_cast<int>(left);
  for (const auto& [name, width] : {std::pair{"d_h", h}, std::pair{"d_w", w}, std::pair{"d_t", t}}) {
    check(width >= 0 && width % 2 == 0, kFunction, name, " must be even and not negative; got ", width);
  }
  constexpr double kMost = std::numeric_limits<int32_t>::max();
  const double tokens = double{1} * num_frames * grid_h * grid_w;
  const int64_t pairs = (int64_t{h} + w + t) / 2;
  check(tokens <= kMost && static_cast<double>(pairs) <= kMost, kFunction,
        "the tables must have at most 2^31 - 1 rows and columns; got ", tokens, " and ", pairs);

  const AxisTable rows(grid_h, h, theta), columns(grid_w, w, theta), frames(num_frames, t, theta);
  const auto shape = mx::Shape{static_cast<int>(tokens), static_cast<int>(pairs)};
  auto fill = [&](std::vector<float> AxisTable::* values) {
    std::vector<float> table;
    table.reserve(static_cast<size_t>(tokens) * static_cast<size_t>(pairs));
    auto append = [&](const AxisTable& axis, int position) {
      const float* first = (axis.*values).data() + static_cast<size_t>(position) * axis.pairs;
      table.insert(table.end(), first, first + axis.pairs);
    };
    for (int f = 0; f < num_frames; ++f) {
      for (int y = 0; y < grid_h; ++y) {
        for (int x = 0; x < grid_w; ++x) {
          append(rows, y);
          append(columns, x);
          append(frames, f);
        }
      }
    }
    return mx::array(table.data(), shape, mx::float32);
  };
  return {fill(&AxisTable::cos), fill(&AxisTable::sin)};
}

}  // namespace mfa
