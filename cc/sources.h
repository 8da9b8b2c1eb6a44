// The kernel sources as the compiler sees them: embedded, or from $JFA_KERNEL_DIR.
#ifndef JAX_FLASHATTN_CC_SOURCES_H_
#define JAX_FLASHATTN_CC_SOURCES_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace jfa {

struct SourceFile {
  std::string name;
  std::string contents;
  std::string sha256;                 // of the contents
  std::vector<std::string> includes;  // names in `#include "..."` lines, in order
};
using SourceFiles = std::vector<std::shared_ptr<const SourceFile>>;

// All files of cc/kernels that `source` includes, directly or not, sorted by name. A name that is
// no kernel file is left out: the compiler will say so.
SourceFiles IncludedFiles(std::string_view source);

// Every kernel file, sorted by name.
SourceFiles AllKernelFiles();

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_SOURCES_H_
