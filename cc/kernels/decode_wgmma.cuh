// The products of decode.cuh for tiles of 64 rows and more: by warpgroups, which read each key from
// shared memory once for 64 rows.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_WGMMA_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_WGMMA_CUH_

#include "ptx_sm90.cuh"
#include "softmax.cuh"

namespace jfa {

// PanelQ, PanelN: 64 columns of the queries, and of a block of keys or values, swizzled.
template <class C, class PanelQ, class PanelN>
struct DecodeWgmma {
  static constexpr int kDimSteps = C::kHeadDim / 16, kKeySteps = C::kBlockN / 16;

  // s = Q K^T for the 64 rows of the warp's group; `row_warp` must be uniform.
  static JFA_DEVICE void Scores(float (&s)[1][2 * kKeySteps][4], uint32 smem_q, uint32 smem_k,
                                int row_warp) {
    const uint64 q = PanelDescriptor(smem_q + row_warp / 4 * 64 * PanelQ::kPitch, 16),
                 k = PanelDescriptor(smem_k, 16);
    Pin(s);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Wgmma<C::kBlockN>::template Ss<C::kBf16, false>(
          s, q + ((panel * PanelQ::kBytes + within) >> 4),
          k + ((panel * PanelN::kBytes + within) >> 4), step > 0);
    }
    WgmmaCommit();
    WgmmaWait<0>();
    Pin(s);
  }

  // out += P V; the weights of a row add up in the softmax's sums.
  static JFA_DEVICE void Outputs(float (&out)[1][C::kHeadDimV / 8][4],
                                 const float (&s)[1][2 * kKeySteps][4], OnlineSoftmax<1>& softmax,
                                 uint32 smem_v) {
    uint32 p[kKeySteps][4];
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      float w[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) w[n][e] = softmax.Weigh(e / 2, s[0][2 * step + n][e]);
      }
      PackBlock<C::kBf16>(p[step], w[0], w[1]);
    }
    const uint64 v = PanelDescriptor(smem_v, PanelN::kBytes);
    Pin(out);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      Wgmma<C::kHeadDimV>::template Rs<C::kBf16, true>(out, p[step],
                                                       v + ((step * 16 * PanelN::kPitch) >> 4), 1);
    }
    WgmmaCommit();
    WgmmaWait<0>();
    Pin(out);
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_WGMMA_CUH_
