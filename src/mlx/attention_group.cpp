#include "mlx/attention_group.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "backend/cpu/attention.h"
#include "mlx/attention.h"
#include "mlx/evaluate.h"
#include "mlx/ops.h"

namespace mfa {
namespace {

constexpr size_t kOutputs = 2;  // of each call

// Where the inputs of a call begin and end among those of the node.
struct Part {
  int begin = 0, end = 0;

  template <typename T>
  std::vector<T> of(const std::vector<T>& x) const {
    return {x.begin() + begin, x.begin() + end};
  }
};

std::vector<Part> parts_of(const std::vector<AttentionParams>& calls) {
  std::vector<Part> parts;
  int end = 0;
  for (const AttentionParams& params : calls) {
    const int begin = end;
    end += InputLayout(params).count;
    parts.push_back({begin, end});
  }
  return parts;
}

Part outputs_of(size_t call) { return {static_cast<int>(call * kOutputs), static_cast<int>((call + 1) * kOutputs)}; }

template <typename T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

std::vector<std::vector<mx::array>> AttentionGroup::make(mx::Stream stream, const std::vector<Request>& requests) {
  std::vector<AttentionParams> calls;
  std::vector<mx::array> inputs;
  std::vector<mx::Dtype> dtypes;
  for (const Request& r : requests) {
    calls.push_back(r.params);
    append(inputs, r.inputs);
    append(dtypes, {r.inputs[0].dtype(), mx::float32});
  }
  const auto primitive = std::make_shared<AttentionGroup>(stream, std::move(calls));
  const auto shapes = primitive->output_shapes(inputs);
  const auto outputs = mx::array::make_arrays(shapes, dtypes, primitive, inputs);
  std::vector<std::vector<mx::array>> result;
  for (size_t i = 0; i < requests.size(); ++i) result.push_back(outputs_of(i).of(outputs));
  return result;
}

void AttentionGroup::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (auto& out : outputs) allocate(out);
  const auto parts = parts_of(calls_);
  std::vector<EvaluatedProblem> problems;
  std::vector<AttentionOutputs> results;
  for (size_t i = 0; i < calls_.size(); ++i) {
    problems.push_back(evaluate(calls_[i], parts[i].of(inputs), stream()));
    results.push_back({mutable_tensor_ref(outputs[i * kOutputs]), outputs[i * kOutputs + 1].data<float>(), nullptr,
                       /*lse_base2=*/true});
  }
  dispatch_or_poison(stream(), outputs, [problems, results] {
    std::vector<cpu::ForwardCall> calls;
    for (size_t i = 0; i < problems.size(); ++i) calls.push_back({problems[i].checked(), results[i]});
    cpu::attention_forward(calls);
  });
}

void AttentionGroup::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error("[MfaAttentionGroup::eval_gpu] this primitive runs on CPU streams only");
}

std::vector<mx::array> AttentionGroup::vjp(const std::vector<mx::array>& primals,
                                           const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
                                           const std::vector<mx::array>& outputs) {
  const auto parts = parts_of(calls_);
  std::vector<std::vector<mx::array>> gradients(calls_.size());  // of the inputs of each call that are asked for
  for (size_t i = 0; i < calls_.size(); ++i) {
    std::vector<int> mine;
    for (const int a : argnums)
      if (a >= parts[i].begin && a < parts[i].end) mine.push_back(a - parts[i].begin);
    if (mine.empty()) continue;
    const Part out = outputs_of(i);
    gradients[i] = Attention(stream(), calls_[i]).vjp(parts[i].of(primals), out.of(cotangents), mine, out.of(outputs));
  }
  std::vector<size_t> next(calls_.size(), 0);
  std::vector<mx::array> result;
  for (const int a : argnums) {
    size_t i = 0;
    while (a >= parts[i].end) ++i;
    result.push_back(gradients[i][next[i]++]);
  }
  return result;
}

// The calls part: they may be mapped along different axes, or not at all.
std::pair<std::vector<mx::array>, std::vector<int>> AttentionGroup::vmap(const std::vector<mx::array>& inputs,
                                                                         const std::vector<int>& axes) {
  int V = 1;
  for (size_t i = 0; i < inputs.size(); ++i)
    if (axes[i] >= 0) V = inputs[i].shape(axes[i]);
  const auto parts = parts_of(calls_);
  std::vector<mx::array> outputs;
  std::vector<int> out_axes;
  for (size_t i = 0; i < calls_.size(); ++i) {
    const auto mine = parts[i].of(inputs);
    const auto my_axes = parts[i].of(axes);
    if (std::any_of(my_axes.begin(), my_axes.end(), [](int a) { return a >= 0; })) {
      const auto [out, at] = Attention(stream(), calls_[i]).vmap(mine, my_axes);
      append(outputs, out);
      append(out_axes, at);
      continue;
    }
    for (const mx::array& x : Attention::make(stream(), calls_[i], mine)) {
      mx::Shape shape = x.shape();
      shape.insert(shape.begin(), V);
      outputs.push_back(mx::broadcast_to(mx::expand_dims(x, 0, stream()), shape, stream()));
      out_axes.push_back(0);
    }
  }
  return {std::move(outputs), std::move(out_axes)};
}

bool AttentionGroup::is_equivalent(const Primitive& other) const {
  return calls_ == static_cast<const AttentionGroup&>(other).calls_;
}

std::vector<mx::Shape> AttentionGroup::output_shapes(const std::vector<mx::array>& inputs) {
  const auto parts = parts_of(calls_);
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i < calls_.size(); ++i)
    append(shapes, Attention(stream(), calls_[i]).output_shapes(parts[i].of(inputs)));
  return shapes;
}

}  // namespace mfa
