#include "options.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <set>
#include <string>

#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {
namespace {

OptionalArray to_seed_array(const Seed& seed) {
  if (const auto* array = std::get_if<mx::array>(&seed)) return *array;
  if (const auto* number = std::get_if<uint64_t>(&seed)) {
    return mx::array({static_cast<uint32_t>(*number), static_cast<uint32_t>(*number >> 32)}, mx::uint32);
  }
  return std::nullopt;
}

}  // namespace

const char* static_name(std::string_view name) {
  static std::set<std::string, std::less<>> names;  // under Python's lock
  const auto at = names.find(name);
  return (at != names.end() ? at : names.emplace(name).first)->c_str();
}

AttentionOptions make_options(std::optional<double> scale, bool causal, double softcap,
                              const OptionalArray& alibi_slopes, double dropout_p, int window_left, int window_right,
                              const OptionalArray& attn_bias, std::string_view backend, const OptionalArray& mask,
                              const OptionalArray& sinks, const OptionalArray& kv_lengths, const Seed& dropout_seed,
                              bool return_probs) {
  AttentionOptions options;
  if (scale) options.scale = static_cast<float>(*scale);
  options.causal = causal;
  options.window_left = window_left;
  options.window_right = window_right;
  options.softcap = static_cast<float>(softcap);
  // 0 is off, and the kernels divide by it.
  if (softcap > 0) options.softcap = std::max(options.softcap, std::numeric_limits<float>::min());
  options.alibi_slopes = alibi_slopes;
  options.bias = attn_bias;
  options.mask = mask;
  options.sinks = sinks;
  options.kv_lengths = kv_lengths;
  options.dropout_p = static_cast<float>(dropout_p);
  options.dropout_seed = to_seed_array(dropout_seed);
  options.return_probs = return_probs;
  options.backend = parse_backend(backend);
  return options;
}

// An entry point with other arguments of its own takes the options as one object.
void bind_options(nb::module_& m) {
  nb::class_<AttentionOptions>(m, "AttentionOptions", "The options that the entry points of attention share.")
      .def(
          "__init__",
          [](AttentionOptions* self, std::string_view function, std::optional<double> scale, bool causal,
             double softcap, const OptionalArray& alibi_slopes, double dropout_p, int window_left, int window_right,
             const OptionalArray& attn_bias, std::string_view backend, const OptionalArray& mask,
             const OptionalArray& sinks, const OptionalArray& kv_lengths, const Seed& dropout_seed) {
            new (self) AttentionOptions(make_options(scale, causal, softcap, alibi_slopes, dropout_p, window_left,
                                                     window_right, attn_bias, backend, mask, sinks, kv_lengths,
                                                     dropout_seed, false));
            self->function = static_name(function);
          },
          "function"_a, "scale"_a = nb::none(), "causal"_a = false, "softcap"_a = 0.0, "alibi_slopes"_a = nb::none(),
          "dropout_p"_a = 0.0, "window_left"_a = -1, "window_right"_a = -1, "attn_bias"_a = nb::none(),
          "backend"_a = "auto", "mask"_a = nb::none(), "sinks"_a = nb::none(), "kv_lengths"_a = nb::none(),
          "dropout_seed"_a = nb::none(),
          "As the arguments of :func:`mlx_mfa.flash_attention`, with ``window_size`` as two integers, for "
          "``function``.");
}

}  // namespace mfa::python
