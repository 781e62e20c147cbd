#include "support/attention_case.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <sstream>

#include "attention/visibility.h"

namespace mfa::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Storage and strides of a bias or mask.
struct TermLayout {
  std::array<int64_t, 4> stride{};
  int64_t origin = 0, size = 0;
};

TermLayout lay_out(const TermSpec& term, std::array<int64_t, 4> shape) {
  TermLayout layout;
  const int64_t step = term.strided ? 2 : 1;
  int64_t size = step;
  int first = -1;
  for (int axis = 3; axis >= 0; --axis) {
    if (!(term.axes & (8 >> axis))) continue;
    layout.stride[axis] = size;
    size *= shape[axis];
    first = axis;
  }
  layout.size = size;
  if (term.strided && first >= 0 && shape[first] > 0) {
    layout.origin = (shape[first] - 1) * layout.stride[first];
    layout.stride[first] = -layout.stride[first];
  }
  return layout;
}

std::string axes_name(const TermSpec& term) {
  std::string name;
  for (int axis = 0; axis < 4; ++axis) name += term.axes & (8 >> axis) ? "bhqk"[axis] : '1';
  return term.strided ? name + " strided" : name;
}

}  // namespace

bool is_visible(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) {
  const KeyRange range = visible_keys(p, b, i);
  if (j < range.begin || j >= range.end) return false;
  const int64_t* s = p.mask.stride;
  return !p.mask.data || p.mask.data[b * s[0] + h * s[1] + i * s[2] + j * s[3]] != 0;
}

std::string describe(const CaseSpec& spec) {
  std::ostringstream out;
  out << mfa::name_of(spec.dtype) << " B" << spec.B << " Hq" << spec.Hq << " Hkv" << spec.Hkv << " Nq" << spec.Nq
      << " Nk" << spec.Nk << " D" << spec.D << " Dv" << spec.Dv;
  if (spec.scale != 0.f) out << " scale " << spec.scale;
  if (spec.causal) out << " causal";
  if (spec.window_left >= 0 || spec.window_right >= 0)
    out << " window(" << spec.window_left << ", " << spec.window_right << ")";
  if (spec.softcap > 0.f) out << " softcap " << spec.softcap;
  if (spec.alibi) out << " alibi";
  if (spec.sinks) out << " sinks";
  if (spec.kv_lengths) out << " kv_lengths";
  if (spec.bias.axes != kAbsent)
    out << " bias(" << axes_name(spec.bias) << ", " << mfa::name_of(spec.bias_dtype) << ", " << spec.bias_minus_infinity
        << " -inf)";
  if (spec.mask.axes != kAbsent) out << " mask(" << axes_name(spec.mask) << ", " << spec.mask_visible << " visible)";
  if (spec.dropout_p > 0.f) out << " dropout " << spec.dropout_p;
  if (spec.dlse) out << " dlse";
  out << " layouts " << name_of(spec.q_layout) << " " << name_of(spec.k_layout) << " " << name_of(spec.v_layout) << " "
      << name_of(spec.o_layout);
  return out.str();
}

CaseSpec random_spec(Random& random, int64_t max_work) {
  // Head sizes and lengths around the tiles of every instruction set, from one row to a few key blocks.
  static const std::vector<int32_t> head_dims = {
      1,  2,  3,  4,  5,   7,   8,   9,   12,  15,  16,  17,  24,  31,  32,  33,  40,  48,  56,  63,  64,  65,
      72, 80, 88, 96, 100, 112, 120, 127, 128, 129, 160, 192, 200, 255, 256, 257, 320, 384, 500, 512, 575, 576};
  static const std::vector<int32_t> lengths = {
      0,  1,  2,  3,  4,  5,  7,  8,   9,   12,  15,  16,  17,  24,  31,  32,  33,  47,  48,  49,  63,  64,
      65, 79, 80, 81, 95, 96, 97, 127, 128, 129, 160, 191, 255, 256, 257, 300, 383, 511, 512, 513, 700, 1025};
  static const std::vector<Layout> layouts = {Layout::dense,          Layout::padded_rows, Layout::token_major,
                                              Layout::sliced,         Layout::reversed,    Layout::broadcast_batch,
                                              Layout::broadcast_heads};
  CaseSpec spec;
  spec.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
  int64_t work;
  do {
    spec.D = random.chance(0.5) ? random.pick({32, 64, 80, 96, 128}) : random.pick(head_dims);
    spec.Dv = random.chance(0.6) ? spec.D : random.pick(head_dims);
    spec.B = random.pick({1, 1, 2, 3});
    spec.Hkv = random.pick({1, 1, 2, 3});
    spec.Hq = spec.Hkv * random.pick({1, 1, 1, 2, 3, 4, 7, 8});
    spec.Nq = random.chance(0.25) ? random.pick({1, 1, 2, 3, 4, 6}) : random.pick(lengths);
    spec.Nk = random.chance(0.2) ? spec.Nq : random.pick(lengths);
    if (spec.Nq <= 2 && random.chance(0.3)) spec.Nk = random.pick({1024, 1300, 2047, 2049, 3000});
    work = int64_t{spec.B} * spec.Hq * spec.Nq * spec.Nk * (spec.D + spec.Dv);
  } while (work > max_work);

  if (random.chance(0.2)) spec.scale = random.pick({0.5f, 0.3f, 0.05f, 0.125f, -0.2f}) * 8.f / std::sqrt(64.f + spec.D);
  if (random.chance(0.2)) spec.softcap = random.pick({1.5f, 5.f, 30.f});
  spec.alibi = random.chance(0.2);
  spec.sinks = random.chance(0.2);
  spec.causal = random.chance(0.35);
  if (random.chance(0.25)) {
    constexpr int32_t huge = std::numeric_limits<int32_t>::max();
    spec.window_left = random.pick({-1, 0, 1, 5, 30, 64, 100, 256, 300, huge});
    spec.window_right = random.pick({-1, 0, 1, 3, 17, 64, 200, huge});
  }
  spec.kv_lengths = random.chance(0.25);
  if (random.chance(0.3)) {
    spec.bias.axes = static_cast<int>(random.integer(0, 15));
    spec.bias.strided = random.chance(0.3);
    spec.bias_dtype = random.chance(0.6) ? spec.dtype : random.pick({DType::f32, DType::f16, DType::bf16});
    spec.bias_minus_infinity = random.chance(0.4) ? random.pick({0.1, 0.5, 0.97}) : 0;
  }
  if (random.chance(0.3)) {
    spec.mask.axes = static_cast<int>(random.integer(0, 15));
    spec.mask.strided = random.chance(0.3);
    spec.mask_visible = random.pick({0.02, 0.3, 0.7, 0.95});
  }
  if (random.chance(0.2)) spec.dropout_p = random.pick({0.1f, 0.5f, 0.9f, 1.f});
  spec.dlse = random.chance(0.3);
  const auto layout = [&] { return random.chance(0.5) ? Layout::dense : random.pick(layouts); };
  spec.q_layout = layout();
  spec.k_layout = layout();
  spec.v_layout = layout();
  spec.o_layout = random.pick({Layout::dense, Layout::padded_rows, Layout::token_major, Layout::sliced});
  return spec;
}

AttentionCase::AttentionCase(const CaseSpec& spec, uint64_t seed) : spec(spec) {
  Random random(seed);
  AttentionProblem& p = problem;
  p.B = spec.B;
  p.Hq = spec.Hq;
  p.Hkv = spec.Hkv;
  p.Nq = spec.Nq;
  p.Nk = spec.Nk;
  p.D = spec.D;
  p.Dv = spec.Dv;
  p.dtype = spec.dtype;
  p.scale = spec.scale != 0.f ? spec.scale : 1.f / std::sqrt(static_cast<float>(spec.D));
  p.softcap = spec.softcap;
  p.causal = spec.causal;
  p.window_left = spec.window_left;
  p.window_right = spec.window_right;
  p.dropout_p = spec.dropout_p;
  p.dropout_seed = random.bits();

  q = Tensor(p.dtype, {p.B, p.Hq, p.Nq, p.D}, spec.q_layout);
  k = Tensor(p.dtype, {p.B, p.Hkv, p.Nk, p.D}, spec.k_layout);
  v = Tensor(p.dtype, {p.B, p.Hkv, p.Nk, p.Dv}, spec.v_layout);
  d_o = Tensor(p.dtype, {p.B, p.Hq, p.Nq, p.Dv}, spec.q_layout);
  for (Tensor* tensor : {&q, &k, &v, &d_o}) tensor->fill_normal(random);
  p.q = q.ref();
  p.k = k.ref();
  p.v = v.ref();

  if (spec.alibi) {
    for (int32_t h = 0; h < p.Hq; ++h) slopes.push_back(std::exp2(-8.f * (h + 1) / p.Hq));
    p.alibi_slopes = slopes.data();
  }
  if (spec.sinks) {
    for (int32_t h = 0; h < p.Hq; ++h) sinks.push_back(random.chance(0.1) ? -kInfinity : 2 * random.normal());
    p.sinks = sinks.data();
  }
  if (spec.kv_lengths) {
    for (int32_t b = 0; b < p.B; ++b)
      kv_lengths.push_back(
          static_cast<int32_t>(random.chance(0.2) ? random.pick({-1, 0, p.Nk, p.Nk + 3}) : random.integer(0, p.Nk)));
    p.kv_lengths = kv_lengths.data();
  }
  if (spec.dlse) {
    dlse.resize(int64_t{p.B} * p.Hq * p.Nq);
    for (float& x : dlse) x = random.normal();
  }
  const std::array<int64_t, 4> shape = {p.B, p.Hq, p.Nq, p.Nk};
  if (spec.mask.axes != kAbsent) {
    const TermLayout layout = lay_out(spec.mask, shape);
    mask.resize(layout.size);
    // Any nonzero byte is visible.
    for (uint8_t& byte : mask) byte = random.chance(spec.mask_visible) ? random.pick({1, 255, 2}) : 0;
    p.mask.data = mask.data() + layout.origin;
    std::copy(layout.stride.begin(), layout.stride.end(), p.mask.stride);
  }
  if (spec.bias.axes != kAbsent) {
    const TermLayout layout = lay_out(spec.bias, shape);
    bias.resize(layout.size * size_of(spec.bias_dtype));
    for (int64_t i = 0; i < layout.size; ++i) {
      const float value = random.chance(spec.bias_minus_infinity) ? -kInfinity : random.normal();
      store_from_float(bias.data(), spec.bias_dtype, i, value);
    }
    p.bias.data = bias.data() + layout.origin * static_cast<int64_t>(size_of(spec.bias_dtype));
    p.bias.dtype = spec.bias_dtype;
    std::copy(layout.stride.begin(), layout.stride.end(), p.bias.stride);

    if (spec.poison) {
      std::vector<bool> used(layout.size);
      for (int32_t b = 0; b < p.B; ++b)
        for (int32_t h = 0; h < p.Hq; ++h)
          for (int32_t i = 0; i < p.Nq; ++i)
            for (int32_t j = 0; j < p.Nk; ++j) {
              if (is_visible(p, b, h, i, j)) {
                used[layout.origin + b * layout.stride[0] + h * layout.stride[1] + i * layout.stride[2] +
                     j * layout.stride[3]] = true;
              }
            }
      for (int64_t i = 0; i < layout.size; ++i) {
        if (!used[i]) store_from_float(bias.data(), spec.bias_dtype, i, kNaN);
      }
    }
  }
  if (spec.poison) {
    const int32_t group = p.Hq / p.Hkv;
    for (int32_t b = 0; b < p.B; ++b)
      for (int32_t kv_head = 0; kv_head < p.Hkv; ++kv_head)
        for (int32_t j = 0; j < p.Nk; ++j) {
          bool seen = false;
          for (int32_t r = 0; r < group * p.Nq && !seen; ++r)
            seen = is_visible(p, b, kv_head * group + r % group, r / group, j);
          if (seen) continue;
          if (!k.is_broadcast()) k.fill_row(b, kv_head, j, kNaN);
          if (!v.is_broadcast()) v.fill_row(b, kv_head, j, j & 1 ? kNaN : kInfinity);
        }
  }
}

}  // namespace mfa::testing
