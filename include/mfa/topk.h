// topk.h: attention of each query to its keys of the largest scores.
#pragma once

#include <optional>

#include "mfa/attention.h"
#include "mfa/masks.h"

namespace mfa {

// attention() of which each row keeps the visible keys whose score is at least its k-th largest: k = max(1,
// ceil(ratio * n)), n being the keys of the batch entry, visible or not. Ties with the k-th are kept; a row that sees
// fewer keys keeps them all. Scores are the finished ones, with softcap, ALiBi, bias and all masks. The selection takes
// O(k) memory a row of a tile, and the result O(Nq). Gradients are those of the kept keys, the selection being
// constant.
//
// `mask`, if given, is as of attention_sparse(). Throws std::invalid_argument unless 0 < ratio <= 1, and as
// attention(); std::runtime_error where no kernel runs.
MFA_API mlx::core::array attention_topk(const mlx::core::array& q, const mlx::core::array& k, const mlx::core::array& v,
                                        double ratio, const std::optional<BlockMask>& mask = std::nullopt,
                                        const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

// The same with the log-sum-exp of each row, over its kept keys.
MFA_API AttentionResult attention_topk_with_lse(const mlx::core::array& q, const mlx::core::array& k,
                                                const mlx::core::array& v, double ratio,
                                                const std::optional<BlockMask>& mask = std::nullopt,
                                                const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

}  // namespace mfa
