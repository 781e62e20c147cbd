#include "mfa/neighbourhood.h"

#include <cstdint>
#include <string>

#include "attention/neighbourhood.h"
#include "common/check.h"
#include "mlx/route.h"

namespace mfa {
namespace {

constexpr const char* kFunction = "flash_attention_gna";

std::string listed(const std::vector<int>& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + (values.size() == 1 ? ",)" : ")");
}

Neighbourhood to_neighbourhood(const NeighbourhoodSpec& spec) {
  const size_t axes = spec.shape.size();
  check(axes >= 1 && axes <= 3, kFunction, "seq_shape must have 1 to 3 axes; got ", listed(spec.shape));
  auto has_axes = [&](size_t count, const char* name, bool optional) {
    check(count == axes || (optional && count == 0), kFunction, name, " must have one value for each of the ", axes,
          " axes of seq_shape; got ", count);
  };
  has_axes(spec.window.size(), "window_size", false);
  has_axes(spec.stride.size(), "stride", false);
  has_axes(spec.dilation.size(), "dilation", true);
  has_axes(spec.causal.size(), "causal", true);
  Neighbourhood n;
  n.axes = static_cast<int32_t>(axes);
  n.shifts = spec.shifts;
  n.leans_left = spec.leans_left;
  for (size_t i = 0; i < axes; ++i) {
    NeighbourhoodAxis& axis = n.axis[i];
    axis = {spec.shape[i], spec.window[i], spec.stride[i], spec.dilation.empty() ? 1 : spec.dilation[i],
            !spec.causal.empty() && spec.causal[i]};
  }
  validate(n, kFunction);
  return n;
}

// Of three int32 extents, which may exceed any integer.
double tokens_of(const Neighbourhood& n) {
  double tokens = 1;
  for (int32_t i = 0; i < n.axes; ++i) tokens *= n.axis[i].size;
  return tokens;
}

std::vector<mx::array> run(const mx::array& q, const mx::array& k, const mx::array& v, const NeighbourhoodSpec& spec,
                           const AttentionOptions& options, mx::StreamOrDevice s, bool wants_lse) {
  AttentionSources sources;
  sources.function = kFunction;
  sources.neighbourhood = to_neighbourhood(spec);
  check(q.ndim() == 4 && k.ndim() == 4, kFunction, "q and k must have 4 dimensions [B, H, N, D]; got shapes ",
        q.shape(), " and ", k.shape());
  check(q.shape(2) == tokens_of(sources.neighbourhood) && k.shape(2) == q.shape(2), kFunction,
        "q and k must have the tokens of seq_shape, ", listed(spec.shape), "; got ", q.shape(2), " and ", k.shape(2));
  return launch(make_request(q, k, v, options, options.return_probs, s, sources), options.backend,
                {.lse = wants_lse, .probs = options.return_probs});
}

}  // namespace

mx::array attention_gna(const mx::array& q, const mx::array& k, const mx::array& v, const NeighbourhoodSpec& spec,
                        const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, spec, options, s, false)[0];
}

AttentionResult attention_gna_with_lse(const mx::array& q, const mx::array& k, const mx::array& v,
                                       const NeighbourhoodSpec& spec, const AttentionOptions& options,
                                       mx::StreamOrDevice s) {
  const auto outputs = run(q, k, v, spec, options, s, true);
  return {outputs[0], outputs[1], std::nullopt};
}

}  // namespace mfa
