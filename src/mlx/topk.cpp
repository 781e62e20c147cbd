// topk.cpp: a first pass finds the k-th largest score of each row, a second attends to what is not below it. Both
// compute scores with the same arithmetic, so the comparison is exact.
#include "mfa/topk.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "common/check.h"
#include "mlx/evaluate.h"
#include "mlx/one_by_one.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/route.h"
#include "mlx/sparse.h"

namespace mfa {
namespace {

constexpr const char* kFunction = "flash_attention_topk";

// Inputs: those of Attention for the same parameters, then the number of keys to keep, int32 [B]. Output: floors of the
// scores, float32 [B, Hq, Nq]. Piecewise constant: it is used behind stop_gradient().
class ScoreFloors : public mx::Primitive {
 public:
  ScoreFloors(mx::Stream stream, const AttentionParams& params) : Primitive(stream), params_(params) {}

  static mx::array make(mx::Stream stream, const AttentionParams& params, std::vector<mx::array> inputs) {
    const mx::Shape& q = inputs[0].shape();
    return mx::array({q[0], q[1], q[2]}, mx::float32, std::make_shared<ScoreFloors>(stream, params), std::move(inputs));
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    const auto evaluated = evaluate(params_, inputs, stream());
    const auto* keep = with_dense_rows(inputs.back(), stream()).data<int32_t>();
    auto* floors = outputs[0].data<float>();
    dispatch_or_poison(stream(), outputs,
                       [evaluated, keep, floors]() { cpu::score_floors(evaluated.checked(), keep, floors); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[flash_attention_topk] there is no kernel for GPUs");
  }

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override {
    return one_by_one(inputs, axes, stream(), [&](std::vector<mx::array> x) -> std::vector<mx::array> {
      return {make(stream(), params_, std::move(x))};
    });
  }

  const char* name() const override { return "MfaScoreFloors"; }
  bool is_equivalent(const Primitive& other) const override {
    return params_ == static_cast<const ScoreFloors&>(other).params_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    const mx::Shape& q = inputs[0].shape();
    return {{q[0], q[1], q[2]}};
  }

 private:
  AttentionParams params_;
};

// How many keys the rows of each batch entry keep, int32 [B].
mx::array kept_keys(double ratio, int B, int Nk, const std::optional<mx::array>& lengths, mx::Stream s) {
  auto kept_of = [&](int keys) { return std::max(1, static_cast<int>(std::ceil(ratio * keys))); };
  if (!lengths) return mx::full({B}, kept_of(Nk), mx::int32, s);
  // A table, so that lengths which are still to be computed are rounded as numbers are.
  std::vector<int32_t> table;
  table.reserve(static_cast<size_t>(Nk) + 1);
  for (int keys = 0; keys <= Nk; ++keys) table.push_back(kept_of(keys));
  const auto known = mx::array(table.begin(), {Nk + 1}, mx::int32);
  return mx::take(known, mx::clip(*lengths, mx::array(0), mx::array(Nk), s), s);
}

std::vector<mx::array> run(const mx::array& q, const mx::array& k, const mx::array& v, double ratio,
                           const std::optional<BlockMask>& mask, const AttentionOptions& options,
                           mx::StreamOrDevice stream_or_device, bool wants_lse) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  check(std::isfinite(ratio) && ratio > 0 && ratio <= 1, kFunction, "topk_ratio must be in (0, 1]; got ", ratio);
  AttentionSources sources;
  sources.function = kFunction;
  if (mask) sources.blocks = block_lists(*mask, score_extents(q, k, kFunction), kFunction);

  AttentionOptions scored = options;  // neither moves a score
  scored.sinks = std::nullopt;
  scored.dropout_p = 0.f;
  Request scores = make_request(q, k, v, scored, false, s, sources);
  const InputLayout at(scores.params);
  std::optional<mx::array> lengths;
  if (at.kv_lengths >= 0) lengths = scores.inputs[at.kv_lengths];
  scores.inputs.push_back(kept_keys(ratio, q.shape(0), k.shape(2), lengths, s));
  sources.score_floor = mx::stop_gradient(ScoreFloors::make(s, scores.params, std::move(scores.inputs)), s);
  return launch(make_request(q, k, v, options, options.return_probs, s, sources), options.backend, {.lse = wants_lse});
}

}  // namespace

mx::array attention_topk(const mx::array& q, const mx::array& k, const mx::array& v, double ratio,
                         const std::optional<BlockMask>& mask, const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, ratio, mask, options, s, false)[0];
}

AttentionResult attention_topk_with_lse(const mx::array& q, const mx::array& k, const mx::array& v, double ratio,
                                        const std::optional<BlockMask>& mask, const AttentionOptions& options,
                                        mx::StreamOrDevice s) {
  const auto outputs = run(q, k, v, ratio, mask, options, s, true);
  return {outputs[0], outputs[1], std::nullopt};
}

}  // namespace mfa
