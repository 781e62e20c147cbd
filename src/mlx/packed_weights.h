// packed_weights.h: the packed copies of dense weights that products read again and again.
//
// A copy is made when the same memory has been multiplied from, in the same layout and with the same contents (of a
// sample), eight times. Weights that an optimiser replaces are not: each step they are other memory or have other
// contents. While a copy is kept, so is the array's buffer, by reference: MLX then lets no operation write into it, so
// the copy is never out of date. It is dropped when nothing else refers to the buffer any more, or to make room.
#pragma once

#include <memory>

#include "backend/cpu/scratch.h"
#include "linear/problem.h"
#include "mlx/array.h"

namespace mfa {

using WeightBuffer = std::shared_ptr<mlx::core::array::Data>;

// p.w packed, if that is kept or is worth making now, else null; p.w lies in `buffer`. Call it where the work runs: the
// contents are read.
std::shared_ptr<const cpu::AlignedBuffer> packed_weights_for(const MatmulProblem& p, const WeightBuffer& buffer);

}  // namespace mfa
