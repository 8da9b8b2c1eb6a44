// The tiles of the Hopper kernel's CTAs: which there are, in what order, and what each consists of.
#ifndef JAX_FLASHATTN_CC_KERNELS_TILES_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_TILES_SM90_CUH_

#include "kv_source.cuh"
#include "logits.cuh"
#include "mask.cuh"

namespace jfa {

template <class C>
struct TilesSm90 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);

  // One row tile of one query head.
  struct Tile {
    int row0, batch, head, kv_head;
    Sequence sequence;
  };

  // With so few, tiles are short, and CTAs on one head's keys too few to read them together.
  static constexpr int kFewRowTiles = 16;

  // The row tiles of one CTA. Under a causal mask they either come longest first, or in pairs of a
  // long and a short one, all equally long, which CTAs that stay can share evenly; middle tiles,
  // where there is an odd number, come after all pairs. Where items are alike, those of one key
  // head follow each other, while the L2 has its keys.
  struct Walk {
    const FwdSm90Params& params;
    int num_row_tiles, blocks_per_head;
    uint32 num_items, item;
    bool second = false, due = false;

    JFA_DEVICE explicit Walk(const FwdSm90Params& p)
        : params(p),
          num_row_tiles(NumTiles<C::kPacked, C::kBlockM>(p.fwd.problem, p.fwd.problem.q_len)),
          blocks_per_head(IsPaired() ? num_row_tiles / 2 : num_row_tiles),
          num_items(NumHeads() * (IsPaired() ? (num_row_tiles + 1) / 2 : num_row_tiles)),
          item(blockIdx.x) {}

    // All items but the CTAs' first are either taken in turn, or by who is free. The next one may
    // be asked for when this one begins, and the answer looked at when it is needed.
    JFA_DEVICE void Advance() {
      if (!IsCounted()) {
        item += gridDim.x;
      } else if (ReadLaneIndex() == 0) {
        item = gridDim.x + atomicAdd(params.counter, 1u);
      }
    }
    JFA_DEVICE bool IsPaired() const { return kMask == MaskKind::kCausal && params.paired; }
    JFA_DEVICE bool IsCounted() const { return C::kCounted && params.counter != nullptr; }
    // Whether a CTA must ask for its next tile only when it is nearly done with this one, so that
    // who had a long one gets a short one.
    JFA_DEVICE bool AsksLate() const {
      return kMask == MaskKind::kCausal && !C::kPacked && IsCounted() &&
             num_row_tiles > kFewRowTiles;
    }

    JFA_DEVICE uint32 NumHeads() const {
      return static_cast<uint32>(params.fwd.problem.batch) * params.fwd.problem.num_heads;
    }

    // False at the end. All lanes of a warp together.
    template <bool kAsksEarly>
    JFA_DEVICE bool Next(Tile* tile) {
      const ProblemParams& problem = params.fwd.problem;
      const bool asks_late = AsksLate(), asks_early = kAsksEarly && !asks_late;
      while (true) {
        if (!asks_early && due) Advance();
        if (IsCounted()) {
          item = __shfl_sync(kFullWarp, item, 0);
        } else if (!C::kCounted) {
          // A lane's own number: nothing changes but ptxas' belief that all lanes have the same
          // one, with which the 8-bit kernel's copies come late (docs/performance.md).
          item = __shfl_sync(kFullWarp, item, ReadLaneIndex());
        }
        if (item >= num_items) return false;
        const uint32 middles = blocks_per_head * NumHeads();  // where they begin, if paired
        const bool alike = kMask == MaskKind::kFull || IsPaired();
        WorkItem work;
        if (item < middles) {
          // Who asks late gets a short tile after a long one, so small sections are shared out
          // evenly, and their keys stay in the L2. (CTAs there are at different keys: no more than
          // a third of it.) Who asks early needs long ones.
          const bool is_small = asks_late || num_row_tiles <= kFewRowTiles;
          work = ScheduleWork(
              item, blocks_per_head, problem.batch, problem.num_heads, problem.group,
              static_cast<int64>(problem.kv_len) * (problem.head_dim + problem.head_dim_v) * 2,
              alike       ? 0
              : asks_late ? C::kL2Bytes / 3
                          : C::kL2Bytes / 2,
              alike ? MaskKind::kFull : kMask, is_small ? 256 : 1024);
        } else {
          const int head = item - middles;
          work = {blocks_per_head, head / problem.num_heads, head % problem.num_heads};
        }
        const bool last_first = kMask != MaskKind::kFull && !second;
        second = IsPaired() && !second && item < middles;
        due = !second;
        if (asks_early && due) Advance();
        if (!SelectQueries<C::kPacked, C::kBlockM>(problem, last_first, work, tile->sequence)) {
          continue;
        }
        tile->row0 = work.block * C::kBlockM;
        tile->batch = work.batch;
        tile->head = work.head;
        tile->kv_head = work.head / problem.group;
        return true;
      }
    }
  };

  using Mask = BandMask<kMask>;
  using Ids = SegmentIds<C::kSegments>;
  using Keys = KeyWalk<kMask, C::kSegments, C::kBlockM, C::kBlockN>;
  static JFA_DEVICE Keys KeysOf(const Tile& tile, const Mask& mask, const Ids& ids) {
    return Keys::template Of<kWarpSize>(mask, ids, tile.row0, nullptr);
  }

  // A tile, and all that its scores go through. The producer makes it, and hands it to the
  // consumers in shared memory.
  struct Work {
    Tile tile;  // row0 -1: there are no more
    Mask mask;
    Ids ids;
    Keys keys;
    LogitMap<C::kSoftcap, C::kAlibi> logits;

    // What `tile`, which is there, doesn't hold. By a whole warp, whose leader writes; part by
    // part, to save registers.
    JFA_DEVICE void SetRest(const ProblemParams& problem, bool leader) {
      const Mask new_mask(problem, tile.sequence);
      if (leader) mask = new_mask;
      const Ids new_ids(problem, tile.batch, tile.kv_head);
      if (leader) ids = new_ids;
      const Keys new_keys = KeysOf(tile, new_mask, new_ids);
      if (leader) keys = new_keys;
      __syncwarp();
      if (leader) logits = {problem, tile.sequence, tile.batch, tile.head};
      __syncwarp();
    }
  };
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_TILES_SM90_CUH_
