// layers_avx512_bf16.cc: the small layers for avx512_bf16.
#define MFA_ISA avx512_bf16
#define MFA_ISA_LAYERS layers_avx512_bf16
#define MFA_ISA_TARGET HWY_AVX3
#include "backend/cpu/layer_rows-inl.h"
