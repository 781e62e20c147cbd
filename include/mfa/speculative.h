// speculative.h: trees of draft tokens: which node sees which, attention of a tree over a cache, and the verification
// score of the package that this one replaces.
#pragma once

#include <string_view>

#include "mfa/attention.h"

namespace mfa {

// A node sees its ancestors and itself. [B, N, ...] for B trees, [N, ...] for one.
struct TreeMask {
  mlx::core::array depths;   // int32 [N]: the node stands this far behind the committed tokens
  mlx::core::array visible;  // bool [N, N]: row i, column j: node i sees node j
  mlx::core::array bits;     // uint32 [N, ceil(N / 32)]: the same, node j as bit j % 32 of word j / 32
};

// `parents`, an integer array [N] or [B, N] of known values, holds the parent of each node, which comes before it, or
// -1 for a node that follows the committed tokens directly. Throws std::invalid_argument.
MFA_API TreeMask tree_mask(const mlx::core::array& parents, mlx::core::StreamOrDevice s = {});

// Attention of the N nodes of draft trees, `q` [B, Hq, N, D], over the committed tokens and the trees: `k` [B, Hkv, Nk,
// D] and `v` [B, Hkv, Nk, Dv] hold the committed tokens of each entry and behind them its nodes, the first
// options.kv_lengths[b] of Nk (default: all). A node sees all committed tokens, its ancestors and itself, and stands at
// position committed + depth: what is far from it and how far follow from that, for ALiBi and the left side of the
// window. The two parts are merged by their log-sum-exps; the cache is read in place. `parents` as tree_mask() takes
// it: [B, N], or [N] for the same tree in all entries.
//
// bias, mask and dropout count the keys as they lie in the cache. A window makes a mask of N Nk bytes (B N Nk with
// kv_lengths). Not offered: return_probs; causal and the right side of the window change nothing. Throws
// std::invalid_argument for it, and as attention().
MFA_API AttentionResult attention_tree(const mlx::core::array& q, const mlx::core::array& k, const mlx::core::array& v,
                                       const mlx::core::array& parents, const AttentionOptions& options = {},
                                       mlx::core::StreamOrDevice s = {});

// What the replaced package calls target log-probabilities: log-softmax over the channels of the mean over heads of
// `out` [B, Hq, N, Dv] divided by `temperature`, at `draft_ids` [B, N] clipped to [0, Dv - 1]; float32 [B, N]. It has
// no relation to probabilities of a vocabulary. Throws std::invalid_argument, naming `function`.
MFA_API mlx::core::array draft_proxy_logprobs(const mlx::core::array& out, const mlx::core::array& draft_ids,
                                              float temperature, mlx::core::StreamOrDevice s = {},
                                              std::string_view function = "draft_proxy_logprobs");

}  // namespace mfa
