// What the specs of all kernels share: the fields of their Config and the parts of their names.
// Part of plan.cc, plan_decode.cc and plan_fp8.cc, which alone use it.
#ifndef JAX_FLASHATTN_CC_PLAN_SPEC_H_
#define JAX_FLASHATTN_CC_PLAN_SPEC_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cc/plan.h"
#include "cc/plan_tiles.h"

namespace jfa {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TileClasses {
  int head_dim, head_dim_v;
};

using Fields = std::vector<std::pair<std::string, std::string>>;

void AddInt(Fields* fields, const char* name, int64_t value);
void AddBool(Fields* fields, const char* name, bool value);
// A field's value as a number; 0 if there is none.
int64_t Field(const KernelSpec& kernel, const std::string& name);

const char* Name(DType dtype);

// What all kernels of a variant share.
struct Common {
  int head_dim, head_dim_v, l2_bytes;
  bool aligned;
  std::string suffix;  // "_bf16_d128_causal"
  std::string suffix_without_mask;
};

Common MakeCommon(const Variant& variant, const ArchInfo& arch, TileClasses classes);

Fields CommonFields(const Variant& variant, const Common& common, int warps, int min_blocks);
// Of kernels that read 8-bit keys for 16-bit queries too.
void AddKeyDtypes(Fields* fields, const Variant& variant);
void AddTile(Fields* fields, const Variant& variant, const Common& common, int block_m, int block_n,
             int stages, int smem_bytes);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_PLAN_SPEC_H_
