#include "mlx/matmul.h"

#include <numeric>
#include <stdexcept>

#include "backend/cpu/matmul.h"
#include "common/check.h"
#include "mfa/errors.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/evaluate.h"
#include "mlx/ops.h"
#include "mlx/packed_weights.h"
#include "mlx/request.h"
#include "mlx/transforms.h"

namespace mfa {
namespace {

[[noreturn]] void refuse_gpu(const char* name) {
  throw std::runtime_error(concat("[", name, "::eval_gpu] this primitive runs on CPU streams only"));
}

mx::Shape product_shape(const mx::array& x, const mx::array& w, int columns) {
  mx::Shape shape = mx::broadcast_shapes(batch_shape(x), batch_shape(w));
  shape.push_back(x.shape(-2));
  shape.push_back(columns);
  return shape;
}

int columns_of(const mx::array& w, const Quantisation& q) {
  return q.transpose ? w.shape(-2) : static_cast<int>(int64_t{w.shape(-1)} * 32 / q.bits);
}

// The products of all matrices of a batch, as one product where they share the weights. `w` describes the first matrix;
// `offsets_of(i)` gives matrix i of weights its place.
struct Products {
  MatmulProblem first;
  std::vector<int64_t> x, c, out;              // of each matrix of the batch; empty: one product
  std::vector<const void*> w, scales, biases;  // likewise

  void run() const {
    if (x.empty()) return cpu::matmul({&first, 1});
    const size_t itemsize = size_of(first.dtype);
    std::vector<MatmulProblem> problems(x.size(), first);
    for (size_t i = 0; i < x.size(); ++i) {
      MatmulProblem& p = problems[i];
      p.x.data = advance(p.x.data, x[i], itemsize);
      p.w.data = w[i];
      if (p.w.quantised()) {
        p.w.affine.scales = scales[i];
        p.w.affine.biases = biases[i];
      }
      if (p.c.data) p.c.data = advance(p.c.data, c[i], itemsize);
      p.out = static_cast<char*>(p.out) + out[i] * static_cast<int64_t>(itemsize);
    }
    cpu::matmul(problems);
  }
};

std::vector<const void*> matrices(const mx::array& a, const mx::Shape& batch) {
  std::vector<const void*> out;
  for (const int64_t offset : matrix_offsets(a, batch)) out.push_back(advance(a.data<void>(), offset, a.itemsize()));
  return out;
}

// Runs the products of `x` and the weights `w` describes on the stream.
void dispatch(const mx::array& x, const std::vector<mx::array>& weights, const WeightRef& w, const mx::array* c,
              float alpha, float beta, mx::array& out, mx::Stream stream) {
  const mx::Shape batch = batch_shape(out);
  Products products;
  MatmulProblem& p = products.first;
  p.M = x.shape(-2);
  p.N = out.shape(-1);
  p.K = x.shape(-1);
  p.dtype = to_dtype(x.dtype());
  p.x = {x.data<void>(), x.shape(-2) == 1 ? 0 : x.strides(-2), nullptr};
  p.w = w;
  if (c) p.c = addend(*c, out.shape());
  p.alpha = alpha;
  p.beta = beta;
  p.out = out.data<void>();

  bool single = true;
  for (const mx::array& a : weights) single = single && is_single_matrix(a);
  if (single) {
    const auto x_stride = row_stride(x, out.shape());
    const auto c_stride = c ? row_stride(*c, out.shape()) : 0;
    if (x_stride && c_stride) {
      p.x.stride = *x_stride;
      p.c.row_stride = *c_stride;
      p.M = out.shape(-1) == 0 ? 0 : static_cast<int64_t>(out.size()) / out.shape(-1);
      return mx::cpu::get_command_encoder(stream).dispatch([p, buffer = weights[0].data_shared_ptr()]() mutable {
        const auto panels = packed_weights_for(p, buffer);
        if (panels) p.w.packed = panels->data();
        cpu::matmul({&p, 1});
      });
    }
  }
  products.x = matrix_offsets(x, batch);
  products.w = matrices(weights[0], batch);
  if (weights.size() == 3) {
    products.scales = matrices(weights[1], batch);
    products.biases = matrices(weights[2], batch);
  }
  if (c) products.c = matrix_offsets(*c, batch);
  for (size_t i = 0; i < products.x.size(); ++i) products.out.push_back(static_cast<int64_t>(i) * p.M * p.N);
  mx::cpu::get_command_encoder(stream).dispatch([products = std::move(products)] { products.run(); });
}

// Sums a gradient over the axes along which `like` was broadcast.
mx::array unbroadcast(const mx::array& gradient, const mx::array& like, mx::Stream s) {
  std::vector<int> summed;
  const int extra = static_cast<int>(gradient.ndim()) - static_cast<int>(like.ndim());
  for (int i = 0; i < static_cast<int>(gradient.ndim()); ++i)
    if (i < extra || (like.shape(i - extra) == 1 && gradient.shape(i) != 1)) summed.push_back(i);
  mx::array out = summed.empty() ? gradient : mx::sum(gradient, summed, false, s);
  return mx::reshape(out, like.shape(), s);
}

mx::array scaled(const mx::array& x, float factor, mx::Stream s) {
  return factor == 1.f ? x : mx::multiply(x, mx::array(factor, x.dtype()), s);
}

// [rows of all matrices, columns].
mx::array as_one_matrix(const mx::array& x, mx::Stream s) { return mx::flatten(x, 0, -2, s); }

// Brings the mapped axis of each input to the front, in front of as many batch axes as the widest input has.
std::vector<mx::array> with_mapped_axis_first(const std::vector<mx::array>& inputs, const std::vector<int>& axes,
                                              mx::Stream s) {
  int widest = 0;
  for (size_t i = 0; i < inputs.size(); ++i)
    widest = std::max(widest, static_cast<int>(inputs[i].ndim()) - (axes[i] >= 0 ? 1 : 0));
  std::vector<mx::array> out;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] < 0) {
      out.push_back(inputs[i]);
      continue;
    }
    mx::array x = mx::moveaxis(inputs[i], axes[i], 0, s);
    std::vector<int> missing(static_cast<size_t>(widest + 1) - x.ndim());
    std::iota(missing.begin(), missing.end(), 1);
    out.push_back(missing.empty() ? x : mx::expand_dims(x, missing, s));
  }
  return out;
}

}  // namespace

// ---- Matmul ---------------------------------------------------------------------------------------------------------
mx::array Matmul::make(mx::Stream stream, std::vector<mx::array> inputs, float alpha, float beta) {
  const bool has_c = inputs.size() == 3;
  mx::Shape shape = product_shape(inputs[0], inputs[1], inputs[1].shape(-1));
  const mx::Dtype dtype = inputs[0].dtype();
  return mx::array(std::move(shape), dtype, std::make_shared<Matmul>(stream, alpha, beta, has_c), std::move(inputs));
}

void Matmul::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  if (out.size() == 0) return;
  const mx::array x = with_dense_last_axis(inputs[0], stream());
  const mx::array w = readable_weights(inputs[1], stream());
  dispatch(x, {w}, dense_weights(w), has_c_ ? &inputs[2] : nullptr, alpha_, beta_, out, stream());
}

void Matmul::eval_gpu(const std::vector<mx::array>&, mx::array&) { refuse_gpu(name()); }

std::vector<mx::array> Matmul::jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                                   const std::vector<int>& argnums) {
  std::optional<mx::array> sum;
  for (size_t i = 0; i < argnums.size(); ++i) {
    mx::array term = tangents[i];
    if (argnums[i] == 2) {
      const mx::array shaped = make(stream(), {primals[0], primals[1]});
      term = mx::broadcast_to(scaled(term, beta_, stream()), shaped.shape(), stream());
    } else {
      std::vector<mx::array> factors = {primals[0], primals[1]};
      factors[argnums[i]] = term;
      term = make(stream(), factors, alpha_);
    }
    sum = sum ? mx::add(*sum, term, stream()) : term;
  }
  return {*sum};
}

std::vector<mx::array> Matmul::vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                                   const std::vector<int>& argnums, const std::vector<mx::array>&) {
  const mx::Stream s = stream();
  const mx::array &x = primals[0], &w = primals[1], &d_out = cotangents[0];
  std::vector<mx::array> gradients;
  for (const int i : argnums) {
    if (i == 0) {
      gradients.push_back(unbroadcast(make(s, {d_out, mx::swapaxes(w, -1, -2, s)}, alpha_), x, s));
    } else if (i == 1 && w.ndim() == 2) {
      // All matrices of the batch share the weights: one product sums over them.
      const mx::array rows = mx::broadcast_to(
          x,
          [&] {
            mx::Shape shape = batch_shape(d_out);
            shape.insert(shape.end(), {x.shape(-2), x.shape(-1)});
            return shape;
          }(),
          s);
      gradients.push_back(make(s, {mx::transpose(as_one_matrix(rows, s), s), as_one_matrix(d_out, s)}, alpha_));
    } else if (i == 1) {
      gradients.push_back(unbroadcast(make(s, {mx::swapaxes(x, -1, -2, s), d_out}, alpha_), w, s));
    } else {
      gradients.push_back(unbroadcast(scaled(d_out, beta_, s), primals[2], s));
    }
  }
  return gradients;
}

std::pair<std::vector<mx::array>, std::vector<int>> Matmul::vmap(const std::vector<mx::array>& inputs,
                                                                 const std::vector<int>& axes) {
  return {{make(stream(), with_mapped_axis_first(inputs, axes, stream()), alpha_, beta_)}, {0}};
}

bool Matmul::is_equivalent(const Primitive& other) const {
  const auto& o = static_cast<const Matmul&>(other);
  return alpha_ == o.alpha_ && beta_ == o.beta_ && has_c_ == o.has_c_;
}

std::vector<mx::Shape> Matmul::output_shapes(const std::vector<mx::array>& inputs) {
  return {product_shape(inputs[0], inputs[1], inputs[1].shape(-1))};
}

// ---- QuantizedMatmul ------------------------------------------------------------------------------------------------
mx::array QuantizedMatmul::make(mx::Stream stream, std::vector<mx::array> inputs, const Quantisation& q) {
  mx::Shape shape = product_shape(inputs[0], inputs[1], columns_of(inputs[1], q));
  const mx::Dtype dtype = inputs[0].dtype();
  return mx::array(std::move(shape), dtype, std::make_shared<QuantizedMatmul>(stream, q), std::move(inputs));
}

void QuantizedMatmul::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  if (out.size() == 0) return;
  std::vector<mx::array> dense;
  for (const mx::array& a : inputs) dense.push_back(with_dense_last_axis(a, stream()));
  const mx::array x = dense[0];
  dense.erase(dense.begin());
  dispatch(x, dense, affine_weights(dense[0], dense[1], dense[2], q_), nullptr, 1.f, 1.f, out, stream());
}

void QuantizedMatmul::eval_gpu(const std::vector<mx::array>&, mx::array&) { refuse_gpu(name()); }

std::vector<mx::array> QuantizedMatmul::jvp(const std::vector<mx::array>& primals,
                                            const std::vector<mx::array>& tangents, const std::vector<int>& argnums) {
  if (argnums.size() != 1 || argnums[0] != 0)
    throw NotImplemented("[quantized_matmul] the forward-mode derivative (jvp) exists for x only");
  return {make(stream(), {tangents[0], primals[1], primals[2], primals[3]}, q_)};
}

std::vector<mx::array> QuantizedMatmul::vjp(const std::vector<mx::array>& primals,
                                            const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
                                            const std::vector<mx::array>&) {
  const mx::Stream s = stream();
  std::vector<mx::array> gradients;
  for (const int i : argnums) {
    if (i == 0) {
      Quantisation other_way = q_;
      other_way.transpose = !q_.transpose;
      gradients.push_back(
          unbroadcast(make(s, {cotangents[0], primals[1], primals[2], primals[3]}, other_way), primals[0], s));
      continue;
    }
    if (i == 1) throw std::runtime_error("[quantized_matmul] no gradient with respect to the codes of the weights");
    // Rare: MLX's own gradient of scales and biases.
    const auto forward = [&](const std::vector<mx::array>& changing) -> std::vector<mx::array> {
      std::vector<mx::array> in = primals;
      in[i] = changing[0];
      return {mx::quantized_matmul(in[0], in[1], in[2], in[3], q_.transpose, q_.group_size, q_.bits, "affine", s)};
    };
    gradients.push_back(mx::vjp(forward, {primals[i]}, cotangents).second[0]);
  }
  return gradients;
}

std::pair<std::vector<mx::array>, std::vector<int>> QuantizedMatmul::vmap(const std::vector<mx::array>& inputs,
                                                                          const std::vector<int>& axes) {
  // The weights' three arrays have their batch axes in common.
  std::vector<mx::array> in = inputs;
  std::vector<int> at = axes;
  if (axes[1] >= 0 || axes[2] >= 0 || axes[3] >= 0) {
    int extent = 0;
    for (int i = 1; i < 4; ++i)
      if (axes[i] >= 0) extent = inputs[i].shape(axes[i]);
    for (int i = 1; i < 4; ++i) {
      if (at[i] >= 0) continue;
      mx::Shape shape = in[i].shape();
      shape.insert(shape.begin(), extent);
      in[i] = mx::broadcast_to(mx::expand_dims(in[i], 0, stream()), shape, stream());
      at[i] = 0;
    }
  }
  return {{make(stream(), with_mapped_axis_first(in, at, stream()), q_)}, {0}};
}

bool QuantizedMatmul::is_equivalent(const Primitive& other) const {
  return q_ == static_cast<const QuantizedMatmul&>(other).q_;
}

std::vector<mx::Shape> QuantizedMatmul::output_shapes(const std::vector<mx::array>& inputs) {
  return {product_shape(inputs[0], inputs[1], columns_of(inputs[1], q_))};
}

}  // namespace mfa
