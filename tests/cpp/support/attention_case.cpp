#include "support/attention_case.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <sstream>

#include "attention/layout.h"
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
  if (!sees(p, b, h, i, j)) return false;
  const int64_t* s = p.mask.stride;
  return !p.mask.data || p.mask.data[b * s[0] + h * s[1] + i * s[2] + j * s[3]] != 0;
}

std::array<int64_t, 4> query_shape(const AttentionProblem& p, int32_t width) {
  return {p.query_starts ? 1 : p.B, p.Hq, p.query_starts ? p.packed_queries : p.Nq, width};
}
std::array<int64_t, 4> key_shape(const AttentionProblem& p, int32_t width) {
  if (p.pages.table) return {p.pages.pages, p.Hkv, p.pages.page_size, width};
  return {p.key_starts ? 1 : p.B, p.Hkv, p.key_starts ? p.packed_keys : p.Nk, width};
}
int64_t key_row(const AttentionProblem& p, int32_t b, int32_t kv_head, int32_t j) {
  const int64_t length = key_shape(p, 1)[2];
  return key_element(p, {p.Hkv * length, length, 1}, b, kv_head, j);
}

BlockLists::BlockLists(const std::vector<bool>& visible, int32_t lists, int32_t query_blocks, int32_t key_blocks) {
  const auto at = [&](int64_t l, int64_t r, int64_t c) { return visible[(l * query_blocks + r) * key_blocks + c]; };
  for (int32_t l = 0; l < lists; ++l) {
    for (int32_t r = 0; r < query_blocks; ++r) {
      offsets.push_back(static_cast<int64_t>(key_ids.size()));
      for (int32_t c = 0; c < key_blocks; ++c)
        if (at(l, r, c)) key_ids.push_back(c);
    }
    offsets.push_back(static_cast<int64_t>(key_ids.size()));
    for (int32_t c = 0; c < key_blocks; ++c) {
      transposed_offsets.push_back(static_cast<int64_t>(query_ids.size()));
      for (int32_t r = 0; r < query_blocks; ++r)
        if (at(l, r, c)) query_ids.push_back(r);
    }
    transposed_offsets.push_back(static_cast<int64_t>(query_ids.size()));
  }
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
  if (spec.packed_queries) out << " packed queries";
  if (spec.packed_keys) out << " packed keys";
  if (spec.page_size) out << " pages of " << spec.page_size;
  if (spec.rotary_dim)
    out << " rope " << spec.rotary_dim << (spec.interleaved ? " interleaved" : " halves")
        << (spec.rotates_k ? "" : " q only");
  if (spec.block_q)
    out << " blocks " << spec.block_q << "x" << spec.block_k << (spec.blocks_by_batch ? " by batch" : "")
        << (spec.blocks_by_head ? " by head" : "") << " " << spec.blocks_visible;
  const Neighbourhood& n = spec.neighbourhood;
  for (int32_t x = 0; x < n.axes; ++x)
    out << (x ? "," : " neighbourhood ") << n.axis[x].size << "/" << n.axis[x].window << "s" << n.axis[x].stride << "d"
        << n.axis[x].dilation << (n.axis[x].causal ? "c" : "");
  if (n.axes) out << (n.shifts ? " shifts" : "") << (n.leans_left ? " left" : "");
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

void add_family(Random& random, CaseSpec& spec) {
  if (random.chance(0.25)) {
    Neighbourhood& n = spec.neighbourhood;
    n.axes = static_cast<int32_t>(random.integer(1, 3));
    int32_t tokens = 1;
    for (int32_t x = 0; x < n.axes; ++x) {
      NeighbourhoodAxis& a = n.axis[x];
      a.size = static_cast<int32_t>(n.axes == 1 ? random.integer(1, 300) : random.integer(1, n.axes == 2 ? 20 : 8));
      a.dilation = random.chance(0.7) ? 1 : static_cast<int32_t>(random.integer(1, std::max(1, a.size / 2)));
      a.window = static_cast<int32_t>(random.integer(1, std::max(1, a.size / a.dilation)));
      a.stride = random.chance(0.6) ? 1 : static_cast<int32_t>(random.integer(1, a.window));
      a.causal = random.chance(0.2);
      tokens *= a.size;
    }
    n.shifts = random.chance(0.5);
    n.leans_left = random.chance(0.5);
    spec.Nq = spec.Nk = tokens;
    if (random.chance(0.1)) spec.Nq = std::max(1, tokens / 2);
    while (int64_t{spec.Hkv} > 1 && int64_t{spec.B} * spec.Hq * tokens * tokens * (spec.D + spec.Dv) > 1 << 25) {
      spec.Hq /= spec.Hkv;
      spec.Hkv = 1;
    }
  }
  if (random.chance(0.5)) {
    spec.B = random.pick({1, 2, 3, 5});
    spec.packed_queries = random.chance(0.8);
    spec.packed_keys = random.chance(spec.packed_queries ? 0.8 : 0.5);
  }
  if (random.chance(0.4)) {
    spec.packed_keys = false;
    spec.page_size = random.pick({1, 3, 16, 16, 32, 64, 100, 256, 300});
  }
  if (spec.packed_queries && spec.q_layout == Layout::broadcast_batch) spec.q_layout = Layout::dense;
  if (spec.D >= 2 && random.chance(0.35)) {
    spec.rotary_dim = random.chance(0.5) ? spec.D / 2 * 2 : 2 * static_cast<int32_t>(random.integer(1, spec.D / 2));
    spec.interleaved = random.chance(0.5);
    spec.rotates_k = random.chance(0.7);
  }
  if (random.chance(0.35)) {
    spec.block_q = random.pick({16, 17, 32, 64, 100, 128});
    spec.block_k = random.pick({16, 17, 32, 64, 77, 128});
    spec.blocks_by_batch = random.chance(0.4);
    spec.blocks_by_head = random.chance(0.5);
    spec.blocks_visible = random.pick({0.05, 0.3, 0.7});
  }
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

  if (spec.kv_lengths) {
    for (int32_t b = 0; b < p.B; ++b)
      kv_lengths.push_back(
          static_cast<int32_t>(random.chance(0.2) ? random.pick({-1, 0, p.Nk, p.Nk + 3}) : random.integer(0, p.Nk)));
    p.kv_lengths = kv_lengths.data();
  }
  set_layout(random);
  q = Tensor(p.dtype, query_shape(p, p.D), spec.q_layout);
  k = Tensor(p.dtype, key_shape(p, p.D), spec.k_layout);
  v = Tensor(p.dtype, key_shape(p, p.Dv), spec.v_layout);
  d_o = Tensor(p.dtype, query_shape(p, p.Dv), spec.q_layout);
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
  if (spec.dlse) {
    dlse.resize(row_count(p));
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
          for (int32_t i = 0; i < query_count(p, b); ++i)
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
  if (spec.poison) poison_keys();
}

// Sequences, pages, tables and lists, in that order of random numbers: a plain case draws none.
void AttentionCase::set_layout(Random& random) {
  AttentionProblem& p = problem;
  int32_t grid = 1;
  for (int32_t x = 0; x < spec.neighbourhood.axes; ++x) grid *= spec.neighbourhood.axis[x].size;
  const bool whole = spec.packed_queries && spec.neighbourhood.axes > 0 && random.chance(0.6);
  const auto starts = [&](int32_t longest) {
    std::vector<int32_t> result = {0};
    for (int32_t b = 0; b < p.B; ++b) {
      const int64_t length = whole                ? random.pick({grid, grid, 0})
                             : random.chance(0.2) ? random.pick({0, longest})
                                                  : random.integer(0, longest);
      result.push_back(result.back() + static_cast<int32_t>(std::min<int64_t>(length, longest)));
    }
    return result;
  };
  if (spec.packed_queries) {
    query_starts = starts(p.Nq);
    p.query_starts = query_starts.data();
    p.packed_queries = query_starts.back();
  }
  if (spec.packed_keys) {
    key_starts = starts(p.Nk);
    p.key_starts = key_starts.data();
    p.packed_keys = key_starts.back();
  }
  if (spec.page_size) {
    const int32_t slots = (p.Nk + spec.page_size - 1) / spec.page_size;
    p.pages.page_size = spec.page_size;
    p.pages.pages = p.B * slots + 3;
    p.pages.table_stride = slots + 2;
    std::vector<int32_t> free;
    for (int32_t i = 0; i < p.pages.pages; ++i) free.push_back(i);
    for (size_t i = free.size(); i > 1; --i) std::swap(free[i - 1], free[random.integer(0, int64_t(i) - 1)]);
    page_table.assign(int64_t{p.B} * (slots + 2), random.pick({-1, 1 << 30}));
    for (int32_t b = 0; b < p.B; ++b)
      for (int32_t slot = 0; slot * spec.page_size < key_count(p, b); ++slot) {
        int32_t& page = page_table[b * p.pages.table_stride + slot];
        page = free.back();
        free.pop_back();
        if (b > 0 && slot * spec.page_size < key_count(p, b - 1) && random.chance(0.4))
          page = page_table[(b - 1) * p.pages.table_stride + slot];
      }
    p.pages.table = page_table.data();
  }
  if (spec.rotary_dim) {
    RopeRef& rope = p.rope;
    rope.rotary_dim = spec.rotary_dim;
    rope.interleaved = spec.interleaved;
    rope.rotates_k = spec.rotates_k;
    rope.positions = std::max(p.Nq, p.Nk) + 20;
    for (int64_t i = 0; i < int64_t{rope.positions} * (spec.rotary_dim / 2); ++i) {
      const double angle = 6.3 * random.uniform();
      cosines.push_back(static_cast<float>(std::cos(angle)));
      sines.push_back(static_cast<float>(std::sin(angle)));
    }
    rope.cos = cosines.data();
    rope.sin = sines.data();
    const bool offsets = random.chance(0.6);
    for (int32_t b = 0; offsets && b < p.B; ++b) {
      q_positions.push_back(static_cast<int32_t>(random.integer(0, 20)));
      k_positions.push_back(static_cast<int32_t>(random.integer(0, 20)));
    }
    if (offsets) rope.q_positions = q_positions.data();
    if (offsets && random.chance(0.7)) rope.k_positions = k_positions.data();
  }
  if (spec.block_q) {
    BlockListRef& l = p.blocks;
    l.block_q = spec.block_q;
    l.block_k = spec.block_k;
    l.query_blocks = (p.Nq + l.block_q - 1) / l.block_q;
    l.key_blocks = (p.Nk + l.block_k - 1) / l.block_k;
    const int32_t heads = spec.blocks_by_head ? p.Hq : 1, batches = spec.blocks_by_batch ? p.B : 1;
    l.stride_h = spec.blocks_by_head ? 1 : 0;
    l.stride_b = spec.blocks_by_batch ? heads : 0;
    std::vector<bool> visible(int64_t{batches} * heads * l.query_blocks * l.key_blocks);
    for (size_t i = 0; i < visible.size(); ++i) visible[i] = random.chance(spec.blocks_visible);
    lists = BlockLists(visible, batches * heads, l.query_blocks, l.key_blocks);
    lists.key_ids.push_back(-1);  // so that there is an address
    lists.query_ids.push_back(-1);
    l.offsets = lists.offsets.data();
    l.key_ids = lists.key_ids.data();
    l.transposed_offsets = lists.transposed_offsets.data();
    l.query_ids = lists.query_ids.data();
  }
  p.neighbourhood = spec.neighbourhood;
}

void AttentionCase::poison_keys() {
  const AttentionProblem& p = problem;
  const int32_t group = p.Hq / p.Hkv;
  const std::array<int64_t, 4> shape = key_shape(p, 1);
  std::vector<bool> seen(shape[0] * shape[1] * shape[2]);
  for (int32_t b = 0; b < p.B; ++b)
    for (int32_t kv_head = 0; kv_head < p.Hkv; ++kv_head)
      for (int32_t j = 0; j < key_count(p, b); ++j) {
        const int64_t row = key_row(p, b, kv_head, j);
        for (int32_t r = 0; r < group * query_count(p, b) && !seen[row]; ++r)
          seen[row] = is_visible(p, b, kv_head * group + r % group, r / group, j);
      }
  for (int64_t row = 0; row < static_cast<int64_t>(seen.size()); ++row) {
    if (seen[row]) continue;
    const int64_t n = row % shape[2], h = row / shape[2] % shape[1], b = row / shape[2] / shape[1];
    if (!k.is_broadcast()) k.fill_row(b, h, n, kNaN);
    if (!v.is_broadcast()) v.fill_row(b, h, n, n & 1 ? kNaN : kInfinity);
  }
}

}  // namespace mfa::testing
