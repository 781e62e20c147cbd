// packed.h: attention on arrays that hold q, k and v, or k and v, side by side, as one projection writes them.
//
// Two layouts of the packed array:
//   [B, N, (Hq + 2 Hkv) D]  heads of q, then of k, then of v    ([B, N, 2 Hkv D]: of k, then of v)
//   [B, H, N, 3, D]         q, k and v of each token            ([B, H, N, 2, D]: k and v)
// Nothing is copied: the parts are views that the kernels read through their strides. The gradient is one packed array,
// into which the parts' gradients are written once.
#pragma once

#include <array>
#include <optional>
#include <string_view>

#include "mfa/attention.h"

namespace mfa {

// Views of q [B, Hq, N, D], k and v [B, Hkv, N, D]. With the first layout `num_heads` is needed and `num_kv_heads` is
// `num_heads` unless given. With the second, `num_heads` may only repeat H, and `num_kv_heads` below H takes the first
// heads of k and v. Throws std::invalid_argument, naming `function`, if the sizes do not fit.
MFA_API std::array<mlx::core::array, 3> unpack_qkv(const mlx::core::array& qkv, std::optional<int> num_heads,
                                                   std::optional<int> num_kv_heads, mlx::core::StreamOrDevice s = {},
                                                   std::string_view function = "unpack_qkv");

// Views of k and v [B, Hkv, N, D]. With the first layout `num_kv_heads` is needed; with the second it may be below the
// heads that are there and takes the first of them. Throws likewise.
MFA_API std::array<mlx::core::array, 2> unpack_kv(const mlx::core::array& kv, std::optional<int> num_kv_heads,
                                                  mlx::core::StreamOrDevice s = {},
                                                  std::string_view function = "unpack_kv");

}  // namespace mfa
