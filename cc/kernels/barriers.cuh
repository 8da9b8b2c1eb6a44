// Barriers between the warps of a CTA: mbarriers in shared memory, which copies too can arrive at,
// and named barriers. One instruction per function.
#ifndef JAX_FLASHATTN_CC_KERNELS_BARRIERS_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BARRIERS_CUH_

#include "ptx.cuh"

namespace jfa {

// --- mbarriers --------------------------------------------------------------------------------

JFA_DEVICE void MbarrierInit(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
JFA_DEVICE void MbarrierArrive(uint32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier)
               : "memory");
#endif
}
// How many lanes of a warp arrive where one could for all of them, after __syncwarp(). One, but for
// racecheck, which doesn't follow that (docs/performance.md): scripts/sanitize_cuda.py writes 32.
constexpr int kArrivingLanes = 1;
JFA_DEVICE void MbarrierInitWarps(uint32 barrier, int warps) {
  MbarrierInit(barrier, warps * kArrivingLanes);
}
// All lanes of a warp.
JFA_DEVICE void MbarrierArriveWarp(uint32 barrier) {
  if (kArrivingLanes == kWarpSize || ReadLaneIndex() == 0) MbarrierArrive(barrier);
}
// Arrives when all earlier cp.async of this thread have landed; counted in the initial number.
JFA_DEVICE void MbarrierArriveAfterCopies(uint32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
JFA_DEVICE bool MbarrierTryWait(uint32 barrier, uint32 parity) {
  uint32 done;
#if __CUDA_ARCH__ >= 900
  // Sleeps for a while if need be.
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
#endif
  return done != 0;
}
JFA_DEVICE void MbarrierWait(uint32 barrier, uint32 parity) {
  while (!MbarrierTryWait(barrier, parity)) {
  }
}
// For what has time: looks once a microsecond, and leaves the issue slots to the other warps.
JFA_DEVICE void MbarrierWaitIdly(uint32 barrier, uint32 parity) {
  while (!MbarrierTryWait(barrier, parity)) asm volatile("nanosleep.u32 1000;");
}
// For the copy engine (sm_90): makes initialised barriers visible to it; tells how much it brings.
JFA_DEVICE void FenceMbarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
JFA_DEVICE void MbarrierArriveExpect(uint32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Position in a ring of kStages buffers; the parity of a buffer's barriers flips with each round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32 parity = 0;
  JFA_DEVICE void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- named barriers: id 0 is __syncthreads -------------------------------------------------------

JFA_DEVICE void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
JFA_DEVICE void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BARRIERS_CUH_
