#include "attention/neighbourhood.h"

#include <limits>
#include <string>

#include "common/check.h"

namespace mfa {

void validate(const Neighbourhood& n, const char* function) {
  check(n.axes >= 1 && n.axes <= 3, function, "seq_shape must have 1 to 3 axes; got ", n.axes);
  const auto listed = [&](int32_t NeighbourhoodAxis::* value) {
    std::string text = "(";
    for (int32_t x = 0; x < n.axes; ++x) text += (x ? ", " : "") + std::to_string(n.axis[x].*value);
    return text + (n.axes == 1 ? ",)" : ")");
  };
  using Axis = NeighbourhoodAxis;
  for (int32_t x = 0; x < n.axes; ++x) {
    const Axis& a = n.axis[x];
    check(a.size >= 1, function, "seq_shape must be positive; got ", listed(&Axis::size));
    check(a.window >= 1, function, "window_size must be positive; got ", listed(&Axis::window));
    check(a.stride >= 1 && a.stride <= a.window, function, "stride must be 1 to window_size on each axis; got ",
          listed(&Axis::stride), " for ", listed(&Axis::window));
    check(a.dilation >= 1 && a.dilation <= a.size, function, "dilation must be 1 to seq_shape on each axis; got ",
          listed(&Axis::dilation), " for ", listed(&Axis::size));
    // Sizes of interleaved sequences are rounded up.
    check(int64_t{a.size} + a.dilation <= std::numeric_limits<int32_t>::max(), function,
          "seq_shape plus dilation must be below 2^31 on each axis; got ", listed(&Axis::size), " and ",
          listed(&Axis::dilation));
  }
}

}  // namespace mfa
