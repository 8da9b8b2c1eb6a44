// The kernels for AVX2. Compile with -mavx2 -mfma -mf16c.
#define JFA_ISA_NAMESPACE avx2
#include "kernels.inc"
