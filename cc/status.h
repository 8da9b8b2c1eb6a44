// Result of anything that can fail on the host side: a code that maps to an FFI error, and a text.
#ifndef JAX_FLASHATTN_CC_STATUS_H_
#define JAX_FLASHATTN_CC_STATUS_H_

#include <string>
#include <utility>

namespace jfa {

enum class StatusCode {
  kOk,
  kInvalidArgument,     // a wrong operand or attribute
  kUnimplemented,       // a valid call that no kernel serves
  kFailedPrecondition,  // something is missing on this machine: driver, NVRTC, cached kernel
  kInternal,
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status OkStatus() { return Status(); }
inline Status InvalidArgument(std::string message) {
  return Status(StatusCode::kInvalidArgument, std::move(message));
}
inline Status Unimplemented(std::string message) {
  return Status(StatusCode::kUnimplemented, std::move(message));
}
inline Status FailedPrecondition(std::string message) {
  return Status(StatusCode::kFailedPrecondition, std::move(message));
}
inline Status Internal(std::string message) {
  return Status(StatusCode::kInternal, std::move(message));
}

}  // namespace jfa

#define JFA_RETURN_IF_ERROR(expr)              \
  do {                                         \
    ::jfa::Status jfa_status_ = (expr);        \
    if (!jfa_status_.ok()) return jfa_status_; \
  } while (false)

#endif  // JAX_FLASHATTN_CC_STATUS_H_
