#include "cc/plan.h"

#include <algorithm>
#include <climits>
#include <tuple>

#include "cc/plan_fp8.h"
#include "cc/plan_tiles.h"

namespace jfa {
namespace {

constexpr int kRowPadding = 128;                   // Sequence::kScratchTile
constexpr int kPreprocessRows = 128;               // BwdPreprocess::kRows
constexpr int kPostprocessRows = 32;               // BwdPostprocess::kRows
constexpr int kTileSlotBytes = 3 * (256 + 2 * 8);  // FwdSm90::kTileSlots and their barriers
constexpr int kMinArch = 80;
constexpr int kCombineRows = 4;  // DecodeCombine: a warp each
// CTAs for which a decode call's scratch has room: no GPU of today has more multiprocessors.
constexpr int64_t kMostDecodeCtas = 192 * 2;
constexpr int kMostPartsLog2 = 3;  // DecodeCluster::kMostCtas
constexpr int kMostPartsRows = 32;

// Rounds a head dim up to its tile class; 0 if there is none.
int TileClass(int head_dim) {
  for (int size : {32, 64, 96, 128, 192, 256}) {
    if (head_dim <= size) return size;
  }
  return 0;
}

struct TileClasses {
  int head_dim, head_dim_v;
};

// Forward takes any pair. In backward eight warps cut dK, dV and dQ into whole 16 x 16 blocks along
// the head dims, in as many parts as the larger class asks for; the smaller one must allow them.
TileClasses ClassesOf(const Variant& variant) {
  const TileClasses own = {TileClass(variant.head_dim), TileClass(variant.head_dim_v)};
  if (variant.op == Op::kFwd || own.head_dim == own.head_dim_v) return own;
  const int larger = std::max(own.head_dim, own.head_dim_v);
  const int granule = larger == 256 ? 128 : larger >= 128 ? 64 : 32;
  const auto fit = [granule](int size) { return (size + granule - 1) / granule * granule; };
  return {fit(own.head_dim), fit(own.head_dim_v)};
}

using Fields = std::vector<std::pair<std::string, std::string>>;

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
const char* Name(Mask mask) {
  return mask == Mask::kFull ? "full" : mask == Mask::kCausal ? "causal" : "local";
}

// "_e4m3" where keys and values are of another dtype than the queries, "_e4m3_e5m2" if they differ.
std::string KeyDtypes(const Variant& variant) {
  if (!variant.fp8_kv) return "";
  const auto name = [](bool e5m2) { return std::string(e5m2 ? "_e5m2" : "_e4m3"); };
  return name(variant.e5m2_k) + (variant.e5m2_v != variant.e5m2_k ? name(variant.e5m2_v) : "");
}

// What all kernels of a variant share.
struct Common {
  int head_dim, head_dim_v, l2_bytes;
  bool aligned;
  std::string suffix;  // "_bf16_d128_causal"
  std::string suffix_without_mask;
};

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

// Of kernels that read 8-bit keys for 16-bit queries too.
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

KernelSpec MakeFwd(const Variant& variant, Common common, const ArchInfo& arch) {
  if (variant.fp8_kv) {
    // Two elements are a column: rows are of whole groups of 64 bytes.
    common.head_dim = (common.head_dim + 63) / 64 * 64;
    common.head_dim_v = (common.head_dim_v + 63) / 64 * 64;
  }
  FwdTile tile = PickFwdTile(std::max(common.head_dim, common.head_dim_v), arch.smem_kb);
  // Looking up pages takes registers, of which large tiles have none to spare; and so does turning
  // 8-bit floats into f16.
  const bool needs_registers = variant.paged || (variant.fp8_kv && !tile.q_in_regs);
  if (needs_registers && tile.block_m == 128 && tile.warps == 4) {
    tile.block_n = std::min(tile.block_n, 32);
  }
  const int row_bytes = (common.head_dim + common.head_dim_v) * (variant.fp8_kv ? 1 : 2);
  const int smem =
      std::max(2 * tile.block_m * common.head_dim + tile.stages * tile.block_n * row_bytes,
               2 * tile.block_m * common.head_dim_v);
  Fields fields = CommonFields(variant, common, tile.warps, tile.min_blocks);
  AddKeyDtypes(&fields, variant);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, tile.stages, smem);
  AddBool(&fields, "kPaged", variant.paged);
  AddBool(&fields, "kQInRegs", tile.q_in_regs);
  return {"fwd_sm80.cuh", "jfa_fwd_sm80" + common.suffix, fields, tile.warps * 32, smem};
}

// Its copies want 16-byte rows. At head dim 32 half of each product would be padding; at 64 its
// large tiles lose to the smaller ones of the older kernel where sequences or segments are short.
bool TakesFwdSm90(const Variant& variant, const Common& common, int arch) {
  if (arch != 90 || !common.aligned || variant.fp8_kv) return false;
  if (variant.family == Family::kSm80) return false;
  if (variant.family == Family::kSm90) return true;
  if (variant.schedule == Schedule::kPersistent) return true;  // the only one that has it
  const int size = std::max(common.head_dim, common.head_dim_v);
  return size > 64 || (size == 64 && !variant.packed && !variant.segments);
}

KernelSpec MakeFwdSm90(const Variant& variant, Common common, int smem_kb) {
  common.head_dim = std::max(common.head_dim, 64);
  common.head_dim_v = std::max(common.head_dim_v, 64);
  const FwdSm90Tile tile = PickFwdSm90Tile(common.head_dim, common.head_dim_v, variant);
  const int warps = 4 * (tile.block_m / 64 + 1);
  // Panels of 64 columns, 128 bytes a row; then barriers: Q's two, and K's and V's per stage.
  const int panels = (common.head_dim + 63) / 64, panels_v = (common.head_dim_v + 63) / 64;
  const int inputs = 128 * (panels * tile.stages_q * tile.block_m +
                            tile.stages * (panels + panels_v) * tile.block_n);
  const int barriers = 8 * (2 * tile.stages_q + 4 * tile.stages) + kTileSlotBytes;
  const int output = 128 * panels_v * tile.block_m;
  const bool stage_out = inputs + output + barriers <= smem_kb * 1024;
  const int smem = inputs + (stage_out ? output : 0) + barriers;
  Fields fields = CommonFields(variant, common, warps, 1);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, tile.stages, smem);
  AddInt(&fields, "kStagesQ", tile.stages_q);
  AddBool(&fields, "kPaged", variant.paged);
  AddBool(&fields, "kStageOut", stage_out);
  AddBool(&fields, "kPingPong", tile.ping_pong);
  // Short and long keys are in the name where they have a kernel of their own.
  Variant medium = variant;
  medium.keys = Length::kMedium;
  const bool own = !(tile == PickFwdSm90Tile(common.head_dim, common.head_dim_v, medium));
  const std::string length = !own ? "" : variant.keys == Length::kShort ? "_short" : "_long";
  return {"fwd_sm90.cuh", "jfa_fwd_sm90" + common.suffix + length,
          fields,         warps * 32,
          smem,           tile.block_m,
          tile.block_n};
}

// `parts`: the kernel whose clusters share tiles; it runs alone on a multiprocessor, where more
// shared memory keeps more copies in flight.
KernelSpec MakeDecodeMain(const Variant& variant, const Common& common, int smem_kb, bool tma,
                          bool parts) {
  const DecodeTile tile = PickDecodeTile(common.head_dim, common.head_dim_v, variant.rows, variant,
                                         tma, parts, smem_kb);
  const int warps = (tile.rows <= 64 ? 4 : 8) + (tma ? 1 : 4);
  Fields fields = CommonFields(variant, common, warps, tile.min_blocks);
  AddTile(&fields, variant, common, tile.rows, tile.block_n, tile.stages, tile.smem);
  AddInt(&fields, "kRows", tile.rows);
  AddBool(&fields, "kTma", tma);
  AddBool(&fields, "kParts", parts);
  AddKeyDtypes(&fields, variant);
  KernelSpec kernel = {"decode.cuh",
                       (tma ? "jfa_decode_sm90" : "jfa_decode_sm80") + common.suffix + "_r" +
                           std::to_string(tile.rows) + (parts ? "_parts" : ""),
                       fields, warps * 32, tile.smem};
  if (tma) kernel.box_rows_kv = tile.block_n;
  if (variant.fp8_kv) kernel.kv_bytes = 1;
  return kernel;
}

// The copy engine wants 16-byte rows, and so does everybody who copies 16 bytes at a time: what
// isn't aligned goes to the forward kernels.
std::vector<KernelSpec> MakeDecode(const Variant& variant, Common common, const ArchInfo& info,
                                   int arch) {
  common.head_dim = std::max(common.head_dim, 64);
  common.head_dim_v = std::max(common.head_dim_v, 64);
  const bool tma = arch == 90 && variant.family != Family::kSm80;
  const KernelSpec decode = MakeDecodeMain(variant, common, info.smem_kb, tma, false);
  const int rows = static_cast<int>(Field(decode, "kRows"));
  Fields combine;
  AddBool(&combine, "kBf16", variant.dtype == DType::kBF16);
  AddInt(&combine, "kRows", rows);
  AddInt(&combine, "kWarps", kCombineRows);
  AddInt(&combine, "kMinBlocks", 1);
  KernelSpec second = {
      "decode_combine.cuh",
      std::string("jfa_decode_combine_") + Name(variant.dtype) + "_r" + std::to_string(rows),
      combine, kCombineRows * 32, 0};
  // Hides what it takes to launch the second kernel.
  second.starts_early = arch >= 90;
  // Merging in a cluster takes longer the more rows there are: it pays with 16, not with 128.
  if (!tma || rows > kMostPartsRows) return {decode, second};
  const KernelSpec parts = MakeDecodeMain(variant, common, info.smem_kb, tma, true);
  const auto same = [&](const char* field) { return Field(parts, field) == Field(decode, field); };
  if (!same("kRows") || !same("kBlockN")) return {decode, second};  // they take the same tiles
  return {decode, second, parts};
}

KernelSpec MakeBwdMain(const Variant& variant, const Common& common, const ArchInfo& arch) {
  BwdTile tile = PickBwdTile(std::max(common.head_dim, common.head_dim_v), arch.smem_kb,
                             variant.deterministic);
  const int dims = common.head_dim + common.head_dim_v;
  const int smem = 2 * dims * (tile.block_n + tile.stages * tile.block_m) +
                   4 * tile.block_m * tile.block_n + tile.stages * 8 * tile.block_m;
  Fields fields = CommonFields(variant, common, tile.warps, tile.min_blocks);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, tile.stages, smem);
  AddBool(&fields, "kDqSums", !variant.deterministic);
  AddBool(&fields, "kDslopes", variant.dslopes);
  AddInt(&fields, "kWarpsScoreN", tile.warps_score_n);
  AddInt(&fields, "kWarpsKvN", tile.warps_kv_n);
  AddInt(&fields, "kWarpsDqM", tile.warps_dq_m);
  return {"bwd_sm80.cuh",
          (variant.deterministic ? "jfa_bwd_dkdv_sm80" : "jfa_bwd_sm80") + common.suffix +
              (variant.dslopes ? "_dslopes" : ""),
          fields, tile.warps * 32, smem};
}

// The tile class of both head dims for the Hopper backward; 0: it doesn't take them. It wants rows
// of 16 bytes; at head dim 32 half of each product would be padding.
int BwdSm90Class(const Variant& variant) {
  const int size = TileClass(std::max(variant.head_dim, variant.head_dim_v));
  if (variant.op != Op::kBwd || size > 128 || variant.head_dim % 8 != 0 ||
      variant.head_dim_v % 8 != 0 || variant.family == Family::kSm80 ||
      (size == 32 && variant.family != Family::kSm90)) {
    return 0;
  }
  return size <= 64 ? 64 : 128;
}

KernelSpec MakeBwdSm90(const Variant& variant, const Common& common) {
  const BwdSm90Tile tile = PickBwdSm90Tile(common.head_dim);
  const int warps = 4 * (tile.block_n / 64 + 1);
  // K, V, Q and dO; two buffers of dS; the rows' statistics; barriers.
  const int smem = 4 * common.head_dim * (tile.block_n + tile.stages * tile.block_m) +
                   4 * tile.block_m * tile.block_n + tile.stages * 8 * tile.block_m +
                   8 * (1 + 4 * tile.stages);
  Fields fields = CommonFields(variant, common, warps, 1);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, tile.stages, smem);
  AddBool(&fields, "kDqSums", !variant.deterministic);
  AddBool(&fields, "kDslopes", variant.dslopes);
  return {"bwd_sm90.cuh",
          (variant.deterministic ? "jfa_bwd_dkdv_sm90" : "jfa_bwd_sm90") + common.suffix +
              (variant.dslopes ? "_dslopes" : ""),
          fields,
          warps * 32,
          smem,
          tile.block_m,
          tile.block_n};
}

KernelSpec MakeBwdDq(const Variant& variant, const Common& common, const ArchInfo& arch) {
  const DqTile tile = PickDqTile(std::max(common.head_dim, common.head_dim_v), arch.smem_kb);
  const int dims = common.head_dim + common.head_dim_v;
  const int smem = 2 * dims * (tile.block_m + tile.stages * tile.block_n);
  Fields fields = CommonFields(variant, common, tile.warps, 1);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, tile.stages, smem);
  return {"bwd_dq_sm80.cuh", "jfa_bwd_dq_sm80" + common.suffix, fields, tile.warps * 32, smem};
}

KernelSpec MakePreprocess(const Variant& variant, const Common& common) {
  Fields fields = CommonFields(variant, common, 4, 1);
  AddBool(&fields, "kDqSums", !variant.deterministic);
  return {"bwd_preprocess.cuh",
          (variant.deterministic ? "jfa_bwd_preprocess_det" : "jfa_bwd_preprocess") +
              common.suffix_without_mask,
          fields, 128, 0};
}

KernelSpec MakePostprocess(const Variant& variant, const Common& common) {
  return {"bwd_postprocess.cuh", "jfa_bwd_postprocess" + common.suffix_without_mask,
          CommonFields(variant, common, 4, 1), 128, 0};
}

std::string CheckHeadDim(const char* name, int head_dim) {
  if (head_dim >= 1 && head_dim <= 256) return "";
  return std::string(name) + ": expected 1 to 256 for the CUDA kernels, got " +
         std::to_string(head_dim);
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As NumTiles of kernels/kv_source.cuh.
int64_t NumTiles(int64_t length, int64_t block, int64_t num_sequences) {
  return num_sequences > 0 ? length / block + num_sequences + 1 : CeilDiv(length, block);
}

// File -> the struct in it and the parameters it takes; whether it uses shared memory.
struct Entry {
  const char *file, *type, *params;
  bool smem;
};
constexpr Entry kEntries[] = {
    {"fwd_sm90.cuh", "FwdSm90", "FwdSm90Params", true},
    {kFwdFp8File, "FwdFp8Sm90", "FwdSm90Params", true},
    {"fwd_sm80.cuh", "FwdSm80", "FwdParams", true},
    {"decode.cuh", "Decode", "DecodeParams", true},
    {"decode_combine.cuh", "DecodeCombine", "DecodeParams", false},
    {"bwd_sm80.cuh", "BwdSm80", "BwdParams", true},
    {"bwd_sm90.cuh", "BwdSm90", "BwdParams", true},
    {"bwd_dq_sm80.cuh", "BwdDqSm80", "BwdParams", true},
    {"bwd_preprocess.cuh", "BwdPreprocess", "BwdParams", false},
    {"bwd_postprocess.cuh", "BwdPostprocess", "BwdParams", false},
};

}  // namespace

bool operator==(const Variant& a, const Variant& b) {
  const auto fields = [](const Variant& v) {
    return std::tie(v.op, v.dtype, v.head_dim, v.head_dim_v, v.mask, v.softcap, v.alibi, v.segments,
                    v.packed, v.deterministic, v.dslopes, v.paged, v.rows, v.fp8, v.fp8_kv,
                    v.e5m2_q, v.e5m2_k, v.e5m2_v, v.two_level, v.family, v.keys, v.schedule);
  };
  return fields(a) == fields(b);
}

Length LengthOf(int64_t kv_len) {
  if (kv_len == 0) return Length::kMedium;
  return kv_len <= 1024 ? Length::kShort : kv_len >= 8192 ? Length::kLong : Length::kMedium;
}

Plan MakePlan(const Variant& variant, int arch) {
  Plan plan;
  ArchInfo info;
  if (!GetArchInfo(arch, &info)) {
    plan.error =
        arch < kMinArch
            ? "GPU architecture: expected sm_80 (Ampere) or newer, got sm_" + std::to_string(arch)
            : "GPU architecture: expected one of sm_80, 86, 87, 89, 90, 100, 103, 120, "
              "121, got sm_" +
                  std::to_string(arch);
    return plan;
  }
  plan.error = CheckHeadDim("head_dim", variant.head_dim);
  if (plan.error.empty()) plan.error = CheckHeadDim("head_dim_v", variant.head_dim_v);
  if (plan.error.empty() && (variant.fp8 || variant.fp8_kv)) plan.error = CheckFp8(variant, arch);
  if (!plan.error.empty()) return plan;

  const int bwd_sm90 = arch == 90 ? BwdSm90Class(variant) : 0;
  const Common common = MakeCommon(
      variant, info, bwd_sm90 > 0 ? TileClasses{bwd_sm90, bwd_sm90} : ClassesOf(variant));
  if (variant.fp8) {
    plan.kernels = {MakeFwdFp8(variant, common.head_dim, common.head_dim_v, info.smem_kb * 1024,
                               common.l2_bytes)};
  } else if (variant.op == Op::kDecode) {
    if (!common.aligned || variant.segments || variant.packed) {
      plan.error = "decode: expected head dims that are multiples of 8, no segments and no packing";
      return plan;
    }
    plan.kernels = MakeDecode(variant, common, info, arch);
  } else if (variant.op == Op::kFwd) {
    if (variant.schedule == Schedule::kPersistent && !TakesFwdSm90(variant, common, arch)) {
      plan.error =
          "schedule 'persistent', or an sm_margin: expected a GPU of architecture sm_90 and head "
          "dims that are multiples of 8, got " +
          ArchName(arch) + " and head dims " + std::to_string(variant.head_dim) + ", " +
          std::to_string(variant.head_dim_v);
      return plan;
    }
    plan.kernels = {TakesFwdSm90(variant, common, arch) ? MakeFwdSm90(variant, common, info.smem_kb)
                                                        : MakeFwd(variant, common, info)};
  } else {
    plan.kernels = {
        MakePreprocess(variant, common),
        bwd_sm90 > 0 ? MakeBwdSm90(variant, common) : MakeBwdMain(variant, common, info),
        variant.deterministic ? MakeBwdDq(variant, common, info)
                              : MakePostprocess(variant, common)};
  }
  for (const KernelSpec& kernel : plan.kernels) {
    if (kernel.smem_bytes > info.smem_kb * 1024) {
      plan.error = kernel.symbol + ": shared memory: expected at most " +
                   std::to_string(info.smem_kb * 1024) + " bytes, got " +
                   std::to_string(kernel.smem_bytes);
      plan.kernels.clear();
      return plan;
    }
  }
  return plan;
}

// All grids are one-dimensional: the kernels order their tiles themselves (ScheduleWork), and x
// alone may exceed 65535.
Grid MakeGrid(const Plan& plan, int index, const Variant& variant, const Problem& problem,
              int multiprocessors) {
  const KernelSpec& kernel = plan.kernels[index];
  if (variant.op == Op::kDecode) {
    const DecodeShare share = ShareDecode(plan, problem, multiprocessors);
    const uint32_t ctas = static_cast<uint32_t>(share.ctas);
    if (index == share.kernel) return {ctas, 1, 1, 1u << share.parts_log2};
    const int64_t tiles =
        problem.batch * problem.num_kv_heads * DecodeRowTiles(plan.kernels.front(), problem);
    const bool whole = problem.alike && ctas > 0 && tiles % ctas == 0;  // nobody shares a tile
    if (index != kDecodeCombine || share.kernel != kDecodeStretches || whole) return {0, 1, 1};
    const int64_t rows = std::min(problem.q_len * problem.group, Field(kernel, "kRows"));
    return {
        static_cast<uint32_t>(std::max<int64_t>(share.ctas - 1, 0) * CeilDiv(rows, kCombineRows)),
        1, 1};
  }
  const int64_t kv_heads = problem.batch * problem.num_kv_heads;
  int64_t length = problem.q_len, heads = kv_heads * problem.group, block = 0;
  if (kernel.file == "fwd_sm90.cuh" || kernel.file == kFwdFp8File) {
    int64_t items = NumTiles(length, Field(kernel, "kBlockM"), problem.num_sequences);
    if (PairsTiles(kernel, variant, problem, multiprocessors)) items = CeilDiv(items, 2);
    items *= heads;
    if (StaysOnMultiprocessors(plan, index, variant)) {
      items = std::min<int64_t>(items, multiprocessors);
    }
    return {static_cast<uint32_t>(items), 1, 1};
  }
  if (kernel.file == "fwd_sm80.cuh" || kernel.file == "bwd_dq_sm80.cuh") {
    block = Field(kernel, "kBlockM");
  } else if (kernel.file == "bwd_sm80.cuh" || kernel.file == "bwd_sm90.cuh") {
    length = problem.kv_len;
    heads = kv_heads;
    block = Field(kernel, "kBlockN");
  } else if (kernel.file == "bwd_preprocess.cuh") {
    block = kPreprocessRows;
  } else if (kernel.file == "bwd_postprocess.cuh") {
    block = kPostprocessRows;
  } else {
    return {0, 1, 1};
  }
  return {static_cast<uint32_t>(NumTiles(length, block, problem.num_sequences) * heads), 1, 1};
}

bool StaysOnMultiprocessors(const Plan& plan, int index, const Variant& variant) {
  if (variant.op == Op::kDecode) return index == 0;
  const std::string& file = plan.kernels[index].file;
  if (file != "fwd_sm90.cuh" && file != kFwdFp8File) return false;
  // CTAs that stay would share tiles whose lengths nobody knows unevenly.
  if (variant.schedule == Schedule::kAny) return !variant.packed && !variant.segments;
  return variant.schedule == Schedule::kPersistent;
}

bool PairsTiles(const KernelSpec& kernel, const Variant& variant, const Problem& problem,
                int multiprocessors) {
  if (variant.mask != Mask::kCausal || variant.packed || variant.segments) return false;
  if (variant.schedule == Schedule::kGrid) return false;
  const int64_t block = Field(kernel, "kBlockM"), tiles = CeilDiv(problem.q_len, block);
  const int64_t heads = problem.batch * problem.num_kv_heads * problem.group;
  const int64_t rounds = CeilDiv(tiles * heads, multiprocessors);
  if (rounds > 8) return true;
  // Row tile i costs as much as the keys it sees, and something to begin and end. Single tiles go
  // longest first to all CTAs in turn: the first one has most to do.
  const int64_t before = std::max<int64_t>(problem.kv_len - problem.q_len, 0);
  const auto cost = [&](int64_t i) { return before + (i + 1) * block + 128; };
  int64_t single = 0;
  for (int64_t r = 0; r < rounds; ++r) single += cost(tiles - 1 - r * multiprocessors / heads);
  const int64_t paired = CeilDiv(CeilDiv(tiles, 2) * heads, multiprocessors) *
                         (tiles > 1 ? cost(tiles - 1) + cost(0) : cost(0));
  // If in doubt pairs: they also share keys better.
  return paired * 15 <= single * 16;
}

namespace {

// 4-byte words of DecodeScratch in kernels/decode_share.cuh: of its header, and for each CTA.
constexpr int64_t kDecodeHeaderWords = 4;
int64_t DecodeWordsPerCta(const KernelSpec& kernel, const Problem& problem, int64_t head_dim_v) {
  const int64_t rows = std::min(problem.q_len * problem.group, Field(kernel, "kRows"));
  return 4 + 2 * rows * (2 + head_dim_v);
}

}  // namespace

int DecodeRowTiles(const KernelSpec& kernel, const Problem& problem) {
  return static_cast<int>(CeilDiv(problem.q_len * problem.group, Field(kernel, "kRows")));
}

namespace {

// In how many parts (log2), one for each CTA of a cluster, each tile should be cut; -1 if stretches
// and a second kernel that merges are better.
int PickParts(const KernelSpec& kernel, const Problem& problem, int64_t tiles, int64_t blocks,
              int multiprocessors) {
  // Clusters that surely run at the same time, a CTA on each multiprocessor: these come in groups
  // of 14, 16 and 18, which no cluster crosses.
  const int64_t most[] = {multiprocessors, multiprocessors, multiprocessors * 7 / 8,
                          multiprocessors * 3 / 4};
  int best = -1;
  int64_t longest = 0;
  for (int log2 = 0; log2 <= kMostPartsLog2; ++log2) {
    const int64_t part = CeilDiv(blocks, int64_t{1} << log2);
    if (tiles << log2 > most[log2] || (best >= 0 && part == longest)) break;
    best = log2;
    longest = part;
  }
  // Times in units of 50 ns, measured on an H100 (docs/performance.md). One CTA takes 9 for a
  // block, but 1 for each copy it orders; all of them together read 8 blocks from L2 in 1; a second
  // kernel costs 52. Where parts are longer than kLongest memory is the limit, and a cluster's
  // CTAs, which can't run anywhere, have less of it.
  constexpr int64_t kLongest = 32, kBlockTime = 9, kBlocksInTime = 8, kMergeTime = 52;
  const int64_t block_n = Field(kernel, "kBlockN");
  const int64_t boxes = problem.page_size > 0 ? CeilDiv(block_n, problem.page_size) : 1;
  const int64_t copies =
      boxes * (CeilDiv(Field(kernel, "kHeadDim"), 64) + CeilDiv(Field(kernel, "kHeadDimV"), 64));
  const bool is_short = longest <= kLongest && longest * std::max(kBlockTime, copies) <=
                                                   kMergeTime + tiles * blocks / kBlocksInTime;
  return is_short ? best : -1;
}

}  // namespace

DecodeShare ShareDecode(const Plan& plan, const Problem& problem, int multiprocessors) {
  const KernelSpec& kernel = plan.kernels[kDecodeStretches];
  if (problem.q_len * problem.group == 0) return {};
  // The same of both kernels.
  const int64_t tiles = problem.batch * problem.num_kv_heads * DecodeRowTiles(kernel, problem);
  const int64_t blocks = std::max<int64_t>(CeilDiv(problem.kv_len, Field(kernel, "kBlockN")), 1);
  if (tiles > INT_MAX / blocks) return {};
  if (plan.kernels.size() > kDecodeParts && tiles <= INT_MAX >> kMostPartsLog2) {
    int log2 = PickParts(plan.kernels[kDecodeParts], problem, tiles, blocks, multiprocessors);
    if (problem.forced_cluster >= 0) {
      log2 = -1;
      while (1 << (log2 + 1) <= problem.forced_cluster) ++log2;
    }
    if (log2 >= 0) return {tiles << log2, kDecodeParts, log2};
  }
  const int64_t room = (problem.scratch_floats - kDecodeHeaderWords) /
                       DecodeWordsPerCta(kernel, problem, problem.head_dim_v);
  const int64_t ctas =
      std::min({multiprocessors * Field(kernel, "kMinBlocks"), tiles * blocks, room});
  if (ctas < tiles) {
    // Whole tiles need no merging: worth a few idle multiprocessors.
    const int64_t each = ctas > 0 ? CeilDiv(tiles, ctas) : 1, whole = tiles / each;
    const bool divides = whole * each == tiles && whole * 10 >= ctas * 9;
    return {problem.alike && divides ? whole : ctas};
  }
  // A short tile for each multiprocessor is read as fast by one CTA as by two, and needs no
  // merging.
  constexpr int64_t kShort = 32;
  if (problem.alike && blocks <= kShort && tiles * 10 >= multiprocessors * 9 &&
      Field(kernel, "kRows") == 16) {
    return {tiles};
  }
  // Equal parts of tiles need less merging. No more of them than make the longest one shorter.
  const int64_t parts = ctas / tiles, longest = CeilDiv(blocks, parts);
  return {tiles * CeilDiv(blocks, longest)};
}

int64_t DecodeScratchFloats(const Variant& variant, const Problem& problem) {
  // The tile differs between architectures, its rows and blocks only by little: the larger ones.
  const int64_t rows = std::min<int64_t>(problem.q_len * problem.group, 128);
  const int64_t tiles = problem.batch * problem.num_kv_heads *
                        CeilDiv(std::max<int64_t>(problem.q_len * problem.group, 1), 16);
  const int64_t ctas =
      std::min(kMostDecodeCtas, tiles * std::max<int64_t>(CeilDiv(problem.kv_len, 16), 1));
  return kDecodeHeaderWords + ctas * (4 + 2 * rows * (2 + variant.head_dim_v));
}

int64_t ScratchRows(int64_t q_len, int64_t num_sequences) {
  if (num_sequences == 0) return CeilDiv(q_len, kRowPadding) * kRowPadding;
  return (q_len / kRowPadding + num_sequences + 1) * kRowPadding;
}

// The layout is BwdScratch in kernels/kv_source.cuh.
int64_t ScratchFloats(const Variant& variant, int64_t group, int64_t q_len, int64_t num_sequences) {
  if (variant.op == Op::kFwd) return 0;
  // For any architecture: the Hopper kernel rounds head dims up further.
  const int head_dim = std::max(ClassesOf(variant).head_dim, BwdSm90Class(variant));
  return group * ScratchRows(q_len, num_sequences) * (2 + (variant.deterministic ? 0 : head_dim));
}

// No tile has more warps than an eighth of its keys, none has more than 128 keys.
int64_t SlopePartials(int64_t kv_len, int64_t num_sequences) {
  return (kv_len / 128 + num_sequences + 1) * (128 / 8);
}

std::string ArchName(int arch) {
  // Hopper and Blackwell have instructions that only the architecture-specific target knows.
  const bool specific = arch == 90 || arch == 100 || arch == 103 || arch == 120 || arch == 121;
  return "sm_" + std::to_string(arch) + (specific ? "a" : "");
}

std::string SourceStub(const KernelSpec& kernel) {
  std::string source = "#include \"" + kernel.file + "\"\n\nstruct Config {\n";
  for (const auto& field : kernel.config) {
    const bool is_bool = field.second == "true" || field.second == "false";
    source += std::string("  static constexpr ") + (is_bool ? "bool " : "int ") + field.first +
              " = " + field.second + ";\n";
  }
  source += "};\n\n";
  for (const Entry& entry : kEntries) {
    if (kernel.file != entry.file) continue;
    // Tiles are addressed by XOR on their low bits: 128-byte alignment is what they need.
    if (entry.smem) source += "extern __shared__ __align__(1024) unsigned char smem[];\n\n";
    source +=
        "extern \"C\" __global__ void __launch_bounds__(Config::kWarps * 32, "
        "Config::kMinBlocks)\n" +
        kernel.symbol + "(const __grid_constant__ jfa::" + entry.params +
        " params) {\n  jfa::" + entry.type + "<Config>::Run(params" + (entry.smem ? ", smem" : "") +
        ");\n}\n";
  }
  return source;
}

std::string Describe(const Plan& plan) {
  if (!plan.error.empty()) return "unsupported: " + plan.error + "\n";
  std::string text;
  for (const KernelSpec& kernel : plan.kernels) {
    text += kernel.symbol + ":";
    if (Field(kernel, "kBlockM") != 0) {
      text += " tile " + std::to_string(Field(kernel, "kBlockM")) + "x" +
              std::to_string(Field(kernel, "kBlockN")) + ", stages " +
              std::to_string(Field(kernel, "kStages")) + ",";
    }
    text += " threads " + std::to_string(kernel.threads) + ", shared memory " +
            std::to_string(kernel.smem_bytes) + " bytes\n";
  }
  return text;
}

}  // namespace jfa
