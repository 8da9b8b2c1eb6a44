#include "cc/plan_spec.h"

#include <cstdlib>

namespace jfa {
namespace {

const char* Name(Mask mask) {
  return mask == Mask::kFull ? "full" : mask == Mask::kCausal ? "causal" : "local";
}

// "_e4m3" where keys and values are of another dtype than the queries, "_e4m3_e5m2" if they differ.
std::string KeyDtypes(const Variant& variant) {
  if (!variant.fp8_kv) return "";
  const auto name = [](bool e5m2) { return std::string(e5m2 ? "_e5m2" : "_e4m3"); };
  return name(variant.e5m2_k) + (variant.e5m2_v != variant.e5m2_k ? name(variant.e5m2_v) : "");
}

}  // namespace

int64_t Field(const KernelSpec& kernel, const std::string& name) {
  for (const auto& field : kernel.config) {
    if (field.first == name) return std::atoll(field.second.c_str());
  }
  return 0;
}

void AddInt(Fields* fields, const char* name, int64_t value) {
  fields->emplace_back(name, std::to_string(value));
}
void AddBool(Fields* fields, const char* name, bool value) {
  fields->emplace_back(name, value ? "true" : "false");
}

const char* Name(DType dtype) { return dtype == DType::kBF16 ? "bf16" : "f16"; }
Common MakeCommon(const Variant& variant, const ArchInfo& arch, TileClasses classes) {
  Common common;
  common.head_dim = classes.head_dim;
  common.head_dim_v = classes.head_dim_v;
  common.l2_bytes = arch.l2_mb << 20;
  // Rows of a multiple of 8 elements start on 16 bytes wherever the array does.
  common.aligned = variant.head_dim % 8 == 0 && variant.head_dim_v % 8 == 0;
  std::string dims = "_d" + std::to_string(common.head_dim);
  if (common.head_dim_v != common.head_dim) dims += "x" + std::to_string(common.head_dim_v);
  if (!common.aligned) dims += "_unaligned";
  common.suffix_without_mask = std::string("_") + Name(variant.dtype) + KeyDtypes(variant) + dims;
  common.suffix = common.suffix_without_mask + "_" + Name(variant.mask) +
                  (variant.softcap ? "_softcap" : "") + (variant.alibi ? "_alibi" : "") +
                  (variant.segments ? "_segments" : "") + (variant.packed ? "_packed" : "") +
                  (variant.paged ? "_paged" : "");
  common.suffix_without_mask += variant.packed ? "_packed" : "";
  return common;
}

Fields CommonFields(const Variant& variant, const Common& common, int warps, int min_blocks) {
  Fields fields;
  AddBool(&fields, "kBf16", variant.dtype == DType::kBF16);
  AddInt(&fields, "kHeadDim", common.head_dim);
  AddInt(&fields, "kHeadDimV", common.head_dim_v);
  AddBool(&fields, "kAligned", common.aligned);
  AddBool(&fields, "kPacked", variant.packed);
  AddInt(&fields, "kWarps", warps);
  AddInt(&fields, "kMinBlocks", min_blocks);
  return fields;
}

void AddKeyDtypes(Fields* fields, const Variant& variant) {
  AddBool(fields, "kFp8", variant.fp8_kv);
  AddBool(fields, "kE5m2K", variant.fp8_kv && variant.e5m2_k);
  AddBool(fields, "kE5m2V", variant.fp8_kv && variant.e5m2_v);
}

void AddTile(Fields* fields, const Variant& variant, const Common& common, int block_m, int block_n,
             int stages, int smem_bytes) {
  AddInt(fields, "kMask", static_cast<int>(variant.mask));
  AddBool(fields, "kSoftcap", variant.softcap);
  AddBool(fields, "kAlibi", variant.alibi);
  AddBool(fields, "kSegments", variant.segments);
  AddInt(fields, "kBlockM", block_m);
  AddInt(fields, "kBlockN", block_n);
  AddInt(fields, "kStages", stages);
  AddInt(fields, "kSmemBytes", smem_bytes);
  AddInt(fields, "kL2Bytes", common.l2_bytes);
}

}  // namespace jfa
