// decoder.cpp: mfa::decoder_layers for Python, and what tells that the modules it was prepared from are as they were.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "mfa/layers.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace mfa::python {
namespace {

using Norm = std::pair<mx::array, float>;
using Rotation = std::tuple<int, bool, std::optional<float>, float, std::optional<mx::array>>;
using Weights = std::tuple<std::vector<mx::array>, int, int>;
// heads, scale, norms, rotation, projections
using Layer = std::tuple<std::array<int, 3>, float, std::vector<Norm>, Rotation, std::vector<Weights>>;
using Outputs = std::pair<mx::array, std::vector<std::pair<mx::array, mx::array>>>;

// `mfa::DecoderStack` is not defined in public headers.
struct Stack {
  std::shared_ptr<const DecoderStack> layers;
};

std::optional<Stack> prepare(std::vector<Layer> layers) {
  std::vector<DecoderLayer> described;
  described.reserve(layers.size());
  for (auto& [heads, scale, norms, rotation, projections] : layers) {
    const auto& [dims, traditional, base, rope_scale, freqs] = rotation;
    if (base.has_value() == freqs.has_value() || norms.size() != 2 || projections.size() != kProjections)
      return std::nullopt;
    const DecoderLayerShape shape{.Hq = heads[0],
                                  .Hkv = heads[1],
                                  .D = heads[2],
                                  .scale = scale,
                                  .eps = {norms[0].second, norms[1].second},
                                  .rope_dims = dims,
                                  .traditional = traditional,
                                  .rope_base = base.value_or(0.f),
                                  .rope_scale = rope_scale};
    DecoderLayerWeights weights{norms[0].first, norms[1].first, freqs, {}};
    for (int i = 0; i < kProjections; ++i) {
      auto& [arrays, bits, group_size] = projections[i];
      weights.projections[i] = {std::move(arrays), bits, group_size};
    }
    described.push_back({shape, std::move(weights)});
  }
  auto stack = prepare_decoder(std::move(described));
  if (!stack) return std::nullopt;
  return Stack{std::move(stack)};
}

std::optional<Outputs> run(const mx::array& x, const Stack& stack,
                           const std::vector<std::tuple<mx::array, mx::array, int>>& caches, bool causal,
                           mx::StreamOrDevice stream) {
  std::vector<LayerCache> described;
  described.reserve(caches.size());
  for (const auto& [keys, values, offset] : caches) described.push_back({keys, values, offset});
  auto outputs = decoder_layers(x, *stack.layers, described, causal, stream);
  if (!outputs) return std::nullopt;
  return Outputs{std::move(outputs->x), std::move(outputs->caches)};
}

// What dictionaries with attributes, as MLX's modules are, held: the objects, and of arrays also the contents that
// these referred to, as `a[0] = 1` gives an array others. It keeps those alive, but not the dictionaries.
class Snapshot {
 public:
  explicit Snapshot(const nb::list& modules) {
    for (nb::handle module : modules) {
      const nb::object attributes = attributes_of(module);
      Module record{module.ptr(), module.type().ptr(), {}, {}};
      each_item(module.ptr(),
                [&](nb::handle key, nb::handle value) { return record.items.emplace_back(key, value), true; });
      each_item(attributes.ptr(),
                [&](nb::handle key, nb::handle value) { return record.attributes.emplace_back(key, value), true; });
      modules_.push_back(std::move(record));
    }
  }

  // Whether the same dictionaries, in this order, hold the same. The first of them must be alive, and each other an
  // item of one before it.
  bool holds() const {
    for (const Module& module : modules_) {
      if (nb::handle(module.object).type().ptr() != module.type || !holds_in(module.object, module.items)) return false;
      if (!holds_in(attributes_of(module.object).ptr(), module.attributes)) return false;
    }
    return true;
  }

 private:
  struct Entry {
    nb::object key, value;
    std::uintptr_t contents = 0;
    Entry(nb::handle k, nb::handle v) : key(nb::borrow(k)), value(nb::borrow(v)), contents(contents_of(v)) {}
  };
  struct Module {
    PyObject *object, *type;
    std::vector<Entry> items, attributes;
  };

  static std::uintptr_t contents_of(nb::handle value) {
    return nb::isinstance<mx::array>(value) ? nb::inst_ptr<mx::array>(value)->id() : 0;
  }
  static nb::object attributes_of(nb::handle module) {
    PyObject* attributes = PyObject_GenericGetDict(module.ptr(), nullptr);
    if (!attributes) throw nb::python_error();
    return nb::steal(attributes);
  }
  template <class F>
  static bool each_item(PyObject* dictionary, const F& f) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dictionary, &at, &key, &value);)
      if (!f(key, value)) return false;
    return true;
  }
  static bool holds_in(PyObject* dictionary, const std::vector<Entry>& entries) {
    auto entry = entries.begin();
    const bool same = each_item(dictionary, [&](nb::handle key, nb::handle value) {
      if (entry == entries.end() || !entry->key.is(key) || !entry->value.is(value)) return false;
      const bool unchanged = entry->contents == 0 || nb::inst_ptr<mx::array>(value)->id() == entry->contents;
      ++entry;
      return unchanged;
    });
    return same && entry == entries.end();
  }

  std::vector<Module> modules_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Stack>(m, "DecoderStack", "Layers of a llama-like decoder, ready for all tokens.");
  m.def("prepare_decoder", &prepare, "layers"_a, R"(
        Consecutive layers of a llama-like decoder, or None if one is not covered. It keeps their weights as they are.

        Args:
            layers (list): Of each ``(heads, scale, norms, rotation, projections)``: heads ``(Hq, Hkv, D)``; scale that
                of scores; norms ``(weight, eps)`` of the two RMS norms; rotation ``(dims, traditional, base or None,
                scale, freqs or None)``; projections ``(arrays, bits, group_size)`` of q, k, v, o, gate, up and down,
                the weights ``[out, in]`` with bits 0, or the three arrays of affine quantisation.
        Returns: DecoderStack or None.)");
  m.def("try_decoder_layers", &run, "x"_a, "stack"_a, "caches"_a, "causal"_a, "stream"_a = nb::none(), R"(
        The layers of ``stack`` as few operations, or None if the call is not covered.

        Args:
            x (array): ``[B, T, width]``, the new tokens, 8 at most in all.
            stack (DecoderStack): The layers.
            caches (list): Of each layer ``(keys, values, offset)``: the whole cache ``[B, Hkv, capacity, D]`` and the
                tokens in it.
            causal (bool): A new token sees only those up to itself.
        Returns: tuple or None: The output, and for each layer keys and values with the new rows.)");
  nb::class_<Snapshot>(m, "Snapshot", "What modules, dictionaries with attributes, held when it was made.")
      .def(nb::init<const nb::list&>(), "modules"_a, "Args:\n    modules (list): Each is alive as long as the first.\n")
      .def("holds", &Snapshot::holds,
           "Whether they hold the same objects, and arrays among these the same contents.\n\nReturns:\n    bool");
}

}  // namespace mfa::python
