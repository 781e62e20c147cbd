#include "mlx/evaluate.h"

#include <new>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace mfa {
namespace {

// Runs MLX's own copy as a part of this node: there is no other exported way to copy an evaluated array.
mx::array dense_copy(const mx::array& x, mx::Stream stream) {
  std::vector<mx::array> out = {mx::contiguous(x, false, stream)};
  out[0].primitive().eval_cpu({x}, out);
  out[0].detach();
  mx::cpu::get_command_encoder(stream).add_temporary(out[0]);
  return out[0];
}

// The stride of an axis as a broadcast term of the scores sees it: an axis of extent 1 is not stepped along.
void set_strides(int64_t (&stride)[4], const mx::array& x) {
  for (int i = 0; i < 4; ++i) stride[i] = x.shape(i) == 1 ? 0 : x.strides(i);
}

bool repeats(const mx::array& x) {
  for (int i = 0; i < static_cast<int>(x.ndim()); ++i) {
    if (x.shape(i) > 1 && x.strides(i) == 0) return true;
  }
  return false;
}

}  // namespace

void allocate(mx::array& out) {
  auto data = mx::allocator::malloc(out.nbytes());
  if (out.nbytes() > 0 && data.buffer().ptr() == nullptr) throw std::bad_alloc();
  out.set_data(std::move(data));
}

mx::array with_dense_last_axis(const mx::array& x, mx::Stream stream) {
  return x.shape(-1) <= 1 || x.strides(-1) == 1 || x.size() == 0 ? x : dense_copy(x, stream);
}

mx::array with_dense_rows(const mx::array& x, mx::Stream stream) {
  return x.flags().row_contiguous || x.size() == 0 ? x : dense_copy(x, stream);
}

TensorRef tensor_ref(const mx::array& x) { return {x.data<void>(), {x.strides(0), x.strides(1), x.strides(2)}}; }

MutableTensorRef mutable_tensor_ref(mx::array& x) {
  return {x.data<void>(), {x.strides(0), x.strides(1), x.strides(2)}};
}

AttentionProblem EvaluatedProblem::with_seed() const {
  AttentionProblem p = problem;
  if (seed) p.dropout_seed = uint64_t{seed[1]} << 32 | seed[0];
  return p;
}

EvaluatedProblem evaluate(const AttentionParams& params, const std::vector<mx::array>& inputs, mx::Stream stream,
                          bool dense_bias) {
  const InputLayout at(params);
  EvaluatedProblem result{describe(params, inputs)};
  AttentionProblem& p = result.problem;
  p.q = tensor_ref(with_dense_last_axis(inputs[0], stream));
  p.k = tensor_ref(with_dense_last_axis(inputs[1], stream));
  p.v = tensor_ref(with_dense_last_axis(inputs[2], stream));
  if (params.has_alibi) p.alibi_slopes = with_dense_rows(inputs[at.alibi], stream).data<float>();
  if (params.has_sinks) p.sinks = with_dense_rows(inputs[at.sinks], stream).data<float>();
  if (params.has_bias) {
    const mx::array& given = inputs[at.bias];
    const mx::array bias = dense_bias && repeats(given) ? with_dense_rows(given, stream) : given;
    p.bias.data = bias.data<void>();
    p.bias.dtype = to_dtype(bias.dtype());
    set_strides(p.bias.stride, bias);
  }
  if (params.has_mask) {
    p.mask.data = inputs[at.mask].data<uint8_t>();
    set_strides(p.mask.stride, inputs[at.mask]);
  }
  if (params.has_lengths) p.kv_lengths = with_dense_rows(inputs[at.kv_lengths], stream).data<int32_t>();
  if (params.has_seed) result.seed = with_dense_rows(inputs[at.seed], stream).data<uint32_t>();
  return result;
}

}  // namespace mfa
