// Tile sizes: what was measured, or follows from registers and shared memory, for every kernel and
// architecture. Part of plan.cc, which alone uses it.
#ifndef JAX_FLASHATTN_CC_PLAN_TILES_H_
#define JAX_FLASHATTN_CC_PLAN_TILES_H_

#include "cc/plan.h"

namespace jfa {

// What of an architecture the tables depend on.
struct ArchInfo {
  int smem_kb;  // shared memory that one CTA may ask for
  int l2_mb;
};

// Returns false for an architecture without support.
bool GetArchInfo(int arch, ArchInfo* info);

struct FwdTile {
  int block_m, block_n, warps, stages, min_blocks;
  bool q_in_regs;
};

FwdTile PickFwdTile(int size, int smem_kb);

struct BwdTile {
  int block_m, block_n, warps, stages, min_blocks;
  int warps_score_n, warps_kv_n, warps_dq_m;
};

BwdTile PickBwdTile(int size, int smem_kb, bool deterministic);

struct DqTile {
  int block_m, block_n, warps, stages;
};

DqTile PickDqTile(int size, int smem_kb);

// How scores become weights; Config::kWeighing of weights_sm90.cuh.
enum class Weighing { kSearched, kSingle, kDouble };

struct FwdSm90Tile {
  int block_m, block_n, stages;
  bool ping_pong;
  int stages_q = 2;
  Weighing weighing = Weighing::kSearched;
  // Who finds the CTAs' next tiles: the producer, or a warp of its own, which may be ahead by one
  // slot less than there are.
  bool finder_warp = false;
  int tile_slots = 3;
  bool counted = false;  // tiles go to who is free, not in turn
  int stages_8 = 0;      // of K or V in 8 bits
  bool split_q = false;  // each warpgroup's queries are copied by themselves
  int held_q = 0;        // of their head dims so many times 16 stay in registers
};
bool operator==(const FwdSm90Tile& a, const FwdSm90Tile& b);

FwdSm90Tile PickFwdSm90Tile(int head_dim, int head_dim_v, const Variant& variant);

struct BwdSm90Tile {
  int block_m, block_n, stages;
};

// `size` is the larger tile class. `sends_slope`: beyond 128, two tiles of 32 bits are exchanged.
BwdSm90Tile PickBwdSm90Tile(int size, bool sends_slope);

// Decode: blocks of 16 KB of K or V, so that copies are long and a ring of several covers the
// latency of memory. Two CTAs on a multiprocessor, where they fit, fill each other's gaps.
struct DecodeTile {
  int rows, block_n, stages, smem, min_blocks, warps;  // warps: that consume
  bool wgmma;                                          // they form warpgroups
};

// `alone`: with all of a multiprocessor's shared memory.
DecodeTile PickDecodeTile(int head_dim, int head_dim_v, int64_t rows, const Variant& variant,
                          bool tma, bool alone, int smem_kb);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_PLAN_TILES_H_
