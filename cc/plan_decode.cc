#include "cc/plan_decode.h"

#include <algorithm>
#include <climits>

namespace jfa {
namespace {

constexpr int kCombineWarps = 8;
// CTAs for which a decode call's scratch has room: no GPU of today has more multiprocessors.
constexpr int64_t kMostDecodeCtas = 192 * 2;
// Of the merging kernel: as many as run at a time. Others would only start late to find, where
// lengths are known on the device alone, that nobody shares a tile.
constexpr int64_t kMostMergeCtas = 256;
constexpr int kMostPartsLog2 = 3;  // DecodeCluster::kMostCtas
constexpr int kMostPartsRows = 32, kNarrowRows = 16;

std::string RowsSuffix(int64_t rows, int64_t tile_heads) {
  return (tile_heads > 1 ? "_pairs_r" : "_r") + std::to_string(rows);
}

// `parts`: the kernel whose clusters share tiles; it runs alone on a multiprocessor, where more
// shared memory keeps more copies in flight.
KernelSpec MakeDecodeMain(const Variant& variant, Common common, int smem_kb, bool tma,
                          bool parts) {
  // Two heads of 64 bytes that lie beside each other are read as one.
  const bool pairs = tma && variant.fp8_kv && !variant.heads_first && variant.head_dim == 64 &&
                     variant.head_dim_v == 64;
  const int tile_heads = pairs ? 2 : 1;
  if (pairs) common.head_dim = common.head_dim_v = 128;
  const DecodeTile tile = PickDecodeTile(common.head_dim, common.head_dim_v,
                                         variant.rows * tile_heads, variant, tma, parts, smem_kb);
  const int warps = tile.warps + (tma && !tile.wgmma && !parts ? 2 : 4);
  Fields fields = CommonFields(variant, common, warps, tile.min_blocks);
  AddTile(&fields, variant, common, tile.rows, tile.block_n, tile.stages, tile.smem);
  AddInt(&fields, "kRows", tile.rows);
  AddBool(&fields, "kTma", tma);
  AddBool(&fields, "kParts", parts);
  AddBool(&fields, "kWgmma", tile.wgmma);
  AddInt(&fields, "kTileHeads", tile_heads);
  AddKeyDtypes(&fields, variant);
  KernelSpec kernel = {"decode.cuh",
                       (tma ? "jfa_decode_sm90" : "jfa_decode_sm80") + common.suffix +
                           RowsSuffix(tile.rows, tile_heads) + (parts ? "_parts" : ""),
                       fields, warps * 32, tile.smem};
  if (tma) kernel.box_rows_kv = tile.block_n;
  if (variant.fp8_kv) kernel.kv_bytes = 1;
  kernel.box_heads = tile_heads;
  return kernel;
}

// Of a call: queries of a tile's key heads, and tiles in all.
int64_t DecodeRows(const KernelSpec& kernel, const Problem& problem) {
  return problem.q_len * problem.group * DecodeTileHeads(kernel);
}
int64_t DecodeTiles(const KernelSpec& kernel, const Problem& problem) {
  return problem.batch * CeilDiv(problem.num_kv_heads, DecodeTileHeads(kernel)) *
         DecodeRowTiles(kernel, problem);
}

// 4-byte words of DecodeScratch in kernels/decode_share.cuh: of its header, and for each CTA.
constexpr int64_t kDecodeHeaderWords = 4;
int64_t DecodeWordsPerCta(const KernelSpec& kernel, const Problem& problem, int64_t head_dim_v) {
  const int64_t rows = std::min<int64_t>(DecodeRows(kernel, problem), kernel.fields.rows);
  return 4 + 2 * rows * (2 + head_dim_v);
}

// Of a tile that sees all keys.
int64_t DecodeBlocks(const KernelSpec& kernel, const Problem& problem) {
  return std::max<int64_t>(CeilDiv(problem.kv_len, kernel.fields.block_n), 1);
}

// Few rows of head dim 64: one CTA keeps up with memory, and half as many leave half as many
// results. Not with pages, which want looking up.
int64_t CtasOfMultiprocessor(const KernelSpec& kernel, const Problem& problem) {
  const bool light = kernel.fields.rows == 16 && kernel.fields.head_dim == 64 &&
                     kernel.kv_bytes == 2 && kernel.box_rows_kv != 0;
  return light && problem.page_size == 0 ? 1 : kernel.fields.min_blocks;
}

// In how many parts (log2), one for each CTA of a cluster, each tile of `kernel` should be cut; -1
// if stretches, of tiles of `main`, and a second kernel that merges are better.
int PickParts(const KernelSpec& kernel, const KernelSpec& main, const Problem& problem,
              int multiprocessors) {
  const int64_t tiles = DecodeTiles(kernel, problem), blocks = DecodeBlocks(kernel, problem);
  const int64_t main_tiles = DecodeTiles(main, problem);
  const bool narrower = main_tiles < tiles;  // of fewer rows
  // A tile for each multiprocessor needs no merging, and one CTA keeps up with memory.
  const bool fills = tiles <= multiprocessors && tiles * 10 >= multiprocessors * 9;
  if (fills && problem.alike && !narrower) return 0;
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
  // Times in units of 50 ns, measured (docs/performance.md). One CTA takes 6 for a block and 3 for
  // each 32 KB of it, but 1 for each pair of copies, of K and V, that it orders; all of them
  // together read 256 KB from L2 in 1, or 384 KB if several read the same; a second kernel costs
  // 52, and with the results of 64 rows and more 134. Where parts are longer than kLongest memory
  // is the limit, and a cluster's CTAs, which can't run anywhere, have less of it.
  constexpr int64_t kLongest = 1024 * 1024, kBytesInTime = 256 * 1024, kSharedInTime = 384 * 1024;
  constexpr int64_t kMergeTime = 52, kWideMergeTime = 134;
  const int64_t block_n = kernel.fields.block_n;
  const int64_t boxes = problem.page_size > 0 ? CeilDiv(block_n, problem.page_size) : 1;
  const int64_t columns = 128 / kernel.kv_bytes;  // of a box
  const int64_t head_dim = kernel.fields.head_dim, head_dim_v = kernel.fields.head_dim_v;
  const int64_t copies = boxes * CeilDiv(std::max(head_dim, head_dim_v), columns);
  const int64_t bytes = kernel.kv_bytes * block_n * (head_dim + head_dim_v);
  const int64_t time = std::max(longest * std::max(6 + 3 * bytes / (32 * 1024), copies),
                                tiles * blocks * bytes / kSharedInTime);
  const int64_t main_time =
      (narrower ? kWideMergeTime : kMergeTime) + main_tiles * blocks * bytes / kBytesInTime;
  return longest * bytes <= kLongest && time <= main_time ? best : -1;
}

}  // namespace

// The copy engine wants 16-byte rows, and so does everybody who copies 16 bytes at a time: what
// isn't aligned goes to the forward kernels.
std::vector<KernelSpec> MakeDecode(const Variant& variant, Common common, const ArchInfo& info,
                                   int arch) {
  common.head_dim = std::max(common.head_dim, 64);
  common.head_dim_v = std::max(common.head_dim_v, 64);
  const bool tma = arch == 90 && variant.family != Family::kSm80;
  const KernelSpec decode = MakeDecodeMain(variant, common, info.smem_kb, tma, false);
  const int64_t rows = Field(decode, "kRows"), tile_heads = Field(decode, "kTileHeads");
  Fields combine;
  AddBool(&combine, "kBf16", variant.dtype == DType::kBF16);
  AddInt(&combine, "kRows", rows);
  AddInt(&combine, "kTileHeads", tile_heads);
  AddInt(&combine, "kWarps", kCombineWarps);
  AddInt(&combine, "kMinBlocks", 1);
  KernelSpec second = {
      "decode_combine.cuh",
      std::string("jfa_decode_combine_") + Name(variant.dtype) + RowsSuffix(rows, tile_heads),
      combine, kCombineWarps * 32, 0};
  // Hides what it takes to launch the second kernel.
  second.starts_early = arch >= 90;
  if (!tma) return {decode, second};
  // Merging in a cluster takes longer the more rows there are: it pays with 16, not with 128. Short
  // calls of many rows have narrow tiles, which all read the keys, but for the first from the L2.
  Variant cut = variant;
  if (rows > kMostPartsRows) cut.rows = kNarrowRows / tile_heads;
  return {decode, second, MakeDecodeMain(cut, common, info.smem_kb, tma, true)};
}

Grid MakeDecodeGrid(const Plan& plan, int index, const Problem& problem, const DecodeShare& share) {
  const KernelSpec& kernel = plan.kernels[index];
  const uint32_t ctas = static_cast<uint32_t>(share.ctas);
  if (index == share.kernel) return {ctas, 1, 1, 1u << share.parts_log2};
  const int64_t tiles = DecodeTiles(plan.kernels.front(), problem);
  const bool whole = problem.alike && ctas > 0 && tiles % ctas == 0;  // nobody shares a tile
  if (index != kDecodeCombine || share.kernel != kDecodeStretches || whole) return {0, 1, 1};
  const int64_t rows = std::min<int64_t>(DecodeRows(kernel, problem), kernel.fields.rows);
  const int64_t shared = std::min(tiles, std::max<int64_t>(share.ctas - 1, 0));
  const int64_t groups = shared * CeilDiv(rows, kCombineWarps >> share.merge_log2);
  return {static_cast<uint32_t>(std::min(groups, kMostMergeCtas)), 1, 1};
}

int DecodeTileHeads(const KernelSpec& kernel) { return kernel.fields.tile_heads; }

int DecodeRowTiles(const KernelSpec& kernel, const Problem& problem) {
  return static_cast<int>(CeilDiv(DecodeRows(kernel, problem), kernel.fields.rows));
}

namespace {

DecodeShare ShareTiles(const Plan& plan, const Problem& problem, int multiprocessors) {
  const KernelSpec& kernel = plan.kernels[kDecodeStretches];
  if (DecodeRows(kernel, problem) == 0) return {};
  const int64_t tiles = DecodeTiles(kernel, problem);
  const int64_t blocks = DecodeBlocks(kernel, problem);
  if (tiles > INT_MAX / blocks) return {};
  const bool has_parts = plan.kernels.size() > kDecodeParts;
  const int64_t narrow_tiles = has_parts ? DecodeTiles(plan.kernels[kDecodeParts], problem) : 0;
  if (has_parts && narrow_tiles <= INT_MAX >> kMostPartsLog2) {
    int log2 = PickParts(plan.kernels[kDecodeParts], kernel, problem, multiprocessors);
    if (problem.forced_cluster >= 0) {
      log2 = -1;
      while (1 << (log2 + 1) <= problem.forced_cluster) ++log2;
    }
    if (log2 >= 0) return {narrow_tiles << log2, kDecodeParts, log2};
  }
  const int64_t room = (problem.scratch_floats - kDecodeHeaderWords) /
                       DecodeWordsPerCta(kernel, problem, problem.head_dim_v);
  const int64_t ctas = std::min(
      {int64_t{multiprocessors} * CtasOfMultiprocessor(kernel, problem), tiles * blocks, room});
  if (ctas < tiles) {
    // Whole tiles need no merging: worth a few idle multiprocessors.
    const int64_t each = ctas > 0 ? CeilDiv(tiles, ctas) : 1, whole = tiles / each;
    const bool divides = whole * each == tiles && whole * 10 >= ctas * 9;
    if (divides) return {whole, kDecodeStretches, 0, 1};
    return {ctas};
  }
  // A short tile for each multiprocessor is read as fast by one CTA as by two, and needs no
  // merging.
  constexpr int64_t kShort = 32;
  if (problem.alike && blocks <= kShort && tiles * 10 >= multiprocessors * 9 &&
      kernel.fields.rows == 16) {
    return {tiles, kDecodeStretches, 0, 1};
  }
  // Equal parts of tiles need less merging. No more of them than make the longest one shorter, or
  // have more rows of results than keys.
  const int64_t keys = blocks * kernel.fields.block_n;
  const int64_t most = std::min(ctas / tiles, CeilDiv(keys, kernel.fields.rows));
  const int64_t parts = CeilDiv(blocks, CeilDiv(blocks, most));
  return {tiles * parts, kDecodeStretches, 0, static_cast<int>(parts)};
}

}  // namespace

DecodeShare ShareDecode(const Plan& plan, const Problem& problem, int multiprocessors) {
  DecodeShare share = ShareTiles(plan, problem, multiprocessors);
  if (share.kernel != kDecodeStretches || share.ctas == 0) return share;
  const int64_t tiles = DecodeTiles(plan.kernels.front(), problem);
  // A warp asks for eight parts at a time.
  while (1 << share.merge_log2 < kCombineWarps &&
         CeilDiv(share.ctas, tiles) > int64_t{8} << share.merge_log2) {
    ++share.merge_log2;
  }
  return share;
}

int64_t DecodeScratchFloats(const Variant& variant, const Problem& problem) {
  // The tile differs between architectures, its rows and blocks only by little: the larger ones.
  // 8-bit keys may have tiles of two heads.
  const int64_t rows = std::min<int64_t>(2 * problem.q_len * problem.group, 128);
  const int64_t tiles = problem.batch * problem.num_kv_heads *
                        CeilDiv(std::max<int64_t>(problem.q_len * problem.group, 1), 16);
  const int64_t ctas =
      std::min(kMostDecodeCtas, tiles * std::max<int64_t>(CeilDiv(problem.kv_len, 16), 1));
  return kDecodeHeaderWords + ctas * (4 + 2 * rows * (2 + variant.head_dim_v));
}

}  // namespace jfa
