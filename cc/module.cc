// The Python module `_native`: FFI handlers as capsules, and plain functions. No logic of its own.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>

#include "cc/cpu/attention.h"
#include "cc/cpu/handlers.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict CpuHandlers() {
  nb::dict handlers;
  handlers["jfa_fwd_v1"] = Capsule(jfa::cpu::FwdExecute);
  handlers["jfa_bwd_v1"] = Capsule(jfa::cpu::BwdExecute);
  return handlers;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("cpu_handlers", &CpuHandlers);
  m.def("cpu_isa", &jfa::cpu::Isa);
  m.def(
      "cpu_bwd_scratch_floats",
      [](int64_t q_len, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
        return jfa::cpu::BwdScratchFloats(1, q_len, num_heads, num_kv_heads, head_dim);
      },
      nb::arg("q_len"), nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"));
}
