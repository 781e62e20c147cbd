// dtypes.h: the dtypes that the kernels compute in.
#pragma once

#include "mlx/ops.h"

namespace mfa {

namespace mx = mlx::core;

inline bool is_kernel_dtype(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

// `x` itself if it has the dtype.
inline mx::array cast_to(const mx::array& x, mx::Dtype dtype, mx::Stream s) {
  return x.dtype() == dtype ? x : mx::astype(x, dtype, s);
}

}  // namespace mfa
