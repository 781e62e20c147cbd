// together.h: several attentions in one launch.
#pragma once

#include <vector>

#include "mfa/attention.h"

namespace mfa {

// The arguments of one attention().
struct AttentionCall {
  mlx::core::array q, k, v;
  AttentionOptions options = {};
};

// What attention() of each call gives, bit for bit; on the CPU as one node of the graph, the work of all calls handed
// out to the threads as that of one. A step of serving is such a launch: chunks of prefill beside decoding sequences.
// Not offered: return_probs. Throws std::invalid_argument, "[function] ...", as attention().
MFA_API std::vector<mlx::core::array> attention_together(const std::vector<AttentionCall>& calls,
                                                         mlx::core::StreamOrDevice s = {},
                                                         const char* function = "attention_together");

// The same with the log-sum-exps.
MFA_API std::vector<AttentionResult> attention_together_with_lse(const std::vector<AttentionCall>& calls,
                                                                 mlx::core::StreamOrDevice s = {},
                                                                 const char* function = "attention_together");

}  // namespace mfa
