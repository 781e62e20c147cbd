// video.cpp: rules on the places of tokens in a video, by boxes around tiles.
//
// The tokens of a tile are a run of the row-major order, so the box around them is the whole width once the run leaves
// its row, and the whole frame once it leaves its frame. Rows of tiles are marked by ranges: the tiles of a range of
// frames, within them those of a range of rows, within them a test of columns.
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "attention/neighbourhood.h"
#include "common/check.h"
#include "masks/block_pattern.h"
#include "masks/marking.h"

namespace mfa {
namespace {

struct Interval {
  int64_t first = 0, last = 0;  // both included
  bool meets(const Interval& other) const { return first <= other.last && other.first <= last; }
  bool covers(int64_t n) const { return first <= 0 && last >= n - 1; }
};

// Frames, rows and columns.
struct Box {
  Interval frame, row, column;
};

struct Place {
  int64_t frame, row, column;
};

Place place_of(const VideoShape& v, int64_t token) {
  const int64_t line = token / v.width;
  return {line / v.height, line % v.height, token % v.width};
}

Box box_around(const VideoShape& v, const TokenRange& tokens) {
  const Place a = place_of(v, tokens.first), b = place_of(v, tokens.last);
  Box box{{a.frame, b.frame}, {a.row, b.row}, {a.column, b.column}};
  if (a.frame != b.frame) box.row = {0, v.height - 1};
  if (a.frame != b.frame || a.row != b.row) box.column = {0, v.width - 1};
  return box;
}

// `interval` made longer by `radius` on both sides and cut to [0, n); a negative radius is open.
Interval widened(const Interval& interval, int64_t radius, int64_t n) {
  if (radius < 0 || radius >= n) return {0, n - 1};
  return {std::max<int64_t>(0, interval.first - radius), std::min(n - 1, interval.last + radius)};
}

Box widened(const Box& box, const VideoRadius& radius, const VideoShape& v) {
  return {widened(box.frame, radius.frame, v.frames), widened(box.row, radius.row, v.height),
          widened(box.column, radius.column, v.width)};
}

int64_t checked_tokens(const VideoShape& v, const char* function) {
  constexpr int64_t kMost = int64_t{1} << 31;
  check(v.frames >= 1 && v.height >= 1 && v.width >= 1, function,
        "frames, height and width must be at least one token each; got ", v.frames, ", ", v.height, " and ", v.width);
  check(v.frames < kMost && v.height < kMost && v.width < kMost && v.height * v.width < kMost &&
            v.frames * (v.height * v.width) < kMost,
        function, "a video must have fewer than 2^31 tokens; got ", v.frames, " frames of ", v.height, " by ", v.width);
  return v.frames * v.height * v.width;
}

// The key blocks of a video and the columns that each spans.
class KeyTiles {
 public:
  KeyTiles(const VideoShape& video, const TileGrid& grid)
      : video_(video), grid_(grid), first_column_(grid.key_blocks()), last_column_(grid.key_blocks()) {
    for (int32_t c = 0; c < grid.key_blocks(); ++c) {
      const Interval columns = box_around(video, key_tokens(grid, c)).column;
      first_column_[c] = static_cast<int32_t>(columns.first);
      last_column_[c] = static_cast<int32_t>(columns.last);
    }
  }

  // Marks the tiles whose boxes meet `box`.
  void mark(const Box& box, uint8_t* row) const {
    const int64_t frame_tokens = video_.height * video_.width;
    if (box.row.covers(video_.height) && box.column.covers(video_.width)) {
      mark_tokens(grid_, box.frame.first * frame_tokens, (box.frame.last + 1) * frame_tokens - 1, row);
      return;
    }
    // Frames of less than a tile or two: a walk over their tiles is shorter than one over the frames.
    if (frame_tokens < 2 * int64_t{grid_.block_k}) {
      const int64_t last = ((box.frame.last + 1) * frame_tokens - 1) / grid_.block_k;
      for (int64_t c = box.frame.first * frame_tokens / grid_.block_k; c <= last; ++c) {
        const Box tile = box_around(video_, key_tokens(grid_, static_cast<int32_t>(c)));
        if (tile.row.meets(box.row) && tile.column.meets(box.column)) row[c] = 1;
      }
      return;
    }
    for (int64_t f = box.frame.first; f <= box.frame.last; ++f) {
      const int64_t start = f * frame_tokens, end = start + frame_tokens;
      // A tile that runs over the border of two frames spans all rows and columns.
      if (start % grid_.block_k != 0) row[start / grid_.block_k] = 1;
      if (end % grid_.block_k != 0 && end < grid_.Nk) row[end / grid_.block_k] = 1;
      const int64_t first = start + box.row.first * video_.width, last = start + (box.row.last + 1) * video_.width - 1;
      if (box.column.covers(video_.width)) {
        mark_tokens(grid_, first, last, row);
      } else {
        mark_columns(first / grid_.block_k, last / grid_.block_k, box.column, row);
      }
    }
  }

 private:
  void mark_columns(int64_t first, int64_t last, const Interval& columns, uint8_t* row) const {
    const auto low = static_cast<int32_t>(columns.first), high = static_cast<int32_t>(columns.last);
    for (int64_t c = first; c <= last; ++c) {
      row[c] |= static_cast<uint8_t>((first_column_[c] <= high) & (last_column_[c] >= low));
    }
  }

  VideoShape video_;
  TileGrid grid_;
  std::vector<int32_t> first_column_, last_column_;
};

// Marks the key blocks that hold a token in `box`.
void mark_places(const VideoShape& v, const TileGrid& grid, const Box& box, uint8_t* row) {
  const int64_t frame_tokens = v.height * v.width;
  if (box.row.covers(v.height) && box.column.covers(v.width)) {
    mark_tokens(grid, box.frame.first * frame_tokens, (box.frame.last + 1) * frame_tokens - 1, row);
    return;
  }
  for (int64_t f = box.frame.first; f <= box.frame.last; ++f) {
    const int64_t start = f * frame_tokens;
    if (box.column.covers(v.width)) {
      mark_tokens(grid, start + box.row.first * v.width, start + (box.row.last + 1) * v.width - 1, row);
      continue;
    }
    for (int64_t y = box.row.first; y <= box.row.last; ++y) {
      const int64_t line = start + y * v.width;
      mark_tokens(grid, line + box.column.first, line + box.column.last, row);
    }
  }
}

// The rule by which queries in a box, the box within one row or around a tile, see the keys in the box seen(queries).
// Adds what `mark` and `mark_exact` share: `base` holds blocks that every query sees.
template <typename Seen>
BlockRule box_rule(const VideoShape& v, const TileGrid& grid, const Seen& seen, std::vector<uint8_t> base = {}) {
  const auto tiles = std::make_shared<const KeyTiles>(v, grid);
  const auto always = std::make_shared<const std::vector<uint8_t>>(std::move(base));
  BlockRule rule;
  rule.grid = grid;
  rule.mark = [=](int32_t r, uint8_t* row) {
    std::copy(always->begin(), always->end(), row);
    tiles->mark(seen(box_around(v, query_tokens(grid, r))), row);
  };
  rule.mark_exact = [=](int32_t r, uint8_t* row) {
    std::copy(always->begin(), always->end(), row);
    const TokenRange queries = query_tokens(grid, r);
    for (int64_t first = queries.first; first <= queries.last;) {  // part by part, each within a row
      const int64_t last = std::min(queries.last, (first / v.width + 1) * v.width - 1);
      mark_places(v, grid, seen(box_around(v, {first, last})), row);
      first = last + 1;
    }
  };
  return rule;
}

bool within(int64_t a, int64_t b, int64_t radius) { return radius < 0 || std::abs(a - b) <= radius; }

bool near(const VideoShape& v, const VideoRadius& radius, int64_t i, int64_t j) {
  const Place a = place_of(v, i), b = place_of(v, j);
  return within(a.frame, b.frame, radius.frame) && within(a.row, b.row, radius.row) &&
         within(a.column, b.column, radius.column);
}

}  // namespace

BlockRule spatial_blocks(VideoShape shape, VideoRadius radius, TileSize tile, const char* function) {
  const int64_t tokens = checked_tokens(shape, function);
  const TileGrid grid = checked_grid(function, tokens, tokens, tile);
  BlockRule rule = box_rule(shape, grid, [=](const Box& queries) { return widened(queries, radius, shape); });
  rule.sees = [=](int32_t i, int32_t j) { return near(shape, radius, i, j); };
  return rule;
}

BlockRule axial_temporal_blocks(VideoShape shape, int64_t radius, bool causal, TileSize tile) {
  constexpr const char* kFunction = "make_axial_temporal_mask";
  const int64_t tokens = checked_tokens(shape, kFunction);
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  const int64_t frame_tokens = shape.height * shape.width;
  const int64_t back = radius < 0 ? shape.frames : std::min(radius, shape.frames), ahead = causal ? 0 : back;
  return {grid,
          [=](int32_t r, uint8_t* row) {
            // Tokens in the same place of frames m apart are m * frame_tokens apart.
            const TokenRange q = query_tokens(grid, r);
            if (q.last - q.first + 1 >= frame_tokens) {  // a tile of a frame or more: what it sees has no gaps
              mark_tokens(grid, q.first - back * frame_tokens, q.last + ahead * frame_tokens, row);
              return;
            }
            const int64_t low = std::max(-back, -q.last / frame_tokens);
            const int64_t high = std::min(ahead, (tokens - 1 - q.first) / frame_tokens);
            for (int64_t m = low; m <= high; ++m) {
              mark_tokens(grid, q.first + m * frame_tokens, q.last + m * frame_tokens, row);
            }
          },
          [=](int32_t i, int32_t j) {
            const int64_t later = j / frame_tokens - i / frame_tokens;
            return i % frame_tokens == j % frame_tokens && -back <= later && later <= ahead;
          }};
}

BlockRule dilated_temporal_blocks(VideoShape shape, int64_t dilation, int64_t local, TileSize tile) {
  constexpr const char* kFunction = "make_dilated_temporal_mask";
  const int64_t tokens = checked_tokens(shape, kFunction);
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  check(dilation >= 1, kFunction, "dilation_rate must be 1 or more; got ", dilation);
  check(local >= 0, kFunction, "local_window must be 0 or more; got ", local);
  const int64_t frame_tokens = shape.height * shape.width, frames = shape.frames;
  dilation = std::min(dilation, frames);  // no two frames are as far apart
  local = std::min(local, frames);
  // Whether one of the distances low .. high is visible.
  const auto any = [=](int64_t low, int64_t high) {
    const int64_t multiple = high - ((high % dilation) + dilation) % dilation;  // the highest up to `high`
    return (low <= local && high >= -local) || multiple >= low;
  };
  return {grid,
          [=](int32_t r, uint8_t* row) {
            const TokenRange q = query_tokens(grid, r);
            const int64_t first = q.first / frame_tokens, last = q.last / frame_tokens;
            if (frames <= grid.key_blocks()) {
              for (int64_t f = 0; f < frames; ++f) {
                if (any(first - f, last - f)) mark_tokens(grid, f * frame_tokens, (f + 1) * frame_tokens - 1, row);
              }
              return;
            }
            for (int32_t c = 0; c < grid.key_blocks(); ++c) {
              const TokenRange k = key_tokens(grid, c);
              row[c] = any(first - k.last / frame_tokens, last - k.first / frame_tokens);
            }
          },
          [=](int32_t i, int32_t j) {
            const int64_t apart = std::abs(i / frame_tokens - j / frame_tokens);
            return apart <= local || apart % dilation == 0;
          }};
}

BlockRule reference_frame_blocks(VideoShape shape, std::span<const int64_t> references, VideoRadius radius,
                                 TileSize tile) {
  constexpr const char* kFunction = "make_reference_frame_mask";
  const int64_t tokens = checked_tokens(shape, kFunction);
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  const int64_t frame_tokens = shape.height * shape.width;
  auto is_reference = std::make_shared<std::vector<bool>>(shape.frames);
  std::vector<uint8_t> base(grid.key_blocks());
  for (const int64_t frame : references) {
    check(frame >= 0 && frame < shape.frames, kFunction, "reference frames must be 0 to ", shape.frames - 1, "; got ",
          frame);
    (*is_reference)[frame] = true;
    mark_tokens(grid, frame * frame_tokens, (frame + 1) * frame_tokens - 1, base.data());
  }
  BlockRule rule =
      box_rule(shape, grid, [=](const Box& queries) { return widened(queries, radius, shape); }, std::move(base));
  rule.sees = [=](int32_t i, int32_t j) { return (*is_reference)[j / frame_tokens] || near(shape, radius, i, j); };
  return rule;
}

BlockRule neighbourhood_blocks(std::span<const int64_t> shape, std::span<const int64_t> window,
                               std::span<const int64_t> stride, TileSize tile) {
  constexpr const char* kFunction = "make_gna_mask";
  const size_t axes = shape.size();
  check(axes >= 1 && axes <= 3 && window.size() == axes && stride.size() == axes, kFunction,
        "seq_shape, window_size and stride must have 1 to 3 numbers, each as many; got ", axes, ", ", window.size(),
        " and ", stride.size());
  VideoShape video;
  int64_t* extents[] = {&video.frames, &video.height, &video.width};
  for (size_t x = 0; x < axes; ++x) *extents[3 - axes + x] = shape[x];
  const int64_t tokens = checked_tokens(video, kFunction);
  for (size_t x = 0; x < axes; ++x) {
    check(1 <= stride[x] && stride[x] <= window[x] && window[x] <= shape[x], kFunction,
          "1 <= stride <= window <= size must hold along each axis; got stride ", stride[x], ", window ", window[x],
          " and size ", shape[x], " along axis ", x);
  }
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);

  Neighbourhood windows;
  windows.axes = 3;
  for (size_t x = 0; x < axes; ++x) {
    windows.axis[3 - axes + x] = {.size = static_cast<int32_t>(shape[x]),
                                  .window = static_cast<int32_t>(window[x]),
                                  .stride = static_cast<int32_t>(stride[x])};
  }
  // Windows move with the query and those of neighbours overlap or touch, so a run of queries sees all between two.
  const auto along = [windows](int axis, const Interval& queries) {
    const auto window_of = [&](int64_t c) { return axis_window(windows, windows.axis[axis], static_cast<int32_t>(c)); };
    return Interval{window_of(queries.first).begin, window_of(queries.last).end - 1};
  };
  BlockRule rule = box_rule(video, grid, [=](const Box& queries) {
    return Box{along(0, queries.frame), along(1, queries.row), along(2, queries.column)};
  });
  rule.sees = [=](int32_t i, int32_t j) { return neighbours(windows, i, j); };
  return rule;
}

}  // namespace mfa
