#include "cc/plan_fp8.h"

#include <algorithm>

namespace jfa {
namespace {

constexpr int kGranule = 16;  // elements: copies want rows and heads of 16 bytes

struct Tile {
  int block_m, block_n;
  int stages_q, stages_v;
  bool optimistic = false;  // weights_fp8.cuh
  int stages_k = 2;
};

// As many keys as registers and shared memory allow; docs/performance.md has what was measured.
// What features hold per row and key takes registers.
Tile PickTile(int head_dim, int head_dim_v, const Variant& variant) {
  const int size = std::max(head_dim, head_dim_v);
  const bool plain = !variant.segments && !variant.packed && !variant.softcap && !variant.alibi;
  if (size <= 64) {
    return plain && !variant.two_level ? Tile{192, 128, 2, 2, false, 3} : Tile{128, 128, 2, 2};
  }
  // Three warpgroups share each block of keys; under a mask their long tiles compute too much.
  if (size == 128 && plain && variant.mask == Mask::kFull && !variant.two_level) {
    return {192, 96, 2, 2, true, 3};
  }
  if (size <= 128) {
    // What segments hold leaves no registers for two sets of weights, nor for two of sums.
    const int block_n = plain ? 192 : variant.two_level && variant.segments ? 96 : 128;
    return {128, block_n, 2, 2, !variant.two_level && !variant.segments};
  }
  return {128, plain ? 96 : 64, 1, 2};
}

}  // namespace

std::string CheckFp8(const Variant& variant, int arch) {
  if (variant.fp8 && arch != 90) {
    return "float8: expected sm_90 (Hopper), got sm_" + std::to_string(arch) +
           "; use bfloat16, or implementation='xla'";
  }
  if (variant.op == Op::kBwd) return "float8: expected the forward pass, got the backward pass";
  if (variant.fp8 && (variant.op == Op::kDecode || variant.paged)) {
    return "float8 queries: expected float16 or bfloat16 for pages and decoding";
  }
  for (const int dim : {variant.head_dim, variant.head_dim_v}) {
    if (dim % kGranule != 0) {
      return "float8: expected head dims that are multiples of 16, got " + std::to_string(dim);
    }
  }
  return "";
}

KernelSpec MakeFwdFp8(const Variant& variant, Common common, const ArchInfo& arch) {
  common.head_dim = std::max(common.head_dim, 64);
  common.head_dim_v = std::max(common.head_dim_v, 64);
  const Tile tile = PickTile(common.head_dim, common.head_dim_v, variant);
  constexpr int kStages = 2;
  const int warps = 4 * (tile.block_m / 64 + 1);
  const auto panels = [](int columns, int width) { return (columns + width - 1) / width; };
  // As the struct lays it out: panels of 128 bytes a row, the output, barriers, slots of tiles.
  const int panels_k = panels(common.head_dim, 128), panels_v = panels(common.head_dim_v, 128);
  const int inputs =
      128 * (tile.stages_q * panels_k * tile.block_m + tile.stages_k * panels_k * tile.block_n +
             tile.stages_v * panels_v * tile.block_n +
             kStages * panels(tile.block_n, 128) * common.head_dim_v);
  constexpr int kSlots = 3, kSlotBytes = 256, kKeysBytes = 16;
  const int control = 16 * (tile.stages_q + tile.stages_k + kStages + tile.stages_v + kSlots) +
                      kKeysBytes + kSlots * kSlotBytes;
  const int output = 128 * panels(common.head_dim_v, 64) * tile.block_m;
  const bool stage_out = inputs + control + output <= arch.smem_kb * 1024;
  const int smem = inputs + control + (stage_out ? output : 0);

  Fields fields = CommonFields(variant, common, warps, 1);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, kStages, smem);
  AddBool(&fields, "kE5m2Q", variant.e5m2_q);
  AddBool(&fields, "kE5m2K", variant.e5m2_k);
  AddBool(&fields, "kE5m2V", variant.e5m2_v);
  AddBool(&fields, "kTwoLevel", variant.two_level);
  AddInt(&fields, "kStagesQ", tile.stages_q);
  AddInt(&fields, "kStagesK", tile.stages_k);
  AddInt(&fields, "kStagesV", tile.stages_v);
  AddBool(&fields, "kOptimistic", tile.optimistic);
  AddBool(&fields, "kStageOut", stage_out);
  // Measured: with long rows in registers, CTAs that take tiles as they get free are slower.
  AddBool(&fields, "kCounted", std::max(common.head_dim, common.head_dim_v) <= 128);

  const auto name = [](bool e5m2) { return std::string(e5m2 ? "_e5m2" : "_e4m3"); };
  std::string dtypes = name(variant.e5m2_q);
  if (variant.e5m2_k != variant.e5m2_q || variant.e5m2_v != variant.e5m2_q) {
    dtypes += name(variant.e5m2_k) + name(variant.e5m2_v);
  }
  KernelSpec kernel = {
      kFwdFp8File,
      "jfa_fwd_sm90" + dtypes + (variant.two_level ? "_two_level" : "") + common.suffix,
      fields,
      warps * 32,
      smem,
      tile.block_m,
      tile.block_n};
  kernel.q_bytes = kernel.kv_bytes = 1;
  return kernel;
}

}  // namespace jfa
