// What brings fwd_sm90.cuh's consumers their work: tiles, and by the copy engine their Q, K and V.
#ifndef JAX_FLASHATTN_CC_KERNELS_FWD_PRODUCERS_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FWD_PRODUCERS_SM90_CUH_

#include "copies_sm90.cuh"
#include "keys_fp8_sm90.cuh"
#include "kv_source.cuh"
#include "ptx_sm90.cuh"
#include "tiles_sm90.cuh"

namespace jfa {

// Warps of which one lane gives the orders. Kernel: FwdSm90<C>, whose shared memory this is.
template <class C, class Kernel>
struct FwdProducersSm90 {
  using Tiles = TilesSm90<C>;
  using TileWalk = typename Tiles::Walk;
  using Keys = typename Tiles::Keys;
  using Work = typename Tiles::Work;
  using Tile = typename Tiles::Tile;
  using Ring = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
  using RingTile = typename Kernel::RingTile;
  using Ring8 = RingPosition<C::kStages8>;
  using Keys8 = KeysFp8Sm90<C, Kernel>;

  using Copies = CopiesSm90<C>;
  using KeyPlace = typename Copies::KeyPlace;

  // Who finds the CTA's tiles, and hands them over in shared memory: the producer in front of each
  // tile, or a warp of its own, one or two tiles ahead. That is faster where tiles are short. Where
  // they are long and go to who is free, a CTA that asks so early isn't free yet, and may get more
  // than its share: there the warp waits until all copies of the tile before are ordered.
  struct Finder {
    TileWalk walk;
    RingTile t;
    JFA_DEVICE explicit Finder(const FwdSm90Params& params) : walk(params) {}

    // The next tile, or the end: false.
    JFA_DEVICE bool Put(unsigned char* smem_pointer) {
      const uint32 smem = SmemAddress(smem_pointer);
      const bool leader = ReadLaneIndex() == 0;
      Work* slot = Kernel::Slot(smem_pointer, t.stage);
      if constexpr (C::kFinderWarp) {
        MbarrierWaitIdly(Kernel::Address(smem, Kernel::kEmptyTile, t.stage), t.parity ^ 1);
      } else {
        MbarrierWait(Kernel::Address(smem, Kernel::kEmptyTile, t.stage), t.parity ^ 1);
      }
      // Written at once where it is read, to save registers: by all lanes the same.
      const bool more = walk.template Next<(Kernel::kTileSlots > 2)>(&slot->tile);
      __syncwarp();
      if (more) slot->SetRest(walk.params.fwd.problem, leader);
      if (kArrivingLanes == kWarpSize || leader) {
        if (leader && !more) slot->tile.row0 = -1;
        MbarrierArrive(Kernel::Address(smem, Kernel::kFullTile, t.stage));
      }
      __syncwarp();
      t.Advance();
      return more;
    }

    // Of the warp of its own, and what ends that, of the producer.
    JFA_DEVICE void WaitForOrders() const {
      if (walk.AsksLate()) NamedBarrierSync(Kernel::kOrdered, 2 * kWarpSize);
    }
    JFA_DEVICE void TellOfOrders() const {
      if (C::kFinderWarp && walk.AsksLate()) NamedBarrierArrive(Kernel::kOrdered, 2 * kWarpSize);
    }
  };

  // All lanes: the tile where it was written, to save registers; null at the end.
  static JFA_DEVICE const Work* WaitTile(unsigned char* smem_pointer, const RingTile& t) {
    MbarrierWait(Kernel::Address(SmemAddress(smem_pointer), Kernel::kFullTile, t.stage), t.parity);
    const Work* slot = Kernel::Slot(smem_pointer, t.stage);
    return slot->tile.row0 < 0 ? nullptr : slot;
  }

  // A tile's queries, when their buffer is empty.
  static JFA_DEVICE void LoadQueries(const FwdSm90Params& params, uint32 smem, const Tile& tile,
                                     const RingQ& q, bool leader) {
    constexpr int kRows = C::kBlockM / Kernel::kPartsQ;
#pragma unroll
    for (int part = 0; part < Kernel::kPartsQ; ++part) {
      const int buffer = Kernel::BufferQ(q.stage, part);
      const uint32 full = Kernel::Address(smem, Kernel::kFullQ, buffer);
      MbarrierWait(Kernel::Address(smem, Kernel::kEmptyQ, buffer), q.parity ^ 1);
      if (!leader) continue;
      MbarrierArriveExpect(full, Kernel::kBytesQ / Kernel::kPartsQ);
      LoadPanels<Kernel::kPanels, Kernel::kPanelBytesM, Kernel::kPanelColumns>(
          &params.q,
          smem + Kernel::kSmemQ + q.stage * Kernel::kBytesQ + part * kRows * Kernel::kRowBytes,
          full, tile.sequence.q_begin + tile.row0 + part * kRows, tile.head, tile.batch,
          kL2EvictFirst);
    }
  }

  static JFA_DEVICE void Produce(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    const bool leader = ElectLane();
    Finder finder(params);
    RingTile t;
    RingQ q;
    Ring k, v;
    Ring8 either;
    const auto load_keys = [&](const KeyPlace& place) {
      if constexpr (C::kFp8) {
        Keys8::LoadKeys(params, smem_pointer, either, place, leader);
      } else {
        Copies::template LoadKeys<Kernel::kPanels>(
            params, &params.k, smem + Kernel::kSmemK + k.stage * Kernel::kBytesK,
            Kernel::Address(smem, Kernel::kFullK, k.stage),
            Kernel::Address(smem, Kernel::kEmptyK, k.stage), k.parity, place, leader);
        k.Advance();
      }
    };
    // Values are needed one block later than keys, so their copies are ordered one block later.
    // Over pages another warp does it: each box takes an order.
    KeyPlace values;
    [[maybe_unused]] int num_values;
    const auto load_values = [&] {
      if (Kernel::kTwoProducers || values.row < 0) return;
      if constexpr (C::kFp8) {
        Keys8::LoadValues(params, smem_pointer, either, values, num_values, leader);
      } else {
        Copies::template LoadKeys<Kernel::kPanelsV>(
            params, &params.v, smem + Kernel::kSmemV + v.stage * Kernel::kBytesV,
            Kernel::Address(smem, Kernel::kFullV, v.stage),
            Kernel::Address(smem, Kernel::kEmptyV, v.stage), v.parity, values, leader);
        v.Advance();
      }
      values.row = -1;
    };
    while (true) {
      // Before the values, for whose buffer it would wait.
      if constexpr (!C::kFinderWarp) finder.Put(smem_pointer);
      if (C::kStagesQ == 1) load_values();
      const Work* slot = WaitTile(smem_pointer, t);
      if (slot == nullptr) break;
      Keys keys = slot->keys;
      int block = keys.First();
      if (block < 0) load_values();  // the consumers first finish what they have
      KeyPlace place;
      place.Set(params, slot->tile, block);
      bool is_first = true;
      while (block >= 0) {
        load_keys(place);
        if (is_first) {
          LoadQueries(params, smem, slot->tile, q, leader);
          q.Advance();
          is_first = false;
        }
        load_values();
        values = place;
        num_values = slot->tile.sequence.kv_len - block * C::kBlockN;
        // Pages are looked up a block ahead.
        block = keys.Next(block);
        place.Set(params, slot->tile, block);
      }
      __syncwarp();
      finder.TellOfOrders();
      Kernel::Arrive(Kernel::Address(smem, Kernel::kEmptyTile, t.stage));
      t.Advance();
    }
    load_values();
    if constexpr (C::kFp8) {
      if (leader) Keys8::End(smem_pointer, either);
    }
  }

  // A paged call's other producer: all values.
  static JFA_DEVICE void ProduceValues(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    const bool leader = ElectLane();
    RingTile t;
    Ring v;
    while (const Work* slot = WaitTile(smem_pointer, t)) {
      Keys keys = slot->keys;
      int block = keys.First();
      KeyPlace place;
      place.Set(params, slot->tile, block);
      while (block >= 0) {
        Copies::template LoadKeys<Kernel::kPanelsV>(
            params, &params.v, smem + Kernel::kSmemV + v.stage * Kernel::kBytesV,
            Kernel::Address(smem, Kernel::kFullV, v.stage),
            Kernel::Address(smem, Kernel::kEmptyV, v.stage), v.parity, place, leader);
        v.Advance();
        block = keys.Next(block);
        place.Set(params, slot->tile, block);
      }
      __syncwarp();
      Kernel::Arrive(Kernel::Address(smem, Kernel::kEmptyTile, t.stage));
      t.Advance();
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_PRODUCERS_SM90_CUH_
