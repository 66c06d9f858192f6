// Errors that reach Python as classes of lltm_ray.errors.
#pragma once
#include <stdexcept>
#include <string>

namespace lltm_ray {

enum class ErrorKind { native, device, memory, shape, dtype };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string &message) : std::runtime_error(message), kind(kind) {}
  const ErrorKind kind;
};

[[noreturn]] inline void fail(ErrorKind kind, const std::string &message) { throw Error(kind, message); }

}  // namespace lltm_ray
