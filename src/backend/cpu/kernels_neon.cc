// kernels_neon.cc: the CPU kernels for neon.
#define MFA_ISA neon
#define MFA_ISA_NAME "neon"
#define MFA_ISA_TABLE kernels_neon
#define MFA_ISA_MATMUL matmul_neon
#define MFA_ISA_LAYERS layers_neon
#define MFA_ISA_TARGET HWY_NEON
#include "backend/cpu/kernels-inl.h"
