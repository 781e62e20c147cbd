// matmul_avx2.cc: the matrix products for avx2.
#define MFA_ISA avx2
#define MFA_ISA_MATMUL matmul_avx2
#define MFA_ISA_TARGET HWY_AVX2
#include "backend/cpu/matmul_kernels-inl.h"
