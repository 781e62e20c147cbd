// matmul_kernels-inl.h: the body of every matmul_<isa>.cc, as kernels-inl.h is of kernels_<isa>.cc: units of their own,
// so that both halves compile at the same time. The including file defines MFA_ISA, MFA_ISA_MATMUL and MFA_ISA_TARGET.
#include "backend/cpu/kernels.h"
#include "backend/cpu/scratch.h"

// Each file builds on those before it.
// clang-format off
#include "backend/cpu/simd-inl.h"
#include "backend/cpu/dot-inl.h"
#include "backend/cpu/tile-inl.h"
#include "backend/cpu/weights-inl.h"
#include "backend/cpu/affine_weights-inl.h"
#include "backend/cpu/few_rows-inl.h"
#include "backend/cpu/row_io-inl.h"
#include "backend/cpu/integer_rows-inl.h"
#include "backend/cpu/integer_few_rows-inl.h"
#include "backend/cpu/integer_tiles-inl.h"
#include "backend/cpu/matmul-inl.h"
// clang-format on

static_assert(HWY_STATIC_TARGET == MFA_ISA_TARGET, "the flags of this unit do not select its instruction set");

namespace mfa::cpu {
namespace MFA_ISA {
namespace {

constexpr MatmulTable kMatmulTable = {
    .traits = {.lanes = kLanes, .panel = kPanelColumns, .integer_panel = kIntegerPanel, .pairs = kNativeBf16},
    .scratch_bytes = MatmulScratchBytes,
    .task = MatmulTask,
    .row_bytes = MatmulRowBytes,
    .prepare = PrepareMatmulRows,
    .packed_bytes = PackedWeightBytes,
    .pack = PackWeightsTask,
};

}  // namespace
}  // namespace MFA_ISA

const MatmulTable& MFA_ISA_MATMUL() { return MFA_ISA::kMatmulTable; }

}  // namespace mfa::cpu
