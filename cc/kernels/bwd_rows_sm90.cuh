// What both Hopper backward kernels do with rows and keys at a sequence's ends: they clear what was
// copied from beyond them, and write gradients of keys no further.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_ROWS_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_ROWS_SM90_CUH_

#include "kv_source.cuh"
#include "panels_sm90.cuh"
#include "row_pieces_sm90.cuh"

namespace jfa {

// Consumer warpgroups call it, each for itself: that both write the same zeros does no harm, and
// they need no barrier between them. Tiles: BwdTilesSm90<C, ...>.
template <class C, class Tiles>
struct BwdRowsSm90 {
  static constexpr int kGroupKeys = 64;  // of one warpgroup: M of wgmma
  using Work = typename Tiles::Work;

  // Waits for K and V; this warpgroup works on the tile's keys from `first` on.
  static JFA_DEVICE void AwaitKeys(const ProblemParams& problem, uint32 smem, const Work& work,
                                   int first, int group) {
    const Sequence& sequence = work.sequence;
    MbarrierWait(Tiles::Address(smem, Tiles::kFullKv), 0);
    const int keys = sequence.kv_len - work.key0;
    if (keys >= Tiles::kN || sequence.kv_begin + sequence.kv_len == problem.kv_len) return;
    const int begin = Max(keys, first), end = first + kGroupKeys;
    ClearRows<Tiles::kPanels, Tiles::kPanelBytesN>(smem + Tiles::kSmemK, begin, end);
    ClearRows<Tiles::kPanelsV, Tiles::kPanelBytesN>(smem + Tiles::kSmemV, begin, end);
    Publish(group);
  }

  // Waits for Q or dO of a step, whichever kFull says.
  template <int kFull>
  static JFA_DEVICE void AwaitRows(const ProblemParams& problem, uint32 smem, const Work& work,
                                   const typename Tiles::Step& step,
                                   const typename Tiles::Ring& ring, int group) {
    static_assert(kFull == Tiles::kFullQ || kFull == Tiles::kFullDo, "barriers of rows");
    constexpr int kOther = kFull == Tiles::kFullQ ? Tiles::kFullDo : Tiles::kFullQ;
    const Sequence& sequence = work.sequence;
    MbarrierWait(Tiles::Address(smem, kFull, ring.stage), ring.parity);
    const int rows = sequence.q_len - step.block * Tiles::kM;
    if (rows >= Tiles::kM || sequence.q_begin + sequence.q_len == problem.q_len) return;
    // Both are cleared now: this warpgroup, too, reads the other later.
    MbarrierWait(Tiles::Address(smem, kOther, ring.stage), ring.parity);
    ClearRows<Tiles::kPanels, Tiles::kPanelBytesM>(
        smem + Tiles::kSmemQ + ring.stage * Tiles::kBytesQ, rows, Tiles::kM);
    ClearRows<Tiles::kPanelsV, Tiles::kPanelBytesM>(
        smem + Tiles::kSmemDo + ring.stage * Tiles::kBytesDo, rows, Tiles::kM);
    Publish(group);
  }

  // A lane's row `half` of dK or dV (as in StoreRow), that of `key`, times `factor`.
  template <int kBlocks>
  static JFA_DEVICE void StoreGradient(const float (&x)[1][kBlocks][4], int half,
                                       const TensorArg& target, const Work& work, int key,
                                       float factor, int columns) {
    const Sequence& sequence = work.sequence;
    StoreRow<C::kBf16>(x, half, factor, true,
                       RowPointer(target, work.item.batch, work.item.head, sequence.kv_begin + key),
                       columns, key < sequence.kv_rows);
  }

 private:
  // What this warpgroup's threads wrote, to its products.
  static JFA_DEVICE void Publish(int group) {
    FenceProxyAsync();
    NamedBarrierSync(Tiles::kGroup + group, Tiles::kGroupThreads);
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_ROWS_SM90_CUH_
