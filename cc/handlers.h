// FFI handlers of the CUDA kernels and the state they share, for module.cc to hand to Python.
#ifndef JAX_FLASHATTN_CC_HANDLERS_H_
#define JAX_FLASHATTN_CC_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jfa {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaFwdInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaFwdInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaFwdExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaBwdInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaBwdInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaBwdExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaServeInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaServeInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CudaServeExecute);

// The type of all those handlers' state, to be registered for platform CUDA.
XLA_FFI_TypeId* CudaStateTypeId();
XLA_FFI_TypeInfo* CudaStateTypeInfo();

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_HANDLERS_H_
