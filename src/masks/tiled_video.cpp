// tiled_video.cpp: rules on tiles themselves: sliding tiles, groups of distances, and the order that makes tiles of a
// grid contiguous.
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "common/check.h"
#include "masks/block_pattern.h"
#include "masks/marking.h"

namespace mfa {
namespace {

// numpy's RandomState(seed).random(): MT19937 seeded by one word, 53 bits of two draws.
class NumpyUniform {
 public:
  explicit NumpyUniform(uint32_t seed) : words_(seed) {}
  double next() {
    const auto high = static_cast<uint32_t>(words_() >> 5), low = static_cast<uint32_t>(words_() >> 6);
    return (high * 0x1p26 + low) * 0x1p-53;
  }

 private:
  std::mt19937 words_;
};

// One, two or three extents as three, with leading ones.
std::vector<int64_t> three_axes(std::span<const int64_t> extents) {
  std::vector<int64_t> all(3 - extents.size(), 1);
  all.insert(all.end(), extents.begin(), extents.end());
  return all;
}

// The product of extents, each 1 or more.
int64_t checked_product(std::span<const int64_t> extents, const char* function, const char* what) {
  int64_t product = 1;
  for (const int64_t extent : extents) {
    check(extent >= 1, function, what, " must be 1 or more along each axis; got ", extent);
    check(extent < int64_t{1} << 31, function, what, " must be below 2^31 along each axis; got ", extent);
    product *= extent;
    check(product < int64_t{1} << 31, function, what, " must have a product below 2^31; got ", product, " or more");
  }
  return product;
}

}  // namespace

BlockRule temporal_group_blocks(int64_t frames, int64_t frame_tokens, std::span<const DistanceGroup> groups,
                                uint32_t seed, TileSize tile) {
  constexpr const char* kFunction = "make_temporal_group_mask";
  const int64_t extents[] = {frames, frame_tokens};
  const int64_t tokens = checked_product(extents, kFunction, "num_frames and spatial_size");
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  const int64_t NQ = grid.query_blocks(), NK = grid.key_blocks();
  check(NQ * NK <= int64_t{1} << 32, kFunction, "expected at most 2^32 tiles, each has its own draw; got ", NQ, " by ",
        NK);
  bool draws = false;
  for (const DistanceGroup& group : groups) {
    check(!std::isnan(group.density), kFunction, "the density of a group must be a number; got NaN");
    draws |= group.density < 1;
  }
  // The draws have one order, so all tiles are decided here.
  auto tiles = std::make_shared<std::vector<uint8_t>>(NQ * NK);
  std::vector<int64_t> first_frame(NK), last_frame(NK);
  for (int32_t c = 0; c < NK; ++c) {
    first_frame[c] = key_tokens(grid, c).first / frame_tokens;
    last_frame[c] = key_tokens(grid, c).last / frame_tokens;
  }
  NumpyUniform uniform(seed);
  for (int64_t r = 0; r < NQ; ++r) {
    const TokenRange q = query_tokens(grid, static_cast<int32_t>(r));
    const int64_t first = q.first / frame_tokens, last = q.last / frame_tokens;
    for (int64_t c = 0; c < NK; ++c) {
      const int64_t gap = std::max({int64_t{0}, first_frame[c] - last, first - last_frame[c]});
      const double u = draws ? uniform.next() : 0;
      for (const DistanceGroup& group : groups) {
        if (group.low <= gap && gap < group.high && (group.density >= 1 || u < group.density)) {
          (*tiles)[r * NK + c] = 1;
          break;
        }
      }
    }
  }
  return {grid, [=](int32_t r, uint8_t* row) { std::copy_n(tiles->begin() + r * NK, NK, row); },
          [=](int32_t i, int32_t j) { return (*tiles)[i / grid.block_q * NK + j / grid.block_k] != 0; }};
}

BlockRule sliding_tile_blocks(std::span<const int64_t> tiles, std::span<const int64_t> window, int64_t tile_tokens,
                              int64_t extra_tokens) {
  constexpr const char* kFunction = "make_sliding_tile_mask";
  check(tiles.size() >= 1 && tiles.size() <= 3 && window.size() == tiles.size(), kFunction,
        "tiles and window must have 1 to 3 numbers, each as many; got ", tiles.size(), " and ", window.size());
  const int64_t count = checked_product(tiles, kFunction, "tiles");
  check(tile_tokens >= 1 && tile_tokens < int64_t{1} << 31, kFunction, "tile_tokens must be 1 to 2^31 - 1; got ",
        tile_tokens);
  check(extra_tokens >= 0 && extra_tokens < int64_t{1} << 31, kFunction, "text_tokens must be 0 to 2^31 - 1; got ",
        extra_tokens);
  for (const int64_t w : window) check(w >= 1, kFunction, "window must be 1 or more along each axis; got ", w);
  const int64_t tokens = count * tile_tokens + extra_tokens;
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, {tile_tokens, tile_tokens});
  const std::vector<int64_t> n = three_axes(tiles), w = three_axes(window);
  // Tiles first .. last of axis x are seen by tile i.
  const auto seen = [n, w](int x, int64_t i) {
    const int64_t half = std::min(w[x] / 2, n[x]);
    const int64_t centre = std::min(std::max(i, half), n[x] - 1 - half);
    return TokenRange{std::max<int64_t>(0, centre - half), std::min(n[x] - 1, centre + half)};
  };
  return {grid,
          [=](int32_t r, uint8_t* row) {
            if (r >= count) {
              std::memset(row, 1, grid.key_blocks());
              return;
            }
            std::memset(row + count, 1, grid.key_blocks() - count);
            const TokenRange t = seen(0, r / (n[1] * n[2])), y = seen(1, r / n[2] % n[1]), x = seen(2, r % n[2]);
            for (int64_t a = t.first; a <= t.last; ++a) {
              for (int64_t b = y.first; b <= y.last; ++b) {
                std::memset(row + (a * n[1] + b) * n[2] + x.first, 1, x.last - x.first + 1);
              }
            }
          },
          [=](int32_t i, int32_t j) {
            int64_t q = i / tile_tokens, k = j / tile_tokens;
            if (q >= count || k >= count) return true;
            for (int x = 2; x >= 0; --x) {
              const TokenRange range = seen(x, q % n[x]);
              if (k % n[x] < range.first || k % n[x] > range.last) return false;
              q /= n[x];
              k /= n[x];
            }
            return true;
          }};
}

TileOrder tile_order(std::span<const int64_t> shape, std::span<const int64_t> tile) {
  constexpr const char* kFunction = "tile_order";
  check(shape.size() >= 1 && shape.size() <= 3 && tile.size() == shape.size(), kFunction,
        "shape and tile must have 1 to 3 numbers, each as many; got ", shape.size(), " and ", tile.size());
  const int64_t tokens = checked_product(shape, kFunction, "shape");
  checked_product(tile, kFunction, "tile");
  const std::vector<int64_t> n = three_axes(shape), t = three_axes(tile);
  TileOrder result;
  result.order.reserve(tokens);
  for (int64_t f = 0; f < n[0]; f += t[0]) {
    for (int64_t y = 0; y < n[1]; y += t[1]) {
      for (int64_t x = 0; x < n[2]; x += t[2]) {
        const size_t before = result.order.size();
        for (int64_t a = f; a < std::min(n[0], f + t[0]); ++a) {
          for (int64_t b = y; b < std::min(n[1], y + t[1]); ++b) {
            for (int64_t c = x; c < std::min(n[2], x + t[2]); ++c) {
              result.order.push_back(static_cast<int32_t>((a * n[1] + b) * n[2] + c));
            }
          }
        }
        result.sizes.push_back(static_cast<int32_t>(result.order.size() - before));
      }
    }
  }
  return result;
}

}  // namespace mfa
