#include "mfa/sparse.h"

#include <vector>

#include "common/check.h"
#include "mlx/route.h"
#include "mlx/sparse.h"

namespace mfa {

ScoreExtents score_extents(const mx::array& q, const mx::array& k, const char* function) {
  check(q.ndim() == 4 && k.ndim() == 4, function, "q and k must have 4 dimensions [B, H, N, D]; got shapes ", q.shape(),
        " and ", k.shape());
  return {q.shape(0), q.shape(1), q.shape(2), k.shape(2)};
}

BlockLists block_lists(const BlockMask& mask, const ScoreExtents& scores, const char* function) {
  const TileGrid& grid = mask.grid();
  check(grid.Nq == scores.Nq && grid.Nk == scores.Nk, function, "the block mask must be of ", scores.Nq,
        " queries and ", scores.Nk, " keys; got one of ", grid.Nq, " and ", grid.Nk);
  check(mask.batch() == 1 || mask.batch() == scores.B, function, "the block mask must be of 1 or ", scores.B,
        " batch entries; got ", mask.batch());
  check(mask.heads() == 1 || mask.heads() == scores.Hq, function, "the block mask must be of 1 or ", scores.Hq,
        " heads; got ", mask.heads());
  return {.block_q = grid.block_q,
          .block_k = grid.block_k,
          .lists_b = mask.batch() > 1,
          .lists_h = mask.heads() > 1,
          .offsets = mask.offsets(),
          .key_ids = mask.key_ids(),
          .transposed_offsets = mask.transposed_offsets(),
          .query_ids = mask.query_ids()};
}

namespace {

std::vector<mx::array> run(const mx::array& q, const mx::array& k, const mx::array& v, const BlockMask& mask,
                           const AttentionOptions& options, mx::StreamOrDevice s, bool wants_lse) {
  const char* function = name_of(options, "flash_attention_sparse");
  AttentionSources sources;
  sources.function = function;
  sources.blocks = block_lists(mask, score_extents(q, k, function), function);
  return launch(make_request(q, k, v, options, options.return_probs, s, sources), options.backend,
                {.lse = wants_lse, .probs = options.return_probs});
}

}  // namespace

mx::array attention_sparse(const mx::array& q, const mx::array& k, const mx::array& v, const BlockMask& mask,
                           const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, mask, options, s, false)[0];
}

AttentionResult attention_sparse_with_lse(const mx::array& q, const mx::array& k, const mx::array& v,
                                          const BlockMask& mask, const AttentionOptions& options,
                                          mx::StreamOrDevice s) {
  const auto outputs = run(q, k, v, mask, options, s, true);
  return {outputs[0], outputs[1], std::nullopt};
}

BlockMask to_block_mask(const mx::array& mask, int64_t Nq, int64_t Nk, int head_dim, std::optional<TileSize> tile,
                        const char* function) {
  check(mask.dtype() == mx::bool_, function, "block_mask must be bool; got ", mask.dtype());
  check(mask.ndim() >= 2 && mask.ndim() <= 4, function,
        "block_mask must have shape [NQ, NK], [H, NQ, NK] or [B, H, NQ, NK]; got ", mask.shape());
  check(!mask.is_tracer(), function,
        "block_mask must be known when the graph is built, not traced: make a BlockMask of it before");
  auto fits = [&](TileSize size) {
    return mask.shape(-2) == (Nq + size.q - 1) / size.q && mask.shape(-1) == (Nk + size.k - 1) / size.k;
  };
  if (tile) {
    check(tile->q >= 1 && tile->k >= 1, function, "block_size must be positive; got (", tile->q, ", ", tile->k, ")");
    check(fits(*tile), function, "block_mask must have ", (Nq + tile->q - 1) / tile->q, " by ",
          (Nk + tile->k - 1) / tile->k, " tiles of (", tile->q, ", ", tile->k, ") for ", Nq, " queries and ", Nk,
          " keys; got shape ", mask.shape());
    return BlockMask::from_dense(mask, Nq, Nk, *tile);
  }
  const TileSize first = default_tiles(head_dim), second = {32, 32};
  check(fits(first) || fits(second), function, "block_mask must have tiles of (", first.q, ", ", first.k, ")",
        first.k == second.k ? "" : " or (32, 32)", " for ", Nq, " queries and ", Nk,
        " keys, or block_size must be given; got shape ", mask.shape());
  return BlockMask::from_dense(mask, Nq, Nk, fits(first) ? first : second);
}

BlockMask to_block_mask(const mx::array& mask, const mx::array& q, const mx::array& k, std::optional<TileSize> tile,
                        const char* function) {
  const ScoreExtents scores = score_extents(q, k, function);
  return to_block_mask(mask, scores.Nq, scores.Nk, q.shape(3), tile, function);
}

}  // namespace mfa
