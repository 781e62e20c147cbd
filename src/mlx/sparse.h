// sparse.h: the lists of a block mask as a source of the attention primitive.
#pragma once

#include "mfa/masks.h"
#include "mlx/sources.h"

namespace mfa {

struct ScoreExtents {
  int B = 0, Hq = 0, Nq = 0, Nk = 0;
};

// Throws std::invalid_argument, naming `function`, unless the mask is of these lengths, and of this batch and these
// heads or 1.
BlockLists block_lists(const BlockMask& mask, const ScoreExtents& scores, const char* function);

// The extents of batched q and k; throws likewise if they are not of rank 4.
ScoreExtents score_extents(const mx::array& q, const mx::array& k, const char* function);

}  // namespace mfa
