#include "cc/plan_fp8.h"

#include <algorithm>

namespace jfa {
namespace {

constexpr int kGranule = 16;  // elements: copies want rows and heads of 16 bytes

struct Tile {
  int block_m, block_n;
  bool ping_pong;
  int stages_q, stages_v;
  bool optimistic = false;  // weights_fp8.cuh
};

// As many keys as registers and shared memory allow; docs/performance.md has what was measured.
// What features hold per row and key takes registers.
Tile PickTile(int head_dim, int head_dim_v, const Variant& variant) {
  const int size = std::max(head_dim, head_dim_v);
  const bool plain = !variant.segments && !variant.packed && !variant.softcap && !variant.alibi;
  if (size <= 64) {
    return {plain && !variant.two_level ? 192 : 128, 128, false, 2, 2};
  }
  // Three warpgroups share each block of keys; under a mask their long tiles compute too much.
  if (size == 128 && plain && variant.mask == Mask::kFull && !variant.two_level) {
    return {192, 96, false, 2, 2, true};
  }
  if (size <= 128) return {128, plain ? 192 : 128, false, 2, 2, !variant.two_level};
  if (size <= 192) return {128, plain ? 96 : 64, false, 1, 2};
  return {128, plain ? 96 : 64, false, 1, 2};
}

const char* Name(Mask mask) {
  return mask == Mask::kFull ? "full" : mask == Mask::kCausal ? "causal" : "local";
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

KernelSpec MakeFwdFp8(const Variant& variant, int head_dim, int head_dim_v, int smem_bytes,
                      int l2_bytes) {
  head_dim = std::max(head_dim, 64);
  head_dim_v = std::max(head_dim_v, 64);
  const Tile tile = PickTile(head_dim, head_dim_v, variant);
  constexpr int kStages = 2;
  const int warps = 4 * (tile.block_m / 64 + 1);
  const auto panels = [](int columns, int width) { return (columns + width - 1) / width; };
  // As the struct lays it out: panels of 128 bytes a row, the output, barriers, slots of tiles.
  const int panels_k = panels(head_dim, 128), panels_v = panels(head_dim_v, 128);
  const int inputs =
      128 *
      (tile.stages_q * panels_k * tile.block_m + kStages * panels_k * tile.block_n +
       tile.stages_v * panels_v * tile.block_n + kStages * panels(tile.block_n, 128) * head_dim_v);
  constexpr int kSlots = 3, kSlotBytes = 256, kKeysBytes = 16;
  const int control = 8 * (2 * tile.stages_q + 4 * kStages + 2 * tile.stages_v + 2 * kSlots) +
                      kKeysBytes + kSlots * kSlotBytes;
  const int output = 128 * panels(head_dim_v, 64) * tile.block_m;
  const bool stage_out = inputs + control + output <= smem_bytes;

  KernelSpec kernel;
  const auto number = [&](const char* name, int value) {
    kernel.config.emplace_back(name, std::to_string(value));
  };
  const auto flag = [&](const char* name, bool value) {
    kernel.config.emplace_back(name, value ? "true" : "false");
  };
  flag("kBf16", variant.dtype == DType::kBF16);
  flag("kE5m2Q", variant.e5m2_q);
  flag("kE5m2K", variant.e5m2_k);
  flag("kE5m2V", variant.e5m2_v);
  flag("kTwoLevel", variant.two_level);
  number("kHeadDim", head_dim);
  number("kHeadDimV", head_dim_v);
  flag("kPacked", variant.packed);
  number("kWarps", warps);
  number("kMinBlocks", 1);
  number("kMask", static_cast<int>(variant.mask));
  flag("kSoftcap", variant.softcap);
  flag("kAlibi", variant.alibi);
  flag("kSegments", variant.segments);
  number("kBlockM", tile.block_m);
  number("kBlockN", tile.block_n);
  number("kStages", kStages);
  number("kStagesQ", tile.stages_q);
  number("kStagesV", tile.stages_v);
  flag("kPingPong", tile.ping_pong);
  flag("kOptimistic", tile.optimistic);
  flag("kStageOut", stage_out);
  kernel.smem_bytes = inputs + control + (stage_out ? output : 0);
  number("kSmemBytes", kernel.smem_bytes);
  number("kL2Bytes", l2_bytes);

  kernel.file = kFwdFp8File;
  const auto name = [](bool e5m2) { return e5m2 ? "e5m2" : "e4m3"; };
  std::string dtypes = name(variant.e5m2_q);
  if (variant.e5m2_k != variant.e5m2_q || variant.e5m2_v != variant.e5m2_q) {
    dtypes += std::string("_") + name(variant.e5m2_k) + "_" + name(variant.e5m2_v);
  }
  std::string dims = std::to_string(head_dim);
  if (head_dim_v != head_dim) dims += "x" + std::to_string(head_dim_v);
  kernel.symbol = "jfa_fwd_sm90_" + dtypes + (variant.two_level ? "_two_level" : "") +
                  (variant.dtype == DType::kBF16 ? "_bf16" : "_f16") + "_d" + dims + "_" +
                  Name(variant.mask) + (variant.softcap ? "_softcap" : "") +
                  (variant.alibi ? "_alibi" : "") + (variant.segments ? "_segments" : "") +
                  (variant.packed ? "_packed" : "");
  kernel.threads = 32 * warps;
  kernel.box_rows_q = tile.block_m;
  kernel.box_rows_kv = tile.block_n;
  kernel.q_bytes = kernel.kv_bytes = 1;
  return kernel;
}

}  // namespace jfa
