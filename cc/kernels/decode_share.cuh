// How the CTAs of a decode call share its work, and where they leave what isn't finished.
//
//   tiles   |  b0 k0  |  b0 k1  | b1 k0| b1 k1|        b2 k0        |        b2 k1        |
//   blocks  |o o o o o|o o o o o|o o o |o o o |o o o o o o o o o o o|o o o o o o o o o o o|
//   CTAs    |<-- c0 -->|<-- c1 -->|<-- c2 -->|<-- c3 -->|<-- c4 -->|<-- c5 -->|<-- c6 -->|
//
// A tile is kRows queries of one key head (of kTileHeads of them, decode.cuh); it visits the key
// blocks of its sequence in which some query sees a key (at least one, so that each tile has
// somebody who writes its results). All blocks of all tiles stand in one line, and each CTA takes
// an equal stretch of it (stream-K: Osama et al., 2023, arXiv:2301.03598): long and short sequences
// are balanced without a decision on the host. A tile within one stretch is finished there. Of
// others every CTA leaves a partial result, at most two per CTA: of a tile that began before its
// stretch (head), and of one that ends after it (tail). The combine kernel merges them, in the
// order of the CTAs: nothing depends on timing.
//
// With kParts, each tile is shared equally by the CTAs of a cluster instead (decode_cluster.cuh),
// and nothing is left to merge: for sequences so short that a second kernel would cost more.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_SHARE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_SHARE_CUH_

#include "mask.cuh"
#include "softmax.cuh"

namespace jfa {

// Long lines are cut otherwise, because multiprocessors aren't equally fast when memory is busy
// (those of a GPU's smaller groups have more of it):
//
//   stretches  |<--- c0 --->|<--- c1 --->|<--- c2 --->|<--- c3 --->|<>|<>|<>|<>|<>|<>|<>|<>|
//
// The short ones behind belong to nobody: who is done with his own claims the next one. Who visits
// a stretch depends on timing then, but not what comes of it.
//
// Scratch, in 4-byte words: a header, a record per stretch, reference and sum of the rows of each
// partial result, their outputs. plan_decode.cc (DecodeScratchFloats) computes the same sum.
struct DecodeScratch {
  // Of the tile in the middle of which a stretch begins; batch -1 if it begins at a tile's start.
  struct Record {
    int tile_start, tile_end;  // in the line of blocks
    int batch, unit;
  };
  struct Header {
    int total;  // blocks
    int unused[2];
    int num_claimed;  // so far; the host clears it
  };
  Header* header;
  Record* records;
  float2* rows;  // [2 * stretches][rows_stored]: reference (log2) and sum of weights
  float* out;    // [2 * stretches][rows_stored][head_dim_v]
  int rows_stored;
  int head_dim_v;

  template <int kRows>
  static JFA_DEVICE DecodeScratch Of(const DecodeParams& p) {
    DecodeScratch s;
    s.rows_stored = Min(kRows, p.rows);
    s.head_dim_v = p.fwd.problem.head_dim_v;
    s.header = reinterpret_cast<Header*>(p.scratch);
    s.records = reinterpret_cast<Record*>(s.header + 1);
    const int num_stretches = p.num_ctas + p.num_claims;
    s.rows = reinterpret_cast<float2*>(s.records + num_stretches);
    s.out = reinterpret_cast<float*>(s.rows + 2 * num_stretches * s.rows_stored);
    return s;
  }
  static constexpr int kHead = 0, kTail = 1;
  JFA_DEVICE float2* RowsOf(int stretch, int which) const {
    return rows + (2 * stretch + which) * rows_stored;
  }
  JFA_DEVICE float* OutOf(int stretch, int which) const {
    return out + (2 * stretch + which) * rows_stored * static_cast<int64>(head_dim_v);
  }
};

// `total` blocks in `num` stretches, which differ by one at most.
struct EqualStretches {
  int each, longer;  // blocks of a stretch; how many of the first have one more

  JFA_DEVICE EqualStretches(int total, int num) : each(num > 0 ? total / num : 0) {
    longer = total - each * num;
  }
  JFA_DEVICE int Begin(int i) const { return i * each + Min(i, longer); }
  JFA_DEVICE int IndexOf(int block) const {
    const int in_longer = longer * (each + 1);
    return block < in_longer ? block / (each + 1) : longer + (block - in_longer) / each;
  }
};

// How the line of `total` blocks (below 2^31, as plan_decode.cc sees to) is cut.
struct Stretches {
  int claimed_blocks, own_blocks;
  int num_own, num_claims;  // no CTA without blocks: it would be the end of one that nobody walks
  EqualStretches own, claims;

  JFA_DEVICE Stretches(const DecodeParams& p, int total)
      : claimed_blocks(ClaimedOf(p, total)),
        own_blocks(total - claimed_blocks),
        num_own(Min(p.num_ctas, own_blocks)),
        num_claims(Min(p.num_claims, claimed_blocks / kLeastClaim)),
        own(own_blocks, num_own),
        claims(claimed_blocks, num_claims) {}
  JFA_DEVICE int Num() const { return num_own + num_claims; }
  // From 0 to Num(), where the line ends.
  JFA_DEVICE int Begin(int i) const {
    return i <= num_own ? own.Begin(i) : own_blocks + claims.Begin(i - num_own);
  }
  // The stretch that has that block.
  JFA_DEVICE int IndexOf(int block) const {
    return block < own_blocks ? own.IndexOf(block) : num_own + claims.IndexOf(block - own_blocks);
  }

 private:
  static constexpr int kLeastClaim = 4, kLeastOwn = 8;
  static JFA_DEVICE int ClaimedOf(const DecodeParams& p, int total) {
    return p.num_claims > 0 && total / p.num_ctas >= 2 * kLeastOwn ? total / 16 * p.claimed : 0;
  }
};

// A sequence's part in the line: each of its key heads and row tiles visits the same blocks.
template <MaskKind kMask, int kBlockN>
struct DecodeSequence {
  Sequence sequence;
  BandMask<kMask> mask;
  KeyBlockSet blocks;

  JFA_DEVICE DecodeSequence(const ProblemParams& p, int batch)
      : sequence(Sequence::Dense(p, batch, 0)),
        mask(p, sequence),
        blocks(KeyBlockSet::Of<kBlockN>(mask, 0, sequence.q_len)) {}
  JFA_DEVICE int Count() const { return Max(blocks.Count(), 1); }
};

// A stretch, and the tile at which one is in it. Used by whole warps.
template <MaskKind kMask, int kBlockN, int kTileHeads, bool kParts>
struct DecodeWalk {
  using Blocks = DecodeSequence<kMask, kBlockN>;

  int total, num_own, num_claims;
  int stretch, begin, length;
  int tile;         // where the tile begins, from the stretch's begin; the first one may be below 0
  int batch, unit;  // unit: key head (or pair of them) * row_tiles + row tile
  int num_units;

  // At the CTA's own stretch, or its part.
  JFA_DEVICE explicit DecodeWalk(const DecodeParams& params) {
    const ProblemParams& p = params.fwd.problem;
    num_units = CeilDiv(p.num_kv_heads, kTileHeads) * params.row_tiles;
    if constexpr (kParts) {
      TakePart(p, params.parts_log2, blockIdx.x);
      return;
    }
    if (AreAlike(p)) {
      total = p.batch * num_units * Blocks(p, 0).Count();
      Enter(params, blockIdx.x);
      return;
    }
    // Each lane counts the blocks of some sequences that follow each other.
    const int lane = ReadLaneIndex(), each = CeilDiv(p.batch, kWarpSize);
    const int first = Min(lane * each, p.batch), last = Min(first + each, p.batch);
    lane_own = 0;
#pragma unroll 4
    for (int b = first; b < last; ++b) lane_own += Blocks(p, b).Count();
    lane_sum = lane_own;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int other = __shfl_up_sync(kFullWarp, lane_sum, distance);
      if (lane >= distance) lane_sum += other;
    }
    total = num_units * __shfl_sync(kFullWarp, lane_sum, kWarpSize - 1);
    Enter(params, blockIdx.x);
  }

  // All sequences have the same blocks.
  static JFA_DEVICE bool AreAlike(const ProblemParams& p) {
    return p.q_lengths == nullptr && p.kv_lengths == nullptr && p.query_offsets == nullptr;
  }

  // To the begin of a stretch.
  JFA_DEVICE void Enter(const DecodeParams& params, int index_of_stretch) {
    const ProblemParams& p = params.fwd.problem;
    const Stretches stretches(params, total);
    stretch = index_of_stretch;
    num_own = stretches.num_own;
    num_claims = stretches.num_claims;
    const bool exists = stretch < stretches.Num();
    begin = exists ? stretches.Begin(stretch) : 0;
    length = exists ? stretches.Begin(stretch + 1) - begin : 0;
    if (AreAlike(p)) {
      const int count = Blocks(p, 0).Count(), index = begin / count;
      tile = index * count - begin;
      batch = index / num_units;
      unit = index - batch * num_units;
      return;
    }
    const int each = CeilDiv(p.batch, kWarpSize);
    const uint32 found = __ballot_sync(kFullWarp, begin < num_units * lane_sum);
    const int owner = found != 0 ? __ffs(found) - 1 : kWarpSize - 1;
    batch = Min(owner * each, p.batch - 1);
    int left = begin - num_units * __shfl_sync(kFullWarp, lane_sum - lane_own, owner);
    int count = Blocks(p, batch).Count();
    while (batch + 1 < p.batch && left >= num_units * count) {
      left -= num_units * count;
      count = Blocks(p, ++batch).Count();
    }
    unit = left / count;
    tile = unit * count - left;
  }

  // To the next tile; `count` is the number of blocks of this one.
  JFA_DEVICE void Advance(int count) {
    tile += count;
    if (++unit == num_units) {
      unit = 0;
      ++batch;
    }
  }

 private:
  int lane_own, lane_sum;  // blocks of this lane's sequences, and of all up to them

  // The part of a cluster's CTA in the cluster's tile. It may be empty, but then it isn't the first
  // one, and the walk comes to the tile all the same: somebody waits for its result.
  JFA_DEVICE void TakePart(const ProblemParams& p, int parts_log2, int cta) {
    const int size = 1 << parts_log2, index = cta >> parts_log2, rank = cta & (size - 1);
    batch = index / num_units;
    unit = index - batch * num_units;
    const int count = Blocks(p, batch).Count();
    const auto part_begin = [&](int part) { return (count * part + size - 1) >> parts_log2; };
    tile = -part_begin(rank);
    length = part_begin(rank + 1) + tile;
    begin = total = stretch = num_own = num_claims = 0;  // there is no line
  }
};

// The rows of one tile: row r is query token r / group of query head r % group, where the group is
// that of all its key heads.
template <int kRows, int kTileHeads>
struct DecodeRows {
  int first, num;      // of the params.rows of its key heads
  int batch, kv_head;  // the first key head, in units of kTileHeads

  JFA_DEVICE DecodeRows(const DecodeParams& params, int batch, int unit)
      : batch(batch), kv_head(unit / params.row_tiles) {
    first = (unit - kv_head * params.row_tiles) * kRows;
    num = Min(kRows, params.rows - first);
  }
  JFA_DEVICE int TokenOf(const ProblemParams& p, int row) const {
    return (first + row) / (p.group * kTileHeads);
  }
  JFA_DEVICE int HeadOf(const ProblemParams& p, int row) const {
    const int group = p.group * kTileHeads;
    return kv_head * group + (first + row) % group;
  }
  // How many of the tile's rows the first `tokens` tokens are, if it went on.
  JFA_DEVICE int NumOf(const ProblemParams& p, int tokens) const {
    return tokens * p.group * kTileHeads - first;
  }
  // Which of the tile's key heads; the second one of the last pair may not exist.
  JFA_DEVICE int PartOf(const ProblemParams& p, int row) const {
    return kTileHeads == 1 ? 0 : (first + row) % (p.group * kTileHeads) / p.group;
  }
  JFA_DEVICE int KeyHead(const ProblemParams& p, int part) const {
    return Min(kv_head * kTileHeads + part, p.num_kv_heads - 1);
  }
  JFA_DEVICE bool Exists(const ProblemParams& p, int row) const {
    return row < num && (kTileHeads == 1 || HeadOf(p, row) < p.num_heads);
  }
};

// Four columns of one row of the results, and its LSE with the first of them. `total`: reference
// and sum of the row's weights, x: the sum of values under that reference.
template <bool kBf16>
JFA_DEVICE void StoreResult(const FwdParams& p, const Sequence& sequence, int batch, int head,
                            int token, int column, float4 x, float2 total) {
  const float sink = p.sinks == nullptr
                         ? -Infinity()
                         : __ldg(p.sinks + static_cast<int64>(batch) * p.problem.num_heads + head);
  const RowResult result = FinishRow(total.y, -total.x, sink);
  const bool valid = token < sequence.q_len;  // padding may have made NaN
  uint2 packed = make_uint2(0, 0);
  if (valid) {
    packed.x = Pack16<kBf16>(x.x * result.normalizer, x.y * result.normalizer);
    packed.y = Pack16<kBf16>(x.z * result.normalizer, x.w * result.normalizer);
  }
  *reinterpret_cast<uint2*>(RowPointer(p.out, batch, head, token) + column) = packed;
  if (column == 0) p.lse[LseRow(p.problem, batch, head) + token] = valid ? result.lse : -Infinity();
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_SHARE_CUH_
