#include "mlx/decoder_layer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "backend/cpu/attention.h"
#include "common/check.h"
#include "mfa/diagnostics.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/dtypes.h"
#include "mlx/evaluate.h"
#include "mlx/request.h"
#include "mlx/stream.h"

namespace mfa {
namespace {

// More tokens keep the operations busy enough, and many of them have packed weights.
constexpr int kMostTokens = 8;
// Layers of one operation. Each of its outputs refers to all others and to all inputs.
constexpr size_t kLayersAtOnce = 8;

bool has_shape(const mx::array& x, const mx::Shape& shape, mx::Dtype dtype) {
  return x.dtype() == dtype && x.shape() == shape;
}

// Whether the weights make N columns of K.
bool fits(const ProjectionWeights& p, int N, int K, mx::Dtype dtype) {
  if (p.bits == 0) return p.arrays.size() == 1 && has_shape(p.arrays[0], {N, K}, dtype);
  if (p.arrays.size() != 3 || p.group_size <= 0 || K % p.group_size != 0) return false;
  const bool known_bits = (p.bits >= 2 && p.bits <= 6) || p.bits == 8;
  const bool known_group = p.group_size == 32 || p.group_size == 64 || p.group_size == 128;
  if (!known_bits || !known_group || int64_t{K} * p.bits % 32 != 0) return false;
  const mx::Shape groups = {N, K / p.group_size};
  return has_shape(p.arrays[0], {N, static_cast<int>(int64_t{K} * p.bits / 32)}, mx::uint32) &&
         has_shape(p.arrays[1], groups, dtype) && has_shape(p.arrays[2], groups, dtype);
}

// Whether a layer is one for x of this width and dtype.
bool fits_together(const DecoderLayer& layer, int width, mx::Dtype dtype) {
  const auto& [s, w] = layer;
  if (s.Hkv < 1 || s.Hq < 1 || s.Hq % s.Hkv != 0 || s.D < kMinHeadDim || s.D > kMaxHeadDim) return false;
  if (s.rope_dims < 2 || s.rope_dims % 2 != 0 || s.rope_dims > s.D) return false;
  if (w.freqs && !has_shape(*w.freqs, {s.rope_dims / 2}, mx::float32)) return false;
  const int q = s.Hq * s.D, kv = s.Hkv * s.D;
  if (!has_shape(w.attention_norm, {width}, dtype) || !has_shape(w.mlp_norm, {width}, dtype)) return false;
  const auto& gate = w.projections[kGate].arrays;
  if (gate.empty() || gate[0].ndim() != 2 || gate[0].shape(0) < 1) return false;
  const int hidden = gate[0].shape(0);
  const std::array<std::array<int, 2>, kProjections> shapes = {
      {{q, width}, {kv, width}, {kv, width}, {width, q}, {hidden, width}, {hidden, width}, {width, hidden}}};
  for (int i = 0; i < kProjections; ++i)
    if (!fits(w.projections[i], shapes[i][0], shapes[i][1], dtype)) return false;
  return true;
}

bool fits_tokens(const LayerCache& cache, const DecoderLayerProblem& layer, const mx::array& x) {
  const mx::array &keys = cache.keys, &values = cache.values;
  if (keys.ndim() != 4 || keys.is_tracer() || values.is_tracer()) return false;
  const int capacity = keys.shape(2);
  const mx::Shape shape = {x.shape(0), layer.Hkv, capacity, layer.D};
  return has_shape(keys, shape, x.dtype()) && has_shape(values, shape, x.dtype()) && cache.offset >= 0 &&
         cache.offset <= capacity - x.shape(1);
}

bool is_writable(const mx::array& x) {
  return x.is_donatable() && x.flags().row_contiguous && x.data_size() == x.size();
}

// Whether the kernels can read the weights where they lie, now.
bool are_readable(const DecoderLayerWeights& w) {
  const auto readable = [](const mx::array& x) {
    return !x.is_tracer() && x.is_available() && x.flags().row_contiguous;
  };
  for (const ProjectionWeights& p : w.projections)
    if (!std::ranges::all_of(p.arrays, readable)) return false;
  return readable(w.attention_norm) && readable(w.mlp_norm) && (!w.freqs || readable(*w.freqs));
}

Projection projection(const ProjectionWeights& p) {
  const mx::array& w = p.arrays[0];
  Projection result;
  result.N = w.shape(0);
  if (p.bits != 0) {
    result.w = affine_weights(w, p.arrays[1], p.arrays[2], {p.bits, p.group_size, true});
    result.K = p.arrays[1].shape(1) * p.group_size;
  } else {
    result.K = w.shape(1);
    result.w.data = w.data<void>();
    result.w.transposed = true;
    result.w.stride = result.K;
  }
  return result;
}

struct Copy {
  const char* from;
  char* to;
  size_t bytes;
};

// Gives `out` memory of its own; what `cache` holds is to be copied there before rows are written.
void take_over(mx::array cache, mx::array& out, std::vector<Copy>& copies, mx::Stream stream) {
  cache = with_dense_rows(cache, stream);
  allocate(out);
  copies.push_back({cache.data<char>(), out.data<char>(), out.nbytes()});
}

DecoderLayerProblem problem(const DecoderLayer& layer) {
  const auto& [s, weights] = layer;
  const mx::array& norm = weights.attention_norm;
  DecoderLayerProblem p;
  p.width = norm.shape(0);
  p.Hq = s.Hq;
  p.Hkv = s.Hkv;
  p.D = s.D;
  p.dtype = to_dtype(norm.dtype());
  p.attention_norm = {norm.data<void>(), s.eps[0]};
  p.mlp_norm = {weights.mlp_norm.data<void>(), s.eps[1]};
  p.rope_dims = s.rope_dims;
  p.traditional = s.traditional;
  p.rope_scale = s.rope_scale;
  p.rope_base = s.rope_base;
  if (weights.freqs) p.rope_periods = weights.freqs->data<float>();
  p.scale = s.scale;
  const std::array<Projection*, kProjections> projections = {&p.q, &p.k, &p.v, &p.o, &p.gate, &p.up, &p.down};
  for (int i = 0; i < kProjections; ++i) *projections[i] = projection(weights.projections[i]);
  return p;
}

}  // namespace

void DecoderLayers::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(outputs[0]);
  // Each output has a list of the inputs, but the one that is being evaluated speaks for all: without the others' only
  // the program itself may refer to the caches.
  for (mx::array& out : outputs)
    if (&out.inputs() != &inputs && !out.is_tracer()) out.inputs().clear();
  // Work in flight, as that of the token before, holds on to its outputs: waiting for it costs less than a copy.
  if (!std::all_of(inputs.begin() + 1, inputs.end(), is_writable)) mx::synchronize(stream());
  std::vector<Copy> copies;
  for (size_t i = 1; i < inputs.size(); ++i) {
    if (is_writable(inputs[i])) {
      outputs[i].copy_shared_buffer(inputs[i]);
    } else {
      take_over(inputs[i], outputs[i], copies, stream());
    }
  }
  const void* x = with_dense_rows(inputs[0], stream()).data<void>();
  std::vector<DecoderLayerProblem> problems;
  problems.reserve(layers_->size());
  for (size_t i = 0; i < layers_->size(); ++i) {
    DecoderLayerProblem& p = problems.emplace_back((*layers_)[i].problem);
    p.B = inputs[0].shape(0);
    p.T = inputs[0].shape(1);
    p.keys = mutable_tensor_ref(outputs[1 + 2 * i]);
    p.values = mutable_tensor_ref(outputs[2 + 2 * i]);
    p.offset = offsets_[i];
    p.causal = causal_;
  }
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x, out = outputs[0].data<void>(), problems = std::move(problems), copies = std::move(copies), layers = layers_] {
        for (const Copy& c : copies) std::memcpy(c.to, c.from, c.bytes);
        decoder_layers(problems, x, out);
      });
}

void DecoderLayers::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(concat("[", name(), "::eval_gpu] this primitive runs on CPU streams only"));
}

std::shared_ptr<const DecoderStack> prepare_decoder(std::vector<DecoderLayer> layers) {
  if (layers.empty() || !cpu::kernel_traits()) return nullptr;
  const mx::array& norm = layers[0].weights.attention_norm;
  if (norm.ndim() != 1 || norm.size() == 0 || !is_kernel_dtype(norm.dtype())) return nullptr;
  auto stack = std::make_shared<DecoderStack>();
  stack->dtype = norm.dtype();
  stack->width = norm.shape(0);
  stack->size = layers.size();
  for (const DecoderLayer& layer : layers)
    if (!fits_together(layer, stack->width, stack->dtype) || !are_readable(layer.weights)) return nullptr;
  for (size_t first = 0; first < layers.size(); first += kLayersAtOnce) {
    auto part = std::make_shared<std::vector<DecoderStack::Layer>>();
    for (size_t i = first; i < std::min(layers.size(), first + kLayersAtOnce); ++i)
      part->push_back({problem(layers[i]), std::move(layers[i].weights)});
    stack->parts.push_back(std::move(part));
  }
  return stack;
}

std::optional<DecoderOutputs> decoder_layers(const mx::array& x, const DecoderStack& stack,
                                             const std::vector<LayerCache>& caches, bool causal,
                                             mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream);
  if (s.device != mx::Device::cpu || x.is_tracer() || caches.size() != stack.size) return std::nullopt;
  if (x.ndim() != 3 || x.dtype() != stack.dtype || x.shape(2) != stack.width) return std::nullopt;
  if (const int64_t tokens = int64_t{x.shape(0)} * x.shape(1); tokens < 1 || tokens > kMostTokens) return std::nullopt;
  auto cache = caches.begin();
  for (const DecoderStack::Part& part : stack.parts)
    for (const DecoderStack::Layer& layer : *part)
      if (!fits_tokens(*cache++, layer.problem, x)) return std::nullopt;

  DecoderOutputs result{x, {}};
  result.caches.reserve(caches.size());
  cache = caches.begin();
  for (const DecoderStack::Part& part : stack.parts) {
    std::vector<mx::array> inputs = {result.x};
    std::vector<mx::Shape> shapes = {x.shape()};
    std::vector<int> offsets;
    for (size_t i = 0; i < part->size(); ++i, ++cache) {
      for (const mx::array& rows : {cache->keys, cache->values}) {
        shapes.push_back(rows.shape());
        inputs.push_back(rows);
      }
      offsets.push_back(cache->offset);
    }
    const std::vector<mx::Dtype> dtypes(shapes.size(), x.dtype());
    const auto outputs =
        mx::array::make_arrays(std::move(shapes), dtypes,
                               std::make_shared<DecoderLayers>(s, part, std::move(offsets), causal), std::move(inputs));
    result.x = outputs[0];
    for (size_t i = 1; i < outputs.size(); i += 2) result.caches.emplace_back(outputs[i], outputs[i + 1]);
  }
  return result;
}

}  // namespace mfa
