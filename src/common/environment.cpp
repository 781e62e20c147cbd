#include "common/environment.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "common/check.h"

namespace mfa {
namespace {

EnvironmentNumber read(const char* name, int64_t least, int64_t most) {
  const char* given = std::getenv(name);
  if (!given || !*given) return {};
  const std::string_view text = given;
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error == std::errc() && end == text.data() + text.size() && number >= least && number <= most)
    return {number, {}};
  return {std::nullopt, concat("[", name, "] a whole number from ", least, " to ", most, " was expected; got ", text)};
}

}  // namespace

EnvironmentNumber environment_threads() { return read("MFA_NUM_THREADS", 1, 4096); }
EnvironmentNumber environment_packed_weights_megabytes() { return read("MFA_PACKED_WEIGHTS_MB", 0, int64_t{1} << 40); }

void check_environment() {
  for (const EnvironmentNumber& number : {environment_threads(), environment_packed_weights_megabytes()})
    if (!number.error.empty()) throw std::invalid_argument(number.error);
}

}  // namespace mfa
