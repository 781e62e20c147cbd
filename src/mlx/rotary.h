// rotary.h: from the public description of a rotary embedding to what the primitives take.
#pragma once

#include "mfa/rope.h"
#include "mlx/sources.h"
#include "mlx/stream.h"

namespace mfa {

// Checks tables and positions for `batch` entries with head dimension `D`. Throws std::invalid_argument.
Rotary make_rotary(const RotaryEmbedding& rope, int batch, int D, const char* function, mx::Stream s);

}  // namespace mfa
