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
// Where all tiles visit as many blocks, and the CTAs are a multiple of the tiles or the reverse,
// each tile is in equal parts instead, whose CTAs take its blocks in turns. What is read at the
// same time then lies beside each other, all heads of a token first, which memory is faster at:
//
//   b0 k0  |0 1 2 0 1 2 ...      CTAs, by what they take: b0 part 0 k0, b0 part 0 k1, ...,
//   b0 k1  |0 1 2 0 1 2 ...      b0 part 1 k0, ..., b1 part 0 k0, ...
//
// With kParts the parts of a tile are a cluster's CTAs (decode_cluster.cuh), and nothing is left to
// merge: for sequences so short that a second kernel would cost more.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_SHARE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_SHARE_CUH_

#include "mask.cuh"
#include "softmax.cuh"

namespace jfa {

// Scratch, in 4-byte words: a header, a record per CTA, reference and sum of the rows of each
// partial result, their outputs. plan.cc (DecodeScratchFloats) computes the same sum.
struct DecodeScratch {
  // Of the tile in the middle of which a CTA begins; batch -1 if it begins at a tile's start.
  struct Record {
    int tile_start, tile_end;  // in the line of blocks
    int batch, unit;
  };
  struct Header {
    int total;  // blocks
    int num_ctas;
    int parts;  // of each tile; 0: the CTAs have stretches of the line
    int unused;
  };
  Header* header;
  Record* records;
  float2* rows;  // [2 * num_ctas][rows_stored]: reference (log2) and sum of weights
  float* out;    // [2 * num_ctas][rows_stored][head_dim_v]
  int rows_stored;
  int head_dim_v;

  template <int kRows>
  static JFA_DEVICE DecodeScratch Of(const DecodeParams& p) {
    DecodeScratch s;
    s.rows_stored = Min(kRows, p.rows);
    s.head_dim_v = p.fwd.problem.head_dim_v;
    s.header = reinterpret_cast<Header*>(p.scratch);
    s.records = reinterpret_cast<Record*>(s.header + 1);
    s.rows = reinterpret_cast<float2*>(s.records + p.num_ctas);
    s.out = reinterpret_cast<float*>(s.rows + 2 * p.num_ctas * s.rows_stored);
    return s;
  }
  static constexpr int kHead = 0, kTail = 1;
  // Number of a partial result; a tile's parts are heads, but for the first one.
  static JFA_DEVICE int PartialOf(int cta, int which) { return 2 * cta + which; }
  JFA_DEVICE float2* RowsOf(int partial) const { return rows + partial * rows_stored; }
  JFA_DEVICE float* OutOf(int partial) const {
    return out + partial * rows_stored * static_cast<int64>(head_dim_v);
  }
};

// `total` blocks (below 2^31, as plan.cc sees to) for num_ctas CTAs, which differ by one at most.
struct Stretches {
  int each, longer;  // blocks of a stretch; how many of the first have one more

  JFA_DEVICE Stretches(int total, int num_ctas) : each(total / num_ctas) {
    longer = total - each * num_ctas;
  }
  JFA_DEVICE int Begin(int cta) const { return cta * each + Min(cta, longer); }
  // The CTA that has that block.
  JFA_DEVICE int OwnerOf(int block) const {
    const int in_longer = longer * (each + 1);
    return block < in_longer ? block / (each + 1) : longer + (block - in_longer) / each;
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

// The blocks of a tile that a CTA visits.
struct DecodeVisit {
  int first, step, num;
  JFA_DEVICE int At(int i) const { return first + i * step; }
};

// The stretch of one CTA, or its parts of tiles, and the tile that it stands at. Used by whole
// warps.
template <MaskKind kMask, int kBlockN, int kTileHeads, bool kParts>
struct DecodeWalk {
  using Blocks = DecodeSequence<kMask, kBlockN>;

  int total, num_ctas;
  int parts, part;  // of a tile, and which one of them; 0: a stretch
  int begin;        // of the stretch
  int length;       // of the stretch; or the number of parts of all tiles
  // Where the tile begins, from the stretch's begin, the first one may be below 0; or the number of
  // the part.
  int tile;
  int batch, unit;  // unit: key head (or pair of them) * row_tiles + row tile
  const DecodeParams& params;

  JFA_DEVICE DecodeWalk(const DecodeParams& params, int cta) : params(params) {
    const ProblemParams& p = params.fwd.problem;
    const int num_units = NumUnits();
    total = begin = part = 0;
    if constexpr (kParts) {
      parts = 1 << params.parts_log2;
      part = cta & (parts - 1);
      tile = cta >> params.parts_log2;
      num_ctas = length = p.batch * num_units;
      batch = tile / num_units;
      unit = tile - batch * num_units;
      return;
    }
    if (params.all_parts > 0) {
      TakeParts(params, cta, params.all_parts);
      return;
    }
    const bool alike =
        p.q_lengths == nullptr && p.kv_lengths == nullptr && p.query_offsets == nullptr;
    if (alike) {
      const int count = Blocks(p, 0).Count();
      if (params.parts > 0) {
        TakeParts(params, cta, count);
        return;
      }
      total = p.batch * num_units * count;
      Divide(params.num_ctas, cta);
      const int index = begin / count;
      tile = index * count - begin;
      batch = index / num_units;
      unit = index - batch * num_units;
      return;
    }
    // Each lane counts the blocks of some sequences that follow each other.
    const int lane = ReadLaneIndex(), each = CeilDiv(p.batch, kWarpSize);
    const int first = Min(lane * each, p.batch), last = Min(first + each, p.batch);
    int own = 0;
    uint32 least = ~0u, most = 0;
#pragma unroll 4
    for (int b = first; b < last; ++b) {
      const uint32 count = Blocks(p, b).Count();
      own += count;
      least = count < least ? count : least;
      most = count > most ? count : most;
    }
    if (params.parts > 0) {
      most = __reduce_max_sync(kFullWarp, most);
      if (__reduce_min_sync(kFullWarp, least) == most) {
        TakeParts(params, cta, most);
        return;
      }
    }
    int sum = own;  // inclusive prefix sum
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int other = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane >= distance) sum += other;
    }
    total = num_units * __shfl_sync(kFullWarp, sum, kWarpSize - 1);
    Divide(params.num_ctas, cta);
    const uint32 found = __ballot_sync(kFullWarp, begin < num_units * sum);
    const int owner = found != 0 ? __ffs(found) - 1 : kWarpSize - 1;
    batch = Min(owner * each, p.batch - 1);
    int left = begin - num_units * __shfl_sync(kFullWarp, sum - own, owner);
    int count = Blocks(p, batch).Count();
    while (batch + 1 < p.batch && left >= num_units * count) {
      left -= num_units * count;
      count = Blocks(p, ++batch).Count();
    }
    unit = left / count;
    tile = unit * count - left;
  }

  JFA_DEVICE bool AtEnd() const { return tile >= length; }

  // Of the tile that it stands at, which has `count` blocks. A cluster's CTA may have none, but
  // comes to the tile all the same: somebody waits for its result.
  JFA_DEVICE DecodeVisit VisitOf(int count) const {
    if (parts > 0) return {part, parts, CeilDiv(Max(count - part, 0), parts)};
    const int first = Max(-tile, 0);
    return {first, 1, Min(length - tile, count) - first};
  }
  // The number in scratch of what such a visit yields; -1 if that is the whole tile's result, or is
  // sent to the cluster.
  JFA_DEVICE int PartialOf(const DecodeVisit& visit, int count) const {
    if (kParts || visit.num == count) return -1;
    const int slot = parts > 0 ? (batch * NumUnits() + unit) * parts + part : blockIdx.x;
    return DecodeScratch::PartialOf(slot,
                                    visit.first > 0 ? DecodeScratch::kHead : DecodeScratch::kTail);
  }

  // To the next tile; `count` is the number of blocks of this one.
  JFA_DEVICE void Advance(int count) {
    if constexpr (kParts) {
      tile = length;
      return;
    }
    if (parts > 0) {
      tile += gridDim.x;
      TakePart();
      return;
    }
    tile += count;
    if (++unit == NumUnits()) {
      unit = 0;
      ++batch;
    }
  }

 private:
  // Asked for anew rather than kept: registers are short where rows are many.
  JFA_DEVICE int NumUnits() const {
    return CeilDiv(params.fwd.problem.num_kv_heads, kTileHeads) * params.row_tiles;
  }
  // All tiles have `count` blocks.
  JFA_DEVICE void TakeParts(const DecodeParams& params, int cta, int count) {
    parts = Min(params.parts, count);
    length = params.fwd.problem.batch * NumUnits() * parts;
    num_ctas = params.num_ctas;
    tile = cta;
    TakePart();
  }
  JFA_DEVICE void TakePart() {
    const int num_units = NumUnits(), others = tile / num_units;
    unit = tile - others * num_units;
    batch = others / parts;
    part = others - batch * parts;
  }

  // CTAs without a block of their own would be ends of stretches that nobody walks.
  JFA_DEVICE void Divide(int most, int cta) {
    parts = 0;
    num_ctas = Min(most, total);
    const Stretches stretches(total, num_ctas);
    const bool works = cta < num_ctas;
    begin = works ? stretches.Begin(cta) : 0;
    length = works ? stretches.Begin(cta + 1) - begin : 0;
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

// What becomes of a row; `total`: reference and sum of its weights.
JFA_DEVICE RowResult ResultOf(const FwdParams& p, int batch, int head, float2 total) {
  const float sink = p.sinks == nullptr
                         ? -Infinity()
                         : __ldg(p.sinks + static_cast<int64>(batch) * p.problem.num_heads + head);
  return FinishRow(total.y, -total.x, sink);
}

// Four columns of one row of the results, and its LSE with the first of them. x: the sum of values
// under the reference of `total`.
template <bool kBf16>
JFA_DEVICE void StoreResult(const FwdParams& p, const Sequence& sequence, int batch, int head,
                            int token, int column, float4 x, float2 total) {
  const RowResult result = ResultOf(p, batch, head, total);
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
