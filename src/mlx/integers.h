// integers.h: the values of arrays of integers, of every integer dtype and any strides, read where they lie, and what
// becomes of those that say where rows lie.
#pragma once

#include <cstdint>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace mfa {

namespace mx = mlx::core;

// Whether values can be looked at when a call is made: that neither computes nor copies anything.
inline bool is_known(const mx::array& x) { return !x.is_tracer() && x.is_available(); }
inline bool is_known(const mx::array& x, mx::Stream s) { return s.device == mx::Device::cpu && is_known(x); }

// Whether 0 <= value < count.
template <typename T>
bool is_index(T value, int64_t count) {
  return !(value < T{0}) && static_cast<uint64_t>(value) < static_cast<uint64_t>(count);
}

// An evaluated array of integers, to be read once what comes before it in the stream is computed.
class Integers {
 public:
  explicit Integers(const mx::array& x)
      : data_(x.data<void>()), dtype_(x.dtype()), shape_(x.shape()), strides_(x.strides()), size_(x.size()) {}

  size_t size() const { return size_; }

  // Calls visit(value) for each element in row-major order, as a number of the array's own type.
  template <typename Visit>
  void each(const Visit& visit) const {
    switch (dtype_) {
      case mx::int8:
        return each_of<int8_t>(visit);
      case mx::int16:
        return each_of<int16_t>(visit);
      case mx::int32:
        return each_of<int32_t>(visit);
      case mx::int64:
        return each_of<int64_t>(visit);
      case mx::uint8:
        return each_of<uint8_t>(visit);
      case mx::uint16:
        return each_of<uint16_t>(visit);
      case mx::uint32:
        return each_of<uint32_t>(visit);
      default:
        return each_of<uint64_t>(visit);
    }
  }

 private:
  template <typename T, typename Visit>
  void each_of(const Visit& visit, size_t axis = 0, int64_t offset = 0) const {
    if (axis == shape_.size()) return visit(static_cast<const T*>(data_)[offset]);
    for (int i = 0; i < shape_[axis]; ++i) each_of<T>(visit, axis + 1, offset + i * strides_[axis]);
  }

  const void* data_;
  mx::Dtype dtype_;
  mx::Shape shape_;
  mx::Strides strides_;
  size_t size_;
};

// Starts, tables, lengths, positions and indices as the primitives take them. What is done to known values is done at
// once, so that the result is known too and the call can check it.

// `x` as int32, in dense rows if it is known. Throws std::invalid_argument, naming `name`, if it is no integer array of
// that rank or a known value has no place in 32 bits; values that are not known are clamped to what has.
mx::array to_int32(const mx::array& x, int rank, const char* name, const char* function, mx::Stream s);

// [count] times `value`, known.
mx::array repeated(int value, int count);

// max(x + addend, least) of an int32 [n] that to_int32() gave.
mx::array plus(const mx::array& x, int addend, int least, mx::Stream s);

}  // namespace mfa
