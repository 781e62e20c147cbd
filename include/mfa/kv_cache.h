// kv_cache.h: attention over a cache of keys and values, dense or in pages, that the call may append to.
#pragma once

#include <optional>

#include "mfa/attention.h"
#include "mfa/rope.h"

namespace mfa {

// A cache of one layer. Which of the optional arrays are given says what it is:
//
//   block_table, seq_lens  pools [pages, page_size, Hkv, D] as paged.h says, of which sequence b uses seq_lens[b] keys
//   seq_lens               preallocated [B, Hkv, S, D], of which batch entry b uses its first seq_lens[b]
//   neither                [B, Hkv, S, D], all in use; it grows by concatenation. k and v may be absent: S = 0
//
// Of a pool and a preallocated cache, cache_batch_idx selects rows: batch entry b has row cache_batch_idx[b] of
// block_table or of the cache, and of seq_lens.
struct KvCache {
  std::optional<mlx::core::array> k, v;
  std::optional<mlx::core::array> block_table, seq_lens, cache_batch_idx;
};

// Keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] to append, cast to the dtype of the cache.
struct NewKeys {
  mlx::core::array k, v;
};

// As RotaryEmbedding, but where positions are not given, new keys follow those of the cache and queries are the last of
// all keys. rotates_k says whether the cache holds keys as they are given, all of which are then rotated at load from
// position 0; by default only a cache without seq_lens that is not appended to does. Otherwise it holds rotated keys,
// and new ones are rotated before they are stored.
struct CacheRotation {
  mlx::core::array cos, sin;
  bool interleaved = true;
  std::optional<int> rotary_dim;
  std::optional<mlx::core::array> positions;  // int [B], of the first query and the first new key
  std::optional<bool> rotates_k;
};

struct KvCacheResult {
  mlx::core::array out;                  // [B, Hq, Nq, Dv], dtype of q
  std::optional<mlx::core::array> lse;   // [B, Hq, Nq], float32, natural, if wanted
  std::optional<mlx::core::array> k, v;  // the cache with the new keys, if there are some
};

// Appends `added` to the cache and attends to all of it. As attention() with kv_lengths; causal and the other options
// count queries as the last of a sequence's keys. q is cast to the dtype of the cache and the result back.
// options.kv_lengths must be empty.
//
// A pool and a preallocated cache are written in place when nothing but this call holds them when it is evaluated: then
// appending takes the time of the new rows alone. Otherwise they are copied, and the arrays given keep their values.
// Differentiable in q, the new rows and the cache.
//
// Throws std::invalid_argument as attention(), and if lengths, table or positions do not fit; of values that are still
// to be computed, the evaluation throws it and nothing is written. std::runtime_error on a GPU stream, except for plain
// attention over a cache that grows.
MFA_API KvCacheResult attention_kvcache(const mlx::core::array& q, const KvCache& cache,
                                        const std::optional<NewKeys>& added = {},
                                        const std::optional<CacheRotation>& rotation = {},
                                        const AttentionOptions& options = {}, bool wants_lse = false,
                                        mlx::core::StreamOrDevice s = {});

// `cache` with `rows` [B, H, N, D] at tokens starts[b] + t of each sequence: [B, H, S, D] or, with a block_table, pools
// [pages, page_size, H, D]. In place or a copy as above.
MFA_API mlx::core::array append_to_cache(const mlx::core::array& cache, const mlx::core::array& rows,
                                         const mlx::core::array& starts,
                                         const std::optional<mlx::core::array>& block_table = {},
                                         mlx::core::StreamOrDevice s = {});

}  // namespace mfa
