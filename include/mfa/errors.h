// errors.h: what the functions of this library throw beside the exceptions of the standard library.
#pragma once

#include <stdexcept>

#include "mfa/api.h"

namespace mfa {

// A derivative that does not exist: NotImplementedError in Python.
class MFA_API NotImplemented : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace mfa
