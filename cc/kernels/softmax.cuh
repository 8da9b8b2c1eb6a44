// Softmax over blocks of columns that arrive one after the other.
//
// Weights are exp2(s * scale - reference), one FFMA and one EX2 per element. The reference is the
// row's maximum, but not always the latest: it is replaced only when a block exceeds it by more
// than kLimit (in log2 units). Any reference gives the same weights after normalisation, and
// exp2(8) leaves both f16 and f32 far from overflow; so after the first blocks nearly no block
// needs the exchange between lanes and the rescaling of the output. Weights that become 8-bit
// floats have little room for slack, and want their largest near the top of the type's range: kTop.
#ifndef JAX_FLASHATTN_CC_KERNELS_SOFTMAX_CUH_
#define JAX_FLASHATTN_CC_KERNELS_SOFTMAX_CUH_

#include "tile.cuh"

namespace jfa {

struct RowResult {
  float normalizer;  // factor of the output; 0 for a row that saw nothing
  float lse;         // natural log
};

// From the sum of all of a row's weights. `sink` is one more logit, natural, that has no value;
// -inf is none.
JFA_DEVICE RowResult FinishRow(float total, float neg_reference, float sink) {
  if (sink == -Infinity()) {
    if (total == 0.f) return {0.f, -Infinity()};
    return {Reciprocal(total), kLn2 * (Log2(total) - neg_reference)};
  }
  // The larger of the two becomes the reference, or the other's weight might overflow.
  const float sink_log2 = sink * kLog2e;
  const float reference = fmaxf(-neg_reference, sink_log2);
  const float factor = Exp2(-neg_reference - reference);
  const float with_sink = fmaf(total, factor, Exp2(sink_log2 - reference));
  return {factor * Reciprocal(with_sink), kLn2 * (Log2(with_sink) + reference)};
}

// For kM blocks of 16 rows per warp; each lane has the rows l / 4 and l / 4 + 8 of each block. A
// new reference gives its row's largest weight 2^kTop_, of 2^8 at most.
template <int kM, int kTop_ = 0>
struct OnlineSoftmax {
  static constexpr int kRows = 2 * kM;
  static constexpr float kTop = kTop_;
  static constexpr float kLimit = 8.f;

  // Minus the reference of a row that has seen nothing yet: far below any logit, but finite, so
  // that such a row needs no special case (hidden logits weigh 0, and its first key raises it).
  static constexpr float kNothingSeen = 3e38f;

  float scale;                 // of the logits, to log2 units; positive
  float neg_reference[kRows];  // in log2 units
  float sum[kRows];            // this lane's share

  JFA_DEVICE explicit OnlineSoftmax(float to_log2) : scale(to_log2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      neg_reference[r] = kNothingSeen;
      sum[r] = 0.f;
    }
  }

  // Takes note of a block of raw logits (hidden ones are -inf); rescales `out` if need be.
  template <int kN, int kOut>
  JFA_DEVICE void Observe(const float (&s)[kM][kN][4], float (&out)[kM][kOut][4]) {
    float highest[kRows];
    bool exceeds = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      highest[r] = Highest(s, r);
      exceeds |= fmaf(highest[r], scale, neg_reference[r]) > kLimit;
    }
    if (__any_sync(kFullWarp, exceeds)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) ScaleRow(out, r, RaiseReference(r, QuadMax(highest[r])));
    }
  }

  // The same where `out` can't be touched yet, because a product that adds to it is under way.
  // Returns whether Rescale(out, factor) is due before the next one.
  template <int kN>
  JFA_DEVICE bool Follow(const float (&s)[kM][kN][4], float (&factor)[kRows]) {
    float highest[kRows];
    bool exceeds = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      highest[r] = Highest(s, r);
      exceeds |= fmaf(highest[r], scale, neg_reference[r]) > kLimit;
    }
    if (!__any_sync(kFullWarp, exceeds)) return false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) factor[r] = RaiseReference(r, QuadMax(highest[r]));
    return true;
  }
  // The same where it is known that a new reference is needed.
  template <int kN>
  JFA_DEVICE void Raise(const float (&s)[kM][kN][4], float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) factor[r] = RaiseReference(r, QuadMax(Highest(s, r)));
  }
  template <int kOut>
  static JFA_DEVICE void Rescale(float (&out)[kM][kOut][4], const float (&factor)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) ScaleRow(out, r, factor[r]);
  }

  // The weight of a logit, counted into the row's sum.
  JFA_DEVICE float Weigh(int r, float s) {
    const float p = Exp2(fmaf(s, scale, neg_reference[r]));
    sum[r] += p;
    return p;
  }

  JFA_DEVICE RowResult Finalize(int r, float sink) const {
    return FinishRow(QuadSum(sum[r]), neg_reference[r], sink);
  }

 private:
  // Of this lane's columns.
  template <int kN>
  static JFA_DEVICE float Highest(const float (&s)[kM][kN][4], int r) {
    const int m = r / 2, e = r % 2 * 2;
    float highest = fmaxf(s[m][0][e], s[m][0][e + 1]);
#pragma unroll
    for (int n = 1; n < kN; ++n) highest = fmaxf(highest, fmaxf(s[m][n][e], s[m][n][e + 1]));
    return highest;
  }

  // Returns the factor of what was summed under the old reference.
  JFA_DEVICE float RaiseReference(int r, float highest) {
    const bool raise = fmaf(highest, scale, neg_reference[r]) > kTop;
    const float neg_new = raise ? fmaf(-highest, scale, kTop) : neg_reference[r];
    const float factor = Exp2(neg_new - neg_reference[r]);
    neg_reference[r] = neg_new;
    sum[r] *= factor;
    return factor;
  }

  template <int kOut>
  static JFA_DEVICE void ScaleRow(float (&out)[kM][kOut][4], int r, float factor) {
    const int m = r / 2, e = r % 2 * 2;
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
      out[m][n][e] *= factor;
      out[m][n][e + 1] *= factor;
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_SOFTMAX_CUH_
