#include "masks/selectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "common/thread_pool.h"
#include "masks/marking.h"
#include "masks/selection.h"

namespace mfa {
namespace {

// Masks of every batch entry and head, written by query rows.
class KeptTiles {
 public:
  KeptTiles(TileGrid grid, int32_t batch, int32_t heads)
      : grid_(grid), batch_(batch), heads_(heads), keep_(int64_t{batch} * heads * grid.query_blocks() * columns()) {}
  uint8_t* head(int64_t b, int64_t h) { return keep_.data() + (b * heads_ + h) * grid_.query_blocks() * columns(); }
  BlockPattern pattern() const {
    return BlockPattern::from_rows(grid_, batch_, heads_, [this](int32_t b, int32_t h, int32_t r, uint8_t* row) {
      const int64_t index = (int64_t{b} * heads_ + h) * grid_.query_blocks() + r;
      std::copy_n(keep_.data() + index * columns(), columns(), row);
    });
  }

 private:
  int64_t columns() const { return grid_.key_blocks(); }
  TileGrid grid_;
  int32_t batch_, heads_;
  std::vector<uint8_t> keep_;
};

// Calls select(r, scores of row r, row of the mask) for the rows of every head; scores are alpha times the products of
// the tiles' means.
template <typename Select>
BlockPattern select_by_rows(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                            const std::vector<float>& mean_q, const std::vector<float>& mean_k, float alpha,
                            const Select& select) {
  const int32_t NQ = grid.query_blocks(), NK = grid.key_blocks();
  KeptTiles kept(grid, q.B, q.H);
  std::vector<float> scores(int64_t{NQ} * NK);
  for (int64_t b = 0; b < q.B; ++b) {
    for (int64_t h = 0; h < q.H; ++h) {
      const int64_t kv = b * k.H + h / (q.H / k.H);
      product(mean_q.data() + (b * q.H + h) * NQ * q.D, mean_k.data() + kv * NK * q.D, NQ, NK, q.D, alpha,
              scores.data());
      uint8_t* keep = kept.head(b, h);
      parallel_for(
          NQ, [&](int64_t r, int) { select(b, h, static_cast<int32_t>(r), scores.data() + r * NK, keep + r * NK); });
    }
  }
  return kept.pattern();
}

float softmax_scale(int32_t D) { return 1.f / std::sqrt(static_cast<float>(D)); }

// Key tiles that hold a key at or before the last query of tile r; all of them unless causal.
int32_t seen_tiles(const TileGrid& grid, int32_t r, bool causal) {
  if (!causal) return grid.key_blocks();
  const int64_t last = query_tokens(grid, r).last + std::max(0, grid.Nk - grid.Nq);
  return static_cast<int32_t>(std::min<int64_t>(grid.key_blocks(), last / grid.block_k + 1));
}

std::vector<int32_t> first_integers(int32_t n) {
  std::vector<int32_t> all(n);
  std::iota(all.begin(), all.end(), 0);
  return all;
}

}  // namespace

BlockPattern averaged_top_tiles(const SelectionOperand& q, const SelectionOperand& k, const BlockRule& allowed,
                                int64_t top_k) {
  const TileGrid& grid = allowed.grid;
  const int32_t NQ = grid.query_blocks(), NK = grid.key_blocks(), G = q.H / k.H;
  const std::vector<float> mean_q = tile_means(q, grid.block_q), mean_k = tile_means(k, grid.block_k);
  // The sum over heads of products is one product of long rows; heads of a group share their key, so they add first.
  const int64_t width = int64_t{k.B} * k.H * k.D;
  std::vector<float> rows_q(NQ * width), rows_k(NK * width);
  for (int64_t g = 0; g < int64_t{k.B} * k.H; ++g) {
    for (int64_t c = 0; c < NK; ++c) std::copy_n(mean_k.data() + (g * NK + c) * k.D, k.D, &rows_k[c * width + g * k.D]);
    for (int64_t h = g * G; h < (g + 1) * G; ++h) {
      for (int64_t r = 0; r < NQ; ++r) {
        for (int64_t d = 0; d < q.D; ++d) rows_q[r * width + g * q.D + d] += mean_q[(h * NQ + r) * q.D + d];
      }
    }
  }
  std::vector<float> scores(int64_t{NQ} * NK);
  product(rows_q.data(), rows_k.data(), NQ, NK, static_cast<int32_t>(width), 1.f / static_cast<float>(q.B * q.H),
          scores.data());
  return BlockPattern::from_rows(grid, 1, 1, [&](int32_t, int32_t, int32_t r, uint8_t* row) {
    allowed.mark(r, row);
    std::vector<int32_t> candidates;
    for (int32_t c = 0; c < NK; ++c) {
      if (row[c]) candidates.push_back(c);
    }
    std::memset(row, 0, NK);
    keep_top(scores.data() + int64_t{r} * NK, candidates, top_k, row);
  });
}

BlockPattern pooled_top_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                              const PooledTopOptions& options) {
  const int32_t NK = grid.key_blocks();
  const std::vector<float> mean_q = tile_means(q, grid.block_q, options.q_sizes);
  std::vector<float> mean_k = tile_means(k, grid.block_k, options.k_sizes);
  if (options.centred) {
    const std::vector<float> centre = tile_means(k, k.N);
    for (int64_t i = 0; i < static_cast<int64_t>(mean_k.size()); ++i) {
      mean_k[i] -= centre[i / (int64_t{NK} * k.D) * k.D + i % k.D];
    }
  }
  return select_by_rows(q, k, grid, mean_q, mean_k, 1.f,
                        [&](int64_t, int64_t, int32_t, const float* scores, uint8_t* row) {
                          std::vector<int32_t> candidates = first_integers(NK);
                          keep_top(scores, candidates, options.top_k, row);
                        });
}

void select_draft(const float* scores, int32_t query_tiles, int32_t key_tiles, const DraftOptions& options,
                  uint8_t* keep) {
  const int64_t windows = options.rows * options.columns, chunks = query_tiles / windows;
  std::vector<double> weights(windows * key_tiles);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    parallel_for(windows, [&](int64_t w, int) {
      std::vector<int32_t> candidates;
      const int64_t low_row = w / options.columns - options.local_range / 2;
      const int64_t low_column = w % options.columns - options.local_range / 2;
      for (int32_t c = 0; c < key_tiles; ++c) {
        const int64_t row = c % windows / options.columns - low_row, column = c % options.columns - low_column;
        if (0 <= row && row < options.local_range && 0 <= column && column < options.local_range) {
          candidates.push_back(c);
        }
      }
      softmax(scores + (chunk * windows + w) * key_tiles, key_tiles, candidates, weights.data() + w * key_tiles);
    });
    keep_budget(weights, options.budget, keep + chunk * windows * key_tiles);
  }
}

BlockPattern draft_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                         const DraftOptions& options) {
  const int32_t NQ = grid.query_blocks(), NK = grid.key_blocks();
  const std::vector<float> mean_q = tile_means(q, grid.block_q), mean_k = tile_means(k, grid.block_k);
  KeptTiles kept(grid, q.B, q.H);
  std::vector<float> scores(int64_t{NQ} * NK);
  for (int64_t b = 0; b < q.B; ++b) {
    for (int64_t h = 0; h < q.H; ++h) {
      const int64_t kv = b * k.H + h / (q.H / k.H);
      product(mean_q.data() + (b * q.H + h) * NQ * q.D, mean_k.data() + kv * NK * q.D, NQ, NK, q.D, softmax_scale(q.D),
              scores.data());
      select_draft(scores.data(), NQ, NK, options, kept.head(b, h));
    }
  }
  return kept.pattern();
}

BlockPattern similarity_mass_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                                   const SimilarityMassOptions& options) {
  const int32_t NQ = grid.query_blocks(), NK = grid.key_blocks();
  const std::vector<float> similar_q = tile_similarities(q, grid.block_q),
                           similar_k = tile_similarities(k, grid.block_k);
  const auto threshold = static_cast<float>(options.similarity);
  return select_by_rows(q, k, grid, tile_means(q, grid.block_q), tile_means(k, grid.block_k), softmax_scale(q.D),
                        [&](int64_t b, int64_t h, int32_t r, const float* scores, uint8_t* row) {
                          const int32_t seen = seen_tiles(grid, r, options.causal);
                          if (similar_q[(b * q.H + h) * NQ + r] < threshold) {
                            std::memset(row, 1, seen);
                            return;
                          }
                          const float* similar = similar_k.data() + (b * k.H + h / (q.H / k.H)) * NK;
                          std::vector<int32_t> candidates;
                          for (int32_t c = 0; c < seen; ++c) {
                            if (similar[c] < threshold) {
                              row[c] = 1;
                            } else {
                              candidates.push_back(c);
                            }
                          }
                          if (options.fraction) {
                            keep_top(scores, candidates,
                                     std::max<int64_t>(1, static_cast<int64_t>(*options.fraction * NK)), row);
                          } else {
                            std::vector<double> weights(NK);
                            softmax(scores, NK, candidates, weights.data());
                            const std::vector<float> rounded(weights.begin(), weights.end());
                            keep_mass(rounded.data(), candidates, options.mass, row);
                          }
                          if (options.sink && seen > 0) row[0] = 1;
                        });
}

std::vector<float> strided_rows(const SelectionOperand& x, int64_t b, int64_t h, int32_t stride, bool reversed) {
  const int64_t groups = (int64_t{x.N} + stride - 1) / stride;
  std::vector<float> rows(groups * stride * x.D);
  parallel_for(groups, [&](int64_t g, int) {
    for (int64_t u = 0; u < stride && g * stride + u < x.N; ++u) {
      const int64_t source = x.row(b, h, g * stride + u);
      float* row = rows.data() + (g * stride + (reversed ? stride - 1 - u : u)) * x.D;
      for (int32_t d = 0; d < x.D; ++d) row[d] = load_as_float(x.tensor.data, x.dtype, source + d);
    }
  });
  return rows;
}

BlockPattern antidiagonal_tiles(const SelectionOperand& q, const SelectionOperand& k, TileGrid grid,
                                const AntidiagonalOptions& options) {
  const int32_t S = options.stride, NQ = grid.query_blocks(), NK = grid.key_blocks();
  const int32_t groups_k = (k.N + S - 1) / S, width = S * q.D;
  const int64_t groups_q = (int64_t{q.N} + S - 1) / S, rows_per_tile = grid.block_q / S,
                columns_per_tile = grid.block_k / S;
  const int64_t tiles_at_once = std::max<int64_t>(1, 256 / rows_per_tile);
  const float alpha = softmax_scale(q.D) / static_cast<float>(S);
  const int64_t offset = std::max(0, k.N - q.N);
  KeptTiles kept(grid, q.B, q.H);
  std::vector<float> scores(tiles_at_once * rows_per_tile * groups_k);
  for (int64_t b = 0; b < q.B; ++b) {
    for (int64_t h = 0; h < q.H; ++h) {
      const std::vector<float> rows_k = strided_rows(k, b, h / (q.H / k.H), S, false);
      const std::vector<float> rows_q = strided_rows(q, b, h, S, true);
      uint8_t* keep = kept.head(b, h);
      for (int64_t first = 0; first < NQ; first += tiles_at_once) {
        const int64_t tiles = std::min<int64_t>(tiles_at_once, NQ - first), row = first * rows_per_tile;
        product(rows_q.data() + row * width, rows_k.data(), std::min(groups_q - row, tiles * rows_per_tile), groups_k,
                width, alpha, scores.data());
        parallel_for(tiles, [&](int64_t tile, int) {
          const auto r = static_cast<int32_t>(first + tile);
          std::vector<double> sums(NK), weights(groups_k);
          const int64_t last = std::min(groups_q, (r + int64_t{1}) * rows_per_tile);
          double total = 0;
          for (int64_t i = r * rows_per_tile; i < last; ++i) {
            // Causal: groups of keys of which one is at or before the last query of the group.
            const int64_t end = std::min<int64_t>(q.N, (i + 1) * S) - 1 + offset;
            const int64_t groups = options.causal ? std::min<int64_t>(groups_k, end / S + 1) : groups_k;
            softmax(scores.data() + (i - row) * groups_k, groups_k, first_integers(static_cast<int32_t>(groups)),
                    weights.data());
            for (int64_t g = 0; g < groups; ++g) sums[g / columns_per_tile] += weights[g];
            total += 1;
          }
          uint8_t* mask = keep + int64_t{r} * NK;
          const int32_t seen = seen_tiles(grid, r, options.causal);
          const std::vector<float> rounded(sums.begin(), sums.end());
          std::vector<int32_t> candidates = first_integers(seen);
          keep_mass(rounded.data(), candidates, options.mass * total, mask);
          if (!options.causal) return;
          mask[0] = 1;
          const TokenRange queries = query_tokens(grid, r);
          const int64_t diagonal = (queries.first + offset) / grid.block_k;
          for (int64_t c = diagonal; c < seen; ++c) mask[c] = 1;
        });
      }
    }
  }
  return kept.pattern();
}

}  // namespace mfa
