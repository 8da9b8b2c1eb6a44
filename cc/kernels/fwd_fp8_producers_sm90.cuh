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
  using Ring = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
  using RingV = RingPosition<C::kStagesV>;
  using RingTile = typename Kernel::RingTile;

  // What the consumers get of a tile.
  struct Slot {
    typename Tiles::Work work;
    float v_scale;

    // By a whole warp, whose leader writes.
    JFA_DEVICE void Set(const FwdSm90Params& params, const Tile& tile, bool leader) {
      work.Set(params.fwd.problem, tile, leader);
      if (!leader) return;
      work.logits.ScaleScores(ScoreScale(params.fwd, tile.batch, tile.kv_head));
      v_scale = ValueScale(params.fwd, tile.batch, tile.kv_head);
    }
  };

  // One warp, of which one lane gives the orders.
  static JFA_DEVICE void Produce(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    const bool leader = ReadLaneIndex() == 0;
    typename Tiles::Walk walk(params);
    Tile tile;
    RingTile t;
    RingQ q;
    Ring k;
    RingV v;
    const auto address = [=](int barrier, int stage) {
      return Kernel::Address(smem, barrier, stage);
    };
    while (walk.template Next<true>(&tile)) {
      tile.sequence.table_row = 0;  // there are no pages; one register less
      Slot* slot = Kernel::SlotAt(smem_pointer, t.stage);
      if (leader) MbarrierWait(address(Kernel::kEmptyTile, t.stage), t.parity ^ 1);
      __syncwarp();
      slot->Set(params, tile, leader);
      if (leader) MbarrierArrive(address(Kernel::kFullTile, t.stage));
      t.Advance();
      // From here on the tile is read where it was written, to save registers.
      const Tile& written = slot->work.tile;
      const Sequence& sequence = written.sequence;
      bool is_first = true;
      Keys keys = slot->work.keys;
      for (int block = keys.First(); block >= 0; block = keys.Next(block)) {
        const int row = sequence.kv_begin + block * C::kBlockN;
        if (leader) {
          MbarrierWait(address(Kernel::kEmptyK, k.stage), k.parity ^ 1);
          LoadTile<Kernel::kPanels, Kernel::kPanelBytesN, Kernel::kPanelColumns>(
              &params.k, smem + Kernel::kSmemK + k.stage * Kernel::kBytesK,
              address(Kernel::kFullK, k.stage), row, written.kv_head, written.batch, kL2EvictLast);
        }
        k.Advance();
        if (is_first) {
          if (leader) {
            MbarrierWait(address(Kernel::kEmptyQ, q.stage), q.parity ^ 1);
            LoadTile<Kernel::kPanels, Kernel::kPanelBytesM, Kernel::kPanelColumns>(
                &params.q, smem + Kernel::kSmemQ + q.stage * Kernel::kBytesQ,
                address(Kernel::kFullQ, q.stage), sequence.q_begin + written.row0, written.head,
                written.batch, kL2EvictFirst);
          }
          q.Advance();
          is_first = false;
        }
        // Values follow at once: they have the longer way.
        if (leader) {
          MbarrierWait(address(Kernel::kEmptyV, v.stage), v.parity ^ 1);
          *Kernel::KeysAt(smem_pointer, v.stage) = sequence.kv_len - block * C::kBlockN;
          LoadTile<Kernel::kPanelsV, Kernel::kPanelBytesN, Kernel::kPanelColumns>(
              &params.v, smem + Kernel::kSmemV + v.stage * Kernel::kBytesV,
              address(Kernel::kFullV, v.stage), row, written.kv_head, written.batch, kL2EvictLast);
        }
        v.Advance();
      }
    }
    if (leader) {
      MbarrierWait(address(Kernel::kEmptyTile, t.stage), t.parity ^ 1);
      Kernel::SlotAt(smem_pointer, t.stage)->work.tile.row0 = -1;
      MbarrierArrive(address(Kernel::kFullTile, t.stage));
      MbarrierWait(address(Kernel::kEmptyV, v.stage), v.parity ^ 1);
      *Kernel::KeysAt(smem_pointer, v.stage) = -1;
      MbarrierArrive(address(Kernel::kFullV, v.stage));
    }
  }

  // Every block of V that comes, by kTransposers warps.
  static JFA_DEVICE void Transpose(unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    RingV v;
    Ring t;
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
