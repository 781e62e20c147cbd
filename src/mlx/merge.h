// merge.h: one call's result from those of its parts.
#pragma once

#include <optional>

#include "mfa/attention.h"
#include "mlx/stream.h"

namespace mfa {

// The attention over the keys of `a` and of `b` [B, Hq, Nq, *] and, if given, over `sinks` [Hq], which neither part has
// seen: merged in float32, o in `dtype`.
AttentionResult merge_parts(const AttentionResult& a, const AttentionResult& b,
                            const std::optional<mlx::core::array>& sinks, mlx::core::Dtype dtype, mlx::core::Stream s);

}  // namespace mfa
