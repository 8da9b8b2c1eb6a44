// The kernels for what every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define JFA_ISA_NAMESPACE baseline
#include "kernels.inc"
