// Where the rows of one (batch, head) are and how many count. Everything that is read from global
// memory to find them is read here, once per tile.
#ifndef JAX_FLASHATTN_CC_KERNELS_KV_SOURCE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_KV_SOURCE_CUH_

#include "params.h"
#include "tile.cuh"

namespace jfa {

// What the mask does to the code of a kernel; Config::kMask.
enum class MaskKind { kFull, kCausal, kLocal };

// A tile's place in the work: which block of which (batch, head).
struct WorkItem {
  int block, batch, head;
};

// Linear CTA number -> work. CTAs start roughly in order, so the order is a schedule: inside a
// section of heads all heads' block 0 come before any block 1. Callers count blocks so that long
// ones come first and the last to finish are short.
//   full    sections whose streamed data is `section_bytes` at most. All tiles are equally long.
//   causal  the same, but at least `least_tiles`, several waves: a section of fewer tiles ends in
//           its longest ones. (H100, head dim 128, S 16384, 16 heads: 3.07 ms with the L2
//           alone, 2.71 without sections; those matter again with more heads than that.)
//   local   one section: a tile streams a window, whatever the length, and long are only the tiles
//           of sink tokens, which must start first.
JFA_DEVICE WorkItem ScheduleWork(uint32 index, int num_blocks, int batch, int heads, int unit,
                                 int64 bytes_per_unit, int section_bytes, MaskKind mask,
                                 int least_tiles = 1024) {
  const int total_units = batch * (heads / unit);
  int units = total_units;
  if (mask != MaskKind::kLocal) {
    int64 fitting = section_bytes / Max(bytes_per_unit, int64{1});
    if (mask == MaskKind::kCausal) {
      fitting = Max(fitting, static_cast<int64>(CeilDiv(least_tiles, num_blocks * unit)));
    }
    units = static_cast<int>(Clamp(fitting, int64{1}, static_cast<int64>(total_units)));
    units = CeilDiv(total_units, CeilDiv(total_units, units));  // of equal size
  }
  const uint32 section_heads = units * unit;
  const uint32 section = index / (section_heads * num_blocks);
  const uint32 rest = index - section * section_heads * num_blocks;
  const uint32 first = section * section_heads;
  const uint32 here = Min(section_heads, static_cast<uint32>(batch * heads) - first);
  const uint32 block = rest / here;
  const uint32 head = first + rest - block * here;
  return {static_cast<int>(block), static_cast<int>(head / heads), static_cast<int>(head % heads)};
}

// Where packed sequence `index` begins. Sequence num_sequences is the tail: tokens of nobody.
// Whatever the boundaries hold, nothing beyond the tokens is read or written.
JFA_DEVICE int Boundary(const int* ends, int num_sequences, int total, int index) {
  if (index == 0) return 0;
  return index > num_sequences ? total : Clamp(ends[index], 0, total);
}

// One sequence: all of a dense call's tokens, or a piece of a packed one's.
struct Sequence {
  int q_len, kv_len;      // tokens that count; the rest is padding
  int q_rows, kv_rows;    // tokens whose results are to be written
  int q_begin, kv_begin;  // the first token's place in the arrays
  int scratch_begin;      // and its row in the backward's scratch
  int table_row;          // of a paged call
  int offset;

  // Lengths outside [0, T] and [0, S] are clamped.
  static JFA_DEVICE Sequence Dense(const ProblemParams& p, int batch, int kv_head) {
    const int64 index = static_cast<int64>(batch) * p.num_kv_heads + kv_head;
    Sequence s;
    s.q_len = p.q_lengths ? Clamp(p.q_lengths[index], 0, p.q_len) : p.q_len;
    s.kv_len = p.kv_lengths ? Clamp(p.kv_lengths[index], 0, p.kv_len) : p.kv_len;
    s.q_rows = p.q_len;
    s.kv_rows = p.kv_len;
    s.q_begin = s.kv_begin = s.scratch_begin = 0;
    s.table_row = batch;
    s.offset = p.query_offsets ? p.query_offsets[index] : p.query_offset;
    return s;
  }

  static JFA_DEVICE Sequence Packed(const ProblemParams& p, int batch, int kv_head, int index) {
    const int64 head = static_cast<int64>(batch) * p.num_kv_heads + kv_head;
    const int n = p.num_sequences;
    const int* ends_q = p.cu_seqlens_q + head * (n + 1);
    const int* ends_kv = p.cu_seqlens_kv + head * (n + 1);
    Sequence s;
    s.q_begin = Boundary(ends_q, n, p.q_len, index);
    s.q_rows = Max(Boundary(ends_q, n, p.q_len, index + 1) - s.q_begin, 0);
    const bool is_tail = index == n;
    if (p.cu_seqlens_kv != nullptr) {
      s.kv_begin = Boundary(ends_kv, n, p.kv_len, index);
      s.kv_rows = Max(Boundary(ends_kv, n, p.kv_len, index + 1) - s.kv_begin, 0);
    } else {  // only queries are packed: keys are in pages
      s.kv_begin = 0;
      s.kv_rows = is_tail ? 0 : Clamp(p.kv_lengths[head * n + index], 0, p.kv_len);
    }
    s.table_row = batch * n + Min(index, n - 1);
    s.q_len = is_tail ? 0 : s.q_rows;
    s.kv_len = is_tail ? 0 : s.kv_rows;
    // Whole tiles for each sequence: at most one tile is lost between two neighbours.
    s.scratch_begin = (s.q_begin + index * kScratchTile) / kScratchTile * kScratchTile;
    s.offset = !p.query_offsets ? p.query_offset : is_tail ? 0 : p.query_offsets[head * n + index];
    return s;
  }

  static constexpr int kScratchTile = 128;
};

// The page of a sequence's key; whatever the table holds, it is one.
JFA_DEVICE int PageOf(const PagesArg& pages, int table_row, int key) {
  const int* row = pages.table + static_cast<int64>(table_row) * pages.max_pages;
  return Clamp(__ldg(row + (key >> pages.page_log2)), 0, pages.num_pages - 1);
}

// Upper bound on the tiles of kBlock tokens; packed sequences may each end in a partial one.
template <bool kPacked, int kBlock>
JFA_DEVICE int NumTiles(const ProblemParams& p, int length) {
  return kPacked ? length / kBlock + p.num_sequences + 1 : CeilDiv(length, kBlock);
}

// Tile number -> sequence and block in it, for a packed call; sequence -1 if there is no such tile.
struct PackedTile {
  int sequence, block, num_blocks;
};

template <int kBlock>
JFA_DEVICE PackedTile FindTile(const int* ends, int num_sequences, int total, int tile) {
  const int lane = ReadLaneIndex();
  int before = 0;  // tiles of the sequences below `first`
  for (int first = 0; first <= num_sequences; first += kWarpSize) {
    const int sequence = first + lane;
    int count = 0;
    if (sequence <= num_sequences) {
      count = CeilDiv(Max(Boundary(ends, num_sequences, total, sequence + 1) -
                              Boundary(ends, num_sequences, total, sequence),
                          0),
                      kBlock);
    }
    int sum = count;  // inclusive prefix sum
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int other = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane >= distance) sum += other;
    }
    const uint32 found = __ballot_sync(kFullWarp, tile < before + sum);
    if (found != 0) {
      const int owner = __ffs(found) - 1;
      const int begin = before + __shfl_sync(kFullWarp, sum - count, owner);
      return {first + owner, tile - begin, __shfl_sync(kFullWarp, count, owner)};
    }
    before += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  return {-1, 0, 0};
}

// Turns the tile number of a work item into a block of a sequence's queries, last blocks first if
// asked for; false if there is no such tile.
template <bool kPacked, int kBlock>
JFA_DEVICE bool SelectQueries(const ProblemParams& p, bool last_first, WorkItem& work,
                              Sequence& sequence) {
  const int kv_head = work.head / p.group;
  int num_blocks = NumTiles<kPacked, kBlock>(p, p.q_len);
  if constexpr (kPacked) {
    const int64 head = static_cast<int64>(work.batch) * p.num_kv_heads + kv_head;
    const PackedTile tile = FindTile<kBlock>(p.cu_seqlens_q + head * (p.num_sequences + 1),
                                             p.num_sequences, p.q_len, work.block);
    if (tile.sequence < 0) return false;
    work.block = tile.block;
    num_blocks = tile.num_blocks;
    sequence = Sequence::Packed(p, work.batch, kv_head, tile.sequence);
  } else {
    sequence = Sequence::Dense(p, work.batch, kv_head);
  }
  if (last_first) work.block = num_blocks - 1 - work.block;
  return true;
}

// The same for a block of a sequence's keys; the work item's head is a key head.
template <bool kPacked, int kBlock>
JFA_DEVICE bool SelectKeys(const ProblemParams& p, WorkItem& work, Sequence& sequence) {
  if constexpr (kPacked) {
    const int64 head = static_cast<int64>(work.batch) * p.num_kv_heads + work.head;
    const PackedTile tile = FindTile<kBlock>(p.cu_seqlens_kv + head * (p.num_sequences + 1),
                                             p.num_sequences, p.kv_len, work.block);
    if (tile.sequence < 0) return false;
    work.block = tile.block;
    sequence = Sequence::Packed(p, work.batch, work.head, tile.sequence);
  } else {
    sequence = Sequence::Dense(p, work.batch, work.head);
  }
  return true;
}

JFA_DEVICE uint16* RowPointer(const TensorArg& tensor, int batch, int head, int row) {
  return static_cast<uint16*>(tensor.data) + batch * tensor.batch_stride +
         head * tensor.head_stride + row * tensor.row_stride;
}

// As TileLoader, of rows that are in pages.
template <class Tile, int kThreads, bool kAligned>
struct PagedLoader {
  using Rows = TileLoader<Tile, kThreads, kAligned>;
  using Map = typename Rows::Map;
  const PagesArg& pages;
  const TensorArg& tensor;
  int table_row, kv_head, dim;

  JFA_DEVICE void Load(uint32 tile, int first_row, int end) const {
    const Map map(ReadThreadIndex());
    const int valid_groups = map.ValidGroups(dim);
#pragma unroll
    for (int pass = 0; pass < Map::kPasses; ++pass) {
      const int row = map.row + pass * Map::kRowStep, key = first_row + row;
      if (!Map::InTile(row)) continue;
      const bool valid = key < end;
      const int page = valid ? PageOf(pages, table_row, key) : 0;
      const uint16* source =
          RowPointer(tensor, page, kv_head, key & ((1 << pages.page_log2) - 1)) + map.column;
      Rows::LoadRow(map, tile, pass, source, valid, valid_groups, dim);
    }
  }
};

// What brings the keys or values of one (batch, key head) to a tile in shared memory.
template <class Tile, int kThreads, bool kAligned, bool kPaged>
JFA_DEVICE auto MakeKeyLoader(const FwdParams& p, const TensorArg& tensor, int dim,
                              const Sequence& sequence, int batch, int kv_head) {
  if constexpr (kPaged) {
    return PagedLoader<Tile, kThreads, kAligned>{p.pages, tensor, sequence.table_row, kv_head, dim};
  } else {
    return TileLoader<Tile, kThreads, kAligned>(
        RowPointer(tensor, batch, kv_head, sequence.kv_begin), tensor.row_stride, dim);
  }
}

// Index of row 0 of a (batch, query head) in LSE-shaped arrays [batch, num_heads, q_len].
JFA_DEVICE int64 LseRow(const ProblemParams& p, int batch, int head) {
  return (static_cast<int64>(batch) * p.num_heads + head) * p.q_len;
}

// The part of the backward's scratch that belongs to one (batch, query head), from a sequence's
// first row on. Sequences are padded to kRowPadding, so that tiles read and write it without
// bounds. Written by bwd_preprocess:
//   lse_log2 [rows]  LSE * log2(e); +inf for a row that counts for nothing, which makes its P zero
//   delta    [rows]  rowsum(dO * O) - dLSE
//   dq       [rows / 16][columns / 16][256]  f32 sums of dQ / scale, in 16 x 16 blocks (see
//            DqElement), only with kDqSums
struct BwdScratch {
  static constexpr int kRowPadding = Sequence::kScratchTile;
  float* lse_log2;
  float* delta;
  float* dq;

  // Floats of one query head.
  template <bool kDqSums, int kHeadDim>
  static JFA_DEVICE int64 PerHead(const BwdParams& p) {
    return p.problem.scratch_rows * (2 + (kDqSums ? kHeadDim : 0));
  }
  template <bool kDqSums, int kHeadDim>
  static JFA_DEVICE BwdScratch Of(const BwdParams& p, const Sequence& sequence, int batch,
                                  int head) {
    return Of<kDqSums, kHeadDim>(p, sequence, batch, head, head / p.problem.group);
  }
  // For whom the key head is known: a division takes longer than the adds of a tile.
  template <bool kDqSums, int kHeadDim>
  static JFA_DEVICE BwdScratch Of(const BwdParams& p, const Sequence& sequence, int batch, int head,
                                  int kv_head) {
    const int64 rows = p.problem.scratch_rows;
    float* base =
        p.scratch +
        (static_cast<int64>(batch) * p.problem.num_kv_heads + kv_head) * p.scratch_stride +
        (head - kv_head * p.problem.group) * PerHead<kDqSums, kHeadDim>(p);
    const int64 first = sequence.scratch_begin;
    return {base + first, base + rows + first, base + 2 * rows + first * kHeadDim};
  }
};

// Place of element e of a lane's half (0: row lane / 4, 1: + 8) in a 16 x 16 block of dQ sums:
// what makes the adds of a warp contiguous. sm_90 adds four floats at a time.
JFA_DEVICE int DqElement(int half, int e, int lane) {
#if __CUDA_ARCH__ >= 900
  return half * 128 + lane * 4 + e;
#else
  return half * 128 + e * 32 + lane;
#endif
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_KV_SOURCE_CUH_
