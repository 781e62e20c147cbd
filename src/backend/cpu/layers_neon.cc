// layers_neon.cc: the small layers for neon.
#define MFA_ISA neon
#define MFA_ISA_LAYERS layers_neon
#define MFA_ISA_TARGET HWY_NEON
#include "backend/cpu/layer_rows-inl.h"
