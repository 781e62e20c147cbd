// selectors.h: block masks from what is in q and k. Inputs are checked by the callers: q [B, Hq, Nq, D], k [B, Hkv, Nk,
// D], Hq a multiple of Hkv, lengths above 0.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "masks/block_pattern.h"
#include "masks/pooling.h"

namespace mfa {

// Of the tiles that `allowed` shows to a query tile, the `top_k` whose mean key has the largest product with the mean
// query, averaged over batch entries and heads: one mask for all.
BlockPattern averaged_top_tiles(const SelectionOperand& q, const SelectionOperand& k, const BlockRule& allowed,
                                int64_t top_k);

// The `top_k` key tiles of each query tile, batch entry and head by the products of means. `centred`: the mean key of
// all tokens is subtracted first. `q_sizes` and `k_sizes`: as tile_means().
struct PooledTopOptions {
  int64_t top_k = 1;
  bool centred = false;
  std::vector<int32_t> q_sizes, k_sizes;
};
BlockPattern pooled_top_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                              const PooledTopOptions& options);

// Draft mask (Zhuang et al., FlashVSR, arXiv:2510.12747): tokens lie window by window, `rows * columns` windows to a
// time chunk; the window of a tile sees those in a square of `local_range` around it in every chunk; the softmax of
// the scaled products of means over them; and of all entries of a head's chunk of queries the `budget` largest.
struct DraftOptions {
  int64_t rows = 1, columns = 1;
  int64_t local_range = 11;
  int64_t budget = 1;
};
BlockPattern draft_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                         const DraftOptions& options);

// What draft_tiles() does with the scores of one head, [query tiles, key tiles].
void select_draft(const float* scores, int32_t query_tiles, int32_t key_tiles, const DraftOptions& options,
                  uint8_t* keep);

// SpargeAttn (Zhang et al., arXiv:2502.18137).
struct SimilarityMassOptions {
  double mass = 0.98;              // of the softmax of the scaled products of means
  std::optional<double> fraction;  // instead of the mass: this share of the key tiles
  double similarity = 0.6;         // tiles less similar to themselves are kept with all their partners
  bool causal = false;
  bool sink = false;  // the first key tile is kept
};
BlockPattern similarity_mass_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                                   const SimilarityMassOptions& options);

// XAttention (Xu et al., arXiv:2503.16428): sums of the score matrix along antidiagonals of stride x stride squares.
struct AntidiagonalOptions {
  int32_t stride = 16;  // divides the sides of a tile
  double mass = 0.9;
  bool causal = false;
};
BlockPattern antidiagonal_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                                const AntidiagonalOptions& options);

// Groups of `stride` rows of head (b, h) as one row each, [ceil(N / stride), stride * D]; `reversed`: the last row
// first. Rows past the end are 0.
std::vector<float> strided_rows(const SelectionOperand& x, int64_t b, int64_t h, int32_t stride, bool reversed);

}  // namespace mfa
