#include "cc/plan_tiles.h"

#include <algorithm>
#include <tuple>

namespace jfa {

bool GetArchInfo(int arch, ArchInfo* info) {
  switch (arch) {
    case 80:
      *info = {163, 40};
      return true;
    case 86:
      *info = {99, 6};
      return true;
    case 87:
      *info = {163, 4};
      return true;
    case 89:
      *info = {99, 48};
      return true;
    case 90:
      *info = {227, 50};
      return true;
    case 100:
      *info = {227, 96};
      return true;
    case 103:
      *info = {227, 96};
      return true;
    case 120:
      *info = {99, 64};
      return true;
    case 121:
      *info = {99, 24};
      return true;
    default:
      return false;
  }
}

// Two CTAs of 4 warps per multiprocessor hide each other's softmax. Up to head dim 128 a warp owns
// 32 rows and so reads K and V half as often; beyond, 32 rows of output no longer fit in registers
// and it owns 16. Measured on an H100 (bf16, S 4096, TFLOP/s full / causal), chosen shape first:
//   d64   128x64, 2 stages, Q in registers 352/302; 1 stage 341/306; 128x128 343/307;
//         3 CTAs 292/241
//   d128  128x64 408/337; 2 stages 376/319; 128x32 355/301; 128x48 384/330; 8 warps 339/312
//   d192  64x64 339/317; 128x64 8 warps 315/305
//   d256  64x64 330/265; 128x64 8 warps 312/270; 64x48 315/276; 64x32, 2 stages 302/263
// The other architectures' rows follow from shared memory and are not measured.
FwdTile PickFwdTile(int size, int smem_kb) {
  if (smem_kb < 128) {
    // About 100 KB per multiprocessor: smaller key blocks keep two CTAs on it up to head dim 128.
    switch (size) {
      case 32:
        return {128, 128, 4, 1, 2, true};
      case 64:
        return {128, 64, 4, 1, 2, true};
      case 96:
        return {128, 64, 4, 1, 2, false};
      case 128:
        return {128, 32, 4, 1, 2, false};
      case 192:
        return {128, 64, 8, 1, 1, false};
      default:
        return {64, 64, 4, 1, 1, false};
    }
  }
  switch (size) {
    case 32:
      return {128, 128, 4, 1, 2, true};
    case 64:
      return {128, 64, 4, 2, 2, true};
    case 96:
      return {128, 64, 4, 1, 2, false};
    case 128:
      return {128, 64, 4, 1, 2, false};
    // Two CTAs of 96 KB where they fit, else one with twice the rows.
    default:
      return smem_kb >= 200 ? FwdTile{64, 64, 4, 1, 2, false} : FwdTile{128, 64, 8, 1, 1, false};
  }
}

// Bound by shared-memory reads, so tiles are as large as registers (dK, dV) and shared memory let
// them be, and each warp's part of every product as square as possible. Measured as above:
//   d64   128x128 291/273 (scores split 4 x 2: 273/265); 64x128 8 warps 245/233; 64x64, 3 CTAs
//         269/252; 64x128 with 4 warps 310/272, but it spills 240 bytes
//   d128  64x128 313/285 (scores 2 x 4: 299/271; 8 x 1: 285/266); 1 stage 299/278; 64x64, 2 CTAs
//         285/271; 32x128 262/239
//   d256  64x64 243/227 (scores 4 x 2: 227/218; dQ split 2 x 4: 247/229, but it spills 8 bytes);
//         1 stage 233/214
BwdTile PickBwdTile(int size, int smem_kb, bool deterministic) {
  if (smem_kb < 128) {
    switch (size) {
      case 32:
        return {64, 128, 8, 2, 1, 4, 4, 4};
      case 64:
        return {64, 128, 8, 1, 1, 4, 4, 4};
      case 96:
        return {64, 64, 8, 1, 1, 4, 4, 4};
      case 128:
        return {64, 64, 8, 1, 1, 4, 4, 4};
      case 192:
        return {32, 64, 8, 1, 1, 4, 4, 2};
      default:
        return {32, 32, 4, 1, 1, 2, 2, 2};
    }
  }
  switch (size) {
    case 32:
      return {128, 128, 8, 2, 1, 4, 4, 4};
    case 64:
      return {128, 128, 8, 2, 1, 2, 4, 4};
    case 96:
      return {64, 128, 8, 2, 1, 4, 4, 4};
    // Without the dQ product ptxas spills a few bytes unless scores are split 2 x 4, not 4 x 2.
    case 128:
      return {64, 128, 8, 2, 1, deterministic ? 2 : 4, 4, 2};
    case 192:
      return {64, 64, 8, smem_kb >= 200 ? 2 : 1, 1, 4, 4, 2};
    default:
      return {64, 64, 8, smem_kb >= 200 ? 2 : 1, 1, 2, 2, 1};
  }
}

DqTile PickDqTile(int size, int smem_kb) {
  if (smem_kb < 128) {
    if (size <= 64) return {128, 64, 8, 2};
    if (size <= 128) return {64, 32, 4, 2};
    return {64, 32, 4, 1};
  }
  if (size <= 128) return {128, 64, 8, 2};
  return {64, 32, 4, 2};
}

// The Hopper kernel's tiles: as many keys as registers and shared memory allow. docs/performance.md
// has what was measured.
bool operator==(const FwdSm90Tile& a, const FwdSm90Tile& b) {
  const auto fields = [](const FwdSm90Tile& t) {
    return std::tie(t.block_m, t.block_n, t.stages, t.ping_pong, t.stages_q, t.weighing,
                    t.finder_warp, t.tile_slots, t.counted, t.stages_8, t.split_q, t.held_q);
  };
  return fields(a) == fields(b);
}

namespace {

// With 8-bit keys: buffers for them instead of a second one of queries. Each block is converted
// once for all rows of a tile, but more rows than 128 compute too much under a mask.
FwdSm90Tile PickFwdFp8Keys(int head_dim, int head_dim_v, const Variant& variant) {
  const int size = std::max(head_dim, head_dim_v);
  const bool segments = variant.segments, full = variant.mask == Mask::kFull;
  const bool capped = variant.softcap || variant.alibi;
  const bool plain = !segments && !variant.packed && !capped && !variant.paged;
  const auto tile = [](int block_m, int block_n, bool ping_pong, int stages_8) {
    FwdSm90Tile result{block_m, block_n, 2, ping_pong, 1};
    result.stages_8 = stages_8;
    return result;
  };
  if (size <= 64) {
    if (segments || variant.packed) return tile(128, 128, false, 4);
    return tile(192, 112, true, 4);
  }
  if (plain && full && variant.keys != Length::kShort) {
    if (size <= 96) return tile(192, 96, true, 4);
    if (head_dim == 128 && head_dim_v == 128) return tile(192, 80, true, 4);
  }
  if (size <= 128) return tile(128, !segments ? 128 : capped ? 64 : 96, false, 2);
  return tile(128, size <= 192 && !segments ? 80 : 64, false, 2);
}

// Segments come in ranges of 32 tokens, of which a block must hold a whole number; and they take
// registers, as do other features at the largest head dim.
FwdSm90Tile PickFwdSm90WithFeatures(int size, int head_dim_v, const Variant& variant) {
  const bool segments = variant.segments, packed = variant.packed;
  const bool is_short = variant.keys == Length::kShort;
  FwdSm90Tile tile{128, 128, 2, false};
  using W = Weighing;
  const bool only_paged = !segments && !packed && !variant.softcap && !variant.alibi;
  if (size <= 64) {
    if (!segments) tile = {192, 112, 2, true, 2, only_paged ? W::kSingle : W::kSearched};
  } else if (size <= 128) {
    if (segments) tile.block_n = 96;
    if (only_paged) tile = {128, 128, 2, false, 1, W::kDouble, false, 2};
  } else if (size <= 192) {
    tile.block_n = segments ? 96 : head_dim_v <= 128 ? 128 : 112;
    tile.stages_q = 1;
  } else {
    tile.block_n = segments || packed || variant.alibi || is_short ? 64 : 80;
    tile.stages_q = 1;
  }
  tile.finder_warp = !segments && !variant.paged && (size <= 64 || packed);
  tile.counted = tile.finder_warp && (packed || variant.mask != Mask::kFull);
  return tile;
}

// What most calls are: no soft cap, ALiBi, segments or pages.
FwdSm90Tile PickPlainFwdSm90(int size, int head_dim_v, const Variant& variant) {
  using W = Weighing;
  const bool full = variant.mask == Mask::kFull, causal = variant.mask == Mask::kCausal;
  const bool is_short = variant.keys == Length::kShort, packed = variant.packed;
  // Where keys are few, and tiles or pairs of them alike, taking them in turn needs no memset.
  const bool counted_short = variant.mask == Mask::kLocal;
  if (size <= 64) {
    // Lengths of few tiles are multiples of 256 rather than of 192, and four warpgroups hide what a
    // tile's begin and end cost.
    if (is_short && !packed) return {256, 64, 4, full, 2, W::kSingle, true, 3, counted_short};
    return {192, 128, 4, true, 2, W::kSingle, packed || !full, 3, true};
  }
  if (packed) {
    if (size <= 128) return {128, 128, 2, true, 1, full ? W::kSearched : W::kSingle, true, 3, true};
    const int block_n = size > 192 ? 64 : head_dim_v <= 128 ? 128 : 112;
    return {128, block_n, 2, false, 1, W::kSearched, true, 3, true};
  }
  if (size <= 96) {
    if (full) return {192, 96, 2, true, 1, W::kSingle, false, 3, true};
    return {128, 128, 2, true, 1, W::kDouble, true, 2, true};
  }
  if (size <= 128) {
    if (is_short) return {128, 128, 2, true, 1, W::kSingle, true, 3, counted_short};
    // Tiles of few blocks gain by a second Q, with the next tile's first product under the end of
    // this one.
    const bool few_blocks = !full && (!causal || variant.keys == Length::kMedium);
    if (few_blocks) return {128, 128, 2, false, 2, W::kDouble, true, 3, true};
    return {128, 128, 2, false, 1, W::kDouble, true, 2, true};
  }
  if (size <= 192) {
    const int block_n = head_dim_v <= 128 ? 128 : 112;
    if (full || is_short) return {128, block_n, 2, false, 1};
    return {128, block_n, 2, false, 1, W::kSearched, true, 2, true};
  }
  // A short tile's copies are soon ordered: with three slots the tile after it is known by then.
  if (is_short) return {128, 64, 2, false, 1, W::kSearched, causal, 3};
  return {128, 80, 2, true, 1, W::kSearched, causal, 2, causal};
}

}  // namespace

FwdSm90Tile PickFwdSm90Tile(int head_dim, int head_dim_v, const Variant& variant) {
  if (variant.fp8_kv) return PickFwdFp8Keys(head_dim, head_dim_v, variant);
  const int size = std::max(head_dim, head_dim_v);
  const bool plain = !variant.segments && !variant.softcap && !variant.alibi && !variant.paged;
  FwdSm90Tile tile = plain ? PickPlainFwdSm90(size, head_dim_v, variant)
                           : PickFwdSm90WithFeatures(size, head_dim_v, variant);
  tile.split_q =
      size > 64 && size <= 128 && tile.block_m == 128 && tile.stages_q == 1 && !variant.packed;
  // As many as there are registers for.
  if (plain && !variant.packed && head_dim > 192) tile.held_q = tile.block_n == 64 ? 6 : 4;
  return tile;
}

BwdSm90Tile PickBwdSm90Tile(int size, bool sends_slope) {
  if (size > 128) return {64, 64, sends_slope ? 1 : 2};
  return {64, 128, size <= 64 ? 3 : 2};
}

namespace {

// Keys of a block at most. `stage_panels` and `panels`: 128 bytes of a key or value, and 64
// columns.
int MostDecodeBlock(int tile_rows, bool wgmma, bool alone, int stage_panels, int panels) {
  if (wgmma) {
    if (panels == 1) return 128;
    return panels == 2 ? 64 : 32;
  }
  // With as many rows and columns there are no registers for the scores of more keys.
  if (tile_rows >= 64) return panels == 1 ? 64 : 32;
  if (tile_rows > 16) stage_panels = panels;
  // What has a multiprocessor for itself needs longer blocks to keep up with the L2.
  return stage_panels == 1 || (alone && panels == 2) ? 128 : 64;
}

}  // namespace

DecodeTile PickDecodeTile(int head_dim, int head_dim_v, int64_t rows, const Variant& variant,
                          bool tma, bool alone, int smem_kb) {
  constexpr int kMostStages = 16, kLeastStages = 3;
  const int panels = (head_dim + 63) / 64, panels_v = (head_dim_v + 63) / 64;
  const int most_panels = std::max(panels, panels_v);
  const int stage_panels = variant.fp8_kv ? (most_panels + 1) / 2 : most_panels;
  const bool narrow = tma && most_panels <= 2;
  const bool is_plain = !variant.softcap && !variant.alibi;
  // 128 rows are one tile of eight warps, where these have the registers, or both halves would read
  // all keys.
  const int most_rows = narrow && is_plain ? 128 : 64;
  int tile_rows = 16;
  while (tile_rows < std::min<int64_t>(rows, most_rows)) tile_rows *= 2;
  const bool needs_registers = tile_rows > 16 && (variant.softcap || variant.alibi);
  const int min_blocks =
      !alone && narrow && tile_rows <= 64 && (most_panels == 1 || !needs_registers) ? 2 : 1;
  // Each CTA pays 1 KB more to the system.
  const int room = smem_kb * 1024 / min_blocks - 1024 * (min_blocks - 1);
  // On their way to a multiprocessor: with more, memory is slower, as its reads lie further apart.
  // What is short has less to lose by it, and wants them soon.
  const int in_flight = (alone ? 96 : 64) * 1024 / min_blocks;
  for (;; tile_rows *= 2) {
    const int warps = tile_rows > 64 ? 8 : 4;
    const bool wgmma = tma && !variant.fp8_kv && tile_rows >= 64;
    // Q, the buffer through which outputs are merged, the rows' sums, and a barrier of clusters.
    const int merged_rows = wgmma ? 0 : 16 * warps;
    const int fixed = 128 * panels * tile_rows + 4 * merged_rows * 72 + 8 * merged_rows + 16;
    const int least_block = 16 * warps / (tile_rows / 16);
    const int most_block = MostDecodeBlock(tile_rows, wgmma, alone, stage_panels, most_panels);
    for (int block_n = most_block; block_n >= least_block; block_n /= 2) {
      const int stage = 128 * stage_panels * block_n + 16;  // and its barriers
      int stages = std::min(kMostStages, (room - fixed) / stage);
      if (stages >= kLeastStages || tile_rows >= 64) {
        // Products of warpgroups keep more buffers busy.
        if (tma && !wgmma) {
          // Head dim 64: enough for a CTA that has a multiprocessor for itself.
          const int least = tile_rows == 16 && most_panels == 1 && !variant.fp8_kv ? 3 : 2;
          stages = std::min(stages, std::max(least, (in_flight + stage / 2) / stage));
        }
        return {tile_rows, block_n, stages, fixed + stages * stage, min_blocks, warps, wgmma};
      }
    }
  }
}

}  // namespace jfa
