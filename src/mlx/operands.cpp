#include "mlx/operands.h"

#include "mlx/evaluate.h"

namespace mfa {
namespace {

// Stride of the axis `axis` counted from the end of `x` broadcast to `batch` and two more axes; 0 where it repeats.
int64_t stride_from_end(const mx::array& x, int axis) {
  if (axis > static_cast<int>(x.ndim()) || x.shape(-axis) == 1) return 0;
  return x.strides(-axis);
}

bool is_dense(const mx::array& x, int axis) { return x.shape(axis) <= 1 || x.strides(axis) == 1; }

}  // namespace

mx::Shape batch_shape(const mx::array& x) { return mx::Shape(x.shape().begin(), x.shape().end() - 2); }

std::vector<int64_t> matrix_offsets(const mx::array& x, const mx::Shape& batch) {
  std::vector<int64_t> offsets = {0};
  const int axes = static_cast<int>(batch.size());
  for (int i = 0; i < axes; ++i) {
    const int64_t stride = stride_from_end(x, axes - i + 2);
    std::vector<int64_t> next;
    next.reserve(offsets.size() * static_cast<size_t>(batch[i]));
    for (const int64_t offset : offsets)
      for (int j = 0; j < batch[i]; ++j) next.push_back(offset + j * stride);
    offsets = std::move(next);
  }
  return offsets;
}

std::optional<int64_t> row_stride(const mx::array& x, const mx::Shape& shape) {
  int64_t extent = 1, stride = 0;
  for (int axis = 2; axis <= static_cast<int>(shape.size()); ++axis) {
    const int64_t count = shape[shape.size() - static_cast<size_t>(axis)];
    if (count == 1) continue;
    const int64_t step = stride_from_end(x, axis);
    if (extent > 1 && step != stride * extent) return std::nullopt;
    if (extent == 1) stride = step;
    extent *= count;
  }
  return stride;
}

bool is_single_matrix(const mx::array& x) {
  for (int axis = 3; axis <= static_cast<int>(x.ndim()); ++axis) {
    if (stride_from_end(x, axis) != 0) return false;
  }
  return true;
}

mx::array readable_weights(const mx::array& w, mx::Stream stream) {
  return is_dense(w, -1) || is_dense(w, -2) ? w : with_dense_last_axis(w, stream);
}

WeightRef dense_weights(const mx::array& w) {
  WeightRef ref;
  ref.data = w.data<void>();
  // A view of a [N, K] matrix; where both axes are dense, the one that is longer in memory is the row.
  ref.transposed = is_dense(w, -2) && !(is_dense(w, -1) && w.shape(-2) == 1);
  const int other = ref.transposed ? -1 : -2;
  ref.stride = w.shape(other) == 1 ? 0 : w.strides(other);
  return ref;
}

WeightRef affine_weights(const mx::array& w, const mx::array& scales, const mx::array& biases, const Quantisation& q) {
  WeightRef ref;
  ref.data = w.data<void>();
  ref.transposed = q.transpose;
  ref.stride = w.shape(-2) == 1 ? 0 : w.strides(-2);
  ref.affine = {q.bits,
                q.group_size,
                scales.data<void>(),
                biases.data<void>(),
                scales.shape(-2) == 1 ? 0 : scales.strides(-2),
                biases.shape(-2) == 1 ? 0 : biases.strides(-2)};
  return ref;
}

AddendRef addend(const mx::array& c, const mx::Shape& out) {
  AddendRef ref;
  ref.data = c.data<void>();
  ref.column_stride = c.ndim() == 0 || out.back() == 1 ? 0 : stride_from_end(c, 1);
  ref.row_stride = stride_from_end(c, 2);
  return ref;
}

}  // namespace mfa
