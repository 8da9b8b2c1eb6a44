// Keys and values of 8-bit floats for fwd_sm90.cuh, whose products want 16 bits: as f16, which
// holds every e4m3 and e5m2.
//
//   K, V  --copy engine-->  8 bits, shared memory  --three warps, by way of registers-->  tiles of
//                                                                    f16 as they are of 16-bit keys
//
// Order       One ring of kStages8 buffers has blocks of K and of V in the order in which they are
//             used, so that nobody waits for what comes behind; a note says what a buffer holds.
// Padding     Values behind a sequence's keys become zeros here: it may be NaN, which a weight of
//             zero doesn't silence.
// Queries     Those of bf16 become f16 too, by the warp that owns the rows, with a power of two as
//             in fragments_fp8.cuh.
// Scales      k's goes with the softmax's, v's with the factors of the output's rows.
#ifndef JAX_FLASHATTN_CC_KERNELS_KEYS_FP8_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_KEYS_FP8_SM90_CUH_

#include "barriers.cuh"
#include "copies_sm90.cuh"
#include "fragments_fp8.cuh"

namespace jfa {

// Kernel: FwdSm90<C>, whose shared memory this is.
template <class C, class Kernel>
struct KeysFp8Sm90 {
  static constexpr int kWarps = 3;  // that convert, from warp 1 of the CTA on
  static constexpr int kAtOnce = C::kBlockM > 128 ? 2 : 4;  // loads, as registers allow
  static constexpr int kRowBytes = 128;
  static constexpr int kPanelBytes = C::kBlockN * kRowBytes;  // 128 columns of 8 bits, 64 of 16
  static constexpr int kPanelsK = (C::kHeadDim + 127) / 128, kPanelsV = (C::kHeadDimV + 127) / 128;
  static constexpr int kBytes = (kPanelsK > kPanelsV ? kPanelsK : kPanelsV) * kPanelBytes;

  using Ring = RingPosition<C::kStages8>;
  using KeyPlace = typename CopiesSm90<C>::KeyPlace;

  // What a buffer holds: keys, values of which so many count, or that nothing follows.
  enum Note { kKeys = -1, kEnd = -2 };
  static constexpr int kNoteBytes = C::kFp8 ? 16 : 0;
  static JFA_DEVICE int* NoteAt(unsigned char* smem, int stage) {
    return reinterpret_cast<int*>(smem + Kernel::kSmemNotes) + stage;
  }

  // --- the producer -----------------------------------------------------------------------------

  static JFA_DEVICE void LoadKeys(const FwdSm90Params& params, unsigned char* smem, Ring& ring,
                                  const KeyPlace& place, bool leader) {
    Load<kPanelsK>(params, &params.k, smem, ring, place, kKeys, leader);
  }
  static JFA_DEVICE void LoadValues(const FwdSm90Params& params, unsigned char* smem, Ring& ring,
                                    const KeyPlace& place, int count, bool leader) {
    Load<kPanelsV>(params, &params.v, smem, ring, place, count, leader);
  }
  template <int kPanels>
  static JFA_DEVICE void Load(const FwdSm90Params& params, const TensorMap* map,
                              unsigned char* smem_pointer, Ring& ring, const KeyPlace& place,
                              int note, bool leader) {
    const uint32 smem = SmemAddress(smem_pointer);
    const uint32 full = Kernel::Address(smem, Kernel::kFull8, ring.stage),
                 empty = Kernel::Address(smem, Kernel::kEmpty8, ring.stage);
    MbarrierWait(empty, ring.parity ^ 1);
    if (leader) *NoteAt(smem_pointer, ring.stage) = note;
    __syncwarp();
    CopiesSm90<C>::template LoadKeys<kPanels>(params, map,
                                              smem + Kernel::kSmem8 + ring.stage * kBytes, full,
                                              empty, ring.parity, place, leader);
    ring.Advance();
  }
  // By one lane.
  static JFA_DEVICE void End(unsigned char* smem_pointer, const Ring& ring) {
    const uint32 smem = SmemAddress(smem_pointer);
    MbarrierWait(Kernel::Address(smem, Kernel::kEmpty8, ring.stage), ring.parity ^ 1);
    *NoteAt(smem_pointer, ring.stage) = kEnd;
    MbarrierArrive(Kernel::Address(smem, Kernel::kFull8, ring.stage));
  }

  // --- what converts ----------------------------------------------------------------------------

  // All there is, by kWarps warps.
  static JFA_DEVICE void Convert(unsigned char* smem_pointer) {
    const uint32 smem = SmemAddress(smem_pointer);
    const auto barrier = [=](int first, int stage) { return Kernel::Address(smem, first, stage); };
    Ring ring;
    RingPosition<C::kStages> k, v;
    while (true) {
      MbarrierWait(barrier(Kernel::kFull8, ring.stage), ring.parity);
      const int note = *NoteAt(smem_pointer, ring.stage);
      if (note == kEnd) return;
      const uint32 source = smem + Kernel::kSmem8 + ring.stage * kBytes;
      uint32 full;
      if (note == kKeys) {
        ConvertBlock<C::kE5m2K, Kernel::kPanels>(
            source, smem + Kernel::kSmemK + k.stage * Kernel::kBytesK, C::kBlockN,
            [&] { MbarrierWait(barrier(Kernel::kEmptyK, k.stage), k.parity ^ 1); });
        full = barrier(Kernel::kFullK, k.stage);
        k.Advance();
      } else {
        ConvertBlock<C::kE5m2V, Kernel::kPanelsV>(
            source, smem + Kernel::kSmemV + v.stage * Kernel::kBytesV, note,
            [&] { MbarrierWait(barrier(Kernel::kEmptyV, v.stage), v.parity ^ 1); });
        full = barrier(Kernel::kFullV, v.stage);
        v.Advance();
      }
      FenceProxyAsync();
      __syncwarp();
      Kernel::Arrive(full);
      Kernel::Arrive(barrier(Kernel::kEmpty8, ring.stage));
      ring.Advance();
    }
  }

  // A block as f16; rows from `count` on as zeros. Both tiles lie under the 128-byte swizzle. The
  // eight lanes that memory serves at a time have four chunks each of rows r and r ^ 5: no two of
  // them in the same banks, neither when they read nor when they write every other chunk.
  //
  // The next batch is asked for before one is converted: three warps can't hide a load otherwise.
  // wait_empty() waits for the target.
  template <bool kE5m2, int kPanels, class WaitEmpty>
  static JFA_DEVICE void ConvertBlock(uint32 source, uint32 target, int count,
                                      const WaitEmpty& wait_empty) {
    constexpr int kGroups = C::kBlockN / 8, kTurns = (kGroups + kWarps - 1) / kWarps;
    constexpr int kTurnBytes = kWarps * 8 * kRowBytes;
    constexpr int kBatch = kPanels >= kAtOnce ? 1 : kAtOnce / kPanels,
                  kBatches = (kTurns + kBatch - 1) / kBatch;
    const int lane = ReadLaneIndex(), quarter = lane % 4;
    const int warp = ReadThreadIndex() / kWarpSize - 1;
    const int row = (lane >> 3) ^ (lane & 4 ? 5 : 0);
    const uint32 from = source + (8 * warp + row) * kRowBytes + ((quarter ^ row) << 4);
    const uint32 to = target + (8 * warp + row) * kRowBytes + (((2 * quarter) ^ row) << 4);
    const auto has = [=](int turn) {  // the last turn may be without some warps
      return turn + 1 < kTurns || (turn < kTurns && warp + turn * kWarps < kGroups);
    };
    uint4 x[2][kBatch][kPanels];
    // act(its chunk of x, which chunk) for each chunk of a batch that this lane has.
    const auto for_each = [&](int batch, const auto& act) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int turn = batch * kBatch + i;
        if (!has(turn)) continue;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) act(x[batch % 2][i][panel], panel, turn);
      }
    };
    const auto load = [&](uint4& bytes, int panel, int turn) {
      bytes = LoadShared16((panel % 2 ? from ^ 64 : from) + panel / 2 * kPanelBytes +
                           turn * kTurnBytes);
    };
    const auto convert = [&](const uint4& bytes, int panel, int turn) {
      const uint32 offset = panel * kPanelBytes + turn * kTurnBytes;
      uint4 y;
      Float8<kE5m2>::InOrder(bytes.x, y.x, y.y);
      Float8<kE5m2>::InOrder(bytes.y, y.z, y.w);
      StoreShared16(to + offset, y);
      Float8<kE5m2>::InOrder(bytes.z, y.x, y.y);
      Float8<kE5m2>::InOrder(bytes.w, y.z, y.w);
      StoreShared16((to ^ 16) + offset, y);
    };
    for_each(0, load);
    wait_empty();
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
      if (batch + 1 < kBatches) for_each(batch + 1, load);
      for_each(batch, convert);
    }
    if (count >= C::kBlockN) return;
#pragma unroll 1
    for (int first = 8 * warp; first < C::kBlockN; first += 8 * kWarps) {
      if (first + row < count) continue;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const uint32 at = to + panel * kPanelBytes + (first - 8 * warp) * kRowBytes;
        StoreShared16(at, make_uint4(0, 0, 0, 0));
        StoreShared16(at ^ 16, make_uint4(0, 0, 0, 0));
      }
    }
  }

  // --- consumers --------------------------------------------------------------------------------

  // This warp's 16 rows of a tile of queries in place, of which num_rows count; returns what their
  // scores must be multiplied with. Rows are 128 bytes in panels under the swizzle.
  static JFA_DEVICE float ConvertQueries(uint32 rows, int panel_bytes, int num_rows) {
    if constexpr (!C::kBf16) return 1.f;
    constexpr int kChunks = C::kHeadDim / 8;
    const auto at = [=](int row, int chunk) {
      return rows + chunk / 8 * panel_bytes + row * kRowBytes + ((chunk % 8 ^ row % 8) << 4);
    };
    const QueryScale scale(LargestExponent<kChunks>(at, 0, Clamp(num_rows, 0, 16)));
    __syncwarp();
#pragma unroll 4
    for (int i = ReadLaneIndex(); i < 16 * kChunks; i += kWarpSize) {
      const uint32 chunk = at(i / kChunks, i % kChunks);
      const uint4 x = LoadShared16(chunk);
      StoreShared16(chunk, make_uint4(scale.Convert(x.x), scale.Convert(x.y), scale.Convert(x.z),
                                      scale.Convert(x.w)));
    }
    return scale.back;
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_KEYS_FP8_SM90_CUH_
