// How a CTA of the decode kernel comes to its next stretch (decode_share.cuh): one of its warps
// claims it, by a counter in memory, and tells the others.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_CLAIMS_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_CLAIMS_CUH_

#include "barriers.cuh"
#include "ptx.cuh"

namespace jfa {

// Each warp has one of its own; all functions are for whole warps.
struct DecodeClaims {
  static constexpr int kSlots = 2;  // the claiming warp is so many ahead of the slowest one
  static constexpr int kBytes = 16 + 16 * kSlots;

  uint32 smem;  // kBytes
  RingPosition<kSlots> ring;

  JFA_DEVICE explicit DecodeClaims(uint32 memory) : smem(memory) {}

  // By one thread.
  JFA_DEVICE void Init(int num_other_warps) const {
    for (int i = 0; i < kSlots; ++i) {
      MbarrierInit(Full(i), 1);
      MbarrierInit(Empty(i), num_other_warps);
    }
  }
  // Number of a claim below `num`, or -1 if none is left.
  JFA_DEVICE int Claim(int* counter, int num) {
    int claim = 0;
    if (ReadLaneIndex() == 0) claim = atomicAdd(counter, 1);
    claim = __shfl_sync(kFullWarp, claim, 0);
    if (claim >= num) claim = -1;
    MbarrierWait(Empty(ring.stage), ring.parity ^ 1);
    if (ReadLaneIndex() == 0) {
      StoreShared4(smem + 4 * ring.stage, claim);
      MbarrierArrive(Full(ring.stage));
    }
    __syncwarp();
    ring.Advance();
    return claim;
  }
  // The same in the other warps.
  JFA_DEVICE int Next() {
    MbarrierWait(Full(ring.stage), ring.parity);
    const int claim = static_cast<int>(LoadShared4(smem + 4 * ring.stage));
    __syncwarp();
    if (ReadLaneIndex() == 0) MbarrierArrive(Empty(ring.stage));
    ring.Advance();
    return claim;
  }

 private:
  JFA_DEVICE uint32 Full(int slot) const { return smem + 16 + 8 * slot; }
  JFA_DEVICE uint32 Empty(int slot) const { return smem + 16 + 8 * (kSlots + slot); }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_CLAIMS_CUH_
