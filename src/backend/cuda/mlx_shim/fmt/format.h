// format.h: MLX's CUDA headers include fmt, which its wheel does not bring; what uses it is never instantiated here.
#pragma once

#include <string>

namespace fmt {

template <typename... Args>
std::string format(Args&&...);

}  // namespace fmt
