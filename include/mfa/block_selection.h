// block_selection.h: block masks from what is in q and k.
//
// q is [B, Hq, Nq, D] and k [B, Hkv, Nk, D], float32, float16 or bfloat16 of one dtype, Hq a multiple of Hkv, nothing
// empty; any strides. Means and scores are float32; equal scores are ranked by block, the lower first. Results have a
// list for each batch entry and query head unless said otherwise.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "mfa/masks.h"

namespace mfa {

// Of the tiles of `allowed` the `top_k` best of each query tile by products of means, averaged over batch entries and
// heads. One list for all.
MFA_API BlockMask averaged_top_blocks(const mlx::core::array& q, const mlx::core::array& k, const BlockRule& allowed,
                                      int64_t top_k, const char* function);

// The `top_k` best key tiles of each query tile by products of means. `centred`: the mean key of all tokens is
// subtracted. Sizes, if there are any: the rows of each tile that are not padding.
MFA_API BlockMask pooled_top_blocks(const mlx::core::array& q, const mlx::core::array& k, int64_t top_k, bool centred,
                                    const std::vector<int64_t>& q_sizes, const std::vector<int64_t>& k_sizes,
                                    TileSize tile, const char* function);

// One budget of tiles for each head and time chunk (FlashVSR, arXiv:2510.12747). Tokens lie window by window, a tile
// to a window of `window_tokens`, `rows` times `columns` windows to a chunk.
MFA_API BlockMask draft_blocks(const mlx::core::array& q, const mlx::core::array& k, int64_t rows, int64_t columns,
                               int64_t budget, int64_t local_range, int64_t window_tokens);

// Cumulative mass with a test of similarity (SpargeAttn, arXiv:2502.18137). With `fraction`, that share of the key
// tiles instead of `mass`.
MFA_API BlockMask similarity_mass_blocks(const mlx::core::array& q, const mlx::core::array& k, double mass,
                                         std::optional<double> fraction, double similarity, bool causal, bool sink,
                                         TileSize tile);

// Sums along antidiagonals of `stride` tokens (XAttention, arXiv:2503.16428). The sides of a tile are multiples of it.
MFA_API BlockMask antidiagonal_blocks(const mlx::core::array& q, const mlx::core::array& k, double mass, int64_t stride,
                                      bool causal, TileSize tile);

}  // namespace mfa
