// kernels_avx512_bf16.cc: the CPU kernels for avx512_bf16.
#define MFA_ISA avx512_bf16
#define MFA_ISA_NAME "avx512_bf16"
#define MFA_ISA_TABLE kernels_avx512_bf16
#define MFA_ISA_MATMUL matmul_avx512_bf16
#define MFA_ISA_LAYERS layers_avx512_bf16
#define MFA_ISA_TARGET HWY_AVX3
#include "backend/cpu/kernels-inl.h"
