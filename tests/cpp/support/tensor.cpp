#include "support/tensor.h"

#include <algorithm>
#include <cstring>

namespace mfa::testing {

const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::dense:
      return "dense";
    case Layout::padded_rows:
      return "padded_rows";
    case Layout::token_major:
      return "token_major";
    case Layout::sliced:
      return "sliced";
    case Layout::reversed:
      return "reversed";
    case Layout::broadcast_batch:
      return "broadcast_batch";
    case Layout::broadcast_heads:
      return "broadcast_heads";
  }
  return "unknown";
}

Tensor::Tensor(DType dtype, std::array<int64_t, 4> shape, Layout layout) : dtype_(dtype), shape_(shape) {
  const auto [B, H, N, D] = shape;
  const int64_t margin = layout == Layout::dense ? 0 : 37;
  int64_t row = D;
  std::array<int64_t, 3> extent = {B, H, N};  // of the storage
  switch (layout) {
    case Layout::padded_rows:
      row = D + 5;
      break;
    case Layout::sliced:
      extent = {B, 2 * H, 2 * N};
      break;
    case Layout::broadcast_batch:
      extent[0] = std::min<int64_t>(B, 1);
      break;
    case Layout::broadcast_heads:
      extent[1] = std::min<int64_t>(H, 1);
      break;
    default:
      break;
  }
  if (layout == Layout::token_major) {
    stride_ = {N * H * row, row, H * row};
  } else {
    stride_ = {extent[1] * extent[2] * row, extent[2] * row, row};
  }
  origin_ = margin;
  if (layout == Layout::sliced) {
    stride_[1] *= 2;
    stride_[2] *= 2;
  } else if (layout == Layout::reversed) {
    for (int axis = 0; axis < 3; ++axis) {
      origin_ += std::max<int64_t>(extent[axis] - 1, 0) * stride_[axis];
      stride_[axis] = -stride_[axis];
    }
  } else if (layout == Layout::broadcast_batch) {
    stride_[0] = 0;
  } else if (layout == Layout::broadcast_heads) {
    stride_[1] = 0;
  }
  broadcast_ = layout == Layout::broadcast_batch || layout == Layout::broadcast_heads;
  const int64_t elements = extent[0] * extent[1] * extent[2] * row + 2 * margin;
  storage_.assign(elements * size_of(dtype), 0xff);  // all bits set is a NaN in every type
}

float Tensor::get(int64_t b, int64_t h, int64_t n, int64_t d) const {
  return load_as_float(storage_.data(), dtype_, offset(b, h, n) + d);
}

void Tensor::set(int64_t b, int64_t h, int64_t n, int64_t d, float value) {
  store_from_float(storage_.data(), dtype_, offset(b, h, n) + d, value);
}

void Tensor::fill_row(int64_t b, int64_t h, int64_t n, float value) {
  for (int64_t d = 0; d < shape_[3]; ++d) set(b, h, n, d, value);
}

void Tensor::fill_normal(Random& random) {
  for (int64_t b = 0; b < shape_[0]; ++b)
    for (int64_t h = 0; h < shape_[1]; ++h)
      for (int64_t n = 0; n < shape_[2]; ++n)
        for (int64_t d = 0; d < shape_[3]; ++d) set(b, h, n, d, random.normal());
}

TensorRef Tensor::ref() const {
  return {storage_.data() + origin_ * static_cast<int64_t>(size_of(dtype_)), {stride_[0], stride_[1], stride_[2]}};
}

MutableTensorRef Tensor::mutable_ref() {
  return {storage_.data() + origin_ * static_cast<int64_t>(size_of(dtype_)), {stride_[0], stride_[1], stride_[2]}};
}

std::vector<float> Tensor::values() const {
  std::vector<float> result;
  result.reserve(shape_[0] * shape_[1] * shape_[2] * shape_[3]);
  for (int64_t b = 0; b < shape_[0]; ++b)
    for (int64_t h = 0; h < shape_[1]; ++h)
      for (int64_t n = 0; n < shape_[2]; ++n)
        for (int64_t d = 0; d < shape_[3]; ++d) result.push_back(get(b, h, n, d));
  return result;
}

std::vector<uint8_t> Tensor::bytes() const {
  std::vector<uint8_t> result;
  const int64_t row_bytes = shape_[3] * static_cast<int64_t>(size_of(dtype_));
  for (int64_t b = 0; b < shape_[0]; ++b)
    for (int64_t h = 0; h < shape_[1]; ++h)
      for (int64_t n = 0; n < shape_[2]; ++n) {
        const uint8_t* row = storage_.data() + offset(b, h, n) * static_cast<int64_t>(size_of(dtype_));
        result.insert(result.end(), row, row + row_bytes);
      }
  return result;
}

bool Tensor::gaps_are_untouched() const {
  const int64_t size = static_cast<int64_t>(size_of(dtype_));
  std::vector<uint8_t> rest = storage_;
  for (int64_t b = 0; b < shape_[0]; ++b)
    for (int64_t h = 0; h < shape_[1]; ++h)
      for (int64_t n = 0; n < shape_[2]; ++n)
        std::fill_n(rest.begin() + offset(b, h, n) * size, shape_[3] * size, 0xff);
  return std::all_of(rest.begin(), rest.end(), [](uint8_t byte) { return byte == 0xff; });
}

}  // namespace mfa::testing
