// Tiles of 16-bit floats in shared memory, and the ways in and out of them: global memory by rows,
// registers by 16 x 16 blocks in the layout of mma.sync.
//
// A 16 x 16 block of an accumulator is two 16 x 8 results: lane l holds of each the columns
// 2 * (l % 4) and + 1 of row l / 4 (elements 0, 1) and of row l / 4 + 8 (elements 2, 3).
#ifndef JAX_FLASHATTN_CC_KERNELS_TILE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_TILE_CUH_

#include "ptx.cuh"

namespace jfa {

// Rows x columns in shared memory. 16-byte chunks of a row are permuted by the row number, so that
// the 8 rows that one ldmatrix phase or one store touches fall into 8 different bank groups.
template <int kRows_, int kCols_>
struct SmemTile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kChunks = kCols / 8;
  static constexpr int kPitch = kCols * 2;
  static constexpr int kBytes = kRows * kPitch;
  // Chunks that are permuted among themselves. With a pitch of 64 or 192 bytes two neighbouring
  // rows already differ in the upper half of the banks, so four are enough there.
  static constexpr int kGroup = kCols % 64 == 0 ? 8 : 4;
  static_assert(kCols % 32 == 0, "a row is a whole number of permuted chunk groups");
  static_assert(kRows % 16 == 0, "tiles are made of 16 x 16 blocks");

  static JFA_DEVICE int Permutation(int row) { return kGroup == 8 ? row & 7 : (row >> 1) & 3; }
  static JFA_DEVICE uint32 Offset(int row, int chunk) {
    return row * kPitch + (chunk ^ Permutation(row)) * 16;
  }
  // The address `chunks` to the right of `address`, for a constant that shares no bit with the
  // chunk number already in it (below kGroup): one XOR, and an immediate.
  static JFA_DEVICE uint32 Right(uint32 address, int chunks) {
    return (address ^ ((chunks % kGroup) * 16)) + (chunks / kGroup) * (kGroup * 16);
  }
};

// The 16 x 16 blocks of a tile as one operand of a matrix product, for one of kParts warps (or warp
// groups) that share the outer dimension (rows of A, columns of B) block by block: part p has the
// blocks p, p + kParts, ... This keeps every address a constant away from one register.
// kTransposed: the tile is stored with the product's inner dimension along its rows.
enum class Side { kA, kB };
template <class Tile, Side kSide, bool kTransposed, int kParts>
struct Operand {
  static_assert((kParts & (kParts - 1)) == 0, "parts must be a power of two: see SmemTile::Right");
  uint32 base;

  JFA_DEVICE Operand(uint32 tile, int part, int lane) {
    // ldmatrix takes row addresses of four 8 x 8 matrices from lanes 0-7, 8-15, 16-23, 24-31.
    // A wants them ordered down, then right; B (and both transposed) right, then down.
    constexpr bool kDownFirst = (kSide == Side::kA) != kTransposed;
    const int row = kDownFirst ? lane & 15 : (lane & 7) + ((lane >> 4) << 3);
    const int chunk = kDownFirst ? lane >> 4 : (lane >> 3) & 1;
    base = tile + (kTransposed ? Tile::Offset(row, 2 * part + chunk)
                               : Tile::Offset(row + 16 * part, chunk));
  }
  // Block `outer` of this part (in units of its own blocks), block `inner` along the product.
  JFA_DEVICE void Load(uint32 (&r)[4], int outer, int inner) const {
    if constexpr (kTransposed) {
      Ldmatrix4Trans(r, Tile::Right(base, 2 * outer * kParts) + inner * 16 * Tile::kPitch);
    } else {
      Ldmatrix4(r, Tile::Right(base, 2 * inner) + outer * kParts * 16 * Tile::kPitch);
    }
  }
};

// acc[m][n] += a[m] b for kM blocks of 16 rows and one of 16 columns, n.
template <bool kBf16, int kM, int kN2>
JFA_DEVICE void MmaColumn(float (&acc)[kM][kN2][4], int n, const uint32 (&a)[kM][4],
                          const uint32 (&b)[4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    Mma16x8x16<kBf16>(acc[m][2 * n], a[m], b[0], b[1]);
    Mma16x8x16<kBf16>(acc[m][2 * n + 1], a[m], b[2], b[3]);
  }
}

// The same for all columns, b from shared memory at step `inner`.
template <bool kBf16, int kM, int kN2, class OperandB>
JFA_DEVICE void MmaRow(float (&acc)[kM][kN2][4], const uint32 (&a)[kM][4], const OperandB& op_b,
                       int inner) {
  constexpr int kN = kN2 / 2;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    uint32 b[4];
    op_b.Load(b, n, inner);
    MmaColumn<kBf16>(acc, n, a, b);
  }
}

// acc += a b over kInner blocks, both from shared memory. A fragments are read a step ahead, B
// fragments one 16-column block ahead: enough to cover ldmatrix, with a third of the registers of
// reading both a whole step ahead (which spills at head dim 128).
template <bool kBf16, int kInner, int kM, int kN2, class OperandA, class OperandB>
JFA_DEVICE void Gemm(float (&acc)[kM][kN2][4], const OperandA& op_a, const OperandB& op_b) {
  constexpr int kN = kN2 / 2;
  uint32 a[2][kM][4], b[2][4];
#pragma unroll
  for (int m = 0; m < kM; ++m) op_a.Load(a[0][m], m, 0);
  op_b.Load(b[0], 0, 0);
#pragma unroll
  for (int k = 0; k < kInner; ++k) {
    if (k + 1 < kInner) {
#pragma unroll
      for (int m = 0; m < kM; ++m) op_a.Load(a[(k + 1) & 1][m], m, k + 1);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int step = k * kN + n;
      if (n + 1 < kN) {
        op_b.Load(b[(step + 1) & 1], n + 1, k);
      } else if (k + 1 < kInner) {
        op_b.Load(b[(step + 1) & 1], 0, k + 1);
      }
      MmaColumn<kBf16>(acc, n, a[k & 1], b[step & 1]);
    }
  }
}

template <int kM, int kN>
JFA_DEVICE void Clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
    }
  }
}

// A 16 x 16 block of an accumulator, rounded: at the same time fragment A of a product.
template <bool kBf16>
JFA_DEVICE void PackBlock(uint32 (&r)[4], const float (&left)[4], const float (&right)[4]) {
  r[0] = Pack16<kBf16>(left[0], left[1]);
  r[1] = Pack16<kBf16>(left[2], left[3]);
  r[2] = Pack16<kBf16>(right[0], right[1]);
  r[3] = Pack16<kBf16>(right[2], right[3]);
}

// Writes packed blocks to a tile that kPartsN warps share along its columns; the row is the
// caller's first block row.
template <class Tile, int kPartsN>
struct BlockWriter {
  uint32 base;
  JFA_DEVICE BlockWriter(uint32 tile, int first_row, int part_n, int lane) {
#if __CUDA_ARCH__ >= 900
    base = tile + Tile::Offset(first_row + (lane & 15), 2 * part_n + (lane >> 4));
#else
    base = tile + Tile::Offset(first_row + (lane >> 2), 2 * part_n) + (lane & 3) * 4;
#endif
  }
  // `row` in rows, a constant multiple of 16; `n` in this part's blocks.
  JFA_DEVICE void Store(int row, int n, const uint32 (&r)[4]) const {
#if __CUDA_ARCH__ >= 900
    Stmatrix4(Tile::Right(base, 2 * n * kPartsN) + row * Tile::kPitch, r);
#else
    const uint32 left = Tile::Right(base, 2 * n * kPartsN) + row * Tile::kPitch;
    const uint32 right = Tile::Right(base, 2 * n * kPartsN + 1) + row * Tile::kPitch;
    StoreShared4(left, r[0]);
    StoreShared4(left + 8 * Tile::kPitch, r[1]);
    StoreShared4(right, r[2]);
    StoreShared4(right + 8 * Tile::kPitch, r[3]);
#endif
  }
};

// How kThreads threads walk a tile in 16-byte chunks: one chunk group per kGroup threads, rows in
// steps, so that shared addresses are one register plus constants.
template <class Tile, int kThreads>
struct CopyMap {
  static constexpr int kLanes = Tile::kGroup;
  static constexpr int kRowStep = kThreads / kLanes;
  static constexpr int kPasses = (Tile::kRows + kRowStep - 1) / kRowStep;
  static constexpr int kGroups = Tile::kChunks / kLanes;
  static_assert(kRowStep % 8 == 0, "a step must keep the chunk permutation of the row");

  int row;     // of the first pass
  int column;  // first element of the thread's first chunk
  uint32 offset;

  JFA_DEVICE explicit CopyMap(int thread)
      : row(thread / kLanes),
        column(thread % kLanes * 8),
        offset(Tile::Offset(thread / kLanes, thread % kLanes)) {}
  // Chunk groups in which this thread has a chunk below `dim` columns.
  JFA_DEVICE int ValidGroups(int dim) const {
    return column >= dim ? 0 : (dim - column - 1) / (kLanes * 8) + 1;
  }
  // Tiles with fewer rows than one pass leave the other threads idle.
  static JFA_DEVICE bool InTile(int tile_row) {
    return Tile::kRows % kRowStep == 0 || tile_row < Tile::kRows;
  }
};

// Copies rows of a [rows, dim] matrix into a tile; rows from `end` on and columns from `dim` on
// become zeros without being read, because padding may hold NaN.
template <class Tile, int kThreads, bool kAligned>
struct TileLoader {
  using Map = CopyMap<Tile, kThreads>;
  const uint16* data;  // uniform, like all members: the thread's place is found anew in each Load
  int64 stride;        // elements from row to row
  int dim;

  JFA_DEVICE TileLoader(const void* matrix, int64 row_stride, int head_dim)
      : data(static_cast<const uint16*>(matrix)), stride(row_stride), dim(head_dim) {}

  JFA_DEVICE void Load(uint32 tile, int first_row, int end) const {
    const Map map(ReadThreadIndex());
    const uint16* source = data + (first_row + map.row) * stride + map.column;
    const int valid_groups = map.ValidGroups(dim);
    const int rows_left = end - first_row - map.row;
#pragma unroll
    for (int pass = 0; pass < Map::kPasses; ++pass) {
      if (Map::InTile(map.row + pass * Map::kRowStep)) {
        LoadRow(map, tile, pass, source, pass * Map::kRowStep < rows_left, valid_groups, dim);
      }
      source += Map::kRowStep * stride;
    }
  }

  // A thread's chunks of its row in one pass, which begin at `source`.
  static JFA_DEVICE void LoadRow(const Map& map, uint32 tile, int pass, const uint16* source,
                                 bool row_valid, int valid_groups, int dim) {
#pragma unroll
    for (int group = 0; group < Map::kGroups; ++group) {
      const uint32 target =
          tile + map.offset + pass * Map::kRowStep * Tile::kPitch + group * Map::kLanes * 16;
      const bool valid = row_valid && group < valid_groups;
      const uint16* chunk = source + group * Map::kLanes * 8;
      if constexpr (kAligned) {
        CpAsync16(target, chunk, valid ? 16 : 0);
      } else {
        LoadElements(target, chunk, valid ? dim - map.column - group * Map::kLanes * 8 : 0);
      }
    }
  }

 private:
  // Head dims that are no multiple of 8 have no 16-byte alignment to use: element by element.
  static JFA_DEVICE void LoadElements(uint32 target, const uint16* chunk, int left) {
    uint32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32 low = 2 * i < left ? chunk[2 * i] : 0;
      const uint32 high = 2 * i + 1 < left ? chunk[2 * i + 1] : 0;
      word[i] = low | high << 16;
    }
    StoreShared16(target, make_uint4(word[0], word[1], word[2], word[3]));
  }
};

// Writes a tile out to rows [first_row, end) of a [rows, dim] matrix.
template <class Tile, int kThreads, bool kAligned>
JFA_DEVICE void StoreTile(uint32 tile, void* matrix, int64 row_stride, int dim, int first_row,
                          int end) {
  using Map = CopyMap<Tile, kThreads>;
  const Map map(ReadThreadIndex());
  const int valid_groups = map.ValidGroups(dim);
  uint16* target = static_cast<uint16*>(matrix) + (first_row + map.row) * row_stride + map.column;
  const int rows_left = end - first_row - map.row;
#pragma unroll
  for (int pass = 0; pass < Map::kPasses; ++pass) {
    if (Map::InTile(map.row + pass * Map::kRowStep) && pass * Map::kRowStep < rows_left) {
#pragma unroll
      for (int group = 0; group < Map::kGroups; ++group) {
        if (group < valid_groups) {
          const uint4 v = LoadShared16(tile + map.offset + pass * Map::kRowStep * Tile::kPitch +
                                       group * Map::kLanes * 16);
          uint16* chunk = target + group * Map::kLanes * 8;
          if constexpr (kAligned) {
            *reinterpret_cast<uint4*>(chunk) = v;
          } else {
            const int left = dim - map.column - group * Map::kLanes * 8;
            const uint32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              if (i < left) chunk[i] = static_cast<uint16>(word[i / 2] >> (i % 2 * 16));
            }
          }
        }
      }
    }
    target += Map::kRowStep * row_stride;
  }
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_TILE_CUH_
