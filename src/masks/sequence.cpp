// sequence.cpp: rules on the distance of tokens in a sequence.
#include <cstdlib>
#include <memory>
#include <vector>

#include "common/check.h"
#include "masks/block_pattern.h"
#include "masks/marking.h"

namespace mfa {

BlockRule full_blocks(int64_t queries, int64_t keys, TileSize tile, const char* function) {
  const TileGrid grid = checked_grid(function, queries, keys, tile);
  return {grid, [grid](int32_t, uint8_t* row) { mark_tokens(grid, 0, grid.Nk - int64_t{1}, row); },
          [](int32_t, int32_t) { return true; }};
}

BlockRule causal_blocks(int64_t tokens, TileSize tile) {
  const TileGrid grid = checked_grid("make_causal_block_mask", tokens, tokens, tile);
  return {grid, [grid](int32_t r, uint8_t* row) { mark_tokens(grid, 0, query_tokens(grid, r).last, row); },
          [](int32_t i, int32_t j) { return j <= i; }};
}

BlockRule sliding_window_blocks(int64_t tokens, int64_t window, bool causal, TileSize tile) {
  constexpr const char* kFunction = "make_sliding_window_mask";
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  check(window >= 0, kFunction, "window_size must be 0 or more; got ", window);
  window = std::min(window, tokens);
  return {grid,
          [=](int32_t r, uint8_t* row) {
            const TokenRange q = query_tokens(grid, r);
            mark_tokens(grid, q.first - window, causal ? q.last : q.last + window, row);
          },
          [=](int32_t i, int32_t j) { return std::abs(int64_t{i} - j) <= window && (!causal || j <= i); }};
}

BlockRule sink_window_blocks(int64_t tokens, int64_t window, int64_t sinks, bool causal, TileSize tile) {
  constexpr const char* kFunction = "make_sink_window_mask";
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  check(window >= 0 && sinks >= 0, kFunction, "window_size and num_sink_tokens must be 0 or more; got ", window,
        " and ", sinks);
  window = std::min(window, tokens);
  return {
      grid,
      [=](int32_t r, uint8_t* row) {
        const TokenRange q = query_tokens(grid, r);
        mark_tokens(grid, 0, sinks - 1, row);
        mark_tokens(grid, q.first - window, causal ? q.last : q.last + window, row);
      },
      [=](int32_t i, int32_t j) { return j < sinks || (std::abs(int64_t{i} - j) <= window && (!causal || j <= i)); }};
}

BlockRule diagonal_blocks(int64_t tokens, int64_t block, int64_t reach, TileSize tile) {
  constexpr const char* kFunction = "make_diagonal_mask";
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  check(block >= 1 && reach >= 0, kFunction,
        "block_size must be 1 or more, num_diagonals and bandwidth 0 or more; got blocks of ", block,
        " and a reach of ", reach);
  block = std::min(block, std::max<int64_t>(1, tokens));  // a longer one holds all tokens, too
  reach = std::min(reach, tokens);
  return {grid,
          [=](int32_t r, uint8_t* row) {
            const TokenRange q = query_tokens(grid, r);
            mark_tokens(grid, (q.first / block - reach) * block, (q.last / block + reach + 1) * block - 1, row);
          },
          [=](int32_t i, int32_t j) { return std::abs(i / block - j / block) <= reach; }};
}

BlockRule strided_blocks(int64_t tokens, int64_t window, int64_t stride, TileSize tile) {
  constexpr const char* kFunction = "make_strided_mask";
  const TileGrid grid = checked_grid(kFunction, tokens, tokens, tile);
  check(window >= 0, kFunction, "window_size must be 0 or more; got ", window);
  check(stride >= 1, kFunction, "global_stride must be 1 or more; got ", stride);
  auto global = std::make_shared<std::vector<uint8_t>>(grid.key_blocks());
  for (int32_t c = 0; c < grid.key_blocks(); ++c) {
    const TokenRange k = key_tokens(grid, c);
    (*global)[c] = k.last / stride * stride >= k.first;
  }
  const int64_t half = std::min(window / 2, tokens);
  // Centres of tiles of which two tokens are `half` apart are at most half a tile of each side further apart.
  const int64_t reach = half + std::max(grid.block_q, grid.block_k);
  return {grid,
          [=](int32_t r, uint8_t* row) {
            const int64_t centre = int64_t{r} * grid.block_q + grid.block_q / 2, middle = grid.block_k / 2;
            std::copy(global->begin(), global->end(), row);
            // Tiles whose centres c * block_k + middle lie in centre - reach .. centre + reach.
            const int64_t low = std::max<int64_t>(0, centre - reach - middle + grid.block_k - 1) / grid.block_k;
            if (centre + reach < middle) return;
            const int64_t high = std::min<int64_t>(grid.key_blocks() - 1, (centre + reach - middle) / grid.block_k);
            if (low <= high) std::memset(row + low, 1, high - low + 1);
          },
          [=](int32_t i, int32_t j) { return std::abs(int64_t{i} - j) <= half || j % stride == 0; },
          [=](int32_t r, uint8_t* row) {
            const TokenRange q = query_tokens(grid, r);
            std::copy(global->begin(), global->end(), row);
            mark_tokens(grid, q.first - half, q.last + half, row);
          }};
}

// ---- segments and frames of a sequence ------------------------------------------------------------------------------
namespace {

// First tokens of segments, and the number of all tokens at the end.
using Starts = std::vector<int64_t>;

Starts segment_starts(std::span<const int64_t> lengths, const char* function) {
  Starts starts = {0};
  for (const int64_t length : lengths) {
    check(length >= 0 && length < int64_t{1} << 31, function, "segment lengths must be 0 to 2^31 - 1; got ", length);
    starts.push_back(starts.back() + length);
    check(starts.back() < int64_t{1} << 31, function, "segments must have fewer than 2^31 tokens together; got ",
          starts.back(), " or more");
  }
  return starts;
}

// The segment of a token: the last that starts at it or before. Empty segments before it start no later than they end.
int64_t segment_of(const Starts& starts, int64_t token) {
  return std::upper_bound(starts.begin(), starts.end(), token) - starts.begin() - 1;
}

}  // namespace

BlockRule segment_blocks(std::span<const int64_t> query_lengths, std::span<const int64_t> key_lengths, bool causal,
                         TileSize tile, const char* function) {
  check(query_lengths.size() == key_lengths.size(), function,
        "queries and keys must have the same number of segments; got ", query_lengths.size(), " and ",
        key_lengths.size());
  const auto queries = std::make_shared<const Starts>(segment_starts(query_lengths, function));
  const auto keys = std::make_shared<const Starts>(segment_starts(key_lengths, function));
  check(!causal || *queries == *keys, function, "causal segments must have as many queries as keys");
  const TileGrid grid = checked_grid(function, queries->back(), keys->back(), tile);
  return {grid,
          [=](int32_t r, uint8_t* row) {
            const TokenRange q = query_tokens(grid, r);
            for (int64_t s = segment_of(*queries, q.first); s <= segment_of(*queries, q.last); ++s) {
              if ((*queries)[s] == (*queries)[s + 1]) continue;  // no query of this tile is in it
              const int64_t last = (*keys)[s + 1] - 1;
              mark_tokens(grid, (*keys)[s], causal ? std::min(last, q.last) : last, row);
            }
          },
          [=](int32_t i, int32_t j) { return segment_of(*queries, i) == segment_of(*keys, j) && (!causal || j <= i); }};
}

BlockRule cross_frame_blocks(int64_t queries, int64_t keys, int64_t query_frames, int64_t key_frames, TileSize tile,
                             const char* function) {
  const TileGrid grid = checked_grid(function, queries, keys, tile);
  check(query_frames >= 1 && key_frames >= 1, function, "numbers of frames must be 1 or more; got ", query_frames,
        " and ", key_frames);
  const int64_t per_q = queries / query_frames, per_k = keys / key_frames;
  check(per_q >= 1 && per_k >= 1, function, "each frame must have a token; got ", queries, " queries in ", query_frames,
        " frames and ", keys, " keys in ", key_frames);
  return {grid,
          [=](int32_t r, uint8_t* row) {
            const TokenRange q = query_tokens(grid, r);
            const int64_t first = std::min(q.first / per_q, query_frames - 1);
            const int64_t last = std::min(q.last / per_q, query_frames - 1);
            if (first >= key_frames) return;
            mark_tokens(grid, first * per_k, last >= key_frames - 1 ? keys - 1 : (last + 1) * per_k - 1, row);
          },
          [=](int32_t i, int32_t j) {
            return std::min(i / per_q, query_frames - 1) == std::min(j / per_k, key_frames - 1);
          }};
}

}  // namespace mfa
