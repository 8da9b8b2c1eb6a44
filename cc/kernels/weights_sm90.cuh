// From scores to weights, in the registers that the product with V reads them from.
//
//   kSearched  looks for each row's largest score first; weighs in place, packs after the product.
//   kSingle    is optimistic: it weighs under the reference at hand and looks at the sums, which
//              softmax wants anyway. Where one is large it takes a new reference and weighs the
//              block again. Once all rows have seen a key hardly a block needs that, and a maximum
//              per element is saved. It packs at once, so it waits for the product that reads the
//              weights of the block before.
//   kDouble    is the same without the wait: the weights of two blocks take turns.
#ifndef JAX_FLASHATTN_CC_KERNELS_WEIGHTS_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_WEIGHTS_SM90_CUH_

#include "softmax.cuh"

namespace jfa {

enum class Weighing { kSearched, kSingle, kDouble };  // as in plan_tiles.h

// What weights of 16 and of 8 bits share, for 64 rows per warpgroup: kBlocks times 8 keys in
// kKeySteps products. Own::TryWeights(p, s, softmax, sum) weighs a block, and returns whether all
// weights fit in their type.
template <class Own, int kKeySteps, int kBlocks, int kTop>
struct WeightsBase {
  using Scores = float[1][kBlocks][4];
  using Array = uint32[kKeySteps][4];
  using Softmax = OnlineSoftmax<1, kTop>;

  static JFA_DEVICE void Weigh(Scores& s, Softmax& softmax) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = softmax.Weigh(e / 2, s[0][n][e]);
    }
  }

  // kSingle and kDouble. Returns whether the output must be rescaled by `factor`. `raise`: it is
  // known that a new reference is needed. Leaves the scores as they are.
  static JFA_DEVICE bool WeighOptimistically(Array& p, const Scores& s, Softmax& softmax,
                                             float (&factor)[2], bool raise) {
    float sum[2];
    if (!raise) {
      const bool fits = Own::TryWeights(p, s, softmax, sum);
      raise = __any_sync(kFullWarp, !fits);
    }
    if (raise) {
      softmax.Raise(s, factor);
      Own::TryWeights(p, s, softmax, sum);
    }
    softmax.sum[0] += sum[0];
    softmax.sum[1] += sum[1];
    return raise;
  }

  // As the scores' Pin of ptx_sm90.cuh: what is computed stays before this point.
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
};

// Of 16 bits, for kKeySteps times 16 keys.
template <bool kBf16, int kKeySteps>
struct WeightsSm90 : WeightsBase<WeightsSm90<kBf16, kKeySteps>, kKeySteps, 2 * kKeySteps, 0> {
  using Base = WeightsBase<WeightsSm90, kKeySteps, 2 * kKeySteps, 0>;
  using typename Base::Array;
  using typename Base::Scores;
  using typename Base::Softmax;

  static JFA_DEVICE void Pack(Array& p, const Scores& s) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      PackBlock<kBf16>(p[step], s[0][2 * step], s[0][2 * step + 1]);
    }
  }

  static JFA_DEVICE bool TryWeights(Array& p, const Scores& s, const Softmax& softmax,
                                    float (&sum)[2]) {
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      float w[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          w[n][e] = Exp2(fmaf(s[0][2 * step + n][e], softmax.scale, softmax.neg_reference[e / 2]));
        }
      }
      PackBlock<kBf16>(p[step], w[0], w[1]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[r] += (w[0][2 * r] + w[0][2 * r + 1]) + (w[1][2 * r] + w[1][2 * r + 1]);
      }
    }
    // Of a lane's weights in one row and block: none is larger, so all fit in f16.
    constexpr float kMostSum = 4096.f;
    return sum[0] + sum[1] <= kMostSum;  // and is a number
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_WEIGHTS_SM90_CUH_
