#include "cc/plan.h"

#include <algorithm>
#include <tuple>

#include "cc/plan_decode.h"
#include "cc/plan_fp8.h"
#include "cc/plan_spec.h"
#include "cc/plan_tiles.h"

namespace jfa {
namespace {

constexpr int kRowPadding = 128;             // Sequence::kScratchTile
constexpr int kPreprocessRows = 128;         // BwdPreprocess::kRows
constexpr int kPostprocessRows = 32;         // BwdPostprocess::kRows
constexpr int kTileSlotBytes = 256 + 2 * 8;  // FwdSm90::kSlotBytes and a slot's barriers
constexpr int kMinArch = 80;

// Rounds a head dim up to its tile class; 0 if there is none.
int TileClass(int head_dim) {
  for (int size : {32, 64, 96, 128, 192, 256}) {
    if (head_dim <= size) return size;
  }
  return 0;
}

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
  if (arch != 90 || !common.aligned) return false;
  if (variant.family == Family::kSm80) return false;
  if (variant.family == Family::kSm90) return true;
  if (variant.schedule == Schedule::kPersistent) return true;  // the only one that has it
  const int size = std::max(common.head_dim, common.head_dim_v);
  return size > 64 || (size == 64 && !(variant.packed && variant.paged) && !variant.segments);
}

KernelSpec MakeFwdSm90(const Variant& variant, Common common, int smem_kb) {
  common.head_dim = std::max(common.head_dim, 64);
  common.head_dim_v = std::max(common.head_dim_v, 64);
  const FwdSm90Tile tile = PickFwdSm90Tile(common.head_dim, common.head_dim_v, variant);
  const int groups = tile.block_m / 64, warps = 4 * (groups + 1);
  const int parts_q = tile.split_q ? groups : 1;
  // Panels of 64 columns, 128 bytes a row, or of 128 in 8 bits; then barriers: two per stage of
  // each part of Q, and K's and V's per stage; notes on what is in 8 bits.
  const int panels = (common.head_dim + 63) / 64, panels_v = (common.head_dim_v + 63) / 64;
  const int inputs = 128 * (panels * tile.stages_q * tile.block_m +
                            tile.stages * (panels + panels_v) * tile.block_n +
                            tile.stages_8 * ((std::max(panels, panels_v) + 1) / 2) * tile.block_n);
  const int barriers = 8 * (2 * tile.stages_q * parts_q + 4 * tile.stages + 2 * tile.stages_8) +
                       (variant.fp8_kv ? 16 : 0) + tile.tile_slots * kTileSlotBytes;
  const int output = 128 * panels_v * tile.block_m;
  const bool stage_out = inputs + output + barriers <= smem_kb * 1024;
  const int smem = inputs + (stage_out ? output : 0) + barriers;
  Fields fields = CommonFields(variant, common, warps, 1);
  AddKeyDtypes(&fields, variant);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, tile.stages, smem);
  AddInt(&fields, "kStagesQ", tile.stages_q);
  AddBool(&fields, "kSplitQ", tile.split_q);
  AddInt(&fields, "kHeldQ", tile.held_q);
  AddInt(&fields, "kStages8", tile.stages_8);
  AddBool(&fields, "kPaged", variant.paged);
  AddBool(&fields, "kStageOut", stage_out);
  AddBool(&fields, "kPingPong", tile.ping_pong);
  AddInt(&fields, "kTileSlots", tile.tile_slots);
  AddBool(&fields, "kFinderWarp", tile.finder_warp);
  AddBool(&fields, "kCounted", tile.counted);
  AddInt(&fields, "kWeighing", static_cast<int>(tile.weighing));
  // Short and long keys are in the name where they have a kernel of their own.
  Variant medium = variant;
  medium.keys = Length::kMedium;
  const bool own = !(tile == PickFwdSm90Tile(common.head_dim, common.head_dim_v, medium));
  const std::string length = !own ? "" : variant.keys == Length::kShort ? "_short" : "_long";
  KernelSpec kernel = {"fwd_sm90.cuh", "jfa_fwd_sm90" + common.suffix + length,
                       fields,         warps * 32,
                       smem,           tile.block_m / parts_q,
                       tile.block_n};
  if (variant.fp8_kv) kernel.kv_bytes = 1;
  return kernel;
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

// The tile classes of the Hopper backward; of 0 if it doesn't take the variant. It wants rows of 16
// bytes; at head dim 32 half of each product would be padding. To 128 both head dims are alike.
TileClasses BwdSm90Classes(const Variant& variant) {
  const int size = TileClass(std::max(variant.head_dim, variant.head_dim_v));
  if (variant.op != Op::kBwd || variant.head_dim % 8 != 0 || variant.head_dim_v % 8 != 0 ||
      variant.family == Family::kSm80 || (size == 32 && variant.family != Family::kSm90)) {
    return {0, 0};
  }
  if (size <= 128) return {std::max(size, 64), std::max(size, 64)};
  const auto panels = [](int dim) { return (dim + 63) / 64 * 64; };
  return {panels(variant.head_dim), panels(variant.head_dim_v)};
}

KernelSpec MakeBwdSm90(const Variant& variant, const Common& common) {
  const int size = std::max(common.head_dim, common.head_dim_v);
  const bool wide = size > 128;
  const bool sends_slope = wide && variant.softcap && variant.dslopes;
  const BwdSm90Tile tile = PickBwdSm90Tile(size, sends_slope);
  // What warpgroups exchange, in tiles of 16 bits: dS twice, and in 32 bits P and a cap's slope.
  const int warps = 12, exchanged = sends_slope ? 6 : wide ? 4 : 2;
  const int panels = (common.head_dim + 63) / 64 + (common.head_dim_v + 63) / 64;
  // K, V, Q and dO; what warpgroups exchange; the rows' statistics; barriers.
  const int smem = 128 * panels * (tile.block_n + tile.stages * tile.block_m) +
                   2 * exchanged * tile.block_m * tile.block_n + tile.stages * 8 * tile.block_m +
                   8 * (1 + 4 * tile.stages);
  Fields fields = CommonFields(variant, common, warps, 1);
  AddTile(&fields, variant, common, tile.block_m, tile.block_n, tile.stages, smem);
  AddBool(&fields, "kDqSums", !variant.deterministic);
  AddBool(&fields, "kDslopes", variant.dslopes);
  return {wide ? "bwd_wide_sm90.cuh" : "bwd_sm90.cuh",
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

bool IsFwdSm90(const KernelSpec& kernel) {
  return kernel.file == "fwd_sm90.cuh" || kernel.file == kFwdFp8File;
}

void ReadFields(KernelSpec* kernel) {
  const auto number = [&](const char* name) { return static_cast<int>(Field(*kernel, name)); };
  const auto flag = [&](const char* name) {
    return std::any_of(kernel->config.begin(), kernel->config.end(), [&](const auto& field) {
      return field.first == name && field.second == "true";
    });
  };
  kernel->fields = {number("kBlockM"),    number("kBlockN"),  number("kRows"),
                    number("kTileHeads"), number("kHeadDim"), number("kHeadDimV"),
                    number("kMinBlocks"), flag("kCounted"),   flag("kFinderWarp")};
}

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
    {"bwd_wide_sm90.cuh", "BwdWideSm90", "BwdParams", true},
    {"bwd_dq_sm80.cuh", "BwdDqSm80", "BwdParams", true},
    {"bwd_preprocess.cuh", "BwdPreprocess", "BwdParams", false},
    {"bwd_postprocess.cuh", "BwdPostprocess", "BwdParams", false},
};

}  // namespace

bool operator==(const Variant& a, const Variant& b) {
  const auto fields = [](const Variant& v) {
    return std::tie(v.op, v.dtype, v.head_dim, v.head_dim_v, v.mask, v.softcap, v.alibi, v.segments,
                    v.packed, v.deterministic, v.dslopes, v.paged, v.rows, v.fp8, v.fp8_kv,
                    v.heads_first, v.e5m2_q, v.e5m2_k, v.e5m2_v, v.two_level, v.family, v.keys,
                    v.schedule);
  };
  return fields(a) == fields(b);
}

Length LengthOf(int64_t kv_len) {
  if (kv_len > 4096) return Length::kLong;
  return kv_len > 0 && kv_len <= 1024 ? Length::kShort : Length::kMedium;
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

  const TileClasses sm90 = arch == 90 ? BwdSm90Classes(variant) : TileClasses{0, 0};
  const bool bwd_sm90 = sm90.head_dim > 0;
  const Common common = MakeCommon(variant, info, bwd_sm90 ? sm90 : ClassesOf(variant));
  if (variant.fp8) {
    plan.kernels = {MakeFwdFp8(variant, common, info)};
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
    plan.kernels = {MakePreprocess(variant, common),
                    bwd_sm90 ? MakeBwdSm90(variant, common) : MakeBwdMain(variant, common, info),
                    variant.deterministic ? MakeBwdDq(variant, common, info)
                                          : MakePostprocess(variant, common)};
  }
  for (KernelSpec& kernel : plan.kernels) {
    ReadFields(&kernel);
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

bool StaysOnMultiprocessors(const Plan& plan, int index, const Variant& variant) {
  if (variant.op == Op::kDecode) return index == 0;
  const KernelSpec& kernel = plan.kernels[index];
  if (!IsFwdSm90(kernel)) return false;
  // In turn CTAs that stay would share tiles whose lengths nobody knows unevenly.
  if (variant.schedule == Schedule::kAny) {
    return (!variant.packed && !variant.segments) || kernel.fields.finder_warp;
  }
  return variant.schedule == Schedule::kPersistent;
}

namespace {

bool CountsTiles(const Plan& plan, const Variant& variant, const Problem& problem) {
  const KernelSpec& kernel = plan.kernels[0];
  if (!problem.has_counter || !kernel.fields.counted || !StaysOnMultiprocessors(plan, 0, variant)) {
    return false;
  }
  // Measured for 8-bit floats: where a head has few row tiles, which differ most.
  constexpr int kFewRowTiles = 16;
  return kernel.file != kFwdFp8File ||
         NumTiles(problem.q_len, kernel.fields.block_m, problem.num_sequences) <= kFewRowTiles;
}

// Where tiles aren't counted.
bool PairsTiles(const Plan& plan, const Variant& variant, const Problem& problem,
                int multiprocessors) {
  if (variant.mask != Mask::kCausal || variant.packed || variant.segments) return false;
  if (variant.schedule == Schedule::kGrid) return false;
  const int64_t block = plan.kernels[0].fields.block_m, tiles = CeilDiv(problem.q_len, block);
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

// Row tiles of all heads.
int64_t ForwardTiles(const Plan& plan, const Problem& problem) {
  return NumTiles(problem.q_len, plan.kernels[0].fields.block_m, problem.num_sequences) *
         problem.batch * problem.num_kv_heads * problem.group;
}

ForwardShare ShareForward(const Plan& plan, const Variant& variant, const Problem& problem,
                          int multiprocessors) {
  if (!IsFwdSm90(plan.kernels[0])) return {};
  if (CountsTiles(plan, variant, problem)) {
    // A tile for each CTA, or none: what has nothing to count needs no memory cleared for it.
    return {ForwardTiles(plan, problem) > multiprocessors, false};
  }
  return {false, PairsTiles(plan, variant, problem, multiprocessors)};
}

}  // namespace

Share ShareWork(const Plan& plan, const Variant& variant, const Problem& problem,
                int multiprocessors) {
  Share share;
  share.multiprocessors = multiprocessors;
  if (variant.op == Op::kFwd) {
    share.forward = ShareForward(plan, variant, problem, multiprocessors);
  } else if (variant.op == Op::kDecode) {
    share.decode = ShareDecode(plan, problem, multiprocessors);
  }
  return share;
}

// All grids are one-dimensional: the kernels order their tiles themselves (ScheduleWork), and x
// alone may exceed 65535.
Grid MakeGrid(const Plan& plan, int index, const Variant& variant, const Problem& problem,
              const Share& share) {
  const KernelSpec& kernel = plan.kernels[index];
  if (variant.op == Op::kDecode) return MakeDecodeGrid(plan, index, problem, share.decode);
  const int64_t kv_heads = problem.batch * problem.num_kv_heads;
  int64_t length = problem.q_len, heads = kv_heads * problem.group, block = 0;
  if (IsFwdSm90(kernel)) {
    int64_t items = NumTiles(length, kernel.fields.block_m, problem.num_sequences);
    if (share.forward.paired) items = CeilDiv(items, 2);
    items *= heads;
    if (StaysOnMultiprocessors(plan, index, variant)) {
      items = std::min<int64_t>(items, share.multiprocessors);
    }
    return {static_cast<uint32_t>(items), 1, 1};
  }
  if (kernel.file == "fwd_sm80.cuh" || kernel.file == "bwd_dq_sm80.cuh") {
    block = kernel.fields.block_m;
  } else if (kernel.file == "bwd_sm80.cuh" || kernel.file == "bwd_sm90.cuh" ||
             kernel.file == "bwd_wide_sm90.cuh") {
    length = problem.kv_len;
    heads = kv_heads;
    block = kernel.fields.block_n;
  } else if (kernel.file == "bwd_preprocess.cuh") {
    block = kPreprocessRows;
  } else if (kernel.file == "bwd_postprocess.cuh") {
    block = kPostprocessRows;
  } else {
    return {0, 1, 1};
  }
  return {static_cast<uint32_t>(NumTiles(length, block, problem.num_sequences) * heads), 1, 1};
}

int64_t ScratchRows(int64_t q_len, int64_t num_sequences) {
  if (num_sequences == 0) return CeilDiv(q_len, kRowPadding) * kRowPadding;
  return (q_len / kRowPadding + num_sequences + 1) * kRowPadding;
}

// The layout is BwdScratch in kernels/kv_source.cuh.
int64_t ScratchFloats(const Variant& variant, int64_t group, int64_t q_len, int64_t num_sequences) {
  if (variant.op == Op::kFwd) return 0;
  // For any architecture and family: the Hopper kernel rounds head dims up further.
  Variant hopper = variant;
  hopper.family = Family::kSm90;
  const int head_dim = std::max(ClassesOf(variant).head_dim, BwdSm90Classes(hopper).head_dim);
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
    if (kernel.fields.block_m != 0) {
      text += " tile " + std::to_string(kernel.fields.block_m) + "x" +
              std::to_string(kernel.fields.block_n) + ", stages " +
              std::to_string(Field(kernel, "kStages")) + ",";
    }
    text += " threads " + std::to_string(kernel.threads) + ", shared memory " +
            std::to_string(kernel.smem_bytes) + " bytes\n";
  }
  return text;
}

}  // namespace jfa
