// From scores (q . k) to logits in log2 units: scale, soft cap and ALiBi.
//
//   logit = c * tanh(scale * score / c)  or  scale * score,   minus  slope * |i + offset - j|
//
// What is one factor at the end is left to the softmax, which has a multiplication to spare.
#ifndef JAX_FLASHATTN_CC_KERNELS_LOGITS_CUH_
#define JAX_FLASHATTN_CC_KERNELS_LOGITS_CUH_

#include "kv_source.cuh"

namespace jfa {

template <bool kSoftcap, bool kAlibi>
struct LogitMap {
  static constexpr bool kPlain = !kSoftcap && !kAlibi;

  float inner;  // of the score, before tanh
  float outer;  // after it: to log2 units
  float slope;  // in log2 units
  int offset;

  JFA_DEVICE LogitMap(const ProblemParams& p, const Sequence& sequence, int batch, int head)
      : inner(kSoftcap ? p.scale / p.soft_cap : 1.f),
        outer(kSoftcap ? p.soft_cap * kLog2e : p.scale_log2),
        slope(0.f),
        offset(Clamp(sequence.offset, -kFar, kFar)) {
    if constexpr (kAlibi) SetHead(p, batch, head);
  }
  JFA_DEVICE void SetHead(const ProblemParams& p, int batch, int head) {
    if constexpr (kAlibi) {
      slope = kLog2e * __ldg(p.alibi_slopes + static_cast<int64>(batch) * p.num_heads + head);
    }
  }

  // One more positive factor of the scores, such as those of 8-bit floats.
  JFA_DEVICE void ScaleScores(float factor) {
    float& scale = kSoftcap ? inner : outer;
    // Never 0, which would make NaN of a hidden logit.
    scale = fmaxf(scale * factor, kLeastScale);
  }

  // The factor that turns what Apply leaves into log2 units.
  JFA_DEVICE float Scale() const { return kAlibi ? 1.f : outer; }

  // Signed distance from the query's position to a key. Rows and keys are below 2^30.
  JFA_DEVICE float Distance(int row, int key) const {
    return static_cast<float>(row - key + offset);
  }
  JFA_DEVICE float Cap(float score) const { return kSoftcap ? Tanh(score * inner) : score; }
  JFA_DEVICE float Bias(float capped, float distance) const {
    return kAlibi ? fmaf(capped, outer, -slope * fabsf(distance)) : capped;
  }
  JFA_DEVICE float Apply(float score, float distance) const { return Bias(Cap(score), distance); }

 private:
  // Positions beyond any length are cut, so that their sums stay inside int.
  static constexpr int kFar = (1 << 30) - 1;
  static constexpr float kLeastScale = 1e-37f;
};

// For backward: a weight, recomputed, and the derivative of its logit by scale * score.
struct Weight {
  float p, slope;
};

// A hidden score is -inf. lse_log2 is +inf for a row that counts for nothing.
template <bool kSoftcap, bool kAlibi>
JFA_DEVICE Weight Weigh(const LogitMap<kSoftcap, kAlibi>& map, float score, float distance,
                        float lse_log2) {
  const float capped = map.Cap(score);
  const float p = Exp2(fmaf(map.Bias(capped, distance), map.Scale(), -lse_log2));
  if constexpr (!kSoftcap) return {p, 1.f};
  // The cap makes of -inf an ordinary logit.
  return {score == -Infinity() ? 0.f : p, 1.f - capped * capped};
}

// Of 8-bit floats: factors of the scores and of the output of a (batch, key head).
JFA_DEVICE float ScoreScale(const FwdParams& p, int batch, int kv_head) {
  return p.qk_scales == nullptr ? 1.f
                                : __ldg(p.qk_scales + batch * p.problem.num_kv_heads + kv_head);
}
JFA_DEVICE float ValueScale(const FwdParams& p, int batch, int kv_head) {
  return p.v_scales == nullptr ? 1.f : __ldg(p.v_scales + batch * p.problem.num_kv_heads + kv_head);
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_LOGITS_CUH_
