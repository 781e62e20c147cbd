#include "layers/decoder_layer.h"

#include <array>
#include <optional>
#include <span>
#include <vector>

#include "attention/append.h"
#include "backend/cpu/attention.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/scratch.h"
#include "common/thread_pool.h"
#include "layers/rms_norm.h"
#include "layers/rope.h"
#include "layers/swiglu.h"

namespace mfa {
namespace {

// Hands out the parts of this thread's memory for intermediates; with no memory, counts their bytes.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  void* take(int64_t elements, DType dtype) {
    char* part = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += (static_cast<size_t>(elements) * size_of(dtype) + 63) / 64 * 64;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// [tokens, columns] each, but for those with heads: [B, H, T, D].
struct Intermediates {
  void *normed, *q, *k, *v, *q_heads, *k_heads, *attended, *added, *hidden, *gate, *up;
  Intermediates(const DecoderLayerProblem& p, Arena& arena) {
    const int64_t tokens = p.B * p.T;
    const auto rows = [&](int32_t columns) { return arena.take(tokens * columns, p.dtype); };
    normed = rows(p.width);
    q = rows(p.q.N), k = rows(p.k.N), v = rows(p.v.N);
    q_heads = rows(p.q.N), k_heads = rows(p.k.N), attended = rows(p.q.N);
    added = rows(p.width), hidden = rows(p.width);
    gate = rows(p.gate.N), up = rows(p.up.N);
  }
};

char* working_memory(size_t bytes) {
  static thread_local cpu::AlignedBuffer buffer;  // the kernels have thread_scratch() to themselves
  if (buffer.bytes() < bytes) buffer = cpu::AlignedBuffer(bytes);
  return static_cast<char*>(buffer.data());
}

void normalise(const DecoderLayerProblem& p, const void* x, const RmsNormWeights& norm, void* out) {
  rms_norm({p.B * p.T, p.width, p.dtype, x, p.width, norm.weight, 1, norm.eps, out});
}

struct Product {
  const Projection& projection;
  const void* x;
  void* out;
};

// Products that are independent of each other: their tasks are shared out together.
void multiply(const DecoderLayerProblem& p, std::span<const Product> products) {
  std::array<MatmulProblem, 3> problems;
  size_t count = 0;
  for (const Product& product : products) {
    MatmulProblem m;
    m.M = p.B * p.T;
    m.N = product.projection.N;
    m.K = product.projection.K;
    m.dtype = p.dtype;
    m.x = {product.x, m.K, nullptr};
    m.w = product.projection.w;
    m.out = product.out;
    problems[count++] = m;
  }
  cpu::matmul({problems.data(), count});
}

void add(const DecoderLayerProblem& p, const void* a, const void* b, void* out) {
  cpu::require_kernels().layers().add(p.dtype, a, b, p.B * p.T * p.width, out);
}

// Of [B, T, H * D] to [B, H, T, D].
RopeProblem rotation(const DecoderLayerProblem& p, const void* x, int32_t H, void* out) {
  RopeProblem r;
  r.B = p.B;
  r.H = H;
  r.T = p.T;
  r.D = p.D;
  r.dims = p.rope_dims;
  r.dtype = p.dtype;
  r.x = x;
  const int64_t row = int64_t{H} * p.D;
  r.stride[0] = p.T * row;
  r.stride[1] = p.D;
  r.stride[2] = row;
  r.out = out;
  r.traditional = p.traditional;
  r.scale = p.rope_scale;
  r.base = p.rope_base;
  r.periods = p.rope_periods;
  r.offsets = &p.offset;
  return r;
}

// Whether the tokens of both are turned alike.
bool have_same_turns(const DecoderLayerProblem& a, const DecoderLayerProblem& b) {
  return a.offset == b.offset && a.rope_dims == b.rope_dims && a.rope_scale == b.rope_scale &&
         a.rope_base == b.rope_base && a.rope_periods == b.rope_periods;
}

// Writes the new rows, [B, Hkv, T, D] by their strides, into the cache.
void append(const DecoderLayerProblem& p, void* rows, const int64_t (&stride)[3], const MutableTensorRef& cache) {
  CacheRows r;
  r.B = static_cast<int32_t>(p.B);
  r.H = p.Hkv;
  r.N = static_cast<int32_t>(p.T);
  r.D = p.D;
  r.capacity = p.offset + r.N;
  r.dtype = p.dtype;
  r.cache = cache;
  r.rows = {rows, {stride[0], stride[1], stride[2]}};
  const std::vector<int32_t> starts(static_cast<size_t>(p.B), p.offset);
  r.starts = starts.data();
  append_rows(r);
}

void attend(const DecoderLayerProblem& p, const void* q, void* out) {
  AttentionProblem a;
  a.B = static_cast<int32_t>(p.B);
  a.Hq = p.Hq;
  a.Hkv = p.Hkv;
  a.Nq = static_cast<int32_t>(p.T);
  a.Nk = p.offset + a.Nq;
  a.D = a.Dv = p.D;
  a.dtype = p.dtype;
  a.q = {q, {p.Hq * p.T * p.D, p.T * p.D, p.D}};
  a.k = {p.keys.data, {p.keys.stride[0], p.keys.stride[1], p.keys.stride[2]}};
  a.v = {p.values.data, {p.values.stride[0], p.values.stride[1], p.values.stride[2]}};
  a.scale = p.scale;
  a.causal = p.causal;
  AttentionOutputs o;
  const int64_t row = int64_t{p.Hq} * p.D;
  o.o = {out, {p.T * row, p.D, row}};
  cpu::attention_forward(a, o);
}

void compute(const DecoderLayerProblem& p, const RopeTurns& turns, const Intermediates& m, const void* x, void* out) {
  normalise(p, x, p.attention_norm, m.normed);
  multiply(p, std::array{Product{p.q, m.normed, m.q}, Product{p.k, m.normed, m.k}, Product{p.v, m.normed, m.v}});
  rope(rotation(p, m.q, p.Hq, m.q_heads), turns);
  rope(rotation(p, m.k, p.Hkv, m.k_heads), turns);
  const int64_t row = int64_t{p.Hkv} * p.D;
  append(p, m.k_heads, {row * p.T, p.T * p.D, p.D}, p.keys);
  append(p, m.v, {row * p.T, p.D, row}, p.values);
  attend(p, m.q_heads, m.attended);
  multiply(p, std::array{Product{p.o, m.attended, m.added}});
  add(p, x, m.added, m.hidden);

  normalise(p, m.hidden, p.mlp_norm, m.normed);
  multiply(p, std::array{Product{p.gate, m.normed, m.gate}, Product{p.up, m.normed, m.up}});
  swiglu({p.B * p.T * p.gate.N, p.dtype, m.gate, m.up, m.gate});
  multiply(p, std::array{Product{p.down, m.gate, m.added}});
  add(p, m.hidden, m.added, out);
}

}  // namespace

void decoder_layers(std::span<const DecoderLayerProblem> layers, const void* x, void* out) {
  const AwakeWorkers awake;
  std::optional<RopeTurns> turns;
  const DecoderLayerProblem* turned = nullptr;
  for (const DecoderLayerProblem& p : layers) {
    Arena size(nullptr);
    Intermediates(p, size);
    Arena arena(working_memory(size.bytes()));
    if (!turned || !have_same_turns(p, *turned)) turns.emplace(rotation(p, nullptr, p.Hq, nullptr));
    turned = &p;
    compute(p, *turns, Intermediates(p, arena), x, out);
    x = out;
  }
}

}  // namespace mfa
