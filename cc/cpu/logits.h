// From a score q.k to its logit: scale, soft cap, ALiBi. Forward and backward share it.
//
// Calls without a cap and ALiBi leave the scale to the softmax, which is cheaper and a little more
// accurate (see forward.h).
#ifndef JAX_FLASHATTN_CC_CPU_LOGITS_H_
#define JAX_FLASHATTN_CC_CPU_LOGITS_H_

#include "attention.h"
#include "simd.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

static inline bool HasPlainLogits(const Problem& p) { return p.soft_cap == 0 && !p.alibi_slopes; }

struct LogitRule {
  float scale;
  float cap;           // 0: none
  float scale_by_cap;  // scale / cap
  bool has_alibi;
};

static inline LogitRule MakeLogitRule(const Problem& p) {
  return {p.scale, p.soft_cap, p.soft_cap > 0 ? p.scale / p.soft_cap : 0.0f,
          p.alibi_slopes != nullptr};
}

struct Logit {
  Vec value;
  Vec tanh;      // of the capped score
  Vec distance;  // of the row from the key
};

JFA_INLINE Logit ToLogit(const LogitRule& rule, Vec score, Vec slope, Vec position, float key) {
  Logit logit;
  logit.tanh = logit.distance = Vec{};
  if (rule.cap > 0) {
    logit.tanh = Tanh(score * rule.scale_by_cap);
    logit.value = logit.tanh * rule.cap;
  } else {
    logit.value = score * rule.scale;
  }
  if (rule.has_alibi) {
    logit.distance = Abs(position - key);
    logit.value -= slope * logit.distance;
  }
  return logit;
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_LOGITS_H_
