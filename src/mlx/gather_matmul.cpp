// gather_matmul.cpp: products of matrices picked by indices. Entries that share a matrix of weights become one product,
// so that a mixture of experts reads each expert once.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "backend/cpu/matmul.h"
#include "common/check.h"
#include "mlx/evaluate.h"
#include "mlx/integers.h"
#include "mlx/matmul.h"
#include "mlx/ops.h"
#include "mlx/request.h"
#include "mlx/transforms.h"

namespace mfa {
namespace {

std::vector<size_t> checked_indices(const Integers& given, size_t count, const char* function, const char* name) {
  std::vector<size_t> indices;
  indices.reserve(given.size());
  given.each([&](auto index) {
    check(is_index(index, static_cast<int64_t>(count)), function, name, " must be in [0, ", count, "); got ", +index);
    indices.push_back(static_cast<size_t>(index));
  });
  return indices;
}

struct GatheredProducts {
  Integers lhs, rhs;                                              // of the entries
  MatmulProblem first = {};                                       // of single entries: M rows
  std::vector<int64_t> x = {}, w = {}, scales = {}, biases = {};  // offsets of the matrices

  void run() const {
    const char* function = first.w.quantised() ? "gather_qmm" : "gather_mm";
    // Entries by the matrix of weights they use, otherwise in their order.
    const std::vector<size_t> x_of = checked_indices(lhs, x.size(), function, "lhs_indices");
    const std::vector<size_t> w_of = checked_indices(rhs, w.size(), function, "rhs_indices");
    const size_t entries = w_of.size();
    std::vector<size_t> order(entries);
    std::iota(order.begin(), order.end(), size_t{0});
    if (!std::is_sorted(w_of.begin(), w_of.end()))
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return w_of[a] < w_of[b]; });

    const auto M = static_cast<size_t>(first.M);
    std::vector<int64_t> x_rows, out_rows;
    x_rows.reserve(entries * M);
    out_rows.reserve(entries * M);
    for (const size_t entry : order)
      for (size_t r = 0; r < M; ++r) {
        x_rows.push_back(x[x_of[entry]] + static_cast<int64_t>(r) * first.x.stride);
        out_rows.push_back(static_cast<int64_t>(entry * M + r) * first.N);
      }

    const size_t itemsize = size_of(first.dtype);
    std::vector<MatmulProblem> problems;
    for (size_t begin = 0, end = 0; begin < entries; begin = end) {
      const size_t matrix = w_of[order[begin]];
      while (end < entries && w_of[order[end]] == matrix) ++end;
      MatmulProblem p = first;
      p.M = static_cast<int64_t>((end - begin) * M);
      p.x.offsets = x_rows.data() + begin * M;
      p.out_offsets = out_rows.data() + begin * M;
      p.w.data = advance(p.w.data, w[matrix], p.w.quantised() ? sizeof(uint32_t) : itemsize);
      if (p.w.quantised()) {
        p.w.affine.scales = advance(p.w.affine.scales, scales[matrix], itemsize);
        p.w.affine.biases = advance(p.w.affine.biases, biases[matrix], itemsize);
      }
      problems.push_back(p);
    }
    cpu::matmul(problems);
  }
};

mx::Shape gathered_shape(const std::vector<mx::array>& inputs, const Quantisation& q) {
  mx::Shape shape = inputs.back().shape();
  const mx::array& w = inputs[1];
  shape.push_back(inputs[0].shape(-2));
  shape.push_back(q.bits == 0   ? w.shape(-1)
                  : q.transpose ? w.shape(-2)
                                : static_cast<int>(int64_t{w.shape(-1)} * 32 / q.bits));
  return shape;
}

}  // namespace

mx::array GatherMatmul::make(mx::Stream stream, std::vector<mx::array> inputs, const Quantisation& q) {
  mx::Shape shape = gathered_shape(inputs, q);
  const mx::Dtype dtype = inputs[0].dtype();
  return mx::array(std::move(shape), dtype, std::make_shared<GatherMatmul>(stream, q), std::move(inputs));
}

void GatherMatmul::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  if (out.size() == 0) return;
  const size_t n = inputs.size();
  const mx::array x = with_dense_last_axis(inputs[0], stream());

  GatheredProducts products{.lhs = Integers(inputs[n - 2]), .rhs = Integers(inputs[n - 1])};
  MatmulProblem& p = products.first;
  p.M = x.shape(-2);
  p.N = out.shape(-1);
  p.K = x.shape(-1);
  p.dtype = to_dtype(x.dtype());
  p.x = {x.data<void>(), x.shape(-2) == 1 ? 0 : x.strides(-2), nullptr};
  p.out = out.data<void>();
  if (q_.bits == 0) {
    const mx::array w = readable_weights(inputs[1], stream());
    p.w = dense_weights(w);
    products.w = matrix_offsets(w, batch_shape(w));
  } else {
    const mx::array w = with_dense_last_axis(inputs[1], stream());
    const mx::array scales = with_dense_last_axis(inputs[2], stream());
    const mx::array biases = with_dense_last_axis(inputs[3], stream());
    p.w = affine_weights(w, scales, biases, q_);
    products.w = matrix_offsets(w, batch_shape(w));
    products.scales = matrix_offsets(scales, batch_shape(w));
    products.biases = matrix_offsets(biases, batch_shape(w));
  }
  products.x = matrix_offsets(x, batch_shape(x));
  dispatch_or_poison(stream(), {out}, [products = std::move(products)] { products.run(); });
}

void GatherMatmul::eval_gpu(const std::vector<mx::array>&, mx::array&) {
  throw std::runtime_error(concat("[", name(), "::eval_gpu] this primitive runs on CPU streams only"));
}

std::vector<mx::array> GatherMatmul::vjp(const std::vector<mx::array>& primals,
                                         const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
                                         const std::vector<mx::array>&) {
  const mx::Stream s = stream();
  const mx::array &x = primals[0], &w = primals[1];
  const mx::array lhs = mx::flatten(primals[primals.size() - 2], s), rhs = mx::flatten(primals.back(), s);
  const auto entries = static_cast<int>(rhs.size());
  const mx::array d_out = mx::reshape(cotangents[0], {entries, cotangents[0].shape(-2), cotangents[0].shape(-1)}, s);
  const mx::array each = mx::arange(0, entries, mx::uint32, s);

  // Adds each entry's gradient to the matrix that it used.
  const auto scatter = [&](const mx::array& of_entries, const mx::array& indices, const mx::array& like) {
    int matrices = 1;
    for (const int extent : batch_shape(like)) matrices *= extent;
    const mx::array zeros = mx::zeros({matrices, like.shape(-2), like.shape(-1)}, like.dtype(), s);
    const mx::array sum = mx::scatter_add(zeros, indices, mx::expand_dims(of_entries, 1, s), 0, s);
    return mx::reshape(sum, like.shape(), s);
  };

  std::vector<mx::array> gradients;
  for (const int i : argnums) {
    if (i == 0) {
      Quantisation other_way = q_;
      other_way.transpose = !q_.transpose;
      std::vector<mx::array> inputs = {d_out};
      inputs.insert(inputs.end(), primals.begin() + 1, primals.end() - 2);
      if (q_.bits == 0) inputs[1] = mx::swapaxes(w, -1, -2, s);
      inputs.insert(inputs.end(), {each, rhs});
      gradients.push_back(scatter(make(s, std::move(inputs), other_way), lhs, x));
    } else if (i == 1 && q_.bits == 0) {
      const mx::array matrices = mx::reshape(x, {-1, x.shape(-2), x.shape(-1)}, s);
      const mx::array picked = mx::take(matrices, lhs, 0, s);
      gradients.push_back(scatter(Matmul::make(s, {mx::swapaxes(picked, -1, -2, s), d_out}), rhs, w));
    } else if (q_.bits != 0 && (i == 2 || i == 3)) {
      // Rare: MLX's own gradient of scales and biases.
      const auto forward = [&](const std::vector<mx::array>& changing) -> std::vector<mx::array> {
        std::vector<mx::array> in = primals;
        in[i] = changing[0];
        return {mx::gather_qmm(in[0], in[1], in[2], in[3], in[4], in[5], q_.transpose, q_.group_size, q_.bits, "affine",
                               std::nullopt, false, s)};
      };
      gradients.push_back(mx::vjp(forward, {primals[i]}, cotangents).second[0]);
    } else {
      // Of the kinds that MLX throws for its own primitives.
      check(q_.bits != 0, "gather_mm",
            "a gradient with respect to x or w; got indices: use stop_gradient on what they are computed from");
      throw std::runtime_error("[gather_qmm] no gradient with respect to indices or codes of weights");
    }
  }
  return gradients;
}

bool GatherMatmul::is_equivalent(const Primitive& other) const {
  return q_ == static_cast<const GatherMatmul&>(other).q_;
}

std::vector<mx::Shape> GatherMatmul::output_shapes(const std::vector<mx::array>& inputs) {
  return {gathered_shape(inputs, q_)};
}

}  // namespace mfa
