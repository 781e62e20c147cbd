// composed.h: attention as a graph of MLX operations.
#pragma once

#include <vector>

#include "mlx/request.h"

namespace mfa {

// o, lse and, if params.returns_probs, probs: what the primitive Attention gives for the same inputs, on any device and
// differentiable by MLX to any order. Stores the scores. A non-finite key or value that some rows see and others do not
// reaches the others too; one that no row sees reaches none. Products of float32 are as exact as MLX's matmul on the
// device: TF32 on CUDA unless MLX_ENABLE_TF32=0.
std::vector<mx::array> composed_attention(const AttentionParams& params, const std::vector<mx::array>& inputs,
                                          mx::Stream s);

}  // namespace mfa
