// Forward attention for Hopper: wgmma fed by the tensor copy engine (TMA).
//
//   one tile = kBlockM rows of one query head         keys, right to left ->
//                  kHeadDim                     kBlockN   kBlockN
//            +-----------------+               +---------+---------+
//   64 rows  | Q, warpgroup 1  |   x K^T = S   |  block  |  block  |   P = exp2(S - ref), in
//   64 rows  | Q, warpgroup 2  |               |         |         |   registers, feeds P V
//            +-----------------+               +---------+---------+
//
// Roles       Warpgroup 0 gives its registers away; its first warp produces: one lane orders TMA
//             copies of Q, K and V (over pages all lanes, and a third warp those of V). With
//             kFinderWarp its second warp finds the tiles. Each other warpgroup consumes: it owns
//             64 rows of the tile.
// Overlap     A consumer starts S = Q K^T of a block, then out += P V of the block before, and
//             computes the block's softmax while the second product still runs. Other consumers
//             fill what is left; with kPingPong they take turns at starting products.
// Tiles       CTAs stay, and take one tile after the other (TileWalk): in turn, or where tiles
//             differ who is free takes the next one. With room for two Q there is no gap: the first
//             product of a tile starts before the last one of the tile before.
// Shared      kStagesQ buffers of Q, kStages of K and of V, each with a full and an empty mbarrier;
//             the output, if there is room. plan.cc computes the same sum.
// Registers   consumer: output kHeadDimV / 2, scores kBlockN / 2, weights kBlockN / 4, and 30 or so
//             more, of 240 (two consumers), 160 (three) or 112 (four).
//
// ptxas runs all products one after the other (C7510 to C7517 in its log) if on some path it can't
// tell that a product is done before its accumulator is touched. So each wait stands in the same
// branch as its product, and accumulators change only between a wait and the next product's start.
#ifndef JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_

#include "copies_sm90.cuh"
#include "kv_source.cuh"
#include "ptx_sm90.cuh"
#include "results_sm90.cuh"
#include "row_scores.cuh"
#include "softmax.cuh"
#include "tiles_sm90.cuh"

namespace jfa {

template <class C>
struct FwdSm90 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  using Results = ResultsSm90<C>;
  static constexpr int kGroupThreads = Results::kGroupThreads;
  static constexpr int kGroupRows = Results::kGroupRows;
  static constexpr int kConsumers = C::kBlockM / kGroupRows;
  static constexpr int kKeySteps = C::kBlockN / 16;
  static constexpr int kDimSteps = C::kHeadDim / 16;
  // What one thread may hold: 64 Ki registers, in units of 8, shared out by role. To find blocks of
  // keys among segments or pages takes more than to walk over all.
  static constexpr int kProducerRegisters = C::kSegments || C::kPaged    ? 56
                                            : kConsumers < 3             ? 40
                                            : (C::kSoftcap || C::kAlibi) ? 56
                                                                         : 32;
  // As many as the CTA is launched with, in units of 8 a thread; who claims more waits for ever.
  static constexpr int kPool = (kConsumers + 1) * (512 / (kConsumers + 1) / 8 * 8);
  static constexpr int kConsumerRegisters =
      kConsumers == 1 ? 256 : (kPool - kProducerRegisters) / kConsumers / 8 * 8;

  // Tiles lie in shared memory as panels of 64 columns: rows of 128 bytes, whose 16-byte chunks are
  // permuted by the row's number modulo 8 (the 128-byte swizzle of TMA and wgmma).
  static constexpr int kPanelColumns = Results::kPanelColumns;
  static constexpr int kRowBytes = Results::kRowBytes;
  static constexpr int kPanels = (C::kHeadDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelsV = Results::kPanels;
  static constexpr int kPanelBytesM = C::kBlockM * kRowBytes;
  static constexpr int kPanelBytesN = C::kBlockN * kRowBytes;
  static constexpr int kBytesQ = kPanels * kPanelBytesM;
  static constexpr int kBytesK = kPanels * kPanelBytesN;
  static constexpr int kBytesV = kPanelsV * kPanelBytesN;

  static constexpr int kSmemQ = 0;
  static constexpr int kSmemK = C::kStagesQ * kBytesQ;
  static constexpr int kSmemV = kSmemK + C::kStages * kBytesK;
  static constexpr int kSmemOut = kSmemV + C::kStages * kBytesV;
  static constexpr int kSmemBarriers = kSmemOut + (C::kStageOut ? kConsumers * Results::kBytes : 0);
  static constexpr int kTileSlots = 3, kSlotBytes = 256;
  static constexpr int kSmemTiles =
      kSmemBarriers + 8 * (2 * C::kStagesQ + 4 * C::kStages + 2 * kTileSlots);
  static constexpr int kSmemBytes = kSmemTiles + kTileSlots * kSlotBytes;
  enum Barrier {
    kFullQ = 0,
    kEmptyQ = kFullQ + C::kStagesQ,
    kFullK = kEmptyQ + C::kStagesQ,
    kEmptyK = kFullK + C::kStages,
    kFullV = kEmptyK + C::kStages,
    kEmptyV = kFullV + C::kStages,
    kFullTile = kEmptyV + C::kStages,
    kEmptyTile = kFullTile + kTileSlots,
  };
  enum NamedBarrier { kTurn = 1, kGroup = kTurn + kConsumers };  // of each consumer warpgroup

  static_assert(C::kBlockM % kGroupRows == 0 && kConsumers >= 1 && kConsumers <= 4,
                "a consumer warpgroup owns 64 rows");
  static_assert(C::kBlockM - kGroupRows <= C::kStages * C::kBlockN,
                "blocks that a warpgroup lets pass keep their values until it has passed them all");
  static_assert(C::kWarps == 4 * (kConsumers + 1), "one more warpgroup produces");
  static_assert(C::kBlockN % 16 == 0 && C::kBlockN <= 256, "one wgmma spans the key block");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");

  using Ring = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
  using RingTile = RingPosition<kTileSlots>;
  using Output = typename Results::Output;
  using Scores = float[1][2 * kKeySteps][4];
  using Weights = uint32[kKeySteps][4];
  using Place = RowScores<4, 1, kKeySteps>;

  static JFA_DEVICE uint32 Address(uint32 smem, int barrier, int stage = 0) {
    return smem + kSmemBarriers + 8 * (barrier + stage);
  }

  using Tiles = TilesSm90<C>;
  using Tile = typename Tiles::Tile;
  using TileWalk = typename Tiles::Walk;
  using Mask = typename Tiles::Mask;
  using Keys = typename Tiles::Keys;
  using Work = typename Tiles::Work;
  static_assert(sizeof(Work) <= kSlotBytes, "a tile must fit in its slot");
  static JFA_DEVICE Work* Slot(unsigned char* smem, int slot) {
    return reinterpret_cast<Work*>(smem + kSmemTiles + slot * kSlotBytes);
  }

  // --- producers: warps of which one lane gives the orders ------------------------------------

  using Copies = CopiesSm90<C>;
  using KeyPlace = typename Copies::KeyPlace;

  // Who finds the CTA's tiles, and hands them over in shared memory: the producer in front of each
  // tile, or a warp of its own, one or two tiles ahead. That is faster where tiles are short, and
  // slower where they are long.
  struct Finder {
    TileWalk walk;
    RingTile t;
    JFA_DEVICE explicit Finder(const FwdSm90Params& params) : walk(params) {}

    // The next tile, or the end: false.
    JFA_DEVICE bool Put(unsigned char* smem_pointer) {
      const uint32 smem = SmemAddress(smem_pointer);
      const bool leader = ReadLaneIndex() == 0;
      Work* slot = Slot(smem_pointer, t.stage);
      if constexpr (C::kFinderWarp) {
        MbarrierWaitIdly(Address(smem, kEmptyTile, t.stage), t.parity ^ 1);
      } else {
        MbarrierWait(Address(smem, kEmptyTile, t.stage), t.parity ^ 1);
      }
      // Written at once where it is read, to save registers: by all lanes the same.
      const bool more = walk.Next(&slot->tile);
      __syncwarp();
      if (more) slot->SetRest(walk.params.fwd.problem, leader);
      if (leader) {
        if (!more) slot->tile.row0 = -1;
        MbarrierArrive(Address(smem, kFullTile, t.stage));
      }
      __syncwarp();
      t.Advance();
      return more;
    }
  };

  // All lanes: the tile where it was written, to save registers; null at the end.
  static JFA_DEVICE const Work* WaitTile(unsigned char* smem_pointer, const RingTile& t) {
    MbarrierWait(Address(SmemAddress(smem_pointer), kFullTile, t.stage), t.parity);
    const Work* slot = Slot(smem_pointer, t.stage);
    return slot->tile.row0 < 0 ? nullptr : slot;
  }

  static JFA_DEVICE void Produce(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    const bool leader = ReadLaneIndex() == 0;
    Finder finder(params);
    RingTile t;
    RingQ q;
    Ring k, v;
    // Values are needed one block later than keys, so their copies are ordered one block later.
    // Over pages another warp does it: each box takes an order.
    KeyPlace values;
    const auto load_values = [&] {
      if (C::kPaged || values.row < 0) return;
      Copies::template LoadKeys<kPanelsV>(
          params, &params.v, smem + kSmemV + v.stage * kBytesV, Address(smem, kFullV, v.stage),
          Address(smem, kEmptyV, v.stage), v.parity, values, leader);
      v.Advance();
      values.row = -1;
    };
    while (true) {
      if constexpr (!C::kFinderWarp) finder.Put(smem_pointer);
      const Work* slot = WaitTile(smem_pointer, t);
      if (slot == nullptr) break;
      bool is_first = true;
      Keys keys = slot->keys;
      int block = keys.First();
      if (block < 0) load_values();  // the consumers first finish what they have
      KeyPlace place;
      place.Set(params, slot->tile, block);
      while (block >= 0) {
        // A single buffer of Q is free only when all keys of the tile before have been used.
        if (C::kStagesQ == 1 && is_first) load_values();
        Copies::template LoadKeys<kPanels>(
            params, &params.k, smem + kSmemK + k.stage * kBytesK, Address(smem, kFullK, k.stage),
            Address(smem, kEmptyK, k.stage), k.parity, place, leader);
        k.Advance();
        if (is_first) {
          if (leader) {
            MbarrierWait(Address(smem, kEmptyQ, q.stage), q.parity ^ 1);
            Copies::template Load<kPanels, kPanelBytesM>(
                &params.q, smem + kSmemQ + q.stage * kBytesQ, Address(smem, kFullQ, q.stage),
                slot->tile.sequence.q_begin + slot->tile.row0, slot->tile.head, slot->tile.batch,
                kL2EvictFirst);
          }
          q.Advance();
          is_first = false;
        }
        load_values();
        values = place;
        // Pages are looked up a block ahead.
        block = keys.Next(block);
        place.Set(params, slot->tile, block);
      }
      __syncwarp();
      Arrive(Address(smem, kEmptyTile, t.stage));
      t.Advance();
    }
    load_values();
  }

  // A paged call's other producer: all values.
  static JFA_DEVICE void ProduceValues(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    RingTile t;
    Ring v;
    while (const Work* slot = WaitTile(smem_pointer, t)) {
      Keys keys = slot->keys;
      int block = keys.First();
      KeyPlace place;
      place.Set(params, slot->tile, block);
      while (block >= 0) {
        Copies::template LoadKeys<kPanelsV>(
            params, &params.v, smem + kSmemV + v.stage * kBytesV, Address(smem, kFullV, v.stage),
            Address(smem, kEmptyV, v.stage), v.parity, place, ReadLaneIndex() == 0);
        v.Advance();
        block = keys.Next(block);
        place.Set(params, slot->tile, block);
      }
      __syncwarp();
      Arrive(Address(smem, kEmptyTile, t.stage));
      t.Advance();
    }
  }

  // --- consumers --------------------------------------------------------------------------------

  // s = Q K^T, started
  static JFA_DEVICE void ScoreGemm(Scores& s, uint32 smem_q, uint32 smem_k) {
    const uint64 q = PanelDescriptor(smem_q, 16), k = PanelDescriptor(smem_k, 16);
    Pin(s);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Wgmma<C::kBlockN>::template Ss<C::kBf16, false>(s, q + ((panel * kPanelBytesM + within) >> 4),
                                                      k + ((panel * kPanelBytesN + within) >> 4),
                                                      step > 0);
    }
    WgmmaCommit();
    Pin(s);
  }

  // out += P V, started
  static JFA_DEVICE void OutputGemm(Output& out, const Weights& p, uint32 smem_v) {
    const uint64 v = PanelDescriptor(smem_v, kPanelBytesN);
    Pin(out);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      Wgmma<C::kHeadDimV>::template Rs<C::kBf16, true>(out, p[step],
                                                       v + ((step * 16 * kRowBytes) >> 4), 1);
    }
    WgmmaCommit();
    Pin(out);
  }

  // Scores to logits, -inf where a row doesn't see a key.
  static JFA_DEVICE void MakeLogits(Scores& s, const Work& work, int group, int block,
                                    bool one_segment) {
    const int key0 = block * C::kBlockN;
    // Warps count from the producer's on.
    const int row0 = work.tile.row0 - kGroupRows;
    if constexpr (!decltype(work.logits)::kPlain) Place::Apply(s, work.logits, row0, key0);
    if (work.mask.template NeedsMask<kGroupRows, C::kBlockN>(work.tile.row0 + group * kGroupRows,
                                                             key0)) {
      Place::HideBand(s, work.mask, row0, key0);
    }
    if constexpr (C::kSegments) {
      if (!one_segment) Place::HideOtherSegments(s, work.ids, row0, key0);
    }
  }

  static JFA_DEVICE void Weigh(Scores& s, OnlineSoftmax<1>& softmax) {
#pragma unroll
    for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = softmax.Weigh(e / 2, s[0][n][e]);
    }
  }

  static JFA_DEVICE void Pack(Weights& p, const Scores& s) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      PackBlock<C::kBf16>(p[step], s[0][2 * step], s[0][2 * step + 1]);
    }
  }

  // One lane per warp: a buffer is free when all consumer warps say so.
  static JFA_DEVICE void Arrive(uint32 barrier) {
    if (ReadLaneIndex() == 0) MbarrierArrive(barrier);
  }

  // Padding may hold NaN, which a weight of zero doesn't silence. TMA zeroes what lies beyond the
  // array, this what lies beyond a sequence's length, which only a tile's first block may hold.
  // Every consumer warpgroup does it for itself: that needs no barrier between them, and writing a
  // zero twice does no harm.
  static JFA_DEVICE void ClearPadding(const ProblemParams& problem, const Work& work, int block,
                                      uint32 smem, const Ring& v, int group) {
    const Sequence& sequence = work.tile.sequence;
    const int row = sequence.kv_len - block * C::kBlockN;
    if (row >= C::kBlockN) return;
    if (!C::kPaged && sequence.kv_begin + sequence.kv_len == problem.kv_len) return;
    MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
    for (int i = row * 8 + ReadThreadIndex() % kGroupThreads; i < C::kBlockN * 8;
         i += kGroupThreads) {
#pragma unroll
      for (int panel = 0; panel < kPanelsV; ++panel) {
        StoreShared16(smem + kSmemV + v.stage * kBytesV + panel * kPanelBytesN + i * 16,
                      make_uint4(0, 0, 0, 0));
      }
    }
    FenceProxyAsync();
    NamedBarrierSync(kGroup + group, kGroupThreads);
  }

  static JFA_DEVICE void TakeTurn(int group) {
    if constexpr (C::kPingPong) NamedBarrierSync(kTurn + group, 2 * kGroupThreads);
  }
  static JFA_DEVICE void PassTurn(int group) {
    if constexpr (C::kPingPong) {
      NamedBarrierArrive(kTurn + (group + 1 == kConsumers ? 0 : group + 1), 2 * kGroupThreads);
    }
  }

  static JFA_DEVICE void Consume(const FwdSm90Params& params, unsigned char* smem_pointer,
                                 int group) {
    const ProblemParams& problem = params.fwd.problem;
    const uint32 smem = SmemAddress(smem_pointer);
    RingTile t;
    RingQ q;
    Ring k, v;
    if (C::kPingPong && group == 0) NamedBarrierArrive(kTurn, 2 * kGroupThreads);

    const auto wait_tile = [&] {
      MbarrierWait(Address(smem, kFullTile, t.stage), t.parity);
      const int slot = t.stage;
      t.Advance();
      return slot;
    };
    const auto release = [&](int slot) {
      __syncwarp();
      Arrive(Address(smem, kEmptyTile, slot));
    };
    int slot = wait_tile(), block = -1;
    Work work = *Slot(smem_pointer, slot);
    // Tiles without keys are done at once; false at the end.
    const auto skip_empty = [&] {
      while (work.tile.row0 >= 0) {
        block = work.keys.First();
        if (block >= 0) return true;
        Output zeros;
        Clear(zeros);
        const OnlineSoftmax<1> nothing(1.f);
        Results::Store(params, smem + kSmemOut, kGroup + group, group, work.tile,
                       Results::StoreLse(params, work.tile, nothing), zeros);
        release(slot);
        slot = wait_tile();
        work = *Slot(smem_pointer, slot);
      }
      return false;
    };

    // A tile's first blocks may lie to the right of all that this warpgroup's rows see: it lets
    // them pass, at most those that begin between its last row's keys and the tile's.
    int hidden_blocks = 0;
    const auto skip_hidden = [&](int first) {
      if constexpr (kMask != MaskKind::kFull) {
        const int end = work.tile.row0 + (group + 1) * kGroupRows - 1 + work.mask.high;
        while (first * C::kBlockN >= end &&
               !(Mask::kHasSinks && first * C::kBlockN < work.mask.sink_tokens)) {
          const int next = work.keys.Next(first);
          if (next < 0) break;
          MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
          Arrive(Address(smem, kEmptyK, k.stage));
          k.Advance();
          TakeTurn(group);
          PassTurn(group);
          ++hidden_blocks;
          first = next;
        }
      }
      return first;
    };
    const auto skip_hidden_values = [&] {
      if constexpr (kMask != MaskKind::kFull) {
        for (; hidden_blocks > 0; --hidden_blocks) {
          MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
          Arrive(Address(smem, kEmptyV, v.stage));
          v.Advance();
        }
      }
    };

    bool more = skip_empty();
    while (more) {
      Output out;
      Scores s;
      Weights p;
      float factor[2];
      float2 normalizer;
      OnlineSoftmax<1> softmax(work.logits.Scale());
      Clear(out);
      Pin(out);

      uint32 smem_q, empty_q;
      const auto wait_q = [&] {
        smem_q = smem + kSmemQ + q.stage * kBytesQ + group * kGroupRows * kRowBytes;
        empty_q = Address(smem, kEmptyQ, q.stage);
        MbarrierWait(Address(smem, kFullQ, q.stage), q.parity);
        q.Advance();
      };
      wait_q();
      block = skip_hidden(block);
      MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
      ScoreGemm(s, smem_q, smem + kSmemK + k.stage * kBytesK);
      bool one_segment = work.keys.one_segment;
      int next = work.keys.Next(block);
      WgmmaWait<0>();
      Pin(s);
      Arrive(Address(smem, kEmptyK, k.stage));
      k.Advance();
      if (next < 0) Arrive(empty_q);
      MakeLogits(s, work, group, block, one_segment);
      softmax.Follow(s, factor);
      Weigh(s, softmax);
      Pack(p, s);
      skip_hidden_values();
      ClearPadding(problem, work, block, smem, v, group);

      int done;  // slot
      // A tile's output may wait in registers until the next tile's second product of scores runs.
      // Where warpgroups take turns, this would make them longer.
      constexpr bool kStoreLater = C::kStagesQ > 1 && !C::kPingPong;
      int unstored = -1;  // slot
      const auto store = [&](int tile_slot) {
        Results::Store(params, smem + kSmemOut, kGroup + group, group,
                       Slot(smem_pointer, tile_slot)->tile, normalizer, out);
        release(tile_slot);
      };
      const auto store_waiting = [&] {
        if (!kStoreLater || unstored < 0) return;
        store(unstored);
        Clear(out);
        unstored = -1;
      };
#pragma unroll 1
      while (true) {
        // The next block; that of the next tile, if it has any and Q has a second buffer.
        const bool is_first = next < 0;
        if (is_first) {
          done = slot;
          slot = wait_tile();
          work = *Slot(smem_pointer, slot);
          block = work.tile.row0 >= 0 ? work.keys.First() : -1;
          if (C::kStagesQ == 1 || block < 0) break;
          wait_q();
          next = skip_hidden(block);
        }
        block = next;
        MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
        TakeTurn(group);
        ScoreGemm(s, smem_q, smem + kSmemK + k.stage * kBytesK);
        store_waiting();
        MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
        OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
        PassTurn(group);
        if (is_first) {
          normalizer = Results::StoreLse(params, Slot(smem_pointer, done)->tile, softmax);
          softmax = OnlineSoftmax<1>(work.logits.Scale());
        }
        one_segment = work.keys.one_segment;
        next = work.keys.Next(block);
        WgmmaWait<1>();
        Pin(s);
        Arrive(Address(smem, kEmptyK, k.stage));
        k.Advance();
        if (next < 0) Arrive(empty_q);
        MakeLogits(s, work, group, block, one_segment);
        const bool rescale = softmax.Follow(s, factor);
        Weigh(s, softmax);
        Pin(s);  // or the compiler leaves half of the weights for after the wait
        WgmmaWait<0>();
        Pin(out);
        Arrive(Address(smem, kEmptyV, v.stage));
        v.Advance();
        Pack(p, s);
        if (is_first) {
          if constexpr (kStoreLater) {
            unstored = done;
          } else {
            store(done);
            Clear(out);
          }
          skip_hidden_values();
          ClearPadding(problem, work, block, smem, v, group);
        } else if (rescale) {
          softmax.Rescale(out, factor);
        }
      }

      store_waiting();
      MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
      OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
      normalizer = Results::StoreLse(params, Slot(smem_pointer, done)->tile, softmax);
      WgmmaWait<0>();
      Pin(out);
      Arrive(Address(smem, kEmptyV, v.stage));
      v.Advance();
      store(done);
      more = skip_empty();
    }
    TmaStoreWaitRead();
  }

  static JFA_DEVICE void Run(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
    if (threadIdx.x == 0) {
      TmaPrefetch(&params.q);
      TmaPrefetch(&params.k);
      TmaPrefetch(&params.v);
      TmaPrefetch(&params.out);
      for (int stage = 0; stage < C::kStagesQ; ++stage) {
        MbarrierInit(Address(smem, kFullQ, stage), 1);
        MbarrierInit(Address(smem, kEmptyQ, stage), 4 * kConsumers);
      }
      for (int slot = 0; slot < kTileSlots; ++slot) {
        MbarrierInit(Address(smem, kFullTile, slot), 1);
        MbarrierInit(Address(smem, kEmptyTile, slot), 4 * kConsumers + (C::kPaged ? 2 : 1));
      }
      for (int stage = 0; stage < C::kStages; ++stage) {
        MbarrierInit(Address(smem, kFullK, stage), 1);
        MbarrierInit(Address(smem, kEmptyK, stage), 4 * kConsumers);
        MbarrierInit(Address(smem, kFullV, stage), 1);
        MbarrierInit(Address(smem, kEmptyV, stage), 4 * kConsumers);
      }
      FenceMbarrierInit();
    }
    __syncthreads();
    if (group == 0) {
      ReleaseRegisters<kProducerRegisters>();
      const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
      if (warp == 0) {
        Produce(params, smem_pointer);
      } else if (C::kFinderWarp && warp == 1) {
        Finder finder(params);
        while (finder.Put(smem_pointer)) {
        }
      } else if (C::kPaged && warp == 2) {
        ProduceValues(params, smem_pointer);
      }
    } else {
      ClaimRegisters<kConsumerRegisters>();
      Consume(params, smem_pointer, group - 1);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_
