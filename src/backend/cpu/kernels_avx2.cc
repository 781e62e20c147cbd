// kernels_avx2.cc: the CPU kernels for avx2.
#define MFA_ISA avx2
#define MFA_ISA_NAME "avx2"
#define MFA_ISA_TABLE kernels_avx2
#define MFA_ISA_MATMUL matmul_avx2
#define MFA_ISA_LAYERS layers_avx2
#define MFA_ISA_TARGET HWY_AVX2
#include "backend/cpu/kernels-inl.h"
