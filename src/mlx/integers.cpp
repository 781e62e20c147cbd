#include "mlx/integers.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "common/check.h"
#include "mlx/ops.h"

namespace mfa {
namespace {

constexpr int64_t kLeast = std::numeric_limits<int32_t>::min(), kMost = std::numeric_limits<int32_t>::max();

}  // namespace

mx::array to_int32(const mx::array& x, int rank, const char* name, const char* function, mx::Stream s) {
  check(mx::issubdtype(x.dtype(), mx::integer), function, name, " must have an integer dtype; got ", x.dtype());
  check(static_cast<int>(x.ndim()) == rank, function, name, " must have ", rank,
        rank == 1 ? " dimension" : " dimensions", "; got shape ", x.shape());
  if (is_known(x, s)) {
    if (x.dtype() == mx::int32 && x.flags().row_contiguous) return x;
    std::vector<int32_t> values;
    values.reserve(x.size());
    Integers(x).each([&](auto value) {
      check(std::in_range<int32_t>(value), function, name, " must be integers of 32 bits; got ", +value);
      values.push_back(static_cast<int32_t>(value));
    });
    return mx::array(values.data(), x.shape(), mx::int32);
  }
  if (x.dtype() == mx::int32) return x;
  if (x.itemsize() < 4) return mx::astype(x, mx::int32, s);
  const mx::array low(x.dtype() == mx::int64 ? kLeast : 0, x.dtype()), high(kMost, x.dtype());
  return mx::astype(mx::clip(x, low, high, s), mx::int32, s);
}

mx::array repeated(int value, int count) {
  const std::vector<int32_t> values(static_cast<size_t>(count), value);
  return mx::array(values.data(), {count}, mx::int32);
}

mx::array plus(const mx::array& x, int addend, int least, mx::Stream s) {
  if (!is_known(x, s)) return mx::maximum(mx::add(x, mx::array(addend), s), mx::array(least), s);
  std::vector<int32_t> values(x.data<int32_t>(), x.data<int32_t>() + x.size());
  for (int32_t& value : values)
    value = static_cast<int32_t>(std::clamp<int64_t>(int64_t{value} + addend, least, kMost));
  return mx::array(values.data(), x.shape(), mx::int32);
}

}  // namespace mfa
