// matmul_avx512_bf16.cc: the matrix products for avx512_bf16.
#define MFA_ISA avx512_bf16
#define MFA_ISA_MATMUL matmul_avx512_bf16
#define MFA_ISA_TARGET HWY_AVX3
#include "backend/cpu/matmul_kernels-inl.h"
