// The plan's part for 8-bit floats: the Hopper kernel fwd_fp8_sm90.cuh and its tiles.
#ifndef JAX_FLASHATTN_CC_PLAN_FP8_H_
#define JAX_FLASHATTN_CC_PLAN_FP8_H_

#include <string>

#include "cc/plan.h"
#include "cc/plan_spec.h"

namespace jfa {

inline constexpr char kFwdFp8File[] = "fwd_fp8_sm90.cuh";

// Empty, or why 8-bit floats don't run there.
std::string CheckFp8(const Variant& variant, int arch);

// The kernel.
KernelSpec MakeFwdFp8(const Variant& variant, Common common, const ArchInfo& arch);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_PLAN_FP8_H_
