// sparse.h: block-sparse attention: tiles of queries and keys that a mask does not name are not computed.
#pragma once

#include <cstdint>
#include <optional>

#include "mfa/attention.h"
#include "mfa/masks.h"

namespace mfa {

// attention() of which only the pairs in visible tiles of `mask` are left, bit for bit on the CPU; all options combine
// with it. The mask's lengths are those of q and k; its batch and heads are those of q or 1. Throws
// std::invalid_argument if they are not, and as attention(); std::runtime_error where no kernel runs.
MFA_API mlx::core::array attention_sparse(const mlx::core::array& q, const mlx::core::array& k,
                                          const mlx::core::array& v, const BlockMask& mask,
                                          const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

// The same with the log-sum-exp of each row, over its visible keys.
MFA_API AttentionResult attention_sparse_with_lse(const mlx::core::array& q, const mlx::core::array& k,
                                                  const mlx::core::array& v, const BlockMask& mask,
                                                  const AttentionOptions& options = {},
                                                  mlx::core::StreamOrDevice s = {});

// The BlockMask of a bool array for Nq queries and Nk keys, of which `tile` is the size of a tile, or, without it, that
// one of the replaced package's sizes for the head dimension which fits the array's shape: 32 by 32, or above head
// dimension 64 also 32 by 16. Throws std::invalid_argument, naming `function`.
MFA_API BlockMask to_block_mask(const mlx::core::array& mask, int64_t Nq, int64_t Nk, int head_dim,
                                std::optional<TileSize> tile, const char* function = "flash_attention_sparse");

// The same for batched q and k.
MFA_API BlockMask to_block_mask(const mlx::core::array& mask, const mlx::core::array& q, const mlx::core::array& k,
                                std::optional<TileSize> tile, const char* function = "flash_attention_sparse");

}  // namespace mfa
