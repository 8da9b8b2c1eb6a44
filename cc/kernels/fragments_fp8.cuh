// Keys and values of 8-bit floats in products by mma.sync, as f16: it holds every e4m3 and e5m2.
//
// K and V lie in shared memory as in global memory, two elements to a 16-bit column of a tile, and
// become f16 in registers. What ldmatrix gives a lane j = lane % 4 of 8 rows is another set of
// elements than with 16 bits, so the order of head dims differs:
//
//   scores    4 dims that follow each other, 4 j to 4 j + 3 of 16, where the instruction wants 2 j,
//             2 j + 1, 2 j + 8 and 2 j + 9. The sum may have any order: PrepareQueries puts the
//             queries into this one.
//   output    of a pair of columns one byte each: the instruction's first 8 columns are the even
//             dims of 16, the next 8 the odd ones. So a lane has the dims 4 j to 4 j + 3 of 16, and
//             AdjoinColumns puts neighbours together.
//
// Queries become f16 too. Those of bf16 are first multiplied by a power of two that makes the
// largest of a warp's rows 2^15 or more: what is lost is below 2^-39 of it.
#ifndef JAX_FLASHATTN_CC_KERNELS_FRAGMENTS_FP8_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FRAGMENTS_FP8_CUH_

#include "kv_source.cuh"

namespace jfa {

// --- conversions --------------------------------------------------------------------------------

// Four bytes as two pairs of f16. Before sm_89 an e4m3 that is NaN becomes 480 of its sign.
template <bool kE5m2>
struct Float8 {
  // Bytes 0 and 1, and 2 and 3.
  static JFA_DEVICE void InOrder(uint32 bytes, uint32& low, uint32& high) {
#if __CUDA_ARCH__ >= 890
    if constexpr (!kE5m2) {
      asm("{\n.reg .b16 low, high;\n"
          "mov.b32 {low, high}, %2;\n"
          "cvt.rn.f16x2.e4m3x2 %0, low;\n"
          "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
          : "=r"(low), "=r"(high)
          : "r"(bytes));
      return;
    }
#endif
    low = OfUpperBytes(Permute<0x1404>(bytes, 0));
    high = OfUpperBytes(Permute<0x3424>(bytes, 0));
  }
  // Bytes 0 and 2, and 1 and 3.
  static JFA_DEVICE void EvenAndOdd(uint32 bytes, uint32& even, uint32& odd) {
#if __CUDA_ARCH__ >= 890
    if constexpr (!kE5m2) {
      InOrder(Permute<0x3120>(bytes, 0), even, odd);
      return;
    }
#endif
    even = OfUpperBytes(Permute<0x2404>(bytes, 0));
    odd = OfUpperBytes(bytes & 0xff00ff00u);
  }

 private:
  // e5m2 is the upper byte of an f16. The exponent of e4m3 is one bit shorter, and less by 8.
  static JFA_DEVICE uint32 OfUpperBytes(uint32 x) {
    if constexpr (kE5m2) return x;
    constexpr uint32 kTwoTo8 = 0x5c005c00u;
    const uint32 moved = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
    uint32 r;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(moved), "r"(kTwoTo8));
    return r;
  }
};

// K or V as rows of 16-bit columns.
template <bool kFp8>
JFA_DEVICE decltype(auto) ColumnsOf(const TensorArg& x) {
  if constexpr (kFp8) {
    return TensorArg{x.data, x.batch_stride / 2, x.row_stride / 2, x.head_stride / 2};
  } else {
    return (x);
  }
}

// --- queries ------------------------------------------------------------------------------------

// The exponent, as bf16 has it, of the largest finite value of some rows; by a warp. `at` gives the
// address of 8 elements of a row.
template <int kChunks, class At>
JFA_DEVICE int LargestExponent(const At& at, int first_row, int num_rows) {
  constexpr int kInfinity = 0x7f80;
  int largest = 0;
#pragma unroll 4
  for (int i = ReadLaneIndex(); i < num_rows * kChunks; i += kWarpSize) {
    const uint4 x = LoadShared16(at(first_row + i / kChunks, i % kChunks));
#pragma unroll
    for (const uint32 word : {x.x, x.y, x.z, x.w}) {
      const int low = word & 0x7fff, high = word >> 16 & 0x7fff;
      if (low < kInfinity) largest = Max(largest, low);
      if (high < kInfinity) largest = Max(largest, high);
    }
  }
  return WarpMax(largest) >> 7;
}

// The power of two by which queries with that largest exponent are multiplied, and its inverse.
struct QueryScale {
  float to_f16, back;

  JFA_DEVICE explicit QueryScale(int exponent) {
    constexpr int kLeast = 16;  // below, the factor itself would overflow
    const int e = Max(exponent, kLeast);
    to_f16 = __int_as_float((127 + 15 + 127 - e) << 23);
    back = __int_as_float((e - 15) << 23);
  }

  // Two of bf16.
  JFA_DEVICE uint32 Convert(uint32 pair) const {
    return Pack16<false>(__uint_as_float(pair << 16) * to_f16,
                         __uint_as_float(pair & 0xffff0000u) * to_f16);
  }
};

struct NoFactor {
  JFA_DEVICE float operator()(int) const { return 1.f; }
};

// Rows of queries, in place: f16 in the order that the scores want. By a warp. `of_row` gives a
// further factor of a row, at most 1.
template <bool kBf16, int kChunks, class At, class OfRow = NoFactor>
JFA_DEVICE void PrepareQueries(const At& at, int first_row, int num_rows, QueryScale scale,
                               const OfRow& of_row = {}) {
  for (int i = ReadLaneIndex(); i < num_rows * kChunks / 2; i += kWarpSize) {
    const int row = first_row + i / (kChunks / 2), chunk = i % (kChunks / 2) * 2;
    const uint4 a = LoadShared16(at(row, chunk)), b = LoadShared16(at(row, chunk + 1));
    const float factor = of_row(row) * (kBf16 ? scale.to_f16 : 1.f);
    const auto convert = [=](uint32 pair) {
      if (!kBf16 && factor == 1.f) return pair;
      return Pack16<false>(ToFloat<kBf16>(static_cast<uint16>(pair)) * factor,
                           ToFloat<kBf16>(static_cast<uint16>(pair >> 16)) * factor);
    };
    StoreShared16(at(row, chunk),
                  make_uint4(convert(a.x), convert(a.z), convert(b.x), convert(b.z)));
    StoreShared16(at(row, chunk + 1),
                  make_uint4(convert(a.y), convert(a.w), convert(b.y), convert(b.w)));
  }
}

// --- products -----------------------------------------------------------------------------------

// s += Q K^T over kSteps steps of 32 head dims. load_q(a, m, i) gives the fragment of rows m and 16
// dims i, load_k(b, n, k) what ldmatrix gives of 16 keys n and 32 dims k.
template <bool kE5m2, int kSteps, int kM, int kN2, class LoadQ, class LoadK>
JFA_DEVICE void ScoreGemm8(float (&s)[kM][kN2][4], const LoadQ& load_q, const LoadK& load_k) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32 a[2][kM][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < kM; ++m) load_q(a[half][m], m, 2 * k + half);
    }
#pragma unroll
    for (int n = 0; n < kN2 / 2; ++n) {
      uint32 keys[4];
      load_k(keys, n, k);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32 b[4];
        Float8<kE5m2>::InOrder(keys[half], b[0], b[1]);
        Float8<kE5m2>::InOrder(keys[2 + half], b[2], b[3]);
        MmaColumn<false>(s, n, a[half], b);
      }
    }
  }
}

// out += P V for 16 keys. load_v(b, n) gives what transposing ldmatrix gives of columns 32 n on.
template <bool kE5m2, int kM, int kN2, class LoadV>
JFA_DEVICE void OutputGemm8(float (&out)[kM][kN2][4], const uint32 (&p)[kM][4],
                            const LoadV& load_v) {
#pragma unroll
  for (int n = 0; n < kN2 / 4; ++n) {
    uint32 values[4];
    load_v(values, n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32 b[4];
      Float8<kE5m2>::EvenAndOdd(values[2 * half], b[0], b[2]);
      Float8<kE5m2>::EvenAndOdd(values[2 * half + 1], b[1], b[3]);
      MmaColumn<false>(out, 2 * n + half, p, b);
    }
  }
}

// Puts neighbouring columns into neighbouring elements: block 2 n has 16 n + 4 j and the next,
// block 2 n + 1 the two after.
template <int kM, int kN2>
JFA_DEVICE void AdjoinColumns(float (&out)[kM][kN2][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN2; n += 2) {
#pragma unroll
      for (int row = 0; row < 4; row += 2) {
        const float x = out[m][n][row + 1];
        out[m][n][row + 1] = out[m][n + 1][row];
        out[m][n + 1][row] = x;
      }
    }
  }
}

// Such a pair of blocks, rounded (PackBlock), to rows first_row on and columns 16 n on of a tile.
template <class Tile>
JFA_DEVICE void StoreAdjoined(uint32 tile, int first_row, int n, int lane, const uint32 (&r)[4]) {
  const int row = first_row + lane / 4, chunk = 2 * n + lane % 4 / 2;
  StoreShared8(tile + Tile::Offset(row, chunk) + lane % 2 * 8, r[0], r[2]);
  StoreShared8(tile + Tile::Offset(row + 8, chunk) + lane % 2 * 8, r[1], r[3]);
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FRAGMENTS_FP8_CUH_
