// The kernels for AVX-512. Compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c.
#define JFA_ISA_NAMESPACE avx512
#include "kernels.inc"
