// rope.h: attention with rotary position embedding of queries and keys, applied as they are loaded.
#pragma once

#include <optional>

#include "mfa/attention.h"

namespace mfa {

// Turns the pairs of the first rotary_dim channels by the angle whose cosine and sine stand in the row of the token's
// position: (a, b) becomes (a cos - b sin, a sin + b cos). Channels behind pass through. (Su et al., arXiv:2104.09864)
struct RotaryEmbedding {
  mlx::core::array cos, sin;      // [positions, rotary_dim / 2], floating, used in float32; no gradient
  bool interleaved = true;        // pairs are channels (2c, 2c + 1), else (c, c + rotary_dim / 2)
  std::optional<int> rotary_dim;  // default: twice the columns of the tables, which is all it may be

  // int [B], the positions of the first query and the first key of each batch entry; default: 0.
  std::optional<mlx::core::array> q_positions, k_positions;
  bool rotates_k = true;  // false: the keys are rotated already
};

// attention() of rotated queries and keys; gradients are those of `q` and `k` as they are given. All options combine.
// Throws std::invalid_argument as attention(), and if tables or positions do not fit; of positions that are still to be
// computed, the evaluation throws it. std::runtime_error on a GPU stream.
MFA_API mlx::core::array attention_rope(const mlx::core::array& q, const mlx::core::array& k, const mlx::core::array& v,
                                        const RotaryEmbedding& rope, const AttentionOptions& options = {},
                                        mlx::core::StreamOrDevice s = {});

// The same with the log-sum-exp of each row.
MFA_API AttentionResult attention_rope_with_lse(const mlx::core::array& q, const mlx::core::array& k,
                                                const mlx::core::array& v, const RotaryEmbedding& rope,
                                                const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

}  // namespace mfa
