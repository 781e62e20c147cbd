// options.h: the options of attention from Python arguments, for all entry points.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/variant.h>

#include <optional>
#include <string_view>

#include "mfa/attention.h"

namespace mfa::python {

namespace mx = mlx::core;

using OptionalArray = std::optional<mx::array>;
using Seed = std::variant<std::monostate, uint64_t, mx::array>;

// The name of an entry point as a string that lives as long as the process.
const char* static_name(std::string_view name);

AttentionOptions make_options(std::optional<double> scale, bool causal, double softcap,
                              const OptionalArray& alibi_slopes, double dropout_p, int window_left, int window_right,
                              const OptionalArray& attn_bias, std::string_view backend, const OptionalArray& mask,
                              const OptionalArray& sinks, const OptionalArray& kv_lengths, const Seed& dropout_seed,
                              bool return_probs);

}  // namespace mfa::python
