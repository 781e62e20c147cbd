// vmap.cpp: vectorised attention is attention over more batch entries, or over more heads.
//
// A mapped axis of extent V is folded into the batch, [V, B, ...] -> [V * B, ...]. What is given per head (sinks, ALiBi
// slopes) has no batch axis; where such an array is mapped, or its gradient is wanted for each mapped entry, the axis
// is folded into the heads instead, [B, V, H, ...] -> [B, V * H, ...], which keeps each query head with its KV head.
// Where neither can express the result (lengths and heads both mapped; dropout, whose mask depends on batch and head;
// packed or paged rows) the entries are computed one by one.
#include <limits>

#include "mlx/attention.h"
#include "mlx/one_by_one.h"
#include "mlx/ops.h"

namespace mfa {
namespace {

enum class Fold { batch, heads, none };

// What the first axes of an input mean.
enum class Kind {
  batch_heads,  // [B, H, ...]
  broadcast,    // [B or 1, Hq or 1, Nq or 1, Nk or 1]
  heads,        // [Hq]
  batch,        // [B]
  other,
};

struct Mapped {
  int V = 1;  // extent of the mapped axis
  int B = 0, Hq = 0;
  Fold fold = Fold::batch;
  mx::Stream stream;
};

std::vector<Kind> kinds_of(const AttentionParams& params, size_t inputs) {
  const InputLayout at(params);
  std::vector<Kind> kinds(inputs, Kind::batch_heads);
  if (at.alibi >= 0) kinds[at.alibi] = Kind::heads;
  if (at.sinks >= 0) kinds[at.sinks] = Kind::heads;
  if (at.bias >= 0) kinds[at.bias] = Kind::broadcast;
  if (at.mask >= 0) kinds[at.mask] = Kind::broadcast;
  if (at.kv_lengths >= 0) kinds[at.kv_lengths] = Kind::batch;
  if (at.dropout_keys >= 0) kinds[at.dropout_keys] = Kind::batch;
  if (at.seed >= 0) kinds[at.seed] = Kind::other;
  return kinds;
}

Mapped describe_map(const AttentionParams& params, const WantedGradients& wanted, const std::vector<mx::array>& inputs,
                    const std::vector<int>& axes, mx::Stream stream) {
  Mapped m{.stream = stream};
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) m.V = inputs[i].shape(axes[i]);
  }
  // Extents of q without its mapped axis.
  mx::Shape q = inputs[0].shape();
  if (axes[0] >= 0) q.erase(q.begin() + axes[0]);
  m.B = q[0];
  m.Hq = q[1];

  const InputLayout at(params);
  auto is_mapped = [&](int i) { return i >= 0 && axes[i] >= 0; };
  const bool per_head = is_mapped(at.sinks) || is_mapped(at.alibi) || wanted[static_cast<int>(Gradient::sinks)] ||
                        wanted[static_cast<int>(Gradient::alibi)];
  const bool fits = int64_t{m.V} * (per_head ? m.Hq : m.B) <= std::numeric_limits<int32_t>::max();
  const bool one_at_a_time = !params.plain() || params.has_seed || (per_head && is_mapped(at.kv_lengths)) || !fits;
  if (one_at_a_time && m.V > 0) {
    m.fold = Fold::none;
  } else {
    m.fold = per_head ? Fold::heads : Fold::batch;
  }
  return m;
}

// `x` with its mapped axis folded. `separate`: its entries along a broadcast axis must not be shared by mapped entries.
mx::array fold(const mx::array& x, int axis, Kind kind, bool separate, const Mapped& m) {
  const bool in_heads = m.fold == Fold::heads;
  const bool has_axis =
      kind == Kind::batch_heads || kind == Kind::broadcast || kind == (in_heads ? Kind::heads : Kind::batch);
  if (!has_axis) return x;
  const int target = in_heads && kind != Kind::heads ? 1 : 0;  // the axis that grows, as counted without the mapped one
  if (axis < 0 && kind == Kind::broadcast && x.shape(target) == 1 && !separate) return x;

  // The mapped axis, in front of the one that grows.
  auto y = axis >= 0 ? mx::moveaxis(x, axis, target, m.stream) : mx::expand_dims(x, target, m.stream);
  mx::Shape shape = y.shape();
  shape[target] = m.V;
  if (kind == Kind::broadcast) shape[target + 1] = in_heads ? m.Hq : m.B;
  return mx::flatten(mx::broadcast_to(y, shape, m.stream), target, target + 1, m.stream);
}

// An output whose axis `target` was grown from `extent`, with the mapped axis taken out again, in front of it.
mx::array unfold(const mx::array& x, int target, int extent, const Mapped& m) {
  return mx::unflatten(x, target, {m.V, extent}, m.stream);
}

}  // namespace

std::pair<std::vector<mx::array>, std::vector<int>> Attention::vmap(const std::vector<mx::array>& inputs,
                                                                    const std::vector<int>& axes) {
  const Mapped m = describe_map(params_, {}, inputs, axes, stream());
  auto run = [&](std::vector<mx::array> x) { return make(stream(), params_, std::move(x)); };
  if (m.fold == Fold::none) return one_by_one(inputs, axes, m.stream, run);

  const auto kinds = kinds_of(params_, inputs.size());
  std::vector<mx::array> folded;
  for (size_t i = 0; i < inputs.size(); ++i) folded.push_back(fold(inputs[i], axes[i], kinds[i], false, m));
  auto outputs = run(std::move(folded));
  const int target = m.fold == Fold::heads ? 1 : 0;
  for (auto& out : outputs) out = unfold(out, target, target == 1 ? m.Hq : m.B, m);
  std::vector<int> out_axes(outputs.size(), target);
  return {std::move(outputs), std::move(out_axes)};
}

std::pair<std::vector<mx::array>, std::vector<int>> AttentionBackward::vmap(const std::vector<mx::array>& inputs,
                                                                            const std::vector<int>& axes) {
  const Mapped m = describe_map(params_, wanted_, inputs, axes, stream());
  auto run = [&](std::vector<mx::array> x) { return make(stream(), params_, wanted_, std::move(x)); };
  if (m.fold == Fold::none) return one_by_one(inputs, axes, m.stream, run);

  const InputLayout at(params_);
  const auto kinds = kinds_of(params_, inputs.size());
  const bool wants_bias = wanted_[static_cast<int>(Gradient::bias)];
  std::vector<mx::array> folded;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool separate = wants_bias && static_cast<int>(i) == at.bias;
    folded.push_back(fold(inputs[i], axes[i], kinds[i], separate, m));
  }
  auto outputs = run(std::move(folded));

  std::vector<int> out_axes;
  size_t next = 0;
  for (int g = 0; g < kGradients; ++g) {
    if (!wanted_[g]) continue;
    const int i = input_of(Gradient{g}, at);
    const int target = m.fold == Fold::heads && kinds[i] != Kind::heads ? 1 : 0;
    mx::Shape given = inputs[i].shape();
    if (axes[i] >= 0) given.erase(given.begin() + axes[i]);
    auto& out = outputs[next++];
    if (Gradient{g} == Gradient::bias) {
      // fold() expanded the axis if the bias is broadcast over it; the gradient is the sum there.
      out = unfold(out, target, target == 1 ? m.Hq : m.B, m);
      if (given[target] == 1) out = mx::sum(out, target + 1, true, stream());
    } else {
      out = unfold(out, target, given[target], m);
    }
    out_axes.push_back(target);
  }
  return {std::move(outputs), std::move(out_axes)};
}

}  // namespace mfa
