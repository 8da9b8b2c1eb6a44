// What a cubin says about its kernel: read from the ELF file, so that it works without a GPU.
#ifndef JAX_FLASHATTN_CC_CUBIN_H_
#define JAX_FLASHATTN_CC_CUBIN_H_

#include <string>
#include <string_view>

#include "cc/status.h"

namespace jfa {

// -1 is "the cubin doesn't say".
struct KernelResources {
  int registers = -1;     // per thread, at launch
  int local_bytes = -1;   // stack frame per thread; spills live there too
  int shared_bytes = -1;  // static shared memory; from sm_90 on with the 1 KiB the system reserves
  int param_bytes = -1;   // all parameters together
  int spill_bytes = -1;   // stores and loads, from the compiler's log
};

// Fails if `cubin` is no cubin or holds no kernel `symbol`. Never reads outside `cubin`.
Status ReadResources(std::string_view cubin, std::string_view symbol, KernelResources* resources);

// Sum of the spill stores and loads that ptxas reports in NVRTC's log; -1 if the log has none.
int SpillBytes(std::string_view log);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_CUBIN_H_
