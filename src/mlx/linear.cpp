// linear.cpp: the public matrix products: checks of their arguments, and which calls of MLX the hooks should take.
#include "mfa/linear.h"

#include <array>
#include <atomic>
#include <numeric>

#include "backend/cpu/attention.h"
#include "common/check.h"
#include "mlx/dtypes.h"
#include "mlx/integers.h"
#include "mlx/matmul.h"
#include "mlx/ops.h"

namespace mfa {
namespace {

using OptionalArray = std::optional<mx::array>;

enum Kind { kMatmul, kQuantizedMatmul, kGatherMM, kGatherQMM, kKinds };
std::array<std::atomic<uint64_t>, kKinds> graphs;

bool broadcasts(const mx::Shape& a, const mx::Shape& b) {
  for (size_t i = 1; i <= std::min(a.size(), b.size()); ++i) {
    const int m = a[a.size() - i], n = b[b.size() - i];
    if (m != n && m != 1 && n != 1) return false;
  }
  return true;
}

bool broadcasts_to(const mx::Shape& a, const mx::Shape& to) {
  if (a.size() > to.size()) return false;
  for (size_t i = 1; i <= a.size(); ++i)
    if (a[a.size() - i] != to[to.size() - i] && a[a.size() - i] != 1) return false;
  return true;
}

// A message, or nullopt: x [..., M, K] and w [..., K, N] can be multiplied. Both have at least two axes; they were
// given with the shapes `x_given` and `w_given`.
std::optional<std::string> mismatch(const mx::array& x, const mx::array& w, const mx::Shape& x_given,
                                    const mx::Shape& w_given) {
  if (x.shape(-1) != w.shape(-2))
    return concat("x [..., M, K] and w [..., K, N] must agree in K; got shapes ", x_given, " and ", w_given);
  if (!broadcasts(batch_shape(x), batch_shape(w)))
    return concat("the leading axes of x and w must broadcast; got shapes ", x_given, " and ", w_given);
  return std::nullopt;
}

std::optional<std::string> dtype_mismatch(mx::Dtype dtype, const char* names) {
  if (is_kernel_dtype(dtype)) return std::nullopt;
  return concat(names, " must promote to float32, float16 or bfloat16; got ", dtype);
}

// What the three arrays of quantised weights must be for x [..., M, K]; `batched` weights broadcast with x's axes.
std::optional<std::string> quantised_mismatch(const mx::array& x, const mx::array& w, const mx::array& scales,
                                              const mx::array& biases, const Quantisation& q, bool batched) {
  const int bits = q.bits, group_size = q.group_size;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 5 && bits != 6 && bits != 8)
    return concat("bits must be 2, 3, 4, 5, 6 or 8; got ", bits);
  if (group_size != 32 && group_size != 64 && group_size != 128)
    return concat("group_size must be 32, 64 or 128; got ", group_size);
  if (w.dtype() != mx::uint32) return concat("w must be uint32; got ", w.dtype());
  if (x.ndim() < 1) return concat("x must have at least one axis; got shape ", x.shape());
  if (w.ndim() < 2) return concat("w must have at least two axes; got shape ", w.shape());
  if (scales.shape() != biases.shape())
    return concat("scales and biases must have one shape; got ", scales.shape(), " and ", biases.shape());
  if (!mx::issubdtype(mx::result_type(scales, biases), mx::floating))
    return concat("scales and biases must have a floating dtype; got ", scales.dtype(), " and ", biases.dtype());
  const int64_t columns = int64_t{w.shape(-1)} * 32 / bits;
  if (int64_t{w.shape(-1)} * 32 % bits != 0 || columns % group_size != 0)
    return concat("a row of w must hold whole groups of ", group_size, " codes of ", bits, " bits; got shape ",
                  w.shape());
  mx::Shape expected = w.shape();
  expected.back() = static_cast<int>(columns / group_size);
  if (scales.shape() != expected)
    return concat("scales must have shape ", expected, " for w ", w.shape(), " with ", bits, " bits and groups of ",
                  group_size, "; got ", scales.shape());
  const int64_t K = q.transpose ? columns : w.shape(-2);
  if (x.shape(-1) != K)
    return concat("the last axis of x must be ", K, ", that of the expanded w; got shape ", x.shape());
  if (batched && x.ndim() > 1 && !broadcasts(batch_shape(x), batch_shape(w)))
    return concat("the leading axes of x and w must broadcast; got shapes ", x.shape(), " and ", w.shape());
  return std::nullopt;
}

mx::Dtype quantised_dtype(const mx::array& x, const mx::array& scales, const mx::array& biases) {
  return mx::result_type(x, scales, biases);
}

bool has_kernels(const mx::Stream& s) { return s.device == mx::Device::cpu && cpu::kernel_traits().has_value(); }

// The shape of x @ w with the axes of one-dimensional operands still in it.
mx::Shape product_shape(const mx::array& x, const mx::array& w) {
  mx::Shape shape = mx::broadcast_shapes(batch_shape(x), batch_shape(w));
  shape.push_back(x.shape(-2));
  shape.push_back(w.shape(-1));
  return shape;
}

mx::array multiply(const char* function, Kind kind, const OptionalArray& c, mx::array x, mx::array w, float alpha,
                   float beta, mx::Stream s) {
  check(x.ndim() >= 1 && w.ndim() >= 1, function, "x and w must have at least one axis; got shapes ", x.shape(),
        " and ", w.shape());
  const mx::Dtype dtype = c ? mx::result_type(x, w, *c) : mx::result_type(x, w);
  if (const auto why = dtype_mismatch(dtype, c ? "c, x and w" : "x and w")) check(false, function, *why);
  const bool row = x.ndim() == 1, column = w.ndim() == 1;
  const mx::Shape x_given = x.shape(), w_given = w.shape();
  if (row) x = mx::expand_dims(x, 0, s);
  if (column) w = mx::expand_dims(w, 1, s);
  if (const auto why = mismatch(x, w, x_given, w_given)) check(false, function, *why);
  std::vector<mx::array> inputs = {cast_to(x, dtype, s), cast_to(w, dtype, s)};
  if (c) {
    mx::Shape shape = product_shape(x, w);
    mx::Shape visible = shape;
    if (column) visible.pop_back();
    if (row) visible.erase(visible.end() - (column ? 1 : 2));
    check(broadcasts_to(c->shape(), visible), function, "c must broadcast to the result's shape ", visible, "; got ",
          c->shape());
    if (beta != 0.f) {
      mx::array added = cast_to(*c, dtype, s);
      if (row || column) {  // the axes that the operands lack
        if (row && !column && added.ndim() >= 2) added = mx::expand_dims(added, -2, s);
        if (column && added.ndim() >= 1) added = mx::expand_dims(added, -1, s);
        if (row && column) added = mx::reshape(added, {1, 1}, s);
      }
      inputs.push_back(added);
    }
  }
  graphs[kind].fetch_add(1, std::memory_order_relaxed);
  mx::array out = Matmul::make(s, std::move(inputs), alpha, beta);
  if (row && column) return mx::reshape(out, {}, s);
  if (row) return mx::squeeze(out, -2, s);
  if (column) return mx::squeeze(out, -1, s);
  return out;
}

// The indices, or all in order. Those whose values are known are checked when the call is made, the others where the
// work runs.
mx::array indices_or_all(const char* function, const char* name, const OptionalArray& given, const mx::array& x,
                         mx::Stream s) {
  const mx::Shape batch = batch_shape(x);
  int64_t count = 1;
  for (const int extent : batch) count *= extent;
  if (!given) return mx::reshape(mx::arange(0., static_cast<double>(count), mx::uint32, s), batch, s);
  check(mx::issubdtype(given->dtype(), mx::integer), function, name, " must have an integer dtype; got ",
        given->dtype());
  if (is_known(*given))
    Integers(*given).each([&](auto index) {
      check(is_index(index, count), function, name, " must be in [0, ", count, "); got ", +index);
    });
  return *given;
}

mx::array gather(Kind kind, std::vector<mx::array> inputs, const Quantisation& q, const OptionalArray& lhs,
                 const OptionalArray& rhs, mx::Stream s) {
  const char* function = kind == kGatherQMM ? "gather_qmm" : "gather_mm";
  mx::array left = indices_or_all(function, "lhs_indices", lhs, inputs[0], s);
  mx::array right = indices_or_all(function, "rhs_indices", rhs, inputs[1], s);
  check(broadcasts(left.shape(), right.shape()), function, "lhs_indices and rhs_indices must broadcast; got shapes ",
        left.shape(), " and ", right.shape());
  const mx::Shape shape = mx::broadcast_shapes(left.shape(), right.shape());
  inputs.push_back(mx::broadcast_to(left, shape, s));
  inputs.push_back(mx::broadcast_to(right, shape, s));
  graphs[kind].fetch_add(1, std::memory_order_relaxed);
  return GatherMatmul::make(s, std::move(inputs), q);
}

}  // namespace

mx::array matmul(const mx::array& x, const mx::array& w, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream);
  if (!has_kernels(s)) return mx::matmul(x, w, s);
  return multiply("matmul", kMatmul, std::nullopt, x, w, 1.f, 1.f, s);
}

mx::array addmm(const mx::array& c, const mx::array& x, const mx::array& w, float alpha, float beta,
                mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream);
  if (!has_kernels(s)) return mx::addmm(c, x, w, alpha, beta, s);
  return multiply("addmm", kMatmul, c, x, w, alpha, beta, s);
}

mx::array quantized_matmul(const mx::array& x, const mx::array& w, const mx::array& scales, const mx::array& biases,
                           bool transpose, int group_size, int bits, mx::StreamOrDevice stream) {
  constexpr const char* kFunction = "quantized_matmul";
  const mx::Stream s = mx::to_stream(stream);
  if (!has_kernels(s)) return mx::quantized_matmul(x, w, scales, biases, transpose, group_size, bits, "affine", s);
  const Quantisation q{bits, group_size, transpose};
  if (const auto why = quantised_mismatch(x, w, scales, biases, q, true)) check(false, kFunction, *why);
  const mx::Dtype dtype = quantised_dtype(x, scales, biases);
  if (const auto why = dtype_mismatch(dtype, "x, scales and biases")) check(false, kFunction, *why);
  const bool row = x.ndim() == 1;
  graphs[kQuantizedMatmul].fetch_add(1, std::memory_order_relaxed);
  const mx::array out = QuantizedMatmul::make(
      s,
      {cast_to(row ? mx::expand_dims(x, 0, s) : x, dtype, s), w, cast_to(scales, dtype, s), cast_to(biases, dtype, s)},
      q);
  return row ? mx::squeeze(out, -2, s) : out;
}

mx::array gather_mm(const mx::array& x, const mx::array& w, const OptionalArray& lhs_indices,
                    const OptionalArray& rhs_indices, mx::StreamOrDevice stream) {
  constexpr const char* kFunction = "gather_mm";
  const mx::Stream s = mx::to_stream(stream);
  if (!has_kernels(s)) return mx::gather_mm(x, w, lhs_indices, rhs_indices, false, s);
  check(x.ndim() >= 2 && w.ndim() >= 2, kFunction, "x and w must have at least two axes; got shapes ", x.shape(),
        " and ", w.shape());
  check(x.shape(-1) == w.shape(-2), kFunction, "x [..., M, K] and w [..., K, N] must agree in K; got shapes ",
        x.shape(), " and ", w.shape());
  const mx::Dtype dtype = mx::result_type(x, w);
  if (const auto why = dtype_mismatch(dtype, "x and w")) check(false, kFunction, *why);
  return gather(kGatherMM, {cast_to(x, dtype, s), cast_to(w, dtype, s)}, {}, lhs_indices, rhs_indices, s);
}

mx::array gather_qmm(const mx::array& x, const mx::array& w, const mx::array& scales, const mx::array& biases,
                     const OptionalArray& lhs_indices, const OptionalArray& rhs_indices, bool transpose, int group_size,
                     int bits, mx::StreamOrDevice stream) {
  constexpr const char* kFunction = "gather_qmm";
  const mx::Stream s = mx::to_stream(stream);
  if (!has_kernels(s))
    return mx::gather_qmm(x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, "affine",
                          std::nullopt, false, s);
  const Quantisation q{bits, group_size, transpose};
  check(x.ndim() >= 2, kFunction, "x must have at least two axes; got shape ", x.shape());
  if (const auto why = quantised_mismatch(x, w, scales, biases, q, false)) check(false, kFunction, *why);
  const mx::Dtype dtype = quantised_dtype(x, scales, biases);
  if (const auto why = dtype_mismatch(dtype, "x, scales and biases")) check(false, kFunction, *why);
  return gather(kGatherQMM, {cast_to(x, dtype, s), w, cast_to(scales, dtype, s), cast_to(biases, dtype, s)}, q,
                lhs_indices, rhs_indices, s);
}

// Elements of a matrix of weights up to which MLX's loop is faster than panels and tiles, by a half to two times:
// measured for any number of rows and matrices. At twice as many both are even.
constexpr int64_t kTinyWeights = 32;

bool routes_matmul(const mx::array& x, const mx::array& w, const OptionalArray& c, mx::StreamOrDevice stream) {
  if (x.ndim() < 2 || w.ndim() < 2 || mismatch(x, w, x.shape(), w.shape()) || !has_kernels(mx::to_stream(stream)))
    return false;
  if (!is_kernel_dtype(c ? mx::result_type(x, w, *c) : mx::result_type(x, w))) return false;
  const int64_t elements = int64_t{w.shape(-2)} * w.shape(-1);
  if (elements > 0 && elements <= kTinyWeights) return false;
  return !c || broadcasts_to(c->shape(), product_shape(x, w));
}

// Whether MLX's quantised product has the shape of ours: where x has fewer axes than w it reads the first matrices
// alone.
bool has_shape_of_mlx(const mx::array& x, const mx::array& w) {
  return x.ndim() >= w.ndim() || (x.ndim() == 1 && w.ndim() == 2);
}

bool routes_quantized_matmul(const mx::array& x, const mx::array& w, const mx::array& scales,
                             const OptionalArray& biases, bool transpose, int group_size, int bits,
                             mx::StreamOrDevice stream) {
  return biases && has_kernels(mx::to_stream(stream)) && has_shape_of_mlx(x, w) &&
         !quantised_mismatch(x, w, scales, *biases, {bits, group_size, transpose}, true) &&
         is_kernel_dtype(quantised_dtype(x, scales, *biases));
}

bool routes_gather(const mx::array& x, const mx::array& w, const OptionalArray& scales, const OptionalArray& biases,
                   const OptionalArray& lhs_indices, const OptionalArray& rhs_indices, bool transpose, int group_size,
                   int bits, mx::StreamOrDevice stream) {
  if (x.ndim() < 2 || w.ndim() < 2 || !has_kernels(mx::to_stream(stream))) return false;
  for (const OptionalArray& indices : {lhs_indices, rhs_indices})
    if (indices && !mx::issubdtype(indices->dtype(), mx::integer)) return false;
  const mx::Shape left = lhs_indices ? lhs_indices->shape() : batch_shape(x);
  const mx::Shape right = rhs_indices ? rhs_indices->shape() : batch_shape(w);
  if (!broadcasts(left, right)) return false;
  if (!scales) return x.shape(-1) == w.shape(-2) && is_kernel_dtype(mx::result_type(x, w));
  if (!lhs_indices && !rhs_indices && !has_shape_of_mlx(x, w)) return false;  // MLX calls its quantized_matmul
  return biases && !quantised_mismatch(x, w, *scales, *biases, {bits, group_size, transpose}, false) &&
         is_kernel_dtype(quantised_dtype(x, *scales, *biases));
}

LinearCounters linear_counters() {
  const auto read = [](Kind kind) { return graphs[kind].load(std::memory_order_relaxed); };
  return {read(kMatmul), read(kQuantizedMatmul), read(kGatherMM), read(kGatherQMM)};
}

}  // namespace mfa
