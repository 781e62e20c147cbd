// Every rule against brute force over pairs of tokens: each visible pair lies in a visible tile, rules that are exact
// have no other tiles, and exact() leaves no other tiles of any rule.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "mfa/block_rules.h"
#include "support/json.h"
#include "support/random.h"

namespace mfa {
namespace {

using testing::Json;
using testing::Random;
using Pair = std::function<bool(int64_t i, int64_t j)>;

std::vector<uint8_t> tiles_of(const BlockRule& rule) {
  std::vector<uint8_t> tiles(int64_t{rule.grid.query_blocks()} * rule.grid.key_blocks(), 9);
  write_tiles(rule, tiles.data());
  return tiles;
}

// The tiles that hold a pair that `visible` shows.
std::vector<uint8_t> brute_force(const TileGrid& grid, const Pair& visible) {
  const int64_t NK = grid.key_blocks();
  std::vector<uint8_t> tiles(grid.query_blocks() * NK);
  for (int64_t i = 0; i < grid.Nq; ++i) {
    for (int64_t j = 0; j < grid.Nk; ++j) {
      if (visible(i, j)) tiles[i / grid.block_q * NK + j / grid.block_k] = 1;
    }
  }
  return tiles;
}

enum class Tiles : uint8_t { exact, superset };

void expect_covers(const BlockRule& rule, const Pair& visible, Tiles kind) {
  const TileGrid& grid = rule.grid;
  std::vector<uint8_t> tokens(int64_t{grid.Nq} * grid.Nk, 9);
  write_tokens(rule, tokens.data());
  for (int64_t i = 0; i < grid.Nq; ++i) {
    for (int64_t j = 0; j < grid.Nk; ++j) ASSERT_EQ(tokens[i * grid.Nk + j], visible(i, j)) << i << ", " << j;
  }
  const std::vector<uint8_t> wanted = brute_force(grid, visible), tiles = tiles_of(rule);
  if (kind == Tiles::exact) {
    ASSERT_EQ(tiles, wanted);
  }
  for (size_t t = 0; t < tiles.size(); ++t) {
    ASSERT_LE(tiles[t], 1);
    ASSERT_LE(wanted[t], tiles[t]) << "tile " << t / grid.key_blocks() << ", " << t % grid.key_blocks();
  }
  ASSERT_EQ(tiles_of(exact(rule)), wanted);
}

// Runs `body` for 300 random tiles; a failure names its case.
void for_cases(uint64_t seed, const std::function<void(Random&, TileSize)>& body) {
  Random random(seed);
  for (int n = 0; n < testing::case_count(300); ++n) {
    SCOPED_TRACE("seed " + std::to_string(seed) + ", case " + std::to_string(n));
    const TileSize tile{random.integer(1, 20), random.integer(1, 20)};
    body(random, tile);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

struct Video {
  VideoShape shape;
  int64_t frame(int64_t token) const { return token / (shape.height * shape.width); }
  int64_t row(int64_t token) const { return token / shape.width % shape.height; }
  int64_t column(int64_t token) const { return token % shape.width; }
  int64_t tokens() const { return shape.frames * shape.height * shape.width; }
};

Video random_video(Random& random) {
  // Frames smaller than a tile, of about a tile, and of many.
  const int64_t most = random.pick({2, 5, 12});
  return {{random.integer(1, 6), random.integer(1, most), random.integer(1, most)}};
}

bool apart(int64_t a, int64_t b, int64_t most) { return most < 0 || std::abs(a - b) <= most; }

TEST(Rules, Full) {
  for_cases(1, [](Random& random, TileSize tile) {
    expect_covers(
        full_blocks(random.integer(0, 90), random.integer(0, 90), tile), [](int64_t, int64_t) { return true; },
        Tiles::exact);
  });
}

TEST(Rules, Causal) {
  for_cases(2, [](Random& random, TileSize tile) {
    expect_covers(
        causal_blocks(random.integer(0, 120), tile), [](int64_t i, int64_t j) { return j <= i; }, Tiles::exact);
  });
}

TEST(Rules, SlidingWindow) {
  for_cases(3, [](Random& random, TileSize tile) {
    const int64_t n = random.integer(0, 120), window = random.pick<int64_t>({0, 1, 7, 30, 200, INT64_MAX});
    const bool causal = random.chance(0.5);
    expect_covers(
        sliding_window_blocks(n, window, causal, tile),
        [=](int64_t i, int64_t j) { return std::abs(i - j) <= window && (!causal || j <= i); }, Tiles::exact);
  });
}

TEST(Rules, SinkWindow) {
  for_cases(4, [](Random& random, TileSize tile) {
    const int64_t n = random.integer(0, 120), window = random.integer(0, 40);
    const int64_t sinks = random.pick<int64_t>({0, 1, 5, 33, 500, INT64_MAX});
    const bool causal = random.chance(0.5);
    expect_covers(
        sink_window_blocks(n, window, sinks, causal, tile),
        [=](int64_t i, int64_t j) { return j < sinks || (std::abs(i - j) <= window && (!causal || j <= i)); },
        Tiles::exact);
  });
}

TEST(Rules, Diagonal) {
  for_cases(5, [](Random& random, TileSize tile) {
    const int64_t block = random.pick<int64_t>({1, 3, 16, 500, INT64_MAX}), reach = random.integer(0, 4);
    expect_covers(
        diagonal_blocks(random.integer(0, 120), block, reach, tile),
        [=](int64_t i, int64_t j) { return std::abs(i / block - j / block) <= reach; }, Tiles::exact);
  });
}

TEST(Rules, Strided) {
  for_cases(6, [](Random& random, TileSize tile) {
    const int64_t window = random.integer(0, 40), stride = random.pick<int64_t>({1, 2, 13, 50, 1000, INT64_MAX});
    expect_covers(
        strided_blocks(random.integer(0, 120), window, stride, tile),
        [=](int64_t i, int64_t j) { return std::abs(i - j) <= window / 2 || j % stride == 0; }, Tiles::superset);
  });
}

TEST(Rules, Segments) {
  for_cases(7, [](Random& random, TileSize tile) {
    const int64_t count = random.integer(0, 6);
    const bool causal = random.chance(0.4), cross = !causal && random.chance(0.5);
    std::vector<int64_t> queries, keys, of_query, of_key;
    for (int64_t s = 0; s < count; ++s) {
      queries.push_back(random.chance(0.3) ? 0 : random.integer(1, 40));
      keys.push_back(cross ? random.integer(0, 40) : queries.back());
      of_query.insert(of_query.end(), queries.back(), s);
      of_key.insert(of_key.end(), keys.back(), s);
    }
    expect_covers(
        segment_blocks(queries, keys, causal, tile),
        [&](int64_t i, int64_t j) { return of_query[i] == of_key[j] && (!causal || j <= i); }, Tiles::exact);
  });
}

TEST(Rules, CrossFrames) {
  for_cases(8, [](Random& random, TileSize tile) {
    const int64_t nq = random.integer(1, 90), nk = random.integer(1, 90);
    const int64_t fq = random.integer(1, std::min<int64_t>(nq, 9)), fk = random.integer(1, std::min<int64_t>(nk, 9));
    expect_covers(
        cross_frame_blocks(nq, nk, fq, fk, tile),
        [=](int64_t i, int64_t j) { return std::min(i / (nq / fq), fq - 1) == std::min(j / (nk / fk), fk - 1); },
        Tiles::exact);
  });
}

TEST(Rules, Spatial) {
  for_cases(9, [](Random& random, TileSize tile) {
    const Video v = random_video(random);
    const VideoRadius r{random.integer(-1, 3), random.integer(-1, 5), random.integer(-1, 5)};
    expect_covers(
        spatial_blocks(v.shape, r, tile),
        [&](int64_t i, int64_t j) {
          return apart(v.frame(i), v.frame(j), r.frame) && apart(v.row(i), v.row(j), r.row) &&
                 apart(v.column(i), v.column(j), r.column);
        },
        Tiles::superset);
  });
}

TEST(Rules, SpatialTilesAreThoseWhoseBoxesAreNear) {
  for_cases(10, [](Random& random, TileSize tile) {
    const Video v = random_video(random);
    const VideoRadius radius{random.integer(-1, 3), random.integer(-1, 5), random.integer(-1, 5)};
    const BlockRule rule = spatial_blocks(v.shape, radius, tile);
    const std::vector<uint8_t> tiles = tiles_of(rule);
    const auto box = [&](int64_t first, int64_t size) {  // lowest and highest frame, row and column
      std::vector<int64_t> b = {INT64_MAX, 0, INT64_MAX, 0, INT64_MAX, 0};
      for (int64_t t = first; t < std::min(v.tokens(), first + size); ++t) {
        const int64_t place[] = {v.frame(t), v.row(t), v.column(t)};
        for (int x = 0; x < 3; ++x) {
          b[2 * x] = std::min(b[2 * x], place[x]);
          b[2 * x + 1] = std::max(b[2 * x + 1], place[x]);
        }
      }
      return b;
    };
    for (int64_t r = 0; r < rule.grid.query_blocks(); ++r) {
      for (int64_t c = 0; c < rule.grid.key_blocks(); ++c) {
        const auto q = box(r * tile.q, tile.q), k = box(c * tile.k, tile.k);
        const int64_t limits[] = {radius.frame, radius.row, radius.column};
        bool near = true;
        for (int x = 0; x < 3; ++x) {
          const int64_t gap = std::max({int64_t{0}, q[2 * x] - k[2 * x + 1], k[2 * x] - q[2 * x + 1]});
          near &= limits[x] < 0 || gap <= limits[x];
        }
        ASSERT_EQ(tiles[r * rule.grid.key_blocks() + c], near) << r << ", " << c;
      }
    }
  });
}

TEST(Rules, AxialTemporal) {
  for_cases(11, [](Random& random, TileSize tile) {
    const Video v = random_video(random);
    const int64_t radius = random.pick<int64_t>({-1, 0, 1, 3, INT64_MAX});
    const bool causal = random.chance(0.5);
    expect_covers(
        axial_temporal_blocks(v.shape, radius, causal, tile),
        [&](int64_t i, int64_t j) {
          return v.row(i) == v.row(j) && v.column(i) == v.column(j) && apart(v.frame(i), v.frame(j), radius) &&
                 (!causal || v.frame(j) <= v.frame(i));
        },
        Tiles::exact);
  });
}

TEST(Rules, DilatedTemporal) {
  for_cases(12, [](Random& random, TileSize tile) {
    Video v = random_video(random);
    v.shape.frames = random.integer(1, 30);
    v.shape.width = random.integer(1, 3);
    const int64_t dilation = random.pick<int64_t>({1, 2, 3, 7, 100, INT64_MAX}), local = random.integer(0, 3);
    expect_covers(
        dilated_temporal_blocks(v.shape, dilation, local, tile),
        [&](int64_t i, int64_t j) {
          const int64_t d = std::abs(v.frame(i) - v.frame(j));
          return d <= local || d % dilation == 0;
        },
        Tiles::exact);
  });
}

TEST(Rules, ReferenceFrames) {
  for_cases(13, [](Random& random, TileSize tile) {
    const Video v = random_video(random);
    std::vector<int64_t> references(random.integer(0, 3));
    for (int64_t& frame : references) frame = random.integer(0, v.shape.frames - 1);
    const int64_t spatial = random.integer(-1, 4);
    const VideoRadius r{random.integer(0, 2), spatial, spatial};
    expect_covers(
        reference_frame_blocks(v.shape, references, r, tile),
        [&](int64_t i, int64_t j) {
          return std::count(references.begin(), references.end(), v.frame(j)) > 0 ||
                 (apart(v.frame(i), v.frame(j), r.frame) && apart(v.row(i), v.row(j), r.row) &&
                  apart(v.column(i), v.column(j), r.column));
        },
        Tiles::superset);
  });
}

TEST(Rules, Neighbourhood) {
  for_cases(14, [](Random& random, TileSize tile) {
    const size_t axes = random.integer(1, 3);
    std::vector<int64_t> shape(axes), window(axes), stride(axes);
    for (size_t x = 0; x < axes; ++x) {
      shape[x] = random.integer(1, axes == 1 ? 120 : axes == 2 ? 14 : 6);
      window[x] = random.integer(1, shape[x]);
      stride[x] = random.integer(1, window[x]);
    }
    expect_covers(
        neighbourhood_blocks(shape, window, stride, tile),
        [&](int64_t i, int64_t j) {
          for (size_t x = axes; x-- > 0;) {
            const int64_t n = shape[x], w = window[x], s = stride[x], g = i % n / s;
            const int64_t low = g * s - (w - s) / 2, high = (g + 1) * s + (w - s + 1) / 2 - 1;
            if (j % n < low || j % n > high) return false;
            i /= n;
            j /= n;
          }
          return true;
        },
        Tiles::superset);
  });
}

TEST(Rules, SlidingTiles) {
  for_cases(15, [](Random& random, TileSize) {
    const size_t axes = random.integer(1, 3);
    std::vector<int64_t> tiles(axes), window(axes);
    int64_t count = 1;
    for (size_t x = 0; x < axes; ++x) {
      tiles[x] = random.integer(1, axes == 1 ? 12 : 4);
      window[x] = random.integer(1, 9);
      count *= tiles[x];
    }
    const int64_t size = random.integer(1, 3), extra = random.chance(0.5) ? 0 : random.integer(1, 7);
    expect_covers(
        sliding_tile_blocks(tiles, window, size, extra),
        [&](int64_t i, int64_t j) {
          int64_t q = i / size, k = j / size;
          if (q >= count || k >= count) return true;
          for (size_t x = axes; x-- > 0;) {
            const int64_t n = tiles[x], half = window[x] / 2;
            const int64_t centre = std::min(std::max(q % n, half), n - 1 - half);
            if (std::abs(centre - k % n) > half) return false;
            q /= n;
            k /= n;
          }
          return true;
        },
        Tiles::exact);
  });
}

TEST(Rules, TemporalGroupsWithoutChanceGoByTheNearestFrames) {
  for_cases(16, [](Random& random, TileSize tile) {
    const int64_t frames = random.integer(1, 8), size = random.integer(1, 20), low = random.integer(0, 4);
    const DistanceGroup groups[] = {{low, low + random.integer(0, 3), 1.0}, {6, 7, 2.0}};
    const BlockRule rule = temporal_group_blocks(frames, size, groups, 42, tile);
    const std::vector<uint8_t> tiles = tiles_of(rule);
    for (int64_t r = 0; r < rule.grid.query_blocks(); ++r) {
      for (int64_t c = 0; c < rule.grid.key_blocks(); ++c) {
        int64_t gap = INT64_MAX;
        for (int64_t i = r * tile.q; i < std::min(frames * size, (r + 1) * tile.q); ++i) {
          for (int64_t j = c * tile.k; j < std::min(frames * size, (c + 1) * tile.k); ++j) {
            gap = std::min(gap, std::abs(i / size - j / size));
          }
        }
        ASSERT_EQ(tiles[r * rule.grid.key_blocks() + c], (gap >= low && gap < groups[0].high) || gap == 6);
      }
    }
  });
}

// The first draws of numpy.random.RandomState(42).random().
TEST(Rules, TemporalGroupsDrawWhatNumpyDraws) {
  const double draws[] = {0.3745401188473625,  0.9507143064099162,  0.7319939418114051,
                          0.5986584841970366,  0.15601864044243652, 0.15599452033620265,
                          0.05808361216819946, 0.8661761457749352,  0.6011150117432088};
  for (const double density : {0.0, 0.1, 0.16, 0.5, 0.6, 0.74, 0.9, 0.99}) {
    const DistanceGroup group{0, 100, density};
    const std::vector<uint8_t> tiles = tiles_of(temporal_group_blocks(3, 4, {&group, 1}, 42, {4, 4}));
    for (int t = 0; t < 9; ++t) EXPECT_EQ(tiles[t], draws[t] < density) << t << " at " << density;
  }
}

TEST(Rules, GoldenSlidingTiles) {
  const Json golden = Json::golden("block_masks.json");
  for (const Json& row : golden["sliding_tile"]) {
    const int64_t n = static_cast<int64_t>(row["tiles"].number()), w = static_cast<int64_t>(row["kernel"].number());
    const std::vector<uint8_t> tiles = tiles_of(sliding_tile_blocks({&n, 1}, {&w, 1}, 1, 0));
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < n; ++c) EXPECT_EQ(tiles[r * n + c], row["rows"][r].text()[c] == '1');
    }
  }
}

TEST(Rules, GoldenTileOrders) {
  const Json golden = Json::golden("block_masks.json");
  const auto integers = [](const Json& values) {
    const std::vector<double> flat = values.flat();
    return std::vector<int64_t>(flat.begin(), flat.end());
  };
  for (const char* name : {"ragged_tiles", "window_partition"}) {
    const Json& row = golden[name];
    const TileOrder order = tile_order(integers(row["dims"]), integers(row["tile"]));
    EXPECT_EQ(std::vector<int64_t>(order.sizes.begin(), order.sizes.end()), integers(row["sizes"]));
    const std::vector<int64_t> expected = integers(row[row.has("order") ? "order" : "first_tile"]);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), order.order.begin()));
  }
}

// Whatever numbers come in, a builder answers or refuses; sizes are small or absurd, never merely large.
TEST(Rules, MalformedArgumentsAreRefusedOrAnswered) {
  Random random(17);
  int refused = 0;
  const auto number = [&] {
    return random.pick<int64_t>({INT64_MIN, -1, 0, 1, 2, 3, 7, 40, int64_t{1} << 31, int64_t{1} << 40, INT64_MAX});
  };
  const auto numbers = [&] {
    std::vector<int64_t> values(random.integer(0, 4));
    for (int64_t& value : values) value = number();
    return values;
  };
  const int cases = 10000;
  for (int n = 0; n < cases; ++n) {
    const TileSize tile{number(), number()};
    const VideoShape shape{number(), number(), number()};
    const VideoRadius radius{number(), number(), number()};
    const bool causal = random.chance(0.5);
    const DistanceGroup group{number(), number(),
                              random.pick({-1.0, 0.5, 1.0, std::numeric_limits<double>::quiet_NaN()})};
    try {
      const BlockRule rule = [&] {
        switch (n % 15) {
          case 0:
            return causal_blocks(number(), tile);
          case 1:
            return sliding_window_blocks(number(), number(), causal, tile);
          case 2:
            return sink_window_blocks(number(), number(), number(), causal, tile);
          case 3:
            return diagonal_blocks(number(), number(), number(), tile);
          case 4:
            return strided_blocks(number(), number(), number(), tile);
          case 5:
            return segment_blocks(numbers(), numbers(), causal, tile);
          case 6:
            return full_blocks(number(), number(), tile);
          case 7:
            return cross_frame_blocks(number(), number(), number(), number(), tile);
          case 8:
            return spatial_blocks(shape, radius, tile);
          case 9:
            return axial_temporal_blocks(shape, number(), causal, tile);
          case 10:
            return dilated_temporal_blocks(shape, number(), number(), tile);
          case 11:
            return reference_frame_blocks(shape, numbers(), radius, tile);
          case 12:
            return neighbourhood_blocks(numbers(), numbers(), numbers(), tile);
          case 13:
            return temporal_group_blocks(number(), number(), {&group, 1}, 1, tile);
          default:
            return sliding_tile_blocks(numbers(), numbers(), number(), number());
        }
      }();
      ASSERT_LT(int64_t{rule.grid.Nq} * rule.grid.Nk, int64_t{1} << 34);
      tiles_of(rule);
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what()[0], '[');
      ++refused;
    }
  }
  EXPECT_GT(refused, cases / 2);
  EXPECT_LT(refused, cases);
}

}  // namespace
}  // namespace mfa
