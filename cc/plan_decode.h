// The plan's part for decoding: decode.cuh, alone or in clusters, and decode_combine.cuh.
#ifndef JAX_FLASHATTN_CC_PLAN_DECODE_H_
#define JAX_FLASHATTN_CC_PLAN_DECODE_H_

#include <vector>

#include "cc/plan.h"
#include "cc/plan_spec.h"

namespace jfa {

// The kernels, in the order of DecodeKernel.
std::vector<KernelSpec> MakeDecode(const Variant& variant, Common common, const ArchInfo& info,
                                   int arch);

DecodeShare ShareDecode(const Plan& plan, const Problem& problem, int multiprocessors);

Grid MakeDecodeGrid(const Plan& plan, int index, const Problem& problem, const DecodeShare& share);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_PLAN_DECODE_H_
