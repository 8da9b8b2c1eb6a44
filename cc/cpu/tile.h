// Between tensors in memory (any dtype, rows apart) and the f32 tiles that the products read.
//
//   LoadRows         rows -> [rows][ld], columns zero-padded to whole vectors
//   LoadTransposed   rows -> [cols][lanes]; a null row gives zeros
//   StoreRows, StoreTransposed   the way back, times a factor
//
// Nothing beyond a row's columns is read or written, whatever the padding of the tile.
#ifndef JAX_FLASHATTN_CC_CPU_TILE_H_
#define JAX_FLASHATTN_CC_CPU_TILE_H_

#include "simd.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

JFA_INLINE int RoundUp(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Leading dimension of a tile: an odd number of cache lines, so that the elements of one column,
// which the products walk down, do not fall into a few L1 sets.
JFA_INLINE int LeadingDim(int cols) { return RoundUp(cols, 16) | 16; }

template <class T>
JFA_INLINE Vec LoadPartial(const T* p, int count) {
  T buffer[kWidth];
  __builtin_memset(buffer, 0, sizeof(buffer));
  __builtin_memcpy(buffer, p, count * sizeof(T));
  return LoadF(buffer);
}

template <class T>
JFA_INLINE void StorePartial(T* p, Vec v, int count) {
  T buffer[kWidth];
  StoreF(buffer, v);
  __builtin_memcpy(p, buffer, count * sizeof(T));
}

// Far enough ahead to overlap misses, little enough to fit the L1's fill buffers; 2 to 8 are alike.
constexpr int kPrefetchRows = 4;

// Rows of one head are far apart, often a page each, where the hardware does not prefetch. `src`
// may lie beyond the tensor or be null: a prefetch never faults.
template <class T>
JFA_INLINE void PrefetchRow(const T* src, int cols) {
  const uintptr_t row = reinterpret_cast<uintptr_t>(src);
  for (int c = 0; c < cols * static_cast<int>(sizeof(T)); c += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(row + c));
  }
}

template <class T>
static inline void LoadRow(const T* src, int cols, float* dst) {
  int c = 0;
  for (; c + kWidth <= cols; c += kWidth) Store(dst + c, LoadF(src + c));
  if (c < cols) Store(dst + c, LoadPartial(src + c, cols - c));
}

template <class T>
static void LoadRows(const T* src, int64_t stride, int rows, int cols, float* dst, int ld) {
  for (int r = 0; r < rows; ++r) {
    PrefetchRow(src + (r + kPrefetchRows) * stride, cols);
    LoadRow(src + r * stride, cols, dst + r * ld);
  }
}

template <class T>
static void LoadRows(const T* const* src, int rows, int cols, float* dst, int ld) {
  for (int r = 0; r < rows; ++r) {
    if (r + kPrefetchRows < rows) PrefetchRow(src[r + kPrefetchRows], cols);
    if (src[r]) {
      LoadRow(src[r], cols, dst + r * ld);
    } else {
      __builtin_memset(dst + r * ld, 0, RoundUp(cols, kWidth) * sizeof(float));
    }
  }
}

template <class T>
static void StoreRows(const float* src, int ld, int rows, int cols, float factor, T* dst,
                      int64_t stride) {
  for (int r = 0; r < rows; ++r) {
    int c = 0;
    for (; c + kWidth <= cols; c += kWidth) {
      StoreF(dst + r * stride + c, Load(src + r * ld + c) * factor);
    }
    if (c < cols) StorePartial(dst + r * stride + c, Load(src + r * ld + c) * factor, cols - c);
  }
}

template <class T>
static void ZeroRows(T* dst, int64_t stride, int64_t rows, int cols) {
  for (int64_t r = 0; r < rows; ++r) __builtin_memset(dst + r * stride, 0, cols * sizeof(T));
}

// The columns of kWidth rows that can be transposed in pairs, a pair being an element of 32 bits;
// returns their number. It takes half the shuffles, of which a core does one per cycle.
template <class T>
JFA_INLINE int LoadPairsTransposed(const T* const*, int, int, float*) {
  return 0;
}

JFA_INLINE int LoadPairsTransposed(const BF16* const* src, int lanes, int cols, float* dst) {
  int c = 0;
  for (; c + 2 * kWidth <= cols; c += 2 * kWidth) {
    Vec m[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      m[i] = Vec{};
      if (src[i]) __builtin_memcpy(&m[i], src[i] + c, sizeof(Vec));
    }
    Transpose(m);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      Store(dst + (c + 2 * i) * lanes, (Vec)((UVec)m[i] << 16));
      Store(dst + (c + 2 * i + 1) * lanes, (Vec)((UVec)m[i] & 0xffff0000u));
    }
  }
  return c;
}

template <class T>
static void LoadTransposed(const T* const* src, int lanes, int cols, float* dst) {
  for (int l = 0; l < lanes; l += kWidth) {
    for (int c = LoadPairsTransposed(src + l, lanes, cols, dst + l); c < cols; c += kWidth) {
      const int count = Min(kWidth, cols - c);
      Vec m[kWidth];
      if (count == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) m[i] = src[l + i] ? LoadF(src[l + i] + c) : Vec{};
      } else {
        for (int i = 0; i < kWidth; ++i) {
          m[i] = src[l + i] ? LoadPartial(src[l + i] + c, count) : Vec{};
        }
      }
      Transpose(m);
      for (int i = 0; i < count; ++i) Store(dst + (c + i) * lanes + l, m[i]);
    }
  }
}

// factors: one per lane. A null row is not written.
template <class T>
static void StoreTransposed(const float* src, int lanes, int cols, const float* factors,
                            T* const* dst) {
  for (int l = 0; l < lanes; l += kWidth) {
    const Vec factor = Load(factors + l);
    for (int c = 0; c < cols; c += kWidth) {
      const int count = Min(kWidth, cols - c);
      Vec m[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        m[i] = i < count ? Load(src + (c + i) * lanes + l) * factor : Vec{};
      }
      Transpose(m);
      for (int i = 0; i < kWidth; ++i) {
        if (!dst[l + i]) continue;
        if (count == kWidth) {
          StoreF(dst[l + i] + c, m[i]);
        } else {
          StorePartial(dst[l + i] + c, m[i], count);
        }
      }
    }
  }
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_TILE_H_
