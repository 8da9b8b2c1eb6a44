// FFI handlers of the CPU kernels, for module.cc to hand to Python.
#ifndef JAX_FLASHATTN_CC_CPU_HANDLERS_H_
#define JAX_FLASHATTN_CC_CPU_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jfa::cpu {

XLA_FFI_DECLARE_HANDLER_SYMBOL(FwdExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(BwdExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(PagedExecute);

}  // namespace jfa::cpu

#endif  // JAX_FLASHATTN_CC_CPU_HANDLERS_H_
