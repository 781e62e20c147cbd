// isa.h: which instruction set's kernels the process uses.
#pragma once

#include <string>

#include "backend/cpu/kernels.h"

namespace mfa::cpu {

// The selected kernels, or null; `reason`, if given, then says why. Throws std::invalid_argument if MFA_CPU_ISA is
// unknown or cannot run here.
const KernelTable* selected_kernels(std::string* reason = nullptr);

// The selected kernels; throws std::runtime_error if there are none.
const KernelTable& require_kernels();

}  // namespace mfa::cpu
