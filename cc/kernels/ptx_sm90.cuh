// Hopper's own instructions (sm_90a), one per function: the tensor copy engine (TMA), warpgroup
// matrix products (wgmma) and register reallocation.
#ifndef JAX_FLASHATTN_CC_KERNELS_PTX_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_PTX_SM90_CUH_

#include "barriers.cuh"
#include "params.h"
#include "ptx.cuh"

namespace jfa {

// Inline, because a plain store of a uint4 that was put together from selects is split in four; and
// under a predicate, because rows of many such stores else branch around each.
JFA_DEVICE void StoreGlobal16(void* gmem, const uint32 (&w)[4], bool writes) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(gmem),
      "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(static_cast<int>(writes))
      : "memory");
}

// One lane of a warp whose lanes are together, always the same one. ptxas knows that it is alone;
// of lane 0 it doesn't, and makes each order to the copy engine a loop over lanes.
JFA_DEVICE bool ElectLane() {
  uint32 elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected != 0;
}

// --- the tensor copy engine ---

// Orders this thread's plain accesses to shared memory before those of the copy engine and wgmma.
JFA_DEVICE void FenceProxyAsync() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

JFA_DEVICE void TmaPrefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// L2 policies as createpolicy makes them.
constexpr uint64 kL2EvictNormal = 0x1000000000000000ull;
constexpr uint64 kL2EvictFirst = 0x12f0000000000000ull;
constexpr uint64 kL2EvictLast = 0x14f0000000000000ull;

// A box that starts at (column, row, head, batch) of the mapped tensor; zeros beyond its edges.
JFA_DEVICE void TmaLoad(uint32 smem, const TensorMap* map, uint32 barrier, int column, int row,
                        int head, int batch, uint64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}
// The reverse; what lies beyond the tensor's edges isn't written.
JFA_DEVICE void TmaStore(const TensorMap* map, uint32 smem, int column, int row, int head,
                         int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(smem), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
JFA_DEVICE void TmaStoreCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's stores have read shared memory.
JFA_DEVICE void TmaStoreWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// --- clusters: CTAs that run at the same time and reach each other's shared memory ---

// Counts threads that have exited as arrived. Orders nothing: a release would wait for all stores
// to global memory, too.
JFA_DEVICE void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
JFA_DEVICE void ClusterWait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// What has address `smem` here, in the shared memory of the cluster's CTA number `rank`.
JFA_DEVICE uint32 MapToCta(uint32 smem, int rank) {
  uint32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem), "r"(rank));
  return address;
}
// Stores to a CTA of the cluster, whose mbarrier counts the bytes that have come.
JFA_DEVICE void StoreToCta(uint32 address, uint32 barrier, float2 x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          address),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}
JFA_DEVICE void StoreToCta(uint32 address, uint32 barrier, float4 x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}

// --- registers ---

template <int kRegisters>
JFA_DEVICE void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
JFA_DEVICE void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- wgmma: d += a b for a warpgroup, a 64 x 16, b 16 x kN, d 64 x kN in f32 ---

// Orders register accesses before the wgmmas that follow.
JFA_DEVICE void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
JFA_DEVICE void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
JFA_DEVICE void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what touches `x` over this point: it believes that a wgmma's
// result is there when the statement is passed.
template <int kM, int kN>
JFA_DEVICE void Pin(float (&x)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(x[m][n][e])::"memory");
    }
  }
}

// Shared memory operand in panels: rows of 128 bytes in groups of 8 (1024 bytes), swizzled;
// `leading` bytes from panel to panel, which counts only where a product's outer dimension runs
// over panels.
JFA_DEVICE uint64 PanelDescriptor(uint32 address, uint32 leading) {
  constexpr uint64 kSwizzle128 = 1ull << 62, kEightRows = 1024 >> 4;
  return kSwizzle128 | kEightRows << 32 | static_cast<uint64>(leading >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

// Products of every width in use; the specialisations below hold nothing but the instruction.
//   Ss  a from shared memory (rows along the product's inner dimension), Rs  a from registers
//   b   from shared memory; kTransB (kTransA): stored with the outer dimension along rows
//   accumulate 0: d is overwritten
template <int kN>
struct Wgmma;

// clang-format off
#define JFA_R0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define JFA_R1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define JFA_R2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define JFA_R3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define JFA_R4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define JFA_R5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define JFA_R6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define JFA_R7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define JFA_R8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define JFA_R9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define JFA_R10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define JFA_R11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define JFA_R12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define JFA_R13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define JFA_R14 "%112,%113,%114,%115,%116,%117,%118,%119"
#define JFA_R15 "%120,%121,%122,%123,%124,%125,%126,%127"

// All registers of an accumulator of 16, 32, ... columns.
#define JFA_L1 JFA_R0
#define JFA_L2 JFA_L1 "," JFA_R1
#define JFA_L3 JFA_L2 "," JFA_R2
#define JFA_L4 JFA_L3 "," JFA_R3
#define JFA_L5 JFA_L4 "," JFA_R4
#define JFA_L6 JFA_L5 "," JFA_R5
#define JFA_L7 JFA_L6 "," JFA_R6
#define JFA_L8 JFA_L7 "," JFA_R7
#define JFA_L9 JFA_L8 "," JFA_R8
#define JFA_L10 JFA_L9 "," JFA_R9
#define JFA_L11 JFA_L10 "," JFA_R10
#define JFA_L12 JFA_L11 "," JFA_R11
#define JFA_L13 JFA_L12 "," JFA_R12
#define JFA_L14 JFA_L13 "," JFA_R13
#define JFA_L15 JFA_L14 "," JFA_R14
#define JFA_L16 JFA_L15 "," JFA_R15

#define JFA_D(i) "+f"(d[0][2*i][0]), "+f"(d[0][2*i][1]), "+f"(d[0][2*i][2]), "+f"(d[0][2*i][3]), \
                 "+f"(d[0][2*i+1][0]), "+f"(d[0][2*i+1][1]), "+f"(d[0][2*i+1][2]), "+f"(d[0][2*i+1][3])
#define JFA_D1() JFA_D(0)
#define JFA_D2() JFA_D1(), JFA_D(1)
#define JFA_D3() JFA_D2(), JFA_D(2)
#define JFA_D4() JFA_D3(), JFA_D(3)
#define JFA_D5() JFA_D4(), JFA_D(4)
#define JFA_D6() JFA_D5(), JFA_D(5)
#define JFA_D7() JFA_D6(), JFA_D(6)
#define JFA_D8() JFA_D7(), JFA_D(7)
#define JFA_D9() JFA_D8(), JFA_D(8)
#define JFA_D10() JFA_D9(), JFA_D(9)
#define JFA_D11() JFA_D10(), JFA_D(10)
#define JFA_D12() JFA_D11(), JFA_D(11)
#define JFA_D13() JFA_D12(), JFA_D(12)
#define JFA_D14() JFA_D13(), JFA_D(13)
#define JFA_D15() JFA_D14(), JFA_D(14)
#define JFA_D16() JFA_D15(), JFA_D(15)

#define JFA_WGMMA_SS(TYPE, kN, LIST, OUT, I0, I1, I2, I3, I4)                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." TYPE "." TYPE " {" LIST "}, %"  \
               #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 ";\n}"                                  \
               : OUT() : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA ? 1 : 0),                     \
                 "n"(kTransB ? 1 : 0))
#define JFA_WGMMA_RS(TYPE, kN, LIST, OUT, I0, I1, I2, I3, I4, I5, I6)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." TYPE "." TYPE " {" LIST "}, {%" \
               #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}"             \
               : OUT() : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),       \
                 "n"(kTransB ? 1 : 0))
#define JFA_DEFINE_WGMMA(kN, LIST, OUT, I0, I1, I2, I3, I4, I5, I6)                              \
  template <>                                                                                     \
  struct Wgmma<kN> {                                                                              \
    template <bool kBf16, bool kTransB, bool kTransA = false>                                     \
    static JFA_DEVICE void Ss(float (&d)[1][kN / 8][4], uint64 a, uint64 b, int accumulate) {     \
      if constexpr (kBf16) {                                                                      \
        JFA_WGMMA_SS("bf16", kN, LIST, OUT, I0, I1, I2, I3, I4);                                  \
      } else {                                                                                    \
        JFA_WGMMA_SS("f16", kN, LIST, OUT, I0, I1, I2, I3, I4);                                   \
      }                                                                                           \
    }                                                                                             \
    template <bool kBf16, bool kTransB>                                                           \
    static JFA_DEVICE void Rs(float (&d)[1][kN / 8][4], const uint32 (&a)[4], uint64 b,           \
                              int accumulate) {                                                   \
      if constexpr (kBf16) {                                                                      \
        JFA_WGMMA_RS("bf16", kN, LIST, OUT, I0, I1, I2, I3, I4, I5, I6);                          \
      } else {                                                                                    \
        JFA_WGMMA_RS("f16", kN, LIST, OUT, I0, I1, I2, I3, I4, I5, I6);                           \
      }                                                                                           \
    }                                                                                             \
  };

JFA_DEFINE_WGMMA(32, JFA_L2, JFA_D2, 16, 17, 18, 19, 20, 21, 22)
JFA_DEFINE_WGMMA(48, JFA_L3, JFA_D3, 24, 25, 26, 27, 28, 29, 30)
JFA_DEFINE_WGMMA(64, JFA_L4, JFA_D4, 32, 33, 34, 35, 36, 37, 38)
JFA_DEFINE_WGMMA(80, JFA_L5, JFA_D5, 40, 41, 42, 43, 44, 45, 46)
JFA_DEFINE_WGMMA(96, JFA_L6, JFA_D6, 48, 49, 50, 51, 52, 53, 54)
JFA_DEFINE_WGMMA(112, JFA_L7, JFA_D7, 56, 57, 58, 59, 60, 61, 62)
JFA_DEFINE_WGMMA(128, JFA_L8, JFA_D8, 64, 65, 66, 67, 68, 69, 70)
JFA_DEFINE_WGMMA(144, JFA_L9, JFA_D9, 72, 73, 74, 75, 76, 77, 78)
JFA_DEFINE_WGMMA(160, JFA_L10, JFA_D10, 80, 81, 82, 83, 84, 85, 86)
JFA_DEFINE_WGMMA(176, JFA_L11, JFA_D11, 88, 89, 90, 91, 92, 93, 94)
JFA_DEFINE_WGMMA(192, JFA_L12, JFA_D12, 96, 97, 98, 99, 100, 101, 102)
JFA_DEFINE_WGMMA(208, JFA_L13, JFA_D13, 104, 105, 106, 107, 108, 109, 110)
JFA_DEFINE_WGMMA(224, JFA_L14, JFA_D14, 112, 113, 114, 115, 116, 117, 118)
JFA_DEFINE_WGMMA(240, JFA_L15, JFA_D15, 120, 121, 122, 123, 124, 125, 126)
JFA_DEFINE_WGMMA(256, JFA_L16, JFA_D16, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_PTX_SM90_CUH_
