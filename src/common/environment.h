// environment.h: the numbers among this library's environment variables.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace mfa {

struct EnvironmentNumber {
  std::optional<int64_t> value;  // nullopt if the variable is not set, empty or wrong
  std::string error;             // "[NAME] what was expected; got what", if it is wrong
};
EnvironmentNumber environment_threads();                   // MFA_NUM_THREADS
EnvironmentNumber environment_packed_weights_megabytes();  // MFA_PACKED_WEIGHTS_MB

// Throws std::invalid_argument if one of them is wrong. Kernels are selected after that, so nothing runs with a default
// that a user thinks is replaced.
void check_environment();

}  // namespace mfa
