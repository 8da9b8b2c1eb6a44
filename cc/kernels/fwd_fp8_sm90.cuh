// Forward attention for Hopper in 8-bit floats. What it shares with fwd_sm90.cuh (tiles, overlap,
// turns, what ptxas wants) is told there; this is what differs.
//
//   V [keys, dims]  --copy-->  shared memory  --ldmatrix.trans, bytes sorted-->  V^T [dims, keys]
//
// Roles       Of warpgroup 0 the first warp orders copies; the other three transpose V, block after
//             block (fwd_fp8_producers_sm90.cuh): products of 8-bit floats want both operands with
//             the inner dimension along rows, and V has the head dim there.
// Keys        P takes the registers of S as they are: keys are permuted (transpose_sm90.cuh).
// Dims        That also permutes V's dims; Store renames registers.
// Weights     Of e4m3, by one of two ways (kOptimistic): weights_fp8.cuh.
// Precision   The tensor cores keep about 14 bits of a sum of such products. With kTwoLevel each
//             block's P V begins at zero and is added in f32; there is no room then to run it under
//             the softmax, which other warpgroups fill instead.
// Shared      kStagesQ buffers of Q, kStagesK of K, kStagesV of V, kStages of V^T, and the output.
// Registers   As fwd_sm90.cuh, with weights of kBlockN / 8.
#ifndef JAX_FLASHATTN_CC_KERNELS_FWD_FP8_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FWD_FP8_SM90_CUH_

#include "fwd_fp8_producers_sm90.cuh"
#include "ptx_fp8_sm90.cuh"
#include "results_sm90.cuh"
#include "row_scores.cuh"
#include "tiles_sm90.cuh"
#include "transpose_sm90.cuh"
#include "weights_fp8.cuh"

namespace jfa {

template <class C>
struct FwdFp8Sm90 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  using Results = ResultsSm90<C>;
  static constexpr int kGroupThreads = Results::kGroupThreads;
  static constexpr int kGroupRows = Results::kGroupRows;
  static constexpr int kConsumers = C::kBlockM / kGroupRows;
  static constexpr int kTransposers = 3;  // warps
  static constexpr int kKeySteps = C::kBlockN / 32;
  static constexpr int kDimSteps = C::kHeadDim / 32;
  // As in fwd_sm90.cuh. Transposing takes about 40, and less if it reads half as much at once:
  // three optimistic consumers need each register.
  static constexpr bool kSearches = C::kPacked || C::kSegments;
  static constexpr bool kTight = kConsumers == 3 && C::kOptimistic;
  static constexpr int kProducerRegisters = kTight                         ? 32
                                            : C::kSegments                 ? 88
                                            : kSearches || kConsumers == 3 ? 56
                                                                           : 40;
  static constexpr int kConsumerRegisters = (512 - kProducerRegisters) / kConsumers / 8 * 8;

  // Panels of 128 columns: rows of 128 bytes under the 128-byte swizzle.
  static constexpr int kRowBytes = 128;
  static constexpr int kPanelColumns = 128;
  static constexpr int kPanels = (C::kHeadDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelsV = (C::kHeadDimV + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelsT = (C::kBlockN + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytesM = C::kBlockM * kRowBytes;
  static constexpr int kPanelBytesN = C::kBlockN * kRowBytes;
  static constexpr int kPanelBytesT = C::kHeadDimV * kRowBytes;
  static constexpr int kBytesQ = kPanels * kPanelBytesM;
  static constexpr int kBytesK = kPanels * kPanelBytesN;
  static constexpr int kBytesV = kPanelsV * kPanelBytesN;
  static constexpr int kBytesT = kPanelsT * kPanelBytesT;

  static constexpr int kSmemQ = 0;
  static constexpr int kSmemK = C::kStagesQ * kBytesQ;
  static constexpr int kSmemV = kSmemK + C::kStagesK * kBytesK;
  static constexpr int kSmemT = kSmemV + C::kStagesV * kBytesV;
  static constexpr int kSmemOut = kSmemT + C::kStages * kBytesT;
  static constexpr int kSmemBarriers = kSmemOut + (C::kStageOut ? kConsumers * Results::kBytes : 0);
  static constexpr int kTileSlots = 3, kSlotBytes = 256;
  // How many keys of a block count, per stage of V; -1 ends the transposers' work.
  static constexpr int kSmemKeys =
      kSmemBarriers + 16 * (C::kStagesQ + C::kStagesK + C::kStages + C::kStagesV + kTileSlots);
  static constexpr int kSmemTiles = kSmemKeys + 16;
  static constexpr int kSmemBytes = kSmemTiles + kTileSlots * kSlotBytes;
  enum Barrier {
    kFullQ = 0,
    kEmptyQ = kFullQ + C::kStagesQ,
    kFullK = kEmptyQ + C::kStagesQ,
    kEmptyK = kFullK + C::kStagesK,
    kFullT = kEmptyK + C::kStagesK,
    kEmptyT = kFullT + C::kStages,
    kFullV = kEmptyT + C::kStages,
    kEmptyV = kFullV + C::kStagesV,
    kFullTile = kEmptyV + C::kStagesV,
    kEmptyTile = kFullTile + kTileSlots,
  };
  enum NamedBarrier { kGroup = 1 };  // of each consumer warpgroup

  static_assert(C::kBlockM % kGroupRows == 0 && kConsumers >= 1 && kConsumers <= 3,
                "a consumer warpgroup owns 64 rows");
  static_assert(C::kWarps == 4 * (kConsumers + 1), "one more warpgroup produces");
  static_assert(C::kBlockN % 32 == 0 && C::kBlockN <= 256, "one wgmma spans the key block");
  static_assert(C::kStagesV <= 4, "kSmemKeys has room for four");
  static_assert(kSmemBytes == C::kSmemBytes, "plan_fp8.cc must agree on shared memory");

  using RingK = RingPosition<C::kStagesK>;
  using RingT = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
  using RingTile = RingPosition<kTileSlots>;
  using Output = typename Results::Output;
  using Weighing = WeightsFp8<kKeySteps>;
  using Scores = typename Weighing::Scores;
  using Weights = typename Weighing::Array;
  using Softmax = typename Weighing::Softmax;
  using Place = RowScores<4, 1, 2 * kKeySteps>;
  using Transposer = TransposeSm90<C::kBlockN, C::kHeadDimV, kTransposers, kTight ? 2 : 4>;

  static JFA_DEVICE uint32 Address(uint32 smem, int barrier, int stage = 0) {
    return smem + kSmemBarriers + 8 * (barrier + stage);
  }

  using Tiles = TilesSm90<C>;
  using Tile = typename Tiles::Tile;
  using Mask = typename Tiles::Mask;
  using Keys = typename Tiles::Keys;
  using Work = typename Tiles::Work;
  using Producers = FwdFp8ProducersSm90<C, FwdFp8Sm90>;
  using Slot = typename Producers::Slot;
  static_assert(sizeof(Slot) <= kSlotBytes, "a tile must fit in its slot");
  static JFA_DEVICE Slot* SlotAt(unsigned char* smem, int slot) {
    return reinterpret_cast<Slot*>(smem + kSmemTiles + slot * kSlotBytes);
  }
  static JFA_DEVICE int* KeysAt(unsigned char* smem, int stage) {
    return reinterpret_cast<int*>(smem + kSmemKeys) + stage;
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
      WgmmaFp8<C::kBlockN>::template Ss<C::kE5m2Q, C::kE5m2K>(
          s, q + ((panel * kPanelBytesM + within) >> 4), k + ((panel * kPanelBytesN + within) >> 4),
          step > 0);
    }
    WgmmaCommit();
    Pin(s);
  }

  // out += P V, or out = P V, started; of as many dims as `out` has.
  template <bool kFromZero, int kBlocks>
  static JFA_DEVICE void OutputGemm(float (&out)[1][kBlocks][4], const Weights& p, uint32 smem_t) {
    const uint64 v = PanelDescriptor(smem_t, 16);
    Pin(out);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      WgmmaFp8<8 * kBlocks>::template Rs<C::kE5m2V>(
          out, p[step], v + ((panel * kPanelBytesT + within) >> 4), !kFromZero || step > 0);
    }
    WgmmaCommit();
    Pin(out);
  }

  // out += P V, the block's part summed on its own; done when it returns.
  static JFA_DEVICE void AddBlock(Output& out, const Weights& p, uint32 smem_t) {
    constexpr int kParts = C::kHeadDimV % 64 == 0 ? C::kHeadDimV / 64 : 1;  // as registers allow
    constexpr int kBlocks = C::kHeadDimV / 8 / kParts;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float sum[1][kBlocks][4];
      OutputGemm<true>(sum, p, smem_t + part * kBlocks * 8 * kRowBytes);
      WgmmaWait<0>();
      Pin(sum);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[0][part * kBlocks + n][e] += sum[0][n][e];
      }
    }
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

  // One lane per warp: a buffer is free when all warps that use it say so.
  static JFA_DEVICE void Arrive(uint32 barrier) { MbarrierArriveWarp(barrier); }

  // Writes out, with columns in V's order again.
  static JFA_DEVICE void Store(const FwdSm90Params& params, uint32 smem_out, int group,
                               const Tile& tile, float2 normalizer, const Output& out) {
    Output sorted;
    Transposer::Unpermute(sorted, out);
    Results::Store(params, smem_out, kGroup + group, group, tile, normalizer, sorted);
  }

  static JFA_DEVICE void Consume(const FwdSm90Params& params, unsigned char* smem_pointer,
                                 int group) {
    const uint32 smem = SmemAddress(smem_pointer);
    RingTile t;
    RingQ q;
    RingK k;
    RingT v;

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
    // Of a tile that is done: its LSE, and the factors of its rows.
    const auto finish = [&](int slot, const Softmax& softmax) {
      const Slot* done = SlotAt(smem_pointer, slot);
      const float2 normalizer = Results::StoreLse(params, done->work.tile, softmax);
      return make_float2(normalizer.x * done->v_scale, normalizer.y * done->v_scale);
    };
    const auto store = [&](int slot, float2 normalizer, const Output& out) {
      Store(params, smem + kSmemOut, group, SlotAt(smem_pointer, slot)->work.tile, normalizer, out);
      release(slot);
    };
    int slot = wait_tile(), block = -1;
    const Work* work = &SlotAt(smem_pointer, slot)->work;
    Keys keys = work->keys;
    // Whether any of the tile's rows are this warpgroup's; looked at where tiles are alike.
    const auto has_rows = [&] {
      return kMask != MaskKind::kFull ||
             work->tile.row0 + group * kGroupRows < work->tile.sequence.q_rows;
    };
    // Lets a tile's copies pass. Where V^T of a block is there, so is its buffer of K: its copy was
    // ordered before, once all had released what was in it.
    const auto pass_tile = [&] {
      MbarrierWait(Address(smem, kFullQ, q.stage), q.parity);
      Arrive(Address(smem, kEmptyQ, q.stage));
      q.Advance();
      int blocks = 0;
      for (; block >= 0; block = keys.Next(block)) ++blocks;
      // Or ptxas takes the rings' positions for different in a warp's lanes, and spills.
      blocks = __shfl_sync(kFullWarp, blocks, 0);
#pragma unroll 1
      for (; blocks > 0; --blocks) {
        MbarrierWait(Address(smem, kFullT, v.stage), v.parity);
        Arrive(Address(smem, kEmptyK, k.stage));
        Arrive(Address(smem, kEmptyT, v.stage));
        k.Advance();
        v.Advance();
      }
    };
    // Tiles without keys, or without rows here, are done at once; false at the end.
    const auto skip_empty = [&] {
      while (work->tile.row0 >= 0) {
        block = keys.First();
        if (block >= 0 && has_rows()) return true;
        if (block >= 0) {
          pass_tile();
          release(slot);
        } else {
          Results::StoreZeros(params, smem + kSmemOut, kGroup + group, group, work->tile,
                              finish(slot, Softmax(1.f)));
          release(slot);
        }
        slot = wait_tile();
        work = &SlotAt(smem_pointer, slot)->work;
        keys = work->keys;
      }
      return false;
    };

    // A tile's first blocks may lie to the right of all that this warpgroup's rows see: it lets
    // them pass, at most the one or two that begin between its last row's keys and the tile's.
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
          ++hidden_blocks;
          first = next;
        }
      }
      return first;
    };
    const auto skip_hidden_values = [&] {
      if constexpr (kMask != MaskKind::kFull) {
        for (; hidden_blocks > 0; --hidden_blocks) {
          MbarrierWait(Address(smem, kFullT, v.stage), v.parity);
          Arrive(Address(smem, kEmptyT, v.stage));
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
      Softmax softmax(work->logits.Scale());
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
      bool one_segment = keys.one_segment;
      int next = keys.Next(block);
      WgmmaWait<0>();
      Pin(s);
      Arrive(Address(smem, kEmptyK, k.stage));
      k.Advance();
      if (next < 0) Arrive(empty_q);
      MakeLogits(s, *work, group, block, one_segment);
      if constexpr (C::kOptimistic) {
        Weighing::WeighOptimistically(p, s, softmax, factor, Weighing::SeesFirst(softmax));
      } else {
        softmax.Follow(s, factor);
        Weighing::Weigh(s, softmax);
        Weighing::Pack(p, s);
      }
      skip_hidden_values();

      int done;  // slot
      // A tile's output may wait in registers until the next tile's second product of scores runs.
      constexpr bool kStoreLater = C::kStagesQ > 1 && !C::kTwoLevel;
      int unstored = -1;  // slot
      const auto store_waiting = [&] {
        if (!kStoreLater || unstored < 0) return;
        store(unstored, normalizer, out);
        Clear(out);
        unstored = -1;
      };
      const auto release_values = [&] {
        Arrive(Address(smem, kEmptyT, v.stage));
        v.Advance();
      };
#pragma unroll 1
      while (true) {
        // The next block; that of the next tile, if it has any and Q has a second buffer.
        const bool is_first = next < 0;
        if (is_first) {
          done = slot;
          slot = wait_tile();
          work = &SlotAt(smem_pointer, slot)->work;
          keys = work->keys;
          block = work->tile.row0 >= 0 ? keys.First() : -1;
          if (C::kStagesQ == 1 || block < 0 || !has_rows()) break;
          wait_q();
          next = skip_hidden(block);
        }
        block = next;
        if constexpr (C::kTwoLevel) {
          MbarrierWait(Address(smem, kFullT, v.stage), v.parity);
          AddBlock(out, p, smem + kSmemT + v.stage * kBytesT);
          release_values();
          Clear(s);  // frees its registers until here
        }
        MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
        ScoreGemm(s, smem_q, smem + kSmemK + k.stage * kBytesK);
        store_waiting();
        if constexpr (!C::kTwoLevel) {
          MbarrierWait(Address(smem, kFullT, v.stage), v.parity);
          OutputGemm<false>(out, p, smem + kSmemT + v.stage * kBytesT);
        }
        if (is_first) {
          normalizer = finish(done, softmax);
          softmax = Softmax(work->logits.Scale());
        }
        one_segment = keys.one_segment;
        next = keys.Next(block);
        WgmmaWait<C::kTwoLevel ? 0 : 1>();
        Pin(s);
        Arrive(Address(smem, kEmptyK, k.stage));
        k.Advance();
        if (next < 0) Arrive(empty_q);
        MakeLogits(s, *work, group, block, one_segment);
        const auto finish_product = [&] {
          if constexpr (!C::kTwoLevel) {
            WgmmaWait<0>();
            Pin(out);
            release_values();
          }
        };
        bool rescale;
        if constexpr (C::kOptimistic) {
          Weights next_p;  // a product may still read `p`
          rescale = Weighing::WeighOptimistically(next_p, s, softmax, factor,
                                                  Weighing::SeesFirst(softmax));
          Weighing::Pin(next_p);
          finish_product();
          Weighing::Copy(p, next_p);
        } else {
          rescale = softmax.Follow(s, factor);
          Weighing::Weigh(s, softmax);
          Pin(s);  // or the compiler leaves half of the weights for after the wait
          finish_product();
          Weighing::Pack(p, s);
        }
        if (is_first) {
          if constexpr (kStoreLater) {
            unstored = done;
          } else {
            store(done, normalizer, out);
            Clear(out);
          }
          skip_hidden_values();
        } else if (rescale) {
          softmax.Rescale(out, factor);
        }
      }

      store_waiting();
      MbarrierWait(Address(smem, kFullT, v.stage), v.parity);
      if constexpr (C::kTwoLevel) {
        AddBlock(out, p, smem + kSmemT + v.stage * kBytesT);
        normalizer = finish(done, softmax);
      } else {
        OutputGemm<false>(out, p, smem + kSmemT + v.stage * kBytesT);
        normalizer = finish(done, softmax);
        WgmmaWait<0>();
        Pin(out);
      }
      release_values();
      store(done, normalizer, out);
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
        MbarrierInitWarps(Address(smem, kEmptyQ, stage), 4 * kConsumers);
      }
      for (int slot = 0; slot < kTileSlots; ++slot) {
        MbarrierInitWarps(Address(smem, kFullTile, slot), 1);
        MbarrierInitWarps(Address(smem, kEmptyTile, slot), 4 * kConsumers);
      }
      for (int stage = 0; stage < C::kStagesK; ++stage) {
        MbarrierInit(Address(smem, kFullK, stage), 1);
        MbarrierInitWarps(Address(smem, kEmptyK, stage), 4 * kConsumers);
      }
      for (int stage = 0; stage < C::kStages; ++stage) {
        MbarrierInitWarps(Address(smem, kFullT, stage), kTransposers);
        MbarrierInitWarps(Address(smem, kEmptyT, stage), 4 * kConsumers);
      }
      for (int stage = 0; stage < C::kStagesV; ++stage) {
        MbarrierInit(Address(smem, kFullV, stage), 1);
        MbarrierInitWarps(Address(smem, kEmptyV, stage), kTransposers);
      }
      FenceMbarrierInit();
    }
    __syncthreads();
    if (group == 0) {
      ReleaseRegisters<kProducerRegisters>();
      if (threadIdx.x < kWarpSize) {
        Producers::Produce(params, smem_pointer);
      } else {
        Producers::Transpose(smem_pointer);
      }
    } else {
      ClaimRegisters<kConsumerRegisters>();
      Consume(params, smem_pointer, group - 1);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_FP8_SM90_CUH_
