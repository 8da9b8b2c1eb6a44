// The plan's part for 8-bit floats: the Hopper kernel fwd_fp8_sm90.cuh and its tiles.
#ifndef JAX_FLASHATTN_CC_PLAN_FP8_H_
#define JAX_FLASHATTN_CC_PLAN_FP8_H_

#include <string>

#include "cc/plan.h"

namespace jfa {

inline constexpr char kFwdFp8File[] = "fwd_fp8_sm90.cuh";

// Empty, or why 8-bit floats don't run there.
std::string CheckFp8(const Variant& variant, int arch);

// The kernel; `head_dim` and `head_dim_v` are tile classes.
KernelSpec MakeFwdFp8(const Variant& variant, int head_dim, int head_dim_v, int smem_bytes,
                      int l2_bytes);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_PLAN_FP8_H_
