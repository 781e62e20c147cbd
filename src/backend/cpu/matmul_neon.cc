// matmul_neon.cc: the matrix products for neon.
#define MFA_ISA neon
#define MFA_ISA_MATMUL matmul_neon
#define MFA_ISA_TARGET HWY_NEON
#include "backend/cpu/matmul_kernels-inl.h"
