// check.h: errors at the public boundary. Messages read "[function] what was expected; got what".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace mfa {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws std::invalid_argument (ValueError in Python) unless `holds`.
template <typename... Parts>
void check(bool holds, std::string_view function, const Parts&... parts) {
  if (!holds) throw std::invalid_argument(concat("[", function, "] ", parts...));
}

}  // namespace mfa
