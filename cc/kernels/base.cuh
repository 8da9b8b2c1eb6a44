// The few words every device file shares. NVRTC sees no standard header, so they are defined here.
#ifndef JAX_FLASHATTN_CC_KERNELS_BASE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BASE_CUH_

#define JFA_DEVICE __device__ __forceinline__

namespace jfa {

using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

constexpr int kWarpSize = 32;
constexpr uint32 kFullWarp = 0xffffffffu;
constexpr int kIntMax = 0x7fffffff;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.442695040888963407f;

template <class T>
JFA_DEVICE T Min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
JFA_DEVICE T Max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
JFA_DEVICE T Clamp(T x, T low, T high) {
  return Min(Max(x, low), high);
}
// For a >= 0, b > 0.
JFA_DEVICE int CeilDiv(int a, int b) { return a / b + (a % b != 0); }

JFA_DEVICE float Infinity() { return __int_as_float(0x7f800000); }

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BASE_CUH_
