// From scores to weights in e4m3, in the registers that the product with V reads them from: as
// weights_sm90.cuh, searched or optimistic. That one looks for large weights eight at a time by
// their sum, because e4m3 ends so soon.
#ifndef JAX_FLASHATTN_CC_KERNELS_WEIGHTS_FP8_CUH_
#define JAX_FLASHATTN_CC_KERNELS_WEIGHTS_FP8_CUH_

#include "ptx_fp8_sm90.cuh"
#include "weights_sm90.cuh"

namespace jfa {

// For kKeySteps times 32 keys. e4m3 ends at 448 and loses bits below 2^-6: weights begin at 2^4,
// and 2^8 is the limit.
template <int kKeySteps>
struct WeightsFp8 : WeightsBase<WeightsFp8<kKeySteps>, kKeySteps, 4 * kKeySteps, 4> {
  using Base = WeightsBase<WeightsFp8, kKeySteps, 4 * kKeySteps, 4>;
  using typename Base::Array;
  using typename Base::Scores;
  using typename Base::Softmax;

  // The four scores that become register `i` of `step`: of row i % 2, neighbours in P's order.
  static JFA_DEVICE float Score(const Scores& s, int step, int i, int e) {
    return s[0][4 * step + i / 2 * 2 + e / 2][i % 2 * 2 + e % 2];
  }

  static JFA_DEVICE void Pack(Array& p, const Scores& s) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[step][i] = PackE4m3(Score(s, step, i, 0), Score(s, step, i, 1), Score(s, step, i, 2),
                              Score(s, step, i, 3));
      }
    }
  }

  // Whether a new reference is needed because a row of the warp has none.
  static JFA_DEVICE bool SeesFirst(const Softmax& softmax) {
    const float highest = fmaxf(softmax.neg_reference[0], softmax.neg_reference[1]);
    return __any_sync(kFullWarp, highest == Softmax::kNothingSeen);
  }

  // False if a weight may be 256 or more, or is not a number. Eight that are no larger than a new
  // reference makes them don't add up to so much.
  static JFA_DEVICE bool TryWeights(Array& p, const Scores& s, const Softmax& softmax,
                                    float (&sum)[2]) {
    float highest = 0.f;
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float eight = 0.f;
#pragma unroll
        for (int i = row; i < 4; i += 2) {
          float w[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            w[e] = Exp2(fmaf(Score(s, step, i, e), softmax.scale, softmax.neg_reference[row]));
          }
          p[step][i] = PackE4m3(w[0], w[1], w[2], w[3]);
          const float four = (w[0] + w[1]) + (w[2] + w[3]);
          eight = i == row ? four : eight + four;
        }
        sum[row] += eight;
        asm("max.NaN.f32 %0, %0, %1;" : "+f"(highest) : "f"(eight));
      }
    }
    return highest < 256.f;
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_WEIGHTS_FP8_CUH_
