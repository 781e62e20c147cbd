// tensor.h: a [B, H, N, D] tensor in any layout, surrounded by NaN: whatever reads beside it shows.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/problem.h"
#include "support/random.h"

namespace mfa::testing {

enum class Layout : uint8_t {
  dense,            // [B, H, N, D], nothing around it: AddressSanitizer sees every read outside
  padded_rows,      // dense with gaps after each row, and an odd number of elements before the first
  token_major,      // [B, N, H, D], as a projection leaves it
  sliced,           // every second row of every second head of a larger tensor
  reversed,         // negative strides along every axis
  broadcast_batch,  // stride 0 along B
  broadcast_heads,  // stride 0 along H
};
const char* name_of(Layout layout);

class Tensor {
 public:
  Tensor() = default;
  // Elements are NaN until they are set, those between and around them always.
  Tensor(DType dtype, std::array<int64_t, 4> shape, Layout layout);

  DType dtype() const { return dtype_; }
  const std::array<int64_t, 4>& shape() const { return shape_; }
  bool is_broadcast() const { return broadcast_; }

  float get(int64_t b, int64_t h, int64_t n, int64_t d) const;
  void set(int64_t b, int64_t h, int64_t n, int64_t d, float value);
  void fill_row(int64_t b, int64_t h, int64_t n, float value);
  void fill_normal(Random& random);

  TensorRef ref() const;
  MutableTensorRef mutable_ref();

  std::vector<float> values() const;   // dense, in row-major order
  std::vector<uint8_t> bytes() const;  // the elements' bytes, likewise: for bitwise comparison
  bool gaps_are_untouched() const;

 private:
  int64_t offset(int64_t b, int64_t h, int64_t n) const {
    return origin_ + b * stride_[0] + h * stride_[1] + n * stride_[2];
  }

  DType dtype_ = DType::f32;
  std::array<int64_t, 4> shape_{};
  std::array<int64_t, 3> stride_{};
  int64_t origin_ = 0;
  bool broadcast_ = false;
  std::vector<uint8_t> storage_;
};

}  // namespace mfa::testing
