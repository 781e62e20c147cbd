// sparse.h: the lists of a block mask as a source of the attention primitive.
#pragma once

#include "mfa/masks.h"
#include "mlx/sources.h"

namespace mfa {

// Throws std::invalid_argument, naming `function`, unless the mask is of the lengths, and of the batch and heads (or 1)
// of q and k.
BlockLists block_lists(const BlockMask& mask, const mx::array& q, const mx::array& k, const char* function);

}  // namespace mfa
