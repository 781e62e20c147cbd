// version.h: the version of this library and of the MLX it works with.
#pragma once

#include "mfa/api.h"

namespace mfa {

// "major.minor.patch" of this library.
MFA_API const char* version();

// The MLX release that this library was built against. MLX's C++ interface changes between releases, so it works with
// exactly this one.
MFA_API const char* built_for_mlx_version();

}  // namespace mfa
