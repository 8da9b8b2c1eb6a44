// From scores to weights in e4m3, in the registers that the product with V reads them from.
//
// Two ways. One looks for each row's largest score first, as the 16-bit kernel does. The other is
// optimistic: it weighs under the reference at hand and looks for large results, eight at a time by
// their sum, which the softmax wants anyway; where one may be near the end of e4m3 it takes a new
// reference and weighs the block again. Once all rows have seen a key nearly no block needs it, and
// what is saved is a maximum per element.
#ifndef JAX_FLASHATTN_CC_KERNELS_WEIGHTS_FP8_CUH_
#define JAX_FLASHATTN_CC_KERNELS_WEIGHTS_FP8_CUH_

#include "ptx_fp8_sm90.cuh"
#include "softmax.cuh"

namespace jfa {

// For 64 rows per warpgroup and kKeySteps times 32 keys.
template <int kKeySteps>
struct WeightsFp8 {
  using Scores = float[1][4 * kKeySteps][4];
  using Array = uint32[kKeySteps][4];
  // e4m3 ends at 448 and loses bits below 2^-6: weights begin at 2^4, and 2^8 is the limit.
  using Softmax = OnlineSoftmax<1, 4>;

  // The four scores that become register `i` of `step`: of row i % 2, neighbours in P's order.
  static JFA_DEVICE float Score(const Scores& s, int step, int i, int e) {
    return s[0][4 * step + i / 2 * 2 + e / 2][i % 2 * 2 + e % 2];
  }

  static JFA_DEVICE void Weigh(Scores& s, Softmax& softmax) {
#pragma unroll
    for (int n = 0; n < 4 * kKeySteps; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = softmax.Weigh(e / 2, s[0][n][e]);
    }
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

  // Returns whether the output must be rescaled by `factor`. Leaves the scores as they are.
  static JFA_DEVICE bool WeighOptimistically(Array& p, const Scores& s, Softmax& softmax,
                                             float (&factor)[2]) {
    float sum[2];
    const float highest = fmaxf(softmax.neg_reference[0], softmax.neg_reference[1]);
    bool raise = __any_sync(kFullWarp, highest == Softmax::kNothingSeen);
    if (!raise) {
      const bool fits = TryWeights(p, s, softmax, sum);
      raise = __any_sync(kFullWarp, !fits);
    }
    if (raise) {
      softmax.Raise(s, factor);
      TryWeights(p, s, softmax, sum);
    }
    softmax.sum[0] += sum[0];
    softmax.sum[1] += sum[1];
    return raise;
  }

  static JFA_DEVICE void Pin(Array& p) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(p[step][i])::"memory");
    }
  }
  // Volatile, or ptxas makes one register of the two, while a product still reads `to`.
  static JFA_DEVICE void Copy(Array& to, const Array& from) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile("mov.b32 %0, %1;" : "=r"(to[step][i]) : "r"(from[step][i]) : "memory");
      }
    }
  }

 private:
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
