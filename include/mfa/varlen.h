// varlen.h: attention of many sequences of different lengths, stored one after another, in one call.
#pragma once

#include <optional>

#include "mfa/attention.h"
#include "mfa/masks.h"

namespace mfa {

// Where the sequences lie: sequence b has the rows starts[b] .. starts[b + 1] - 1 of the packed axis.
struct PackedSequences {
  // int [B + 1] (any integer dtype), ascending from 0 to the packed rows of q and of k. Equal neighbours are an empty
  // sequence.
  mlx::core::array cu_seqlens_q;
  mlx::core::array cu_seqlens_k;

  // No sequence has more queries or keys; default: the packed rows. Work is shared out by them, and the axes of bias,
  // mask and dropout count rows within a sequence.
  std::optional<int> max_seqlen_q;
  std::optional<int> max_seqlen_k;

  // The tiles that every sequence sees, of max_seqlen_q queries and max_seqlen_k keys; of each sequence, those that it
  // has. Default: all. One batch entry; 1 or Hq heads.
  std::optional<BlockMask> block_mask;
};

// Attention within each of B sequences: `q` [1, Hq, packed queries, D] over `k` [1, Hkv, packed keys, D] and `v` [1,
// Hkv, packed keys, Dv]; returns [1, Hq, packed queries, Dv]. All as attention() of each sequence, bit for bit on the
// CPU: positions, options.bias and options.mask (broadcastable to [B, Hq, max_seqlen_q, max_seqlen_k]), kv_lengths [B]
// and dropout count sequences and their own rows. Lazy and differentiable as attention(). CPU streams only.
//
// Throws std::invalid_argument as attention() and if the starts are not as said here; of starts that are still to be
// computed, the evaluation throws it. std::runtime_error on a GPU stream.
MFA_API mlx::core::array attention_varlen(const mlx::core::array& q, const mlx::core::array& k,
                                          const mlx::core::array& v, const PackedSequences& sequences,
                                          const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

// The same with the log-sum-exp of each row, [1, Hq, packed queries].
MFA_API AttentionResult attention_varlen_with_lse(const mlx::core::array& q, const mlx::core::array& k,
                                                  const mlx::core::array& v, const PackedSequences& sequences,
                                                  const AttentionOptions& options = {},
                                                  mlx::core::StreamOrDevice s = {});

}  // namespace mfa
