// layers.h: small layers of a transformer that MLX evaluates on the CPU as a dozen operations or more; here each is
// one. Computed in float32 and rounded once. On a GPU stream these are MLX's own operations.
#pragma once

#include <optional>

#include "mfa/api.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mfa {

// x / sqrt(mean(x^2) + eps) * weight over the last axis; float32, float16 or bfloat16, weight [D] of the dtype of x.
// Arguments outside that are left to mlx::core::fast::rms_norm, which reports what is wrong.
MFA_API mlx::core::array rms_norm(const mlx::core::array& x, const std::optional<mlx::core::array>& weight, float eps,
                                  mlx::core::StreamOrDevice s = {});

// Rotary position encoding of x [B, ..., T, D] with the arguments of mlx::core::fast::rope (arXiv:2104.09864); angles
// are float64. `offset` is an integer array of one element or [B]. Arguments outside that are left to MLX's function.
MFA_API mlx::core::array rope(const mlx::core::array& x, int dims, bool traditional, std::optional<float> base,
                              float scale, const mlx::core::array& offset,
                              const std::optional<mlx::core::array>& freqs = std::nullopt,
                              mlx::core::StreamOrDevice s = {});

// silu(gate) * x, element by element, of one shape and dtype: float32, float16 or bfloat16 (arXiv:2002.05202). Other
// arguments are left to a composition of MLX's operations.
MFA_API mlx::core::array swiglu(const mlx::core::array& gate, const mlx::core::array& x,
                                mlx::core::StreamOrDevice s = {});

// Whether the calls above run as one operation of this library.
MFA_API bool fuses_rms_norm(const mlx::core::array& x, const std::optional<mlx::core::array>& weight,
                            mlx::core::StreamOrDevice s = {});
MFA_API bool fuses_rope(const mlx::core::array& x, int dims, std::optional<float> base, const mlx::core::array& offset,
                        const std::optional<mlx::core::array>& freqs, mlx::core::StreamOrDevice s = {});

MFA_API bool fuses_swiglu(const mlx::core::array& gate, const mlx::core::array& x, mlx::core::StreamOrDevice s = {});

}  // namespace mfa
