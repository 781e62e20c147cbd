// paged.h: attention over keys and values in the pages of a pool, found through a table.
#pragma once

#include <optional>

#include "mfa/attention.h"

namespace mfa {

// Where the keys of each sequence lie: key j of sequence b is token j % page_size of page block_table[b][j /
// page_size].
struct PageTable {
  mlx::core::array
      block_table;            // int [B, pages of a sequence]; entries of keys that a sequence lacks are not read (-1)
  mlx::core::array seq_lens;  // int [B], the keys of each sequence; may be 0

  // int [B]: sequence b has row cache_batch_idx[b] of the table and of the lengths, which then may have other counts.
  std::optional<mlx::core::array> cache_batch_idx;
};

// Attention of `q` [B, Hq, Nq, D] over pools `k_pages` [pages, page_size, Hkv, D] and `v_pages` [pages, page_size, Hkv,
// Dv] of one dtype, any page size: as attention() of the gathered keys with kv_lengths = seq_lens, bit for bit. Nothing
// is gathered or copied. q of another dtype is cast to that of the pools, the result back. The axis Nk of bias and mask
// is pages of a sequence * page_size. Differentiable in q and both pools; a page that several sequences share gets the
// sum. options.kv_lengths must be empty. CPU streams only.
//
// Throws std::invalid_argument as attention(), and if table or lengths do not fit the pool; of values that are still to
// be computed, the evaluation throws it. std::runtime_error on a GPU stream.
MFA_API mlx::core::array attention_paged(const mlx::core::array& q, const mlx::core::array& k_pages,
                                         const mlx::core::array& v_pages, const PageTable& table,
                                         const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

// The same with the log-sum-exp of each row.
MFA_API AttentionResult attention_paged_with_lse(const mlx::core::array& q, const mlx::core::array& k_pages,
                                                 const mlx::core::array& v_pages, const PageTable& table,
                                                 const AttentionOptions& options = {},
                                                 mlx::core::StreamOrDevice s = {});

// The queries of packed sequences: sequence b has rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1.
struct PackedQueries {
  mlx::core::array cu_seqlens_q;  // int [B + 1], ascending from 0 to the packed rows

  // No sequence has more. Bias, mask and dropout count rows within a sequence, to this many. Default: the packed rows.
  std::optional<int> max_seqlen_q;
};

// attention_paged() of packed sequences `q` [1, Hq, packed queries, D]: prefill, chunks of it and decoding in one call.
MFA_API mlx::core::array attention_paged_varlen(const mlx::core::array& q, const mlx::core::array& k_pages,
                                                const mlx::core::array& v_pages, const PageTable& table,
                                                const PackedQueries& queries, const AttentionOptions& options = {},
                                                mlx::core::StreamOrDevice s = {});
MFA_API AttentionResult attention_paged_varlen_with_lse(const mlx::core::array& q, const mlx::core::array& k_pages,
                                                        const mlx::core::array& v_pages, const PageTable& table,
                                                        const PackedQueries& queries,
                                                        const AttentionOptions& options = {},
                                                        mlx::core::StreamOrDevice s = {});

}  // namespace mfa
