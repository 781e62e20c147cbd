// block_rules.h: who sees whom in block-sparse attention, by tiles and by tokens. Plain C++20.
//
// A rule says for a tile of block_q queries and a tile of block_k keys whether the pair is computed, and, where it is
// defined on tokens, for a query and a key whether they see each other. Tiles cover the tokens: a visible pair of
// tokens always lies in a visible tile. Tokens of a video are numbered row-major over (frame, row, column).
//
// Every function throws std::invalid_argument, "[function] what was expected; got what", for arguments that are not as
// said here.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "mfa/api.h"

namespace mfa {

struct TileSize {
  int64_t q = 32, k = 16;
};

// The tiles of the package that this one replaces: 32 queries by 32 keys up to head dimension 64, else by 16 keys.
inline TileSize default_tiles(int64_t head_dim) { return {32, head_dim <= 64 ? 32 : 16}; }

// Lengths in tokens and the tiles that they are cut into; the last tile of each axis may be shorter.
struct TileGrid {
  int32_t Nq = 0, Nk = 0, block_q = 1, block_k = 1;
  int32_t query_blocks() const { return static_cast<int32_t>((int64_t{Nq} + block_q - 1) / block_q); }
  int32_t key_blocks() const { return static_cast<int32_t>((int64_t{Nk} + block_k - 1) / block_k); }
  bool operator==(const TileGrid&) const = default;
};

struct BlockRule {
  TileGrid grid;
  // Sets row[c] = 1 for every key block c that query block `r` sees; the row is zero on entry. Called by many threads.
  std::function<void(int32_t r, uint8_t* row)> mark;
  // Whether query token i sees key token j.
  std::function<bool(int32_t i, int32_t j)> sees;
  // As `mark`, only the blocks that hold a visible pair of tokens. Null: `mark` marks no others.
  std::function<void(int32_t r, uint8_t* row)> mark_exact = nullptr;
};

// The same rule with the tiles that hold a visible pair of tokens, and no others.
MFA_API BlockRule exact(BlockRule rule);

// The masks as bytes, 1 = visible: tiles [query_blocks, key_blocks] and tokens [Nq, Nk].
MFA_API void write_tiles(const BlockRule& rule, uint8_t* out);
MFA_API void write_tokens(const BlockRule& rule, uint8_t* out);

// ---- sequences ------------------------------------------------------------------------------------------------------
// j <= i.
MFA_API BlockRule causal_blocks(int64_t tokens, TileSize tile);

// |i - j| <= window, and j <= i if causal.
MFA_API BlockRule sliding_window_blocks(int64_t tokens, int64_t window, bool causal, TileSize tile);

// As the window, and the first `sinks` keys for every query.
MFA_API BlockRule sink_window_blocks(int64_t tokens, int64_t window, int64_t sinks, bool causal, TileSize tile);

// |i / block - j / block| <= reach, rounded down.
MFA_API BlockRule diagonal_blocks(int64_t tokens, int64_t block, int64_t reach, TileSize tile);

// |i - j| <= window / 2, or j is a multiple of `stride`. Tiles: centres within window / 2 and the longer side of a
// tile.
MFA_API BlockRule strided_blocks(int64_t tokens, int64_t window, int64_t stride, TileSize tile);

// Same segment of lengths that add up to the tokens, and j <= i if causal (which needs the same lengths for both).
MFA_API BlockRule segment_blocks(std::span<const int64_t> query_lengths, std::span<const int64_t> key_lengths,
                                 bool causal, TileSize tile, const char* function = "segment_blocks");

// Everything.
MFA_API BlockRule full_blocks(int64_t queries, int64_t keys, TileSize tile, const char* function = "full_blocks");

// Same frame, where frame f has the tokens f * (tokens / frames) onwards and the last frame also those left over.
MFA_API BlockRule cross_frame_blocks(int64_t queries, int64_t keys, int64_t query_frames, int64_t key_frames,
                                     TileSize tile, const char* function = "cross_frame_blocks");

// ---- videos ---------------------------------------------------------------------------------------------------------
struct VideoShape {
  int64_t frames = 1, height = 1, width = 1;  // in tokens
};

// Distances along (frame, row, column) of at most the radius; a negative radius is open. Tiles: by the boxes around
// them, so more tiles than hold a visible pair where a tile runs over the end of a row.
struct VideoRadius {
  int64_t frame = -1, row = -1, column = -1;
};
MFA_API BlockRule spatial_blocks(VideoShape shape, VideoRadius radius, TileSize tile,
                                 const char* function = "spatial_blocks");

// Same place in the frame and frames at most `radius` apart (negative: open); causal: no later frame.
MFA_API BlockRule axial_temporal_blocks(VideoShape shape, int64_t radius, bool causal, TileSize tile);

// Frames at most `local` apart or apart by a multiple of `dilation`.
MFA_API BlockRule dilated_temporal_blocks(VideoShape shape, int64_t dilation, int64_t local, TileSize tile);

// Keys of the reference frames for every query; others within the radius.
MFA_API BlockRule reference_frame_blocks(VideoShape shape, std::span<const int64_t> references, VideoRadius radius,
                                         TileSize tile);

// Neighbourhood attention over one to three axes, windows cut at the borders. Tiles: by the boxes around them.
MFA_API BlockRule neighbourhood_blocks(std::span<const int64_t> shape, std::span<const int64_t> window,
                                       std::span<const int64_t> stride, TileSize tile);

// Groups of tile pairs by the distance between their frames, each kept with a probability.
struct DistanceGroup {
  int64_t low = 0, high = 0;  // frames apart: low <= distance < high
  double density = 1;         // 1 and above: all
};
// One uniform draw for each tile pair, those of numpy's RandomState(seed).random((query blocks, key blocks)), compared
// with the density of each group. The distance of two tiles is that of their nearest frames; there is no rule on
// tokens beyond the tile's.
MFA_API BlockRule temporal_group_blocks(int64_t frames, int64_t frame_tokens, std::span<const DistanceGroup> groups,
                                        uint32_t seed, TileSize tile);

// ---- tiles as the tokens of a grid ----------------------------------------------------------------------------------
// Sliding tile attention: one token a tile. Along each axis |clamp(i, w / 2, n - 1 - w / 2) - j| <= w / 2, where the
// window is inside the grid. `extra` blocks at the end (text) see all and are seen by all.
MFA_API BlockRule sliding_tile_blocks(std::span<const int64_t> tiles, std::span<const int64_t> window,
                                      int64_t tile_tokens, int64_t extra_tokens);

// The order that makes tiles of a grid contiguous: order[n] is the row-major token at place n; sizes are those of the
// tiles, which are smaller at the far borders.
struct TileOrder {
  std::vector<int32_t> order;
  std::vector<int32_t> sizes;
};
MFA_API TileOrder tile_order(std::span<const int64_t> shape, std::span<const int64_t> tile);

}  // namespace mfa
