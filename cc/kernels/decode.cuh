// Attention of few queries over long keys: decoding, bound by how fast K and V can be read.
//
//   one tile = kRows queries of one key head (all query heads of its group, all new tokens)
//
//                 kHeadDim                          kBlockN keys, left to right ->
//            +----------------+               warp 0   warp 1   warp 2   warp 3
//   kRows    |  Q (shared)    |   x K^T  =   |16 keys|16 keys|16 keys|16 keys|  next block ...
//            +----------------+
//
// Roles       Four or eight warps consume: kRows / 16 of them side by side share out the queries,
//             the others the keys of a block, each with an online softmax of its own. Products are
//             those of mma.sync; with kWgmma, where a warpgroup has 64 rows and all keys, of wgmma,
//             or each warp would read all keys from shared memory for its 16 rows. The rest
//             produce: they keep a ring of kStages buffers full, a block of K, then one of V,
//             across tiles. With kTma one of them orders copies by the tensor copy engine, of pages
//             all, else they use cp.async.
// Pairs       With kTileHeads 2 a tile is of two key heads: their 8-bit rows of 64 are one of 128,
//             and each query is zero where the other head is. Memory is read 128 bytes at a time
//             anyway.
// Work        decode_share.cuh: every CTA takes an equal stretch of all key blocks; with kParts the
//             CTAs of a cluster may take equal parts of one tile (decode_cluster.cuh).
// Keys        dense, or in pages that the producers look up; consumers see no difference. With kFp8
//             they are 8-bit floats, 128 to a panel, and fragments_fp8.cuh has the products.
// Barriers    per stage a full and an empty mbarrier; an mbarrier for what the CTAs of a cluster
//             send each other; kBarriersMade, for all but who makes these; kConsumersDone among
//             consumers.
// Shared      kStages blocks of K or V, Q, kMerge for merging the warps' outputs (64 columns at a
//             time) and for going from fragments to rows. plan.cc computes the same sum.
// Registers   output kHeadDimV / 2, scores 2 * keys of a warp / 8, and about 70 more.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_CUH_

#include "barriers.cuh"
#include "decode_cluster.cuh"
#include "decode_copies.cuh"
#include "decode_queries.cuh"
#include "decode_share.cuh"
#include "decode_wgmma.cuh"
#include "fragments_fp8.cuh"
#include "logits.cuh"
#include "ptx_sm90.cuh"
#include "softmax.cuh"

namespace jfa {

template <class C>
struct Decode {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  // Not all of them work with the copy engine; but only a warpgroup can give registers to others.
  static constexpr int kProducerWarps = C::kTma && !C::kWgmma && !C::kParts ? 2 : 4;
  static constexpr int kConsumerWarps = C::kWarps - kProducerWarps;
  static constexpr int kConsumers = kConsumerWarps * kWarpSize;
  static constexpr int kRowWarps = C::kRows / 16, kKeyWarps = kConsumerWarps / kRowWarps;
  static constexpr int kKeyBlocks = C::kBlockN / 16 / kKeyWarps;  // of a warp, 16 keys each
  static constexpr int kDimBlocks = C::kHeadDim / 16, kOutBlocks = C::kHeadDimV / 16;

  // Tiles are panels of 64 columns, as the copy engine swizzles them.
  static constexpr int kPanelColumns = 64, kPanelBlocks = kPanelColumns / 16;
  static constexpr int kPanels = (C::kHeadDim + kPanelColumns - 1) / kPanelColumns;  // of Q
  static constexpr int kPanelsOut = (C::kHeadDimV + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kElements = C::kFp8 ? 2 : 1;  // of K and V in a column
  static constexpr int kPanelsK = (kPanels + kElements - 1) / kElements;
  static constexpr int kPanelsV = (kPanelsOut + kElements - 1) / kElements;
  using PanelQ = SmemTile<C::kRows, kPanelColumns>;
  using PanelN = SmemTile<C::kBlockN, kPanelColumns>;
  static constexpr int kStageBytes = (kPanelsK > kPanelsV ? kPanelsK : kPanelsV) * PanelN::kBytes;
  static constexpr int kMergePitch = kPanelColumns + 8;  // floats: rows of 8 lanes in other banks

  static constexpr int kSmemQ = C::kStages * kStageBytes;
  static constexpr int kSmemMerge = kSmemQ + kPanels * PanelQ::kBytes;
  // A warpgroup has all of its rows' results.
  static constexpr int kMergedRows = C::kWgmma ? 0 : 16 * kConsumerWarps;
  static constexpr int kSmemStats = kSmemMerge + 4 * kMergedRows * kMergePitch;
  static constexpr int kSmemBarriers = kSmemStats + 8 * kMergedRows;
  static constexpr int kSmemResults = kSmemBarriers + 16 * C::kStages;  // the cluster's mbarrier
  static constexpr int kSmemBytes = kSmemResults + 16;
  enum NamedBarrier { kConsumersDone = 1, kBarriersMade };

  static_assert(C::kRows == 16 * kRowWarps && kConsumerWarps == kRowWarps * kKeyWarps,
                "the warps share out the rows");
  static_assert(kKeyBlocks >= 1 && C::kBlockN % (16 * kKeyWarps) == 0,
                "each warp has whole blocks");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");

  static_assert(C::kTileHeads == 1 || (C::kTileHeads == 2 && C::kFp8 && C::kTma &&
                                       C::kHeadDim == 128 && C::kHeadDimV == 128),
                "two heads of 64 bytes make a panel");

  using Cluster = DecodeCluster<C::kRows, C::kHeadDimV / C::kTileHeads, kConsumers>;
  static_assert(!C::kParts || C::kTma, "clusters came with the copy engine");
  static_assert(!C::kWgmma || (C::kTma && !C::kFp8 && kRowWarps % 4 == 0 && kKeyWarps == 1),
                "a warpgroup has 64 rows and all keys of a block");
  static_assert(!C::kParts || Cluster::kBytes <= kSmemQ, "results of others take the ring's place");

  using Walk = DecodeWalk<kMask, C::kBlockN, C::kTileHeads, C::kParts>;
  using Blocks = typename Walk::Blocks;
  using Rows = DecodeRows<C::kRows, C::kTileHeads>;
  using Ring = RingPosition<C::kStages>;
  using Queries = DecodeQueries<C, Decode>;
  // Where they are few, a tile's queries are asked for before the last one is done.
  static constexpr bool kAsksAhead = !C::kParts && !C::kWgmma && !C::kFp8 && Queries::kPasses == 1;
  using Wide = DecodeWgmma<C, PanelQ, PanelN>;
  using Output = float[1][2 * kOutBlocks][4];
  using Scores = float[1][2 * kKeyBlocks][4];
  using Logits = LogitMap<C::kSoftcap, C::kAlibi>;

  static JFA_DEVICE uint32 Full(uint32 smem, int stage) { return smem + kSmemBarriers + 8 * stage; }
  static JFA_DEVICE uint32 Empty(uint32 smem, int stage) {
    return Full(smem, stage) + 8 * C::kStages;
  }

  // --- consumers -------------------------------------------------------------------------------

  // s = Q K^T for the warp's rows and keys.
  static JFA_DEVICE void ScoreGemm(Scores& s, uint32 smem_q, uint32 smem_k, int row_warp,
                                   int key_warp, int lane) {
    const Operand<PanelQ, Side::kA, false, kRowWarps> op_q(smem_q, row_warp, lane);
    const Operand<PanelN, Side::kB, false, kKeyWarps> op_k(smem_k, key_warp, lane);
    if constexpr (C::kFp8) {
      const auto load_q = [&](uint32(&a)[4], int, int block) {
        auto q = op_q;
        q.base += block / kPanelBlocks * PanelQ::kBytes;
        q.Load(a, 0, block % kPanelBlocks);
      };
      const auto load_k = [&](uint32(&b)[4], int n, int step) {
        auto keys = op_k;
        keys.base += step / kPanelBlocks * PanelN::kBytes;
        keys.Load(b, n, step % kPanelBlocks);
      };
      ScoreGemm8<C::kE5m2K, kDimBlocks / 2>(s, load_q, load_k);
      return;
    }
#pragma unroll
    for (int k = 0; k < kDimBlocks; ++k) {
      uint32 a[1][4];
      const int panel = k / kPanelBlocks;
      auto q = op_q;
      q.base += panel * PanelQ::kBytes;
      q.Load(a[0], 0, k % kPanelBlocks);
      auto keys = op_k;
      keys.base += panel * PanelN::kBytes;
      MmaRow<C::kBf16>(s, a, keys, k % kPanelBlocks);
    }
  }

  // out += P V; the weights of a row add up in the softmax's sums.
  static JFA_DEVICE void OutputGemm(Output& out, const Scores& s, OnlineSoftmax<1>& softmax,
                                    uint32 smem_v, int key_warp, int lane) {
    const Operand<PanelN, Side::kB, true, 1> op_v(smem_v + key_warp * 16 * PanelN::kPitch, 0, lane);
#pragma unroll
    for (int k = 0; k < kKeyBlocks; ++k) {
      float w[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) w[n][e] = softmax.Weigh(e / 2, s[0][2 * k + n][e]);
      }
      uint32 p[1][4];
      PackBlock<C::kBf16 && !C::kFp8>(p[0], w[0], w[1]);
      if constexpr (C::kFp8) {
        OutputGemm8<C::kE5m2V>(out, p, [&](uint32(&b)[4], int n) {
          auto values = op_v;
          values.base += n / kPanelBlocks * PanelN::kBytes;
          values.Load(b, n % kPanelBlocks, k * kKeyWarps);
        });
        continue;
      }
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
        uint32 b[4];
        auto values = op_v;
        values.base += n / kPanelBlocks * PanelN::kBytes;
        values.Load(b, n % kPanelBlocks, k * kKeyWarps);
        MmaColumn<C::kBf16>(out, n, p, b);
      }
    }
  }

  // The copy engine brings whole boxes: what lies beyond the keys may be NaN, which a weight of
  // zero doesn't silence. Each warp clears the values of its own keys.
  static JFA_DEVICE void ClearPadding(uint32 smem_v, int num_keys, int key_warp, int lane) {
#pragma unroll 1
    for (int k = 0; k < kKeyBlocks; ++k) {
      const int first = 16 * (key_warp + kKeyWarps * k);
      for (int i = lane; i < 16 * 8; i += kWarpSize) {
        const int row = first + i / 8;
        if (row < num_keys) continue;
#pragma unroll
        for (int panel = 0; panel < kPanelsV; ++panel) {
          StoreShared16(smem_v + panel * PanelN::kBytes + row * PanelN::kPitch + i % 8 * 16,
                        make_uint4(0, 0, 0, 0));
        }
      }
    }
    FenceProxyAsync();
    if constexpr (kRowWarps > 1) {
      NamedBarrierSync(kConsumersDone, kConsumers);  // several warps read these keys
    } else {
      __syncwarp();
    }
  }

  // Results of one tile, from the warps' fragments to rows in memory: final ones if the whole tile
  // was visited here, else a partial one in scratch; or, of a cluster, for each other and merged.
  static JFA_DEVICE void Store(const DecodeParams& params, const Rows& rows,
                               const Sequence& sequence, int partial, Output& out,
                               const OnlineSoftmax<1>& softmax, unsigned char* smem, int warp,
                               int lane) {
    const ProblemParams& problem = params.fwd.problem;
    const DecodeScratch scratch = DecodeScratch::Of<C::kRows>(params);
    float* const merge = reinterpret_cast<float*>(smem + kSmemMerge);
    float2* const stats = reinterpret_cast<float2*>(smem + kSmemStats);
    const bool in_cluster = C::kParts && params.parts_log2 > 0;
    const auto store = [&](int row, int column, float4 x, float2 total) {
      if (!rows.Exists(problem, row)) return;
      StoreResult<C::kBf16>(params.fwd, sequence, rows.batch, rows.HeadOf(problem, row),
                            rows.TokenOf(problem, row), column, x, total);
    };
    const Cluster cluster(SmemAddress(smem), SmemAddress(smem) + kSmemResults, params.parts_log2,
                          rows.num, problem.head_dim_v);
    if constexpr (C::kParts) {
      if (in_cluster) Cluster::Arrive();
    }
    const int row_warp = warp % kRowWarps;
    // Of the warps that share rows, at [their rows][key warp].
    const auto stat = [&](int row, int key_warp) -> float2& {
      return stats[row * kKeyWarps + key_warp];
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = QuadSum(softmax.sum[half]);
      if (lane % 4 == 0) {
        stat(16 * row_warp + lane / 4 + 8 * half, warp / kRowWarps) =
            make_float2(-softmax.neg_reference[half], sum);
      }
    }
    NamedBarrierSync(kConsumersDone, kConsumers);
    const auto total = [&](int row) {
      float2 all = stat(row, 0);
#pragma unroll
      for (int w = 1; w < kKeyWarps; ++w) all.x = fmaxf(all.x, stat(row, w).x);
      all.y = 0.f;
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) {
        all.y = fmaf(Exp2(stat(row, w).x - all.x), stat(row, w).y, all.y);
      }
      return all;
    };
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] =
          Exp2(-softmax.neg_reference[half] - total(16 * row_warp + lane / 4 + 8 * half).x);
      if constexpr (C::kFp8) {
        const int part = rows.PartOf(problem, 16 * row_warp + lane / 4 + 8 * half);
        factor[half] *= ValueScale(params.fwd, rows.batch, rows.KeyHead(problem, part));
      }
    }
    if constexpr (C::kParts) {
      if (in_cluster) {
        Cluster::Wait();
        for (int i = ReadThreadIndex(); i < rows.num << params.parts_log2; i += kConsumers) {
          const int row = i >> params.parts_log2;
          cluster.SendRow(row, total(row), i - (row << params.parts_log2));
        }
      }
    }
    if constexpr (C::kFp8) AdjoinColumns(out);
    // Where a block of 8 columns has the lane's two.
    const auto column_of = [](int n) { return C::kFp8 ? n / 2 * 16 + n % 2 * 2 : n * 8; };
    float* own = merge + (warp * 16 + lane / 4) * kMergePitch + lane % 4 * (C::kFp8 ? 4 : 2);
    // Eight rows of two panels go at a time, the second panel's where rows 8 to 15 would be.
    constexpr bool kFolds = kPanelsOut == 2 && kRowWarps == 1 && C::kTileHeads == 1;
    const bool folds = kFolds && rows.num <= 8;
#pragma unroll
    for (int panel = 0; panel < kPanelsOut; ++panel) {
      if (panel > 0 && !folds) NamedBarrierSync(kConsumersDone, kConsumers);
#pragma unroll
      for (int n = 0; n < 2 * kPanelBlocks; ++n) {
        const int block = panel * 2 * kPanelBlocks + n;
        if (block >= 2 * kOutBlocks) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half > 0 && folds) continue;
          const int slot = folds ? panel : half;
          *reinterpret_cast<float2*>(own + slot * 8 * kMergePitch + column_of(n)) = make_float2(
              out[0][block][2 * half] * factor[half], out[0][block][2 * half + 1] * factor[half]);
        }
      }
      if (folds && panel == 0) continue;
      NamedBarrierSync(kConsumersDone, kConsumers);
      // Four columns of a row at a time; row r is with the warps r / 16 + kRowWarps * i.
      const int groups_log2 = folds ? 5 : 4;
      static_assert(kPanelColumns == 4 << 4, "groups of a panel");
      for (int i = ReadThreadIndex(); i < rows.num << groups_log2; i += kConsumers) {
        const int row = i >> groups_log2, group = i - (row << groups_log2);
        const int own_panel = folds ? group / 16 : panel;
        // The panel of a row's own key head, or one of all panels.
        const bool is_own = C::kTileHeads == 1 || rows.PartOf(problem, row) == panel;
        const int column = group % 16 * 4 + (C::kTileHeads == 1 ? own_panel * kPanelColumns : 0);
        if (!is_own || column >= problem.head_dim_v) continue;
        const int slot = row % 16 + (folds ? 8 * own_panel : 0);
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < kKeyWarps; ++w) {
          const float4 y = *reinterpret_cast<const float4*>(
              merge + ((row / 16 + kRowWarps * w) * 16 + slot) * kMergePitch + group % 16 * 4);
          x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
        }
        if constexpr (C::kParts) {
          if (in_cluster) {
            cluster.SendItem(row, column, x);
            continue;
          }
        }
        const float2 all = total(row);
        if (!C::kParts && partial >= 0) {
          if (column == 0) scratch.RowsOf(partial)[row] = all;
          *reinterpret_cast<float4*>(scratch.OutOf(partial) +
                                     static_cast<int64>(row) * problem.head_dim_v + column) = x;
        } else {
          store(row, column, x, all);
        }
      }
    }
    if constexpr (C::kParts) {
      if (in_cluster) {
        cluster.Merge(reinterpret_cast<const float2*>(smem),
                      reinterpret_cast<const float4*>(smem + Cluster::kItemsAt), store);
      }
    }
  }

  static JFA_DEVICE void Consume(const DecodeParams& params, unsigned char* smem_pointer) {
    const ProblemParams& problem = params.fwd.problem;
    const uint32 smem = SmemAddress(smem_pointer);
    // From one lane: descriptors must be known to be the same in all.
    const int warp = __shfl_sync(kFullWarp, ReadThreadIndex() / kWarpSize, 0);
    const int lane = ReadLaneIndex();
    const int row_warp = warp % kRowWarps, key_warp = warp / kRowWarps;
    Walk walk(params, blockIdx.x);
    Ring ring;
    const auto release = [&](int stage) {
      __syncwarp();
      MbarrierArriveWarp(Empty(smem, stage));
    };
    if (!C::kParts && ReadThreadIndex() == 0) {
      const DecodeScratch scratch = DecodeScratch::Of<C::kRows>(params);
      if (blockIdx.x == 0) *scratch.header = {walk.total, walk.num_ctas, walk.parts, 0};
      if (walk.parts == 0) {
        const int start = walk.begin + walk.tile;
        scratch.records[blockIdx.x] = {start, start + Blocks(problem, walk.batch).Count(),
                                       walk.tile < 0 ? walk.batch : -1, walk.unit};
      }
    }
    typename Queries::Values ahead;
    bool has_ahead = false;
    while (!walk.AtEnd()) {
      const Blocks tiles(problem, walk.batch);
      const Sequence& sequence = tiles.sequence;
      const int count = tiles.Count();
      const DecodeVisit visit = walk.VisitOf(count);
      const Rows rows(params, walk.batch, walk.unit);
      // With 8-bit keys padding, which may be anything, mustn't say how queries are scaled.
      const int num_rows =
          C::kFp8 ? Clamp(rows.NumOf(problem, sequence.q_len), 0, rows.num) : rows.num;
      if (kAsksAhead && has_ahead) {
        Queries::Put(ahead, ReadThreadIndex(), smem + kSmemQ);
      } else {
        Queries::Load(params, rows, num_rows, smem + kSmemQ);
      }
      has_ahead = false;

      // This lane's two rows: the keys that they see, and what becomes of their scores.
      Window seen[2];
      Logits logits[2] = {{problem, sequence, walk.batch, 0}, {problem, sequence, walk.batch, 0}};
      int tokens[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Min(16 * row_warp + lane / 4 + 8 * half, rows.num - 1);
        tokens[half] = rows.TokenOf(problem, row);
        seen[half] = tiles.mask.KeysOf(tokens[half]);
        const int head = rows.HeadOf(problem, row);
        logits[half].SetHead(problem, walk.batch,
                             C::kTileHeads == 1 ? head : Min(head, problem.num_heads - 1));
      }
      const int first_token = rows.TokenOf(problem, 0),
                last_token = rows.TokenOf(problem, rows.num - 1);
      Output out;
      Clear(out);
      OnlineSoftmax<1> softmax(logits[0].Scale());
      if constexpr (C::kWgmma) FenceProxyAsync();
      NamedBarrierSync(kConsumersDone, kConsumers);  // Q is there
      if constexpr (C::kFp8) {
        const float factor = Queries::Prepare(params.fwd, rows, smem + kSmemQ, row_warp, key_warp);
        for (Logits& map : logits) map.ScaleScores(factor);
        softmax.scale = logits[0].Scale();
      }

      // Scores of a block of keys become logits; whether it holds hidden ones.
      const auto make_logits = [&](Scores& s, int key0) {
        const int origin = key0 + 16 * key_warp + lane % 4 * 2;  // the lane's first key
        const auto key_of = [](int n) { return 16 * kKeyWarps * (n / 2) + 8 * (n % 2); };
        if constexpr (!Logits::kPlain) {
#pragma unroll
          for (int n = 0; n < 2 * kKeyBlocks; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const Logits& map = logits[e / 2];
              s[0][n][e] =
                  map.Apply(s[0][n][e], map.Distance(tokens[e / 2], origin + key_of(n) + e % 2));
            }
          }
        }
        const bool needs_mask =
            tiles.mask.NeedsMask(first_token, last_token, key0, key0 + C::kBlockN - 1);
        if (needs_mask) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Window window = seen[half].From(origin);
#pragma unroll
            for (int n = 0; n < 2 * kKeyBlocks; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                if (!BandMask<kMask>::InKeys(window, key_of(n) + e)) {
                  s[0][n][2 * half + e] = -Infinity();
                }
              }
            }
          }
        }
        return needs_mask;
      };
      const auto clear_padding = [&](uint32 smem_v, int key0, bool needs_mask) {
        if constexpr (C::kTma) {
          // The end of the array needs none of this: the engine puts zeros behind it.
          const bool is_end =
              params.fwd.pages.table == nullptr && sequence.kv_len == problem.kv_len;
          if (needs_mask && !is_end && key0 + C::kBlockN > sequence.kv_len) {
            ClearPadding(smem_v, sequence.kv_len - key0, key_warp, lane);
          }
        }
      };
      const auto first_key = [&](int i) { return tiles.blocks.At(visit.At(i)) * C::kBlockN; };
      // Waits for the ring's next buffer.
      const auto wait = [&] {
        MbarrierWait(Full(smem, ring.stage), ring.parity);
        return smem + ring.stage * kStageBytes;
      };

      if constexpr (C::kWgmma) {
        // Weights of a block are computed under the product of the last one's with its values.
        Scores s;
        typename Wide::Weights p;
        Wide::StartScores(s, smem + kSmemQ, wait(), row_warp);
        WgmmaWait<0>();
        Pin(s);
        release(ring.stage);
        ring.Advance();
        Ring values = ring;  // the last block's are still in use where the ring is
        bool is_first = true;
        // Returns whether the block holds hidden keys.
        const auto weigh = [&](int key0) {
          const bool needs_mask = make_logits(s, key0);
          float factor[2];
          const bool rises = softmax.Follow(s, factor);
          Wide::Weigh(s, softmax);
          WgmmaWait<0>();
          Pin(out);
          if (!is_first) release(values.stage);
          is_first = false;
          if (rises) softmax.Rescale(out, factor);
          Wide::Pack(p, s);
          values = ring;
          ring.Advance();
          return needs_mask;
        };
        const auto start_outputs = [&](int key0, bool needs_mask) {
          const uint32 smem_v = smem + values.stage * kStageBytes;
          MbarrierWait(Full(smem, values.stage), values.parity);
          clear_padding(smem_v, key0, needs_mask);
          Wide::StartOutputs(out, p, smem_v);
        };
#pragma unroll 1
        for (int i = 0; i + 1 < visit.num; ++i) {
          const bool needs_mask = weigh(first_key(i));
          Wide::StartScores(s, smem + kSmemQ, wait(), row_warp);
          start_outputs(first_key(i), needs_mask);
          WgmmaWait<1>();
          Pin(s);
          release(ring.stage);
          ring.Advance();
        }
        const bool needs_mask = weigh(first_key(visit.num - 1));
        start_outputs(first_key(visit.num - 1), needs_mask);
        WgmmaWait<0>();
        Pin(out);
        release(values.stage);
      } else {
#pragma unroll 1
        for (int i = 0; i < visit.num; ++i) {
          if (kAsksAhead && i + 1 == visit.num) {
            Walk next = walk;
            next.Advance(count);
            has_ahead = !next.AtEnd();
            if (has_ahead) {
              const Rows next_rows(params, next.batch, next.unit);
              Queries::Fetch(params, next_rows, next_rows.num, ReadThreadIndex(), ahead);
            }
          }
          Scores s;
          Clear(s);
          ScoreGemm(s, smem + kSmemQ, wait(), row_warp, key_warp, lane);
          release(ring.stage);
          ring.Advance();
          const bool needs_mask = make_logits(s, first_key(i));
          softmax.Observe(s, out);
          const uint32 smem_v = wait();
          clear_padding(smem_v, first_key(i), needs_mask);
          OutputGemm(out, s, softmax, smem_v, key_warp, lane);
          release(ring.stage);
          ring.Advance();
        }
      }

      const int partial = walk.PartialOf(visit, count);
      if constexpr (C::kWgmma) {
        NamedBarrierSync(kConsumersDone, kConsumers);  // all are done with Q
        Wide::Store(params, rows, sequence, partial, out, softmax, smem + kSmemQ, row_warp, lane);
        NamedBarrierSync(kConsumersDone, kConsumers);  // the next tile's may come
      } else {
        Store(params, rows, sequence, partial, out, softmax, smem_pointer, warp, lane);
      }
      walk.Advance(count);
    }
  }

  static JFA_DEVICE void Run(const DecodeParams& params, unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    if constexpr (C::kTma) {
      // The warp that orders the first copies makes the barriers, and waits for nobody.
      constexpr int kThreads = C::kWarps * kWarpSize;
      if (threadIdx.x / kWarpSize == kConsumerWarps) {
        const int writers = DecodeCopies<C, Decode>::SharesBoxes(params.fwd.pages) ? 2 : 1;
        if (threadIdx.x % kWarpSize == 0) {
          TmaPrefetch(&params.k);
          TmaPrefetch(&params.v);
          if (C::kParts) MbarrierInit(smem + kSmemResults, 1);
#pragma unroll
          for (int stage = 0; stage < C::kStages; ++stage) {
            MbarrierInit(Full(smem, stage), writers);
            MbarrierInitWarps(Empty(smem, stage), kConsumerWarps);
          }
        }
        FenceMbarrierInit();
        __syncwarp();
        NamedBarrierArrive(kBarriersMade, kThreads);
      } else {
        NamedBarrierSync(kBarriersMade, kThreads);
      }
    } else {
      // A thread of each warp, because one takes its time for many barriers.
      if (threadIdx.x % kWarpSize == 0) {
        for (int stage = threadIdx.x / kWarpSize; stage < C::kStages; stage += C::kWarps) {
          MbarrierInit(Full(smem, stage), kProducerWarps * kWarpSize);
          MbarrierInitWarps(Empty(smem, stage), kConsumerWarps);
        }
      }
      __syncthreads();
    }
    LetKernelBehindStart();
    constexpr bool kGive = C::kWgmma && C::kMinBlocks * C::kWarps > 8;
    if (threadIdx.x < kConsumers) {
      if constexpr (kGive) ClaimRegisters<Wide::template Registers<kConsumers>()>();
      Consume(params, smem_pointer);
    } else {
      if constexpr (kGive) ReleaseRegisters<Wide::kProducerRegisters>();
      DecodeCopies<C, Decode>::Produce(params, smem);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_CUH_
