// layers_avx2.cc: the small layers for avx2.
#define MFA_ISA avx2
#define MFA_ISA_LAYERS layers_avx2
#define MFA_ISA_TARGET HWY_AVX2
#include "backend/cpu/layer_rows-inl.h"
