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
//             copies of Q, K and V. Each other warpgroup consumes: it owns 64 rows of the tile.
// Overlap     A consumer starts S = Q K^T of a block, then out += P V of the block before, and
//             computes the block's softmax while the second product still runs. Other consumers
//             fill what is left; with kPingPong they take turns at starting products.
// Tiles       CTAs stay, and take one tile after the other (TileWalk) without a gap: the first
//             product of a tile starts before the last one of the tile before, if there is room
//             for two Q.
// Shared      kStagesQ buffers of Q, kStages of K and of V, each with a full and an empty mbarrier;
//             the output, if there is room. plan.cc computes the same sum.
// Registers   consumer: output kHeadDimV / 2, scores kBlockN / 2, weights kBlockN / 4, and 30 or so
//             more, of 240 (two consumers) or 160 (three).
//
// ptxas runs all products one after the other (C7510 to C7517 in its log) if on some path it can't
// tell that a product is done before its accumulator is touched. So each wait stands in the same
// branch as its product, and accumulators change only between a wait and the next product's start.
#ifndef JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_

#include "kv_source.cuh"
#include "ptx_sm90.cuh"
#include "row_scores.cuh"
#include "softmax.cuh"

namespace jfa {

// Position in a ring of kStages buffers; the parity of a buffer's barriers flips with each round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32 parity = 0;
  JFA_DEVICE void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <class C>
struct FwdSm90 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  static constexpr int kGroupThreads = 128;
  static constexpr int kGroupRows = 64;  // of one warpgroup: M of wgmma
  static constexpr int kConsumers = C::kBlockM / kGroupRows;
  static constexpr int kKeySteps = C::kBlockN / 16;
  static constexpr int kDimSteps = C::kHeadDim / 16;
  static constexpr int kOutBlocks = C::kHeadDimV / 16;
  // What one thread may hold: 64 Ki registers, in units of 8, shared out by role. To find its tiles
  // among sequences or segments a producer needs more than to walk over plain ones.
  static constexpr bool kSearches = C::kPacked || C::kSegments;
  static constexpr int kProducerRegisters = kSearches ? 56 : kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters =
      kConsumers == 1 ? 256 : (512 - kProducerRegisters) / kConsumers / 8 * 8;

  // Tiles lie in shared memory as panels of 64 columns: rows of 128 bytes, whose 16-byte chunks are
  // permuted by the row's number modulo 8 (the 128-byte swizzle of TMA and wgmma).
  static constexpr int kPanelColumns = 64;
  static constexpr int kRowBytes = 2 * kPanelColumns;
  static constexpr int kPanels = (C::kHeadDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelsV = (C::kHeadDimV + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytesM = C::kBlockM * kRowBytes;
  static constexpr int kPanelBytesN = C::kBlockN * kRowBytes;
  static constexpr int kBytesQ = kPanels * kPanelBytesM;
  static constexpr int kBytesK = kPanels * kPanelBytesN;
  static constexpr int kBytesV = kPanelsV * kPanelBytesN;

  static constexpr int kSmemQ = 0;
  static constexpr int kSmemK = C::kStagesQ * kBytesQ;
  static constexpr int kSmemV = kSmemK + C::kStages * kBytesK;
  static constexpr int kSmemOut = kSmemV + C::kStages * kBytesV;
  static constexpr int kPanelBytesOut = kGroupRows * kRowBytes;
  static constexpr int kBytesOut = kPanelsV * kPanelBytesOut;  // of one warpgroup
  static constexpr int kSmemBarriers = kSmemOut + (C::kStageOut ? kConsumers * kBytesOut : 0);
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
  enum NamedBarrier { kTurn = 1, kGroup = kTurn + 3 };  // of each consumer warpgroup

  static_assert(C::kBlockM % kGroupRows == 0 && kConsumers >= 1 && kConsumers <= 3,
                "a consumer warpgroup owns 64 rows");
  static_assert(C::kWarps == 4 * (kConsumers + 1), "one more warpgroup produces");
  static_assert(C::kBlockN % 16 == 0 && C::kBlockN <= 256, "one wgmma spans the key block");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");

  using Ring = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
  using RingTile = RingPosition<kTileSlots>;
  using Output = float[1][2 * kOutBlocks][4];
  using Scores = float[1][2 * kKeySteps][4];
  using Weights = uint32[kKeySteps][4];
  using Place = RowScores<4, 1, kKeySteps>;

  static JFA_DEVICE uint32 Address(uint32 smem, int barrier, int stage = 0) {
    return smem + kSmemBarriers + 8 * (barrier + stage);
  }

  // One row tile of one query head.
  struct Tile {
    int row0, batch, head, kv_head;
    Sequence sequence;
  };

  // The row tiles of one CTA. Under a causal mask they either come longest first, or in pairs of a
  // long and a short one, all equally long, which CTAs that stay can share evenly; middle tiles,
  // where there is an odd number, come after all pairs. Where items are alike, those of one key head
  // follow each other, while the L2 has its keys.
  struct TileWalk {
    const FwdSm90Params& params;
    int num_row_tiles, blocks_per_head;
    uint32 num_items, item;
    bool second = false;

    JFA_DEVICE explicit TileWalk(const FwdSm90Params& p)
        : params(p),
          num_row_tiles(NumTiles<C::kPacked, C::kBlockM>(p.fwd.problem, p.fwd.problem.q_len)),
          blocks_per_head(p.paired ? num_row_tiles / 2 : num_row_tiles),
          num_items(NumHeads() * (p.paired ? (num_row_tiles + 1) / 2 : num_row_tiles)),
          item(blockIdx.x) {}

    JFA_DEVICE uint32 NumHeads() const {
      return static_cast<uint32>(params.fwd.problem.batch) * params.fwd.problem.num_heads;
    }

    // False at the end. All lanes of a warp together.
    JFA_DEVICE bool Next(Tile* tile) {
      const ProblemParams& problem = params.fwd.problem;
      while (item < num_items) {
        const uint32 middles = blocks_per_head * NumHeads();  // where they begin, if paired
        const bool alike = kMask != MaskKind::kCausal || params.paired;
        WorkItem work;
        if (item < middles) {
          work = ScheduleWork(
              item, blocks_per_head, problem.batch, problem.num_heads, problem.group,
              static_cast<int64>(problem.kv_len) * (problem.head_dim + problem.head_dim_v) * 2,
              alike ? 0 : C::kL2Bytes);
        } else {
          const int head = item - middles;
          work = {blocks_per_head, head / problem.num_heads, head % problem.num_heads};
        }
        const bool last_first = kMask != MaskKind::kFull && !second;
        second = params.paired && !second && item < middles;
        if (!second) item += gridDim.x;
        if (!SelectQueries<C::kPacked, C::kBlockM>(problem, last_first, work, tile->sequence)) {
          continue;
        }
        tile->row0 = work.block * C::kBlockM;
        tile->batch = work.batch;
        tile->head = work.head;
        tile->kv_head = work.head / problem.group;
        return true;
      }
      return false;
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

    // By a whole warp, whose leader writes; part by part, to save registers.
    JFA_DEVICE void Set(const ProblemParams& problem, const Tile& t, bool leader) {
      if (leader) tile = t;
      const Mask new_mask(problem, t.sequence);
      if (leader) mask = new_mask;
      const Ids new_ids(problem, t.batch, t.kv_head);
      if (leader) ids = new_ids;
      const Keys new_keys = KeysOf(t, new_mask, new_ids);
      if (leader) keys = new_keys;
      __syncwarp();
      if (leader) logits = {problem, t.sequence, t.batch, t.head};
      __syncwarp();
    }
  };
  static_assert(sizeof(Work) <= kSlotBytes, "a tile must fit in its slot");
  static JFA_DEVICE Work* Slot(unsigned char* smem, int slot) {
    return reinterpret_cast<Work*>(smem + kSmemTiles + slot * kSlotBytes);
  }

  // --- producer: one warp, of which one lane gives the orders ---------------------------------

  template <int kPanelCount, int kPanelBytes>
  static JFA_DEVICE void Load(const TensorMap* map, uint32 target, uint32 barrier, int row,
                              int head, int batch, uint64 policy) {
    MbarrierArriveExpect(barrier, kPanelCount * kPanelBytes);
#pragma unroll
    for (int panel = 0; panel < kPanelCount; ++panel) {
      TmaLoad(target + panel * kPanelBytes, map, barrier, panel * kPanelColumns, row, head, batch,
              policy);
    }
  }

  static JFA_DEVICE void Produce(const FwdSm90Params& params, unsigned char* smem_pointer) {
    const ProblemParams& problem = params.fwd.problem;
    const uint32 smem = SmemAddress(smem_pointer);
    const bool leader = ReadLaneIndex() == 0;
    TileWalk walk(params);
    Tile tile;
    RingTile t;
    RingQ q;
    Ring k, v;
    // Values are needed one block later than keys, so their copies are ordered one block later.
    int row_v = -1, head_v = 0, batch_v = 0;
    const auto load_values = [&] {
      if (row_v < 0) return;
      if (leader) {
        MbarrierWait(Address(smem, kEmptyV, v.stage), v.parity ^ 1);
        Load<kPanelsV, kPanelBytesN>(&params.v, smem + kSmemV + v.stage * kBytesV,
                                     Address(smem, kFullV, v.stage), row_v, head_v, batch_v,
                                     kL2EvictLast);
      }
      v.Advance();
      row_v = -1;
    };
    while (walk.Next(&tile)) {
      Work* slot = Slot(smem_pointer, t.stage);
      if (leader) MbarrierWait(Address(smem, kEmptyTile, t.stage), t.parity ^ 1);
      __syncwarp();
      slot->Set(problem, tile, leader);
      if (leader) MbarrierArrive(Address(smem, kFullTile, t.stage));
      t.Advance();
      // From here on the tile is read where it was written, to save registers.
      bool is_first = true;
      int block = slot->keys.First();
      if (block < 0) load_values();  // the consumers first finish what they have
      for (; block >= 0; block = slot->keys.Next(block)) {
        const int row = slot->tile.sequence.kv_begin + block * C::kBlockN;
        // A single buffer of Q is free only when all keys of the tile before have been used.
        if (C::kStagesQ == 1 && is_first) load_values();
        if (leader) {
          MbarrierWait(Address(smem, kEmptyK, k.stage), k.parity ^ 1);
          Load<kPanels, kPanelBytesN>(&params.k, smem + kSmemK + k.stage * kBytesK,
                                      Address(smem, kFullK, k.stage), row, slot->tile.kv_head,
                                      slot->tile.batch, kL2EvictLast);
        }
        k.Advance();
        if (is_first) {
          if (leader) {
            MbarrierWait(Address(smem, kEmptyQ, q.stage), q.parity ^ 1);
            Load<kPanels, kPanelBytesM>(&params.q, smem + kSmemQ + q.stage * kBytesQ,
                                        Address(smem, kFullQ, q.stage),
                                        slot->tile.sequence.q_begin + slot->tile.row0,
                                        slot->tile.head, slot->tile.batch, kL2EvictFirst);
          }
          q.Advance();
          is_first = false;
        }
        load_values();
        row_v = row;
        head_v = slot->tile.kv_head;
        batch_v = slot->tile.batch;
      }
    }
    load_values();
    if (leader) {
      MbarrierWait(Address(smem, kEmptyTile, t.stage), t.parity ^ 1);
      Slot(smem_pointer, t.stage)->tile.row0 = -1;
      MbarrierArrive(Address(smem, kFullTile, t.stage));
    }
  }

  // --- consumers --------------------------------------------------------------------------------

  // Shared memory operand in panels: rows in groups of 8 (1024 bytes); `leading` bytes from panel
  // to panel, which counts only where a product's outer dimension runs over panels.
  static JFA_DEVICE uint64 Descriptor(uint32 address, uint32 leading) {
    constexpr uint64 kSwizzle128 = 1ull << 62, kEightRows = (8 * kRowBytes) >> 4;
    return kSwizzle128 | kEightRows << 32 | static_cast<uint64>(leading >> 4) << 16 |
           (address & 0x3ffff) >> 4;
  }

  // s = Q K^T, started
  static JFA_DEVICE void ScoreGemm(Scores& s, uint32 smem_q, uint32 smem_k) {
    const uint64 q = Descriptor(smem_q, 16), k = Descriptor(smem_k, 16);
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
    const uint64 v = Descriptor(smem_v, kPanelBytesN);
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
  static JFA_DEVICE void MakeLogits(Scores& s, const Work& work, int group, int block) {
    const int key0 = block * C::kBlockN;
    // Warps count from the producer's on.
    const int row0 = work.tile.row0 - kGroupRows;
    if constexpr (!decltype(work.logits)::kPlain) Place::Apply(s, work.logits, row0, key0);
    if (work.mask.template NeedsMask<kGroupRows, C::kBlockN>(work.tile.row0 + group * kGroupRows,
                                                             key0)) {
      Place::HideBand(s, work.mask, row0, key0);
    }
    if constexpr (C::kSegments) {
      if (!work.keys.keys.template RangeOf<C::kBlockN>(block).IsOneWith(work.keys.own)) {
        Place::HideOtherSegments(s, work.ids, row0, key0);
      }
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
    if (row >= C::kBlockN || sequence.kv_begin + sequence.kv_len == problem.kv_len) return;
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
        Store(params, smem, group, work.tile, StoreLse(params, work.tile, nothing), zeros);
        release(slot);
        slot = wait_tile();
        work = *Slot(smem_pointer, slot);
      }
      return false;
    };

    // A tile's first blocks may lie to the right of all that this warpgroup's rows see: it lets them
    // pass, at most the one or two that begin between its last row's keys and the tile's.
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
      int next = work.keys.Next(block);
      WgmmaWait<0>();
      Pin(s);
      Arrive(Address(smem, kEmptyK, k.stage));
      k.Advance();
      if (next < 0) Arrive(empty_q);
      MakeLogits(s, work, group, block);
      softmax.Follow(s, factor);
      Weigh(s, softmax);
      Pack(p, s);
      skip_hidden_values();
      ClearPadding(problem, work, block, smem, v, group);

      int done;  // slot
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
        MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
        OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
        PassTurn(group);
        if (is_first) {
          normalizer = StoreLse(params, Slot(smem_pointer, done)->tile, softmax);
          softmax = OnlineSoftmax<1>(work.logits.Scale());
        }
        next = work.keys.Next(block);
        WgmmaWait<1>();
        Pin(s);
        Arrive(Address(smem, kEmptyK, k.stage));
        k.Advance();
        if (next < 0) Arrive(empty_q);
        MakeLogits(s, work, group, block);
        const bool rescale = softmax.Follow(s, factor);
        Weigh(s, softmax);
        WgmmaWait<0>();
        Pin(out);
        Arrive(Address(smem, kEmptyV, v.stage));
        v.Advance();
        Pack(p, s);
        if (is_first) {
          Store(params, smem, group, Slot(smem_pointer, done)->tile, normalizer, out);
          release(done);
          Clear(out);
          skip_hidden_values();
          ClearPadding(problem, work, block, smem, v, group);
        } else if (rescale) {
          softmax.Rescale(out, factor);
        }
      }

      MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
      OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
      normalizer = StoreLse(params, Slot(smem_pointer, done)->tile, softmax);
      WgmmaWait<0>();
      Pin(out);
      Arrive(Address(smem, kEmptyV, v.stage));
      v.Advance();
      Store(params, smem, group, Slot(smem_pointer, done)->tile, normalizer, out);
      release(done);
      more = skip_empty();
    }
    TmaStoreWaitRead();
  }

  // Four words of each of four lanes: lane t gets everybody's word t.
  static JFA_DEVICE void Transpose(uint32 (&w)[4], int t) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool high = t & bit;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const uint32 got = __shfl_xor_sync(kFullWarp, high ? w[i] : w[i | bit], bit);
        (high ? w[i] : w[i | bit]) = got;
      }
    }
  }

  // Returns the factors of this lane's two rows of output.
  static JFA_DEVICE float2 StoreLse(const FwdSm90Params& params, const Tile& tile,
                                    const OnlineSoftmax<1>& softmax) {
    const ProblemParams& problem = params.fwd.problem;
    const Sequence& sequence = tile.sequence;
    float* lse = params.fwd.lse + LseRow(problem, tile.batch, tile.head) + sequence.q_begin;
    const float sink = params.fwd.sinks == nullptr
                           ? -Infinity()
                           : __ldg(params.fwd.sinks +
                                   static_cast<int64>(tile.batch) * problem.num_heads + tile.head);
    const bool writes = ReadLaneIndex() % 4 == 0;
    float normalizer[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const OnlineSoftmax<1>::Result result = softmax.Finalize(half, sink);
      const int row = Place::RowOf(tile.row0 - kGroupRows, half);
      if (writes && row < sequence.q_rows) {
        lse[row] = row < sequence.q_len ? result.lse : -Infinity();
      }
      normalizer[half] = result.normalizer;
    }
    return make_float2(normalizer[0], normalizer[1]);
  }

  // Normalises and writes out.
  static JFA_DEVICE void Store(const FwdSm90Params& params, uint32 smem, int group,
                               const Tile& tile, float2 normalizer, const Output& out) {
    // The copy engine knows the array's end, not a packed sequence's.
    if (C::kStageOut &&
        !(C::kPacked && tile.row0 + (group + 1) * kGroupRows > tile.sequence.q_rows)) {
      StoreByEngine(params, smem + kSmemOut + group * kBytesOut, group, tile, normalizer, out);
    } else if (C::kPacked || !C::kStageOut) {
      StoreDirectly(params, tile, normalizer, out);
    }
  }

  // A select, not a product with zero: padding rows of Q may have made NaN.
  static JFA_DEVICE uint32 PackPair(const float* x, float factor, bool valid) {
    return valid ? Pack16<C::kBf16>(x[0] * factor, x[1] * factor) : 0;
  }

  // Through shared memory of the warpgroup's own.
  static JFA_DEVICE void StoreByEngine(const FwdSm90Params& params, uint32 smem_out, int group,
                                       const Tile& tile, float2 normalizer, const Output& out) {
    const int thread = ReadThreadIndex() % kGroupThreads, lane = thread % kWarpSize;
    if (thread == 0) TmaStoreWaitRead();  // for the tile before
    const int row0 = tile.row0 - kGroupRows, q_len = tile.sequence.q_len;
    const bool valid0 = Place::RowOf(row0, 0) < q_len, valid1 = Place::RowOf(row0, 1) < q_len;
    NamedBarrierSync(kGroup + group, kGroupThreads);
    const uint32 base = smem_out + (thread / kWarpSize * 16 + (lane & 15)) * kRowBytes +
                        (((lane >> 4) ^ (lane & 7)) << 4);
#pragma unroll
    for (int n = 0; n < kOutBlocks; ++n) {
      const uint32 r[4] = {PackPair(&out[0][2 * n][0], normalizer.x, valid0),
                           PackPair(&out[0][2 * n][2], normalizer.y, valid1),
                           PackPair(&out[0][2 * n + 1][0], normalizer.x, valid0),
                           PackPair(&out[0][2 * n + 1][2], normalizer.y, valid1)};
      Stmatrix4((base ^ (n % 4 * 32)) + n / 4 * kPanelBytesOut, r);
    }
    FenceProxyAsync();
    NamedBarrierSync(kGroup + group, kGroupThreads);
    if (thread == 0) {
#pragma unroll
      for (int panel = 0; panel < kPanelsV; ++panel) {
        TmaStore(&params.out, smem_out + panel * kPanelBytesOut, panel * kPanelColumns,
                 tile.sequence.q_begin + tile.row0 + group * kGroupRows, tile.head, tile.batch);
      }
      TmaStoreCommit();
    }
  }

  // Straight from registers: the four lanes that share a row exchange their columns until each has
  // 16 consecutive bytes.
  static JFA_DEVICE void StoreDirectly(const FwdSm90Params& params, const Tile& tile,
                                       float2 normalizer, const Output& out) {
    const int t = ReadLaneIndex() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Place::RowOf(tile.row0 - kGroupRows, half);
      const bool valid = row < tile.sequence.q_len;
      uint16* target =
          RowPointer(params.fwd.out, tile.batch, tile.head, tile.sequence.q_begin + row) + 8 * t;
#pragma unroll
      for (int n = 0; n < C::kHeadDimV / 32; ++n) {
        uint32 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[i] = PackPair(&out[0][4 * n + i][2 * half], half ? normalizer.y : normalizer.x, valid);
        }
        Transpose(w, t);
        if (row < tile.sequence.q_rows && 32 * n + 8 * t < params.fwd.problem.head_dim_v) {
          StoreGlobal16(target + 32 * n, w);
        }
      }
    }
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
        MbarrierInit(Address(smem, kEmptyTile, slot), 4 * kConsumers);
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
      if (threadIdx.x < kWarpSize) Produce(params, smem_pointer);
    } else {
      ClaimRegisters<kConsumerRegisters>();
      Consume(params, smem_pointer, group - 1);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_
