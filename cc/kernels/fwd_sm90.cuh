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
//             copies of Q, K and V (over pages all lanes, and another warp those of V). With
//             kFinderWarp its second warp finds the tiles (fwd_producers_sm90.cuh); with kFp8 its
//             other three convert K and V (keys_fp8_sm90.cuh). Each other warpgroup consumes: it
//             owns 64 rows of the tile.
// Overlap     A consumer starts S = Q K^T of a block, then out += P V of the block before, and
//             computes the block's softmax while the second product still runs. Other consumers
//             fill what is left; with kPingPong they take turns at starting products.
// Tiles       CTAs stay, and take one tile after the other (TileWalk): in turn, or where tiles
//             differ who is free takes the next one. With room for two Q there is no gap: the first
//             product of a tile starts before the last one of the tile before.
// Shared      kStagesQ buffers of Q, kStages of K and of V, kStages8 of either in 8 bits, each with
//             a full and an empty mbarrier; the output, if there is room. plan.cc computes the same
//             sum.
// Registers   consumer: output kHeadDimV / 2, scores kBlockN / 2, weights kBlockN / 4, queries
//             4 kHeldQ, and 30 or so more, of 240 (two consumers), 160 (three) or 112 (four).
//
// ptxas runs all products one after the other (C7510 to C7517 in its log) if on some path it can't
// tell that a product is done before its accumulator is touched. So each wait stands in the same
// branch as its product, and accumulators change only between a wait and the next product's start.
#ifndef JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_

#include "fwd_producers_sm90.cuh"
#include "keys_fp8_sm90.cuh"
#include "kv_source.cuh"
#include "ptx_sm90.cuh"
#include "results_sm90.cuh"
#include "row_scores.cuh"
#include "softmax.cuh"
#include "tiles_sm90.cuh"
#include "weights_sm90.cuh"

namespace jfa {

template <class C>
struct FwdSm90 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  static constexpr Weighing kWeighing = static_cast<Weighing>(C::kWeighing);
  using Results = ResultsSm90<C>;
  static constexpr int kGroupThreads = Results::kGroupThreads;
  static constexpr int kGroupRows = Results::kGroupRows;
  static constexpr int kConsumers = C::kBlockM / kGroupRows;
  static constexpr int kKeySteps = C::kBlockN / 16;
  static constexpr int kDimSteps = C::kHeadDim / 16;
  // What one thread may hold: 64 Ki registers, in units of 8, shared out by role. To find blocks of
  // keys among segments or pages takes more than to walk over all, and to convert keys still more.
  static constexpr int kProducerRegisters = C::kFp8 && kConsumers < 3              ? 72
                                            : C::kSegments || C::kPaged || C::kFp8 ? 56
                                            : kConsumers < 3                       ? 40
                                            : (C::kSoftcap || C::kAlibi)           ? 56
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
  // With kSplitQ each warpgroup's rows come by themselves: who has done with a tile gets the next
  // one's while others still work.
  static constexpr int kPartsQ = C::kSplitQ ? kConsumers : 1;
  using Keys8 = KeysFp8Sm90<C, FwdSm90>;
  static constexpr bool kBf16 = C::kBf16 && !C::kFp8;  // what is multiplied
  // Arrivals at a full buffer of K or V.
  static constexpr int kWriters = C::kFp8 ? Keys8::kWarps * kArrivingLanes : 1;
  static constexpr bool kTwoProducers = C::kPaged && !C::kFp8;

  static constexpr int kSmemQ = 0;
  static constexpr int kSmemK = C::kStagesQ * kBytesQ;
  static constexpr int kSmemV = kSmemK + C::kStages * kBytesK;
  static constexpr int kSmem8 = kSmemV + C::kStages * kBytesV;
  static constexpr int kSmemOut = kSmem8 + C::kStages8 * Keys8::kBytes;
  static constexpr int kSmemBarriers = kSmemOut + (C::kStageOut ? kConsumers * Results::kBytes : 0);
  static constexpr int kTileSlots = C::kTileSlots, kSlotBytes = 256;
  static constexpr int kSmemNotes =
      kSmemBarriers +
      8 * (2 * C::kStagesQ * kPartsQ + 4 * C::kStages + 2 * kTileSlots + 2 * C::kStages8);
  static constexpr int kSmemTiles = kSmemNotes + Keys8::kNoteBytes;
  static constexpr int kSmemBytes = kSmemTiles + kTileSlots * kSlotBytes;
  enum Barrier {
    kFullQ = 0,
    kEmptyQ = kFullQ + C::kStagesQ * kPartsQ,
    kFullK = kEmptyQ + C::kStagesQ * kPartsQ,
    kEmptyK = kFullK + C::kStages,
    kFullV = kEmptyK + C::kStages,
    kEmptyV = kFullV + C::kStages,
    kFullTile = kEmptyV + C::kStages,
    kEmptyTile = kFullTile + kTileSlots,
    kFull8 = kEmptyTile + kTileSlots,
    kEmpty8 = kFull8 + C::kStages8,
  };
  // Of each consumer warpgroup; and what the finder waits for.
  enum NamedBarrier { kTurn = 1, kGroup = kTurn + kConsumers, kOrdered = kGroup + kConsumers };

  static_assert(C::kBlockM % kGroupRows == 0 && kConsumers >= 1 && kConsumers <= 4,
                "a consumer warpgroup owns 64 rows");
  static_assert(C::kBlockM - kGroupRows <= C::kStages * C::kBlockN,
                "blocks that a warpgroup lets pass keep their values until it has passed them all");
  static_assert(C::kWarps == 4 * (kConsumers + 1), "one more warpgroup produces");
  static_assert(C::kBlockN % 16 == 0 && C::kBlockN <= 256, "one wgmma spans the key block");
  static_assert(C::kFp8 ? C::kStagesQ == 1 && C::kStages8 >= 1 && C::kStages8 <= 4
                        : C::kStages8 == 0,
                "queries are converted when a tile begins; notes have room for four");
  static_assert(!(C::kFp8 && C::kFinderWarp), "the second warp converts");
  static_assert(C::kHeldQ == 0 || (C::kStagesQ == 1 && !C::kFp8), "held from a tile's begin on");
  // A tile's output may wait in registers until the next tile's second product of scores runs.
  // Where warpgroups take turns, this would make them longer.
  static constexpr bool kStoreLater = C::kStagesQ > 1 && !C::kPingPong;
  static_assert(kTileSlots >= (kStoreLater ? 3 : 2),
                "a tile's slot is in use until its output is stored");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");

  using Ring = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
  using RingTile = RingPosition<kTileSlots>;
  using Output = typename Results::Output;
  using Weights = WeightsSm90<kBf16, kKeySteps>;
  using WeightArray = typename Weights::Array;
  using Scores = typename Weights::Scores;
  using Place = RowScores<4, 1, kKeySteps>;

  static JFA_DEVICE uint32 Address(uint32 smem, int barrier, int stage = 0) {
    return smem + kSmemBarriers + 8 * (barrier + stage);
  }
  // Which barriers of kFullQ and kEmptyQ are of a warpgroup's rows.
  static JFA_DEVICE int BufferQ(int stage, int group) {
    return kPartsQ == 1 ? stage : stage * kPartsQ + group;
  }

  using Tiles = TilesSm90<C>;
  using Tile = typename Tiles::Tile;
  using Mask = typename Tiles::Mask;
  using Keys = typename Tiles::Keys;
  using Work = typename Tiles::Work;
  static_assert(sizeof(Work) <= kSlotBytes, "a tile must fit in its slot");
  static JFA_DEVICE Work* Slot(unsigned char* smem, int slot) {
    return reinterpret_cast<Work*>(smem + kSmemTiles + slot * kSlotBytes);
  }

  using Producers = FwdProducersSm90<C, FwdSm90>;

  // --- consumers --------------------------------------------------------------------------------

  // The last C::kHeldQ of a tile's kDimSteps times 16 dims of Q, in registers while the tile lasts:
  // at the largest head dim shared memory is nearly full of traffic, and products that read Q there
  // are a good part of it.
  static constexpr int kReadQ = kDimSteps - C::kHeldQ;  // steps that read Q from shared memory
  using HeldQ = uint32[C::kHeldQ > 0 ? C::kHeldQ : 1][4];
  static JFA_DEVICE void LoadHeldQ(HeldQ& held, uint32 smem_q) {
    using Rows = Operand<SmemTile<kGroupRows, kPanelColumns>, Side::kA, false, 4>;
    const int warp = ReadThreadIndex() % kGroupThreads / kWarpSize;
#pragma unroll
    for (int step = kReadQ; step < kDimSteps; ++step) {
      const Rows rows(smem_q + step / 4 * kPanelBytesM, warp, ReadLaneIndex());
      rows.Load(held[step - kReadQ], 0, step % 4);
    }
  }

  // s = Q K^T, started
  static JFA_DEVICE void ScoreGemm(Scores& s, uint32 smem_q, const HeldQ& held, uint32 smem_k) {
    const uint64 q = PanelDescriptor(smem_q, 16), k = PanelDescriptor(smem_k, 16);
    Pin(s);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      const uint64 keys = k + ((panel * kPanelBytesN + within) >> 4);
      if (step < kReadQ) {
        Wgmma<C::kBlockN>::template Ss<kBf16, false>(s, q + ((panel * kPanelBytesM + within) >> 4),
                                                     keys, step > 0);
      } else {
        Wgmma<C::kBlockN>::template Rs<kBf16, false>(s, held[step - kReadQ], keys, step > 0);
      }
    }
    WgmmaCommit();
    Pin(s);
  }

  // out += P V, started
  static JFA_DEVICE void OutputGemm(Output& out, const WeightArray& p, uint32 smem_v) {
    const uint64 v = PanelDescriptor(smem_v, kPanelBytesN);
    Pin(out);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      Wgmma<C::kHeadDimV>::template Rs<kBf16, true>(out, p[step],
                                                    v + ((step * 16 * kRowBytes) >> 4), 1);
    }
    WgmmaCommit();
    Pin(out);
  }

  using Logits = decltype(Work::logits);

  // Whether the mask or the end of the keys hides something of a block from the warpgroup's rows.
  static JFA_DEVICE bool NeedsMask(const Work& work, int group, int block) {
    return work.mask.template NeedsMask<kGroupRows, C::kBlockN>(work.tile.row0 + group * kGroupRows,
                                                                block * C::kBlockN);
  }

  // Scores to logits, -inf where a row doesn't see a key.
  static JFA_DEVICE void MakeLogits(Scores& s, const Work& work, const Logits& logits, int block,
                                    bool needs_mask, bool one_segment) {
    const int key0 = block * C::kBlockN;
    // Warps count from the producer's on.
    if constexpr (!Logits::kPlain) Place::Apply(s, logits, work.tile.row0 - kGroupRows, key0);
    if (needs_mask) Place::HideBand(s, work.mask, work.tile.row0 - kGroupRows, key0);
    if constexpr (C::kSegments) {
      if (!one_segment) {
        Place::HideOtherSegments(s, work.ids, work.tile.row0 - kGroupRows, key0);
      }
    }
  }

  // One lane per warp: a buffer is free when all consumer warps say so.
  static JFA_DEVICE void Arrive(uint32 barrier) { MbarrierArriveWarp(barrier); }

  // Padding may hold NaN, which a weight of zero doesn't silence. TMA zeroes what lies beyond the
  // array, this what lies beyond a sequence's length, which only a tile's first block may hold.
  // Every consumer warpgroup does it for itself: that needs no barrier between them, and writing a
  // zero twice does no harm.
  static JFA_DEVICE void ClearPadding(const ProblemParams& problem, const Work& work, int block,
                                      uint32 smem, const Ring& v, int group) {
    if constexpr (C::kFp8) return;  // who converts does it
    const Sequence& sequence = work.tile.sequence;
    const int row = sequence.kv_len - block * C::kBlockN;
    if (row >= C::kBlockN) return;
    if (!C::kPaged && sequence.kv_begin + sequence.kv_len == problem.kv_len) return;
    MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
    ClearRows<kPanelsV, kPanelBytesN>(smem + kSmemV + v.stage * kBytesV, row, C::kBlockN);
    FenceProxyAsync();
    NamedBarrierSync(kGroup + group, kGroupThreads);
  }

  // Of a tile that is done: its LSE, and the factors of this lane's rows of output.
  static JFA_DEVICE float2 Finish(const FwdSm90Params& params, const Tile& tile,
                                  const OnlineSoftmax<1>& softmax) {
    const float2 x = Results::StoreLse(params, tile, softmax);
    if constexpr (!C::kFp8) return x;
    const float v_scale = ValueScale(params.fwd, tile.batch, tile.kv_head);
    return make_float2(x.x * v_scale, x.y * v_scale);
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
    // The tile at hand. With two sets of weights there are no registers for it, and it is read
    // where it was written.
    constexpr bool kInPlace = kWeighing == Weighing::kDouble;
    Work copy = *Slot(smem_pointer, slot);
    const Work* work = kInPlace ? Slot(smem_pointer, slot) : &copy;
    Keys keys = work->keys;
    const auto next_tile = [&] {
      slot = wait_tile();
      if constexpr (kInPlace) {
        work = Slot(smem_pointer, slot);
      } else {
        copy = *Slot(smem_pointer, slot);
      }
      keys = work->keys;
      return work->tile.row0 >= 0;
    };
    // Tiles without keys are done at once; false at the end.
    const auto skip_empty = [&](bool more) {
      for (; more; more = next_tile()) {
        block = keys.First();
        if (block >= 0) return true;
        const OnlineSoftmax<1> nothing(1.f);
        Results::StoreZeros(params, smem + kSmemOut, kGroup + group, group, work->tile,
                            Finish(params, work->tile, nothing));
        release(slot);
      }
      return false;
    };

    // A tile's first blocks may lie to the right of all that this warpgroup's rows see: it lets
    // them pass, at most those that begin between its last row's keys and the tile's.
    int hidden_blocks = 0;
    const auto skip_hidden = [&](int first) {
      if constexpr (kMask != MaskKind::kFull) {
        const int end = work->tile.row0 + (group + 1) * kGroupRows - 1 + work->mask.high;
        while (first * C::kBlockN >= end &&
               !(Mask::kHasSinks && first * C::kBlockN < work->mask.sink_tokens)) {
          const int next = keys.Next(first);
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

    bool more = skip_empty(work->tile.row0 >= 0);
    while (more) {
      Output out;
      Scores s;
      WeightArray p;
      float factor[2];
      float2 normalizer;
      Logits logits = work->logits;
      OnlineSoftmax<1> softmax(logits.Scale());
      Clear(out);
      Pin(out);

      uint32 smem_q, empty_q;
      const auto wait_q = [&] {
        smem_q = smem + kSmemQ + q.stage * kBytesQ + group * kGroupRows * kRowBytes;
        const int buffer = BufferQ(q.stage, group);
        empty_q = Address(smem, kEmptyQ, buffer);
        MbarrierWait(Address(smem, kFullQ, buffer), q.parity);
        q.Advance();
      };
      float score_scale = 1.f;
      if constexpr (C::kFp8) {
        score_scale = ScoreScale(params.fwd, work->tile.batch, work->tile.kv_head);
      }
      wait_q();
      if constexpr (C::kFp8) {
        const int row = ReadThreadIndex() % kGroupThreads / kWarpSize * 16;
        score_scale *= Keys8::ConvertQueries(
            smem_q + row * kRowBytes, kPanelBytesM,
            work->tile.sequence.q_len - work->tile.row0 - group * kGroupRows - row);
        logits.ScaleScores(score_scale);
        softmax.scale = logits.Scale();
        FenceProxyAsync();
        NamedBarrierSync(kGroup + group, kGroupThreads);
      }
      HeldQ held;
      LoadHeldQ(held, smem_q);
      block = skip_hidden(block);
      MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
      ScoreGemm(s, smem_q, held, smem + kSmemK + k.stage * kBytesK);
      bool one_segment = keys.one_segment;
      int next = keys.Next(block);
      bool needs_mask = NeedsMask(*work, group, block);
      WgmmaWait<0>();
      Pin(s);
      Arrive(Address(smem, kEmptyK, k.stage));
      k.Advance();
      if (next < 0) Arrive(empty_q);
      MakeLogits(s, *work, logits, block, needs_mask, one_segment);
      // As in `step`, to the bit: a tile's result doesn't depend on whether a CTA begins with it.
      if constexpr (kWeighing == Weighing::kSearched) {
        softmax.Follow(s, factor);
        Weights::Weigh(s, softmax);
        Weights::Pack(p, s);
      } else {
        Weights::WeighOptimistically(p, s, softmax, factor, true);
      }
      skip_hidden_values();
      ClearPadding(problem, *work, block, smem, v, group);

      int done;           // slot
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
      // Adds the block before, whose weights are `p`, and weighs the next one: into `next_p` if two
      // take turns, else into `p`. After a tile's last block that is the first one of the next
      // tile, if it has any and Q has a second buffer; else false.
      const auto step = [&](WeightArray& p, WeightArray& next_p) {
        const bool is_first = next < 0;
        if (is_first) {
          done = slot;
          block = next_tile() ? keys.First() : -1;
          if (C::kStagesQ == 1 || block < 0) return false;
          wait_q();
          next = skip_hidden(block);
        }
        block = next;
        MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
        TakeTurn(group);
        ScoreGemm(s, smem_q, held, smem + kSmemK + k.stage * kBytesK);
        store_waiting();
        MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
        OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
        PassTurn(group);
        if (is_first) {
          normalizer = Finish(params, Slot(smem_pointer, done)->tile, softmax);
          logits = work->logits;
          softmax = OnlineSoftmax<1>(logits.Scale());
        }
        one_segment = keys.one_segment;
        next = keys.Next(block);
        needs_mask = NeedsMask(*work, group, block);
        WgmmaWait<1>();
        Pin(s);
        Arrive(Address(smem, kEmptyK, k.stage));
        k.Advance();
        if (next < 0) Arrive(empty_q);
        MakeLogits(s, *work, logits, block, needs_mask, one_segment);
        const auto finish_product = [&] {
          WgmmaWait<0>();
          Pin(out);
          Arrive(Address(smem, kEmptyV, v.stage));
          v.Advance();
        };
        bool rescale;
        if constexpr (kWeighing == Weighing::kDouble) {
          rescale = Weights::WeighOptimistically(next_p, s, softmax, factor, is_first);
          Weights::Pin(next_p);
          finish_product();
        } else if constexpr (kWeighing == Weighing::kSingle) {
          finish_product();
          rescale = Weights::WeighOptimistically(p, s, softmax, factor, is_first);
        } else {
          rescale = softmax.Follow(s, factor);
          Weights::Weigh(s, softmax);
          Pin(s);  // or the compiler leaves half of the weights for after the wait
          finish_product();
          Weights::Pack(p, s);
        }
        if (is_first) {
          if constexpr (kStoreLater) {
            unstored = done;
          } else {
            store(done);
            Clear(out);
          }
          skip_hidden_values();
          ClearPadding(problem, *work, block, smem, v, group);
        } else if (rescale) {
          softmax.Rescale(out, factor);
        }
        return true;
      };
      if constexpr (kWeighing == Weighing::kDouble) {
        WeightArray other;
#pragma unroll 1
        while (step(p, other)) {
          if (!step(other, p)) {
            Weights::Copy(p, other);
            break;
          }
        }
      } else {
#pragma unroll 1
        while (step(p, p)) {
        }
      }

      store_waiting();
      MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
      OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
      normalizer = Finish(params, Slot(smem_pointer, done)->tile, softmax);
      WgmmaWait<0>();
      Pin(out);
      Arrive(Address(smem, kEmptyV, v.stage));
      v.Advance();
      store(done);
      more = skip_empty(work->tile.row0 >= 0);
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
      for (int buffer = 0; buffer < C::kStagesQ * kPartsQ; ++buffer) {
        MbarrierInit(Address(smem, kFullQ, buffer), 1);
        MbarrierInitWarps(Address(smem, kEmptyQ, buffer), 4 * kConsumers / kPartsQ);
      }
      for (int slot = 0; slot < kTileSlots; ++slot) {
        MbarrierInitWarps(Address(smem, kFullTile, slot), 1);
        MbarrierInitWarps(Address(smem, kEmptyTile, slot),
                          4 * kConsumers + (kTwoProducers ? 2 : 1));
      }
      for (int stage = 0; stage < C::kStages; ++stage) {
        MbarrierInit(Address(smem, kFullK, stage), kWriters);
        MbarrierInitWarps(Address(smem, kEmptyK, stage), 4 * kConsumers);
        MbarrierInit(Address(smem, kFullV, stage), kWriters);
        MbarrierInitWarps(Address(smem, kEmptyV, stage), 4 * kConsumers);
      }
      for (int stage = 0; stage < C::kStages8; ++stage) {
        MbarrierInit(Address(smem, kFull8, stage), 1);
        MbarrierInitWarps(Address(smem, kEmpty8, stage), Keys8::kWarps);
      }
      FenceMbarrierInit();
    }
    __syncthreads();
    if (group == 0) {
      ReleaseRegisters<kProducerRegisters>();
      const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
      if (warp == 0) {
        Producers::Produce(params, smem_pointer);
      } else if constexpr (C::kFp8) {
        Keys8::Convert(smem_pointer);
      } else if (C::kFinderWarp && warp == 1) {
        typename Producers::Finder finder(params);
        while (finder.Put(smem_pointer)) finder.WaitForOrders();
      } else if (kTwoProducers && warp == 2) {
        Producers::ProduceValues(params, smem_pointer);
      }
    } else {
      ClaimRegisters<kConsumerRegisters>();
      Consume(params, smem_pointer, group - 1);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_
