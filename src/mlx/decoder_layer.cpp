#include "mlx/decoder_layer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "backend/cpu/attention.h"
#include "common/check.h"
#include "layers/decoder_layer.h"
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

bool all_fit(const mx::array& x, const mx::array& keys, const mx::array& values, const DecoderLayerWeights& w,
             const DecoderLayerShape& s) {
  if (x.ndim() != 3 || !is_kernel_dtype(x.dtype())) return false;
  const int64_t tokens = int64_t{x.shape(0)} * x.shape(1);
  if (tokens < 1 || tokens > kMostTokens || x.shape(2) < 1) return false;
  const mx::Dtype dtype = x.dtype();
  if (s.Hkv < 1 || s.Hq < 1 || s.Hq % s.Hkv != 0 || s.D < kMinHeadDim || s.D > kMaxHeadDim) return false;
  if (keys.ndim() != 4 || keys.dtype() != dtype || !has_shape(values, keys.shape(), dtype)) return false;
  const int capacity = keys.shape(2);
  if (!has_shape(keys, {x.shape(0), s.Hkv, capacity, s.D}, dtype)) return false;
  if (s.offset < 0 || s.offset > capacity - x.shape(1)) return false;
  if (s.rope_dims < 2 || s.rope_dims % 2 != 0 || s.rope_dims > s.D) return false;
  if (w.freqs && !has_shape(*w.freqs, {s.rope_dims / 2}, mx::float32)) return false;
  const int width = x.shape(2), q = s.Hq * s.D, kv = s.Hkv * s.D;
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

DecoderLayerProblem problem(const DecoderLayers::Layer& layer, const mx::array& x, mx::array& keys, mx::array& values) {
  const auto& [s, weights] = layer;
  DecoderLayerProblem p;
  p.B = x.shape(0);
  p.T = x.shape(1);
  p.width = x.shape(2);
  p.Hq = s.Hq;
  p.Hkv = s.Hkv;
  p.D = s.D;
  p.dtype = to_dtype(x.dtype());
  p.attention_norm = {weights.attention_norm.data<void>(), s.eps[0]};
  p.mlp_norm = {weights.mlp_norm.data<void>(), s.eps[1]};
  p.rope_dims = s.rope_dims;
  p.traditional = s.traditional;
  p.rope_scale = s.rope_scale;
  p.rope_base = s.rope_base;
  if (weights.freqs) p.rope_periods = weights.freqs->data<float>();
  p.keys = mutable_tensor_ref(keys);
  p.values = mutable_tensor_ref(values);
  p.offset = s.offset;
  p.scale = s.scale;
  p.causal = s.causal;
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
  for (size_t i = 0; i < layers_->size(); ++i)
    problems.push_back(problem((*layers_)[i], inputs[0], outputs[1 + 2 * i], outputs[2 + 2 * i]));
  mx::cpu::get_command_encoder(stream()).dispatch(
      [x, out = outputs[0].data<void>(), problems = std::move(problems), copies = std::move(copies), layers = layers_] {
        for (const Copy& c : copies) std::memcpy(c.to, c.from, c.bytes);
        decoder_layers(problems, x, out);
      });
}

void DecoderLayers::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(concat("[", name(), "::eval_gpu] this primitive runs on CPU streams only"));
}

std::optional<DecoderOutputs> decoder_layers(const mx::array& x, std::vector<CachedDecoderLayer> layers,
                                             mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream);
  if (s.device != mx::Device::cpu || !cpu::kernel_traits() || x.is_tracer()) return std::nullopt;
  for (const CachedDecoderLayer& layer : layers) {
    if (!all_fit(x, layer.keys, layer.values, layer.weights, layer.shape)) return std::nullopt;
    // There is no derivative, and weights are read as they are now.
    if (layer.keys.is_tracer() || layer.values.is_tracer() || !are_readable(layer.weights)) return std::nullopt;
  }
  DecoderOutputs result{x, {}};
  for (size_t first = 0; first < layers.size(); first += kLayersAtOnce) {
    const size_t end = std::min(layers.size(), first + kLayersAtOnce);
    std::vector<mx::array> inputs = {result.x};
    std::vector<mx::Shape> shapes = {x.shape()};
    std::vector<DecoderLayers::Layer> constants;
    for (size_t i = first; i < end; ++i) {
      for (const mx::array& cache : {layers[i].keys, layers[i].values}) {
        shapes.push_back(cache.shape());
        inputs.push_back(cache);
      }
      constants.push_back({layers[i].shape, std::move(layers[i].weights)});
    }
    const std::vector<mx::Dtype> dtypes(shapes.size(), x.dtype());
    const auto outputs = mx::array::make_arrays(
        std::move(shapes), dtypes, std::make_shared<DecoderLayers>(s, std::move(constants)), std::move(inputs));
    result.x = outputs[0];
    for (size_t i = 1; i < outputs.size(); i += 2) result.caches.emplace_back(outputs[i], outputs[i + 1]);
  }
  return result;
}

}  // namespace mfa
