// What brings fwd_fp8_sm90.cuh's consumers their work: tiles, by the copy engine their Q, K and V,
// and V^T.
#ifndef JAX_FLASHATTN_CC_KERNELS_FWD_FP8_PRODUCERS_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FWD_FP8_PRODUCERS_SM90_CUH_

#include "barriers.cuh"
#include "panels_sm90.cuh"
#include "tiles_sm90.cuh"
#include "transpose_sm90.cuh"

namespace jfa {

// Kernel: FwdFp8Sm90<C>, whose shared memory this is.
template <class C, class Kernel>
struct FwdFp8ProducersSm90 {
  using Tiles = TilesSm90<C>;
  using Tile = typename Tiles::Tile;
  using Keys = typename Tiles::Keys;
  using RingK = RingPosition<C::kStagesK>;
  using RingT = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
  using RingV = RingPosition<C::kStagesV>;
  using RingTile = typename Kernel::RingTile;

  // What the consumers get of a tile.
  struct Slot {
    typename Tiles::Work work;
    float v_scale;

    // By a whole warp, whose leader writes; `work.tile` is there.
    JFA_DEVICE void SetRest(const FwdSm90Params& params, bool leader) {
      const Tile& tile = work.tile;
      work.SetRest(params.fwd.problem, leader);
      if (!leader) return;
      work.logits.ScaleScores(ScoreScale(params.fwd, tile.batch, tile.kv_head));
      v_scale = ValueScale(params.fwd, tile.batch, tile.kv_head);
    }
  };

  // After so many blocks of a tile the next one is looked for: later it would be late, and earlier
  // the tile's own first blocks would be.
  static constexpr int kFindAfter = 3;

  // One warp, of which one lane gives the orders.
  static JFA_DEVICE void Produce(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    const bool leader = ElectLane();
    typename Tiles::Walk walk(params);
    RingTile t;
    RingQ q;
    RingK k;
    RingV v;
    const auto address = [=](int barrier, int stage) {
      return Kernel::Address(smem, barrier, stage);
    };
    // Hands over the next tile, or the end.
    const auto find = [&] {
      Slot* slot = Kernel::SlotAt(smem_pointer, t.stage);
      MbarrierWait(address(Kernel::kEmptyTile, t.stage), t.parity ^ 1);
      // Written at once where it is read, to save registers: by all lanes the same.
      const bool more = walk.template Next<true>(&slot->work.tile);
      __syncwarp();
      if (more) slot->SetRest(params, leader);
      if (leader && !more) slot->work.tile.row0 = -1;
      __syncwarp();
      MbarrierArriveWarp(address(Kernel::kFullTile, t.stage));
      t.Advance();
    };
    int block = -1, done = 0;  // of this tile
    bool is_ahead = false;     // the next tile is handed over
    const auto current = [&] {
      const int slot = t.stage - (is_ahead ? 2 : 1);
      return Kernel::SlotAt(smem_pointer, slot < 0 ? slot + Kernel::kTileSlots : slot);
    };
    Keys keys;
#pragma unroll 1
    while (true) {
      if (!is_ahead && (block < 0 || done == kFindAfter)) {
        find();
        is_ahead = true;
      }
      if (block < 0) {
        is_ahead = false;
        const typename Tiles::Work& work = current()->work;
        if (work.tile.row0 < 0) break;
        keys = work.keys;
        block = keys.First();
        done = 0;
        if (block < 0) continue;
      }
      const Tile& tile = current()->work.tile;
      const Sequence& sequence = tile.sequence;
      const int row = sequence.kv_begin + block * C::kBlockN;
      // All lanes wait: one that waits alone polls on and on, where a warp sleeps.
      MbarrierWait(address(Kernel::kEmptyK, k.stage), k.parity ^ 1);
      if (leader) {
        LoadTile<Kernel::kPanels, Kernel::kPanelBytesN, Kernel::kPanelColumns>(
            &params.k, smem + Kernel::kSmemK + k.stage * Kernel::kBytesK,
            address(Kernel::kFullK, k.stage), row, tile.kv_head, tile.batch, kL2EvictLast);
      }
      k.Advance();
      if (done == 0) {
        MbarrierWait(address(Kernel::kEmptyQ, q.stage), q.parity ^ 1);
        if (leader) {
          LoadTile<Kernel::kPanels, Kernel::kPanelBytesM, Kernel::kPanelColumns>(
              &params.q, smem + Kernel::kSmemQ + q.stage * Kernel::kBytesQ,
              address(Kernel::kFullQ, q.stage), sequence.q_begin + tile.row0, tile.head, tile.batch,
              kL2EvictFirst);
        }
        q.Advance();
      }
      // Values follow at once: they have the longer way.
      MbarrierWait(address(Kernel::kEmptyV, v.stage), v.parity ^ 1);
      if (leader) {
        *Kernel::KeysAt(smem_pointer, v.stage) = sequence.kv_len - block * C::kBlockN;
        LoadTile<Kernel::kPanelsV, Kernel::kPanelBytesN, Kernel::kPanelColumns>(
            &params.v, smem + Kernel::kSmemV + v.stage * Kernel::kBytesV,
            address(Kernel::kFullV, v.stage), row, tile.kv_head, tile.batch, kL2EvictLast);
      }
      v.Advance();
      block = keys.Next(block);
      ++done;
    }
    if (leader) {
      MbarrierWait(address(Kernel::kEmptyV, v.stage), v.parity ^ 1);
      *Kernel::KeysAt(smem_pointer, v.stage) = -1;
      MbarrierArrive(address(Kernel::kFullV, v.stage));
    }
  }

  // Every block of V that comes, by kTransposers warps.
  static JFA_DEVICE void Transpose(unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    RingV v;
    RingT t;
    while (true) {
      MbarrierWait(Kernel::Address(smem, Kernel::kFullV, v.stage), v.parity);
      const int keys = *Kernel::KeysAt(smem_pointer, v.stage);
      if (keys < 0) return;
      MbarrierWait(Kernel::Address(smem, Kernel::kEmptyT, t.stage), t.parity ^ 1);
      Kernel::Transposer::Block(smem + Kernel::kSmemV + v.stage * Kernel::kBytesV,
                                smem + Kernel::kSmemT + t.stage * Kernel::kBytesT, keys);
      FenceProxyAsync();
      __syncwarp();
      Kernel::Arrive(Kernel::Address(smem, Kernel::kFullT, t.stage));
      Kernel::Arrive(Kernel::Address(smem, Kernel::kEmptyV, v.stage));
      v.Advance();
      t.Advance();
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_FP8_PRODUCERS_SM90_CUH_
