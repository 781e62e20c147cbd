// ceil_div.h: how many parts of a size cover a length.
#pragma once

#include <cstdint>

namespace mfa {

constexpr int64_t ceil_div(int64_t length, int64_t part) { return (length + part - 1) / part; }

}  // namespace mfa
