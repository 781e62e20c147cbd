// prefix.h: attention over keys that all sequences of a batch share, followed by keys of their own.
#pragma once

#include "mfa/attention.h"

namespace mfa {

// Attention of `q` [B, Hq, Nq, D] over a shared prefix, `k_prefix` [1, Hkv, P, D] and `v_prefix` [1, Hkv, P, Dv], and
// each entry's own keys behind it, `k` [B, Hkv, Nk, D] and `v` [B, Hkv, Nk, Dv]: what attention() over the
// concatenation gives, up to rounding, but the prefix is read once for all entries, with their query heads as heads of
// one group, and the two parts are merged by their log-sum-exps. Every query stands behind the whole prefix: at
// position P + pos(i), pos(i) being its position among the own keys.
//
// options.kv_lengths, mask and bias are those of the own keys. A window with kv_lengths makes the visible part of the
// prefix differ between entries: then it is read for each entry, with a mask of B Nq P bytes. With dropout, which drops
// what it would drop of the concatenation, it is read for each entry too. Not offered: return_probs. Throws
// std::invalid_argument for it, and as attention().
MFA_API AttentionResult attention_cascade(const mlx::core::array& q, const mlx::core::array& k_prefix,
                                          const mlx::core::array& v_prefix, const mlx::core::array& k,
                                          const mlx::core::array& v, const AttentionOptions& options = {},
                                          mlx::core::StreamOrDevice s = {});

}  // namespace mfa
