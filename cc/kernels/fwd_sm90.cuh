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
//             fill what is left; with kPingPong they take turns at starting products (named
//             barriers).
// Tiles       CTAs stay, and take the next tile as soon as they are done (TileWalk): its Q and K
// are
//             copied while the last product and the stores of the one before are under way.
// Shared      kStagesQ buffers of Q, kStages of K and of V, each with a full and an empty mbarrier.
//             plan.cc computes the same sum.
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
  static constexpr int kProducerRegisters = kConsumers == 1   ? 56
                                            : kConsumers == 3 ? (C::kSegments ? 56 : 32)
                                            : C::kSegments    ? 56
                                            : C::kPacked      ? 40
                                                              : 24;
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
  static constexpr int kSmemBarriers = kSmemV + C::kStages * kBytesV;
  static constexpr int kSmemBytes = kSmemBarriers + 8 * (2 * C::kStagesQ + 4 * C::kStages);
  enum Barrier {
    kFullQ = 0,
    kEmptyQ = kFullQ + C::kStagesQ,
    kFullK = kEmptyQ + C::kStagesQ,
    kEmptyK = kFullK + C::kStages,
    kFullV = kEmptyK + C::kStages,
    kEmptyV = kFullV + C::kStages,
  };
  enum NamedBarrier { kTurn = 1, kGroup = kTurn + 3 };  // of each consumer warpgroup

  static_assert(C::kBlockM % kGroupRows == 0 && kConsumers >= 1 && kConsumers <= 3,
                "a consumer warpgroup owns 64 rows");
  static_assert(C::kWarps == 4 * (kConsumers + 1), "one more warpgroup produces");
  static_assert(C::kBlockN % 16 == 0 && C::kBlockN <= 256, "one wgmma spans the key block");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");

  using Ring = RingPosition<C::kStages>;
  using RingQ = RingPosition<C::kStagesQ>;
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
  // long and a short one, all equally long, which CTAs that stay can share evenly. Where tiles or
  // pairs are alike, those of one key head follow each other, while the L2 has its keys.
  struct TileWalk {
    const FwdSm90Params& params;
    int num_row_tiles, blocks_per_head;
    uint32 count, item;
    bool second = false;

    JFA_DEVICE explicit TileWalk(const FwdSm90Params& p)
        : params(p),
          num_row_tiles(NumTiles<C::kPacked, C::kBlockM>(p.fwd.problem, p.fwd.problem.q_len)),
          blocks_per_head(p.paired ? (num_row_tiles + 1) / 2 : num_row_tiles),
          count(static_cast<uint32>(blocks_per_head) * p.fwd.problem.batch *
                p.fwd.problem.num_heads),
          item(blockIdx.x) {}

    // False at the end. All lanes of a warp together.
    JFA_DEVICE bool Next(Tile* tile) {
      const ProblemParams& problem = params.fwd.problem;
      while (item < count) {
        const bool alike = kMask != MaskKind::kCausal || params.paired;
        WorkItem work = ScheduleWork(
            item, blocks_per_head, problem.batch, problem.num_heads, problem.group,
            static_cast<int64>(problem.kv_len) * (problem.head_dim + problem.head_dim_v) * 2,
            alike ? 0 : C::kL2Bytes);
        const bool last_first = kMask != MaskKind::kFull && !second;
        if (params.paired && !second && 2 * work.block + 1 != num_row_tiles) {
          second = true;
        } else {
          second = false;
          item += gridDim.x;
        }
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

  static JFA_DEVICE void Produce(const FwdSm90Params& params, uint32 smem) {
    const ProblemParams& problem = params.fwd.problem;
    const bool leader = ReadLaneIndex() == 0;
    TileWalk walk(params);
    Tile tile;
    RingQ q;
    Ring k, v;
    while (walk.Next(&tile)) {
      const Mask mask(problem, tile.sequence);
      const Ids ids(problem, tile.batch, tile.kv_head);
      const Keys keys = KeysOf(tile, mask, ids);
      const auto load_q = [&] {
        if (leader) {
          MbarrierWait(Address(smem, kEmptyQ, q.stage), q.parity ^ 1);
          Load<kPanels, kPanelBytesM>(&params.q, smem + kSmemQ + q.stage * kBytesQ,
                                      Address(smem, kFullQ, q.stage),
                                      tile.sequence.q_begin + tile.row0, tile.head, tile.batch,
                                      kL2EvictFirst);
        }
        q.Advance();
      };
      const auto load_v = [&](int block) {
        if (leader) {
          MbarrierWait(Address(smem, kEmptyV, v.stage), v.parity ^ 1);
          Load<kPanelsV, kPanelBytesN>(
              &params.v, smem + kSmemV + v.stage * kBytesV, Address(smem, kFullV, v.stage),
              tile.sequence.kv_begin + block * C::kBlockN, tile.kv_head, tile.batch, kL2EvictLast);
        }
        v.Advance();
      };
      // A single buffer of Q is the last to be free after the tile before. Values are needed one
      // block later than keys.
      int before = -1, block = keys.First();
      if (C::kStagesQ > 1 && block >= 0) load_q();
      for (; block >= 0; block = keys.Next(block)) {
        if (leader) {
          MbarrierWait(Address(smem, kEmptyK, k.stage), k.parity ^ 1);
          Load<kPanels, kPanelBytesN>(
              &params.k, smem + kSmemK + k.stage * kBytesK, Address(smem, kFullK, k.stage),
              tile.sequence.kv_begin + block * C::kBlockN, tile.kv_head, tile.batch, kL2EvictLast);
        }
        k.Advance();
        if (before >= 0) {
          load_v(before);
        } else if (C::kStagesQ == 1) {
          load_q();
        }
        before = block;
      }
      if (before >= 0) load_v(before);
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
  template <class Logits>
  static JFA_DEVICE void MakeLogits(Scores& s, const Logits& logits, const Mask& mask,
                                    const Ids& ids, const Keys& keys, const Tile& tile, int group,
                                    int block) {
    const int key0 = block * C::kBlockN;
    // Warps count from the producer's on.
    const int row0 = tile.row0 - kGroupRows;
    if constexpr (!Logits::kPlain) Place::Apply(s, logits, row0, key0);
    if (mask.template NeedsMask<kGroupRows, C::kBlockN>(tile.row0 + group * kGroupRows, key0)) {
      Place::HideBand(s, mask, row0, key0);
    }
    if constexpr (C::kSegments) {
      if (!keys.keys.template RangeOf<C::kBlockN>(block).IsOneWith(keys.own)) {
        Place::HideOtherSegments(s, ids, row0, key0);
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
  // array, this what lies beyond a sequence's length. Every consumer warpgroup does it for itself:
  // that needs no barrier between them, and writing a zero twice does no harm.
  static JFA_DEVICE void ClearValuesFrom(uint32 smem_v, int row, int group) {
    for (int i = row * 8 + ReadThreadIndex() % kGroupThreads; i < C::kBlockN * 8;
         i += kGroupThreads) {
#pragma unroll
      for (int panel = 0; panel < kPanelsV; ++panel) {
        StoreShared16(smem_v + panel * kPanelBytesN + i * 16, make_uint4(0, 0, 0, 0));
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

  static JFA_DEVICE void Consume(const FwdSm90Params& params, uint32 smem, int group) {
    const ProblemParams& problem = params.fwd.problem;
    TileWalk walk(params);
    Tile tile;
    RingQ q;
    Ring k, v;
    if (C::kPingPong && group == 0) NamedBarrierArrive(kTurn, 2 * kGroupThreads);

    bool more = walk.Next(&tile);
    while (more) {
      const Mask mask(problem, tile.sequence);
      const Ids ids(problem, tile.batch, tile.kv_head);
      const Keys keys = KeysOf(tile, mask, ids);
      const LogitMap<C::kSoftcap, C::kAlibi> logits(problem, tile.sequence, tile.batch, tile.head);
      OnlineSoftmax<1> softmax(logits.Scale());
      Output out;
      Clear(out);
      Pin(out);
      const Tile here = tile;
      float2 normalizer;

      int block = keys.First();
      if (block >= 0) {
        Scores s;
        Weights p;
        float factor[2];

        const uint32 smem_q =
            smem + kSmemQ + q.stage * kBytesQ + group * kGroupRows * kRowBytes;
        const uint32 empty_q = Address(smem, kEmptyQ, q.stage);
        MbarrierWait(Address(smem, kFullQ, q.stage), q.parity);
        q.Advance();
        MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
        ScoreGemm(s, smem_q, smem + kSmemK + k.stage * kBytesK);
        WgmmaWait<0>();
        Pin(s);
        Arrive(Address(smem, kEmptyK, k.stage));
        k.Advance();
        int next = keys.Next(block);
        if (next < 0) Arrive(empty_q);
        MakeLogits(s, logits, mask, ids, keys, here, group, block);
        softmax.Follow(s, factor);
        Weigh(s, softmax);
        Pack(p, s);

        // Only the first block may reach over the end of the keys.
        const int keys_left = here.sequence.kv_len - block * C::kBlockN;
        if (keys_left < C::kBlockN &&
            here.sequence.kv_begin + here.sequence.kv_len < problem.kv_len) {
          MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
          ClearValuesFrom(smem + kSmemV + v.stage * kBytesV, keys_left, group);
        }

#pragma unroll 1
        while (next >= 0) {
          block = next;
          MbarrierWait(Address(smem, kFullK, k.stage), k.parity);
          TakeTurn(group);
          ScoreGemm(s, smem_q, smem + kSmemK + k.stage * kBytesK);
          MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
          OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
          PassTurn(group);
          next = keys.Next(block);
          WgmmaWait<1>();
          Pin(s);
          Arrive(Address(smem, kEmptyK, k.stage));
          k.Advance();
          if (next < 0) Arrive(empty_q);
          MakeLogits(s, logits, mask, ids, keys, here, group, block);
          const bool rescale = softmax.Follow(s, factor);
          Weigh(s, softmax);
          WgmmaWait<0>();
          Pin(out);
          Arrive(Address(smem, kEmptyV, v.stage));
          v.Advance();
          Pack(p, s);
          if (rescale) softmax.Rescale(out, factor);
        }

        MbarrierWait(Address(smem, kFullV, v.stage), v.parity);
        OutputGemm(out, p, smem + kSmemV + v.stage * kBytesV);
        // What needs no output runs under the last product.
        more = walk.Next(&tile);
        normalizer = StoreLse(params, here, group, softmax);
        WgmmaWait<0>();
        Pin(out);
        Arrive(Address(smem, kEmptyV, v.stage));
        v.Advance();
      } else {
        more = walk.Next(&tile);
        normalizer = StoreLse(params, here, group, softmax);
      }
      Store(params, here, group, normalizer, out);
    }
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
  static JFA_DEVICE float2 StoreLse(const FwdSm90Params& params, const Tile& tile, int group,
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

  // Normalises and writes out, straight from registers: the four lanes that share a row exchange
  // their columns until each has 16 consecutive bytes. Shared memory stays free for the next tile.
  static JFA_DEVICE void Store(const FwdSm90Params& params, const Tile& tile, int group,
                               float2 normalizer, const Output& out) {
    const ProblemParams& problem = params.fwd.problem;
    const int t = ReadLaneIndex() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Place::RowOf(tile.row0 - kGroupRows, half);
      const bool valid = row < tile.sequence.q_len;
      const float factor = half ? normalizer.y : normalizer.x;
      uint16* target =
          RowPointer(params.fwd.out, tile.batch, tile.head, tile.sequence.q_begin + row) + 8 * t;
#pragma unroll
      for (int n = 0; n < C::kHeadDimV / 32; ++n) {
        uint32 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = &out[0][4 * n + i][2 * half];
          // A select, not a product with zero: padding rows of Q may have made NaN.
          w[i] = valid ? Pack16<C::kBf16>(x[0] * factor, x[1] * factor) : 0;
        }
        Transpose(w, t);
        if (row < tile.sequence.q_rows && 32 * n + 8 * t < problem.head_dim_v) {
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
      for (int stage = 0; stage < C::kStagesQ; ++stage) {
        MbarrierInit(Address(smem, kFullQ, stage), 1);
        MbarrierInit(Address(smem, kEmptyQ, stage), 4 * kConsumers);
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
      if (threadIdx.x < kWarpSize) Produce(params, smem);
    } else {
      ClaimRegisters<kConsumerRegisters>();
      Consume(params, smem, group - 1);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_SM90_CUH_
