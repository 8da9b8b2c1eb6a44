// The device sources, as embed_kernels.cmake puts them into the module at build time.
#ifndef JAX_FLASHATTN_CC_KERNEL_SOURCES_H_
#define JAX_FLASHATTN_CC_KERNEL_SOURCES_H_

#include <cstddef>

namespace jfa {

struct EmbeddedFile {
  const char* name;  // as kernels write it in #include "..."
  const char* data;
  size_t size;
};

// Every file of cc/kernels, sorted by name.
extern const EmbeddedFile kKernelSources[];
extern const size_t kNumKernelSources;

// Files of cc/ whose change changes what is launched (plan*), and their SHA-256.
struct HashedFile {
  const char* name;
  const char* sha256;
};
extern const HashedFile kPlanSources[];
extern const size_t kNumPlanSources;

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNEL_SOURCES_H_
