#include "mlx/attention.h"

#include <numbers>
#include <stdexcept>

#include "backend/cpu/attention.h"
#include "common/check.h"
#include "mfa/errors.h"
#include "mlx/composed.h"
#include "mlx/evaluate.h"
#include "mlx/gpu.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mfa {
namespace {

std::vector<mx::Shape> forward_shapes(const AttentionParams& params, const std::vector<mx::array>& inputs) {
  const mx::Shape &q = inputs[0].shape(), &v = inputs[2].shape();
  std::vector<mx::Shape> shapes = {{q[0], q[1], q[2], v[3]}};
  if (params.returns_lse) shapes.push_back({q[0], q[1], q[2]});
  if (params.returns_probs) shapes.push_back({q[0], q[1], q[2], v[2]});
  return shapes;
}

std::vector<mx::Shape> backward_shapes(const AttentionParams& params, const WantedGradients& wanted,
                                       const std::vector<mx::array>& inputs) {
  const InputLayout at(params);
  std::vector<mx::Shape> shapes;
  for (int g = 0; g < kGradients; ++g) {
    if (wanted[g]) shapes.push_back(inputs[AttentionBackward::input_of(Gradient{g}, at)].shape());
  }
  return shapes;
}

// Routing has refused streams for which there is none; a node may still be moved to one.
GpuAttention& require_gpu(const char* name) {
  std::string reason;
  GpuAttention* gpu = gpu_attention(&reason);
  if (!gpu) throw std::runtime_error(concat("[", name, "::eval_gpu] this primitive cannot run on the GPU: ", reason));
  return *gpu;
}

// Whether `x` is known to be zero everywhere, as MLX fills in the cotangent of an output that is not used.
bool is_zero(mx::array x) {
  const auto expands = [](const mx::array& y) {
    const std::string name = y.has_primitive() ? y.primitive().name() : "";
    return name == "Full" || name == "Broadcast" || name == "AsType";
  };
  while (expands(x)) {
    const mx::array from = x.inputs()[0];
    x = from;
  }
  if (x.size() != 1 || x.has_primitive() || !x.is_available()) return false;  // computed, traced or several
  return x.dtype() == mx::float32 ? x.item<float>() == 0.f : x.dtype() == mx::int32 && x.item<int32_t>() == 0;
}

[[noreturn]] void refuse_derivative(const char* what) {
  throw NotImplemented(concat("[flash_attention] ", what,
                              " is not implemented for this library's kernels; backend=\"composed\" has it"));
}

}  // namespace

std::vector<mx::array> Attention::make(mx::Stream stream, const AttentionParams& params,
                                       std::vector<mx::array> inputs) {
  std::vector<mx::Dtype> dtypes = {inputs[0].dtype()};
  if (params.returns_lse) dtypes.push_back(mx::float32);
  if (params.returns_probs) dtypes.push_back(mx::float32);
  return mx::array::make_arrays(forward_shapes(params, inputs), dtypes, std::make_shared<Attention>(stream, params),
                                inputs);
}

void Attention::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (auto& out : outputs) allocate(out);
  auto evaluated = evaluate(params_, inputs, stream());
  AttentionOutputs out{mutable_tensor_ref(outputs[0]), params_.returns_lse ? outputs[1].data<float>() : nullptr,
                       params_.returns_probs ? outputs[2].data<float>() : nullptr, /*lse_base2=*/true};
  // MLX holds the inputs and outputs until this has run.
  dispatch_or_poison(stream(), outputs, [evaluated, out]() { cpu::attention_forward(evaluated.checked(), out); });
}

void Attention::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  require_gpu(name()).forward(params_, describe(params_, inputs), inputs, outputs, stream());
}

std::vector<mx::array> Attention::jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                                      const std::vector<int>&) {
  refuse_derivative("the forward-mode derivative (jvp)");
}

std::vector<mx::array> Attention::vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                                      const std::vector<int>& argnums, const std::vector<mx::array>& outputs) {
  if (!params_.returns_lse) {  // nothing was traced when the node was made
    AttentionParams params = params_;
    params.returns_lse = true;
    const auto again = make(stream(), params, primals);
    return Attention(stream(), params)
        .vjp(primals, {cotangents[0], mx::zeros_like(again[1], stream())}, argnums, again);
  }
  const InputLayout at(params_);
  WantedGradients wanted{};
  std::vector<int> gradient_of(at.count, -1);  // by input
  for (int g = 0; g < kGradients; ++g) {
    if (const int i = AttentionBackward::input_of(Gradient{g}, at); i >= 0) gradient_of[i] = g;
  }
  std::vector<int> differentiable;
  for (const int i : argnums) {
    if (gradient_of[i] >= 0) {
      wanted[gradient_of[i]] = true;
      differentiable.push_back(i);
    }
  }

  // The second output is lse / ln 2; both ways to the gradients take the cotangent of the natural lse.
  std::vector<mx::array> natural = cotangents;
  natural[1] = !params_.returns_probs && is_zero(cotangents[1])
                   ? mx::array(std::initializer_list<float>{}, {0, 0, 0}, mx::float32)
                   : mx::multiply(cotangents[1], mx::array(std::numbers::log2e_v<float>), stream());
  std::vector<mx::array> gradients;  // of the inputs in `differentiable`
  if (params_.returns_probs) {
    // The forward has stored all probabilities already, so their cotangent may be as large.
    auto forward = [&](const std::vector<mx::array>& changing) {
      std::vector<mx::array> inputs = primals;
      for (size_t n = 0; n < changing.size(); ++n) inputs[differentiable[n]] = changing[n];
      return composed_attention(params_, inputs, stream());
    };
    std::vector<mx::array> changing;
    for (const int i : differentiable) changing.push_back(primals[i]);
    if (!changing.empty()) gradients = mx::vjp(forward, changing, natural).second;
  } else if (!differentiable.empty()) {
    std::vector<mx::array> inputs = primals;
    inputs.insert(inputs.end(), {outputs[0], outputs[1], natural[0], natural[1]});
    const auto computed = AttentionBackward::make(stream(), params_, wanted, std::move(inputs));
    for (const int i : differentiable) {
      int position = 0;
      for (int g = 0; g < gradient_of[i]; ++g) position += wanted[g];
      gradients.push_back(mx::astype(computed[position], primals[i].dtype(), stream()));
    }
  }

  std::vector<mx::array> result;
  size_t next = 0;
  for (const int i : argnums) {
    result.push_back(gradient_of[i] >= 0 ? gradients[next++] : mx::zeros_like(primals[i], stream()));
  }
  return result;
}

bool Attention::is_equivalent(const Primitive& other) const {
  return params_ == static_cast<const Attention&>(other).params_;
}

std::vector<mx::Shape> Attention::output_shapes(const std::vector<mx::array>& inputs) {
  return forward_shapes(params_, inputs);
}

int AttentionBackward::input_of(Gradient g, const InputLayout& layout) {
  switch (g) {
    case Gradient::q:
    case Gradient::k:
    case Gradient::v:
      return static_cast<int>(g);
    case Gradient::bias:
      return layout.bias;
    case Gradient::sinks:
      return layout.sinks;
    case Gradient::alibi:
      return layout.alibi;
  }
  return -1;
}

std::vector<mx::array> AttentionBackward::make(mx::Stream stream, const AttentionParams& params,
                                               const WantedGradients& wanted, std::vector<mx::array> inputs) {
  std::vector<mx::Dtype> dtypes;
  for (int g = 0; g < kGradients; ++g) {
    if (wanted[g]) dtypes.push_back(g <= static_cast<int>(Gradient::v) ? inputs[0].dtype() : mx::float32);
  }
  return mx::array::make_arrays(backward_shapes(params, wanted, inputs), dtypes,
                                std::make_shared<AttentionBackward>(stream, params, wanted), inputs);
}

void AttentionBackward::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (auto& out : outputs) allocate(out);
  auto is_wanted = [&](Gradient g) { return wanted_[static_cast<int>(g)]; };
  const auto evaluated = evaluate(params_, inputs, stream(), is_wanted(Gradient::bias));

  const int first = InputLayout(params_).count;
  AttentionGradientInputs in;
  in.o = tensor_ref(with_dense_last_axis(inputs[first], stream()));
  in.lse = with_dense_rows(inputs[first + 1], stream()).data<float>();
  in.d_o = tensor_ref(with_dense_last_axis(inputs[first + 2], stream()));
  in.lse_base2 = true;
  if (inputs[first + 3].size() > 0) in.dlse = with_dense_rows(inputs[first + 3], stream()).data<float>();

  AttentionGradients out;
  int next = 0;
  if (is_wanted(Gradient::q)) out.dq = mutable_tensor_ref(outputs[next++]);
  if (is_wanted(Gradient::k)) out.dk = mutable_key_ref(outputs[next++], params_.paged);
  if (is_wanted(Gradient::v)) out.dv = mutable_key_ref(outputs[next++], params_.paged);
  if (is_wanted(Gradient::bias)) out.dbias = outputs[next++].data<float>();
  if (is_wanted(Gradient::sinks)) out.dsinks = outputs[next++].data<float>();
  if (is_wanted(Gradient::alibi)) out.dalibi_slopes = outputs[next++].data<float>();
  dispatch_or_poison(stream(), outputs,
                     [evaluated, in, out]() { cpu::attention_backward(evaluated.checked(), in, out); });
}

void AttentionBackward::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  require_gpu(name()).backward(params_, wanted_, describe(params_, inputs), inputs, outputs, stream());
}

std::vector<mx::array> AttentionBackward::jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                                              const std::vector<int>&) {
  refuse_derivative("the second derivative");
}

std::vector<mx::array> AttentionBackward::vjp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                                              const std::vector<int>&, const std::vector<mx::array>&) {
  refuse_derivative("the second derivative");
}

bool AttentionBackward::is_equivalent(const Primitive& other) const {
  const auto& backward = static_cast<const AttentionBackward&>(other);
  return params_ == backward.params_ && wanted_ == backward.wanted_;
}

std::vector<mx::Shape> AttentionBackward::output_shapes(const std::vector<mx::array>& inputs) {
  return backward_shapes(params_, wanted_, inputs);
}

}  // namespace mfa
