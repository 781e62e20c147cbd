#include "attention/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/layout.h"
#include "attention/visibility.h"
#include "common/dtype.h"
#include "common/philox.h"

namespace mfa {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Vector = std::vector<double>;

// The row [length] of a tensor that begins at element `offset`, as doubles.
Vector load_row(const TensorRef& x, DType dtype, int64_t offset, int32_t length) {
  Vector row(length);
  for (int32_t d = 0; d < length; ++d) row[d] = load_as_float(x.data, dtype, offset + d);
  return row;
}
Vector load_query(const AttentionProblem& p, const TensorRef& x, int32_t b, int32_t h, int32_t i, int32_t length) {
  return load_row(x, p.dtype, query_element(p, x.stride, b, h, i), length);
}
Vector load_key(const AttentionProblem& p, const TensorRef& x, int32_t b, int32_t h, int32_t j, int32_t length) {
  return load_row(x, p.dtype, key_element(p, x.stride, b, h, j), length);
}

// Turns the pairs of `x` [D] by the angles of `position`, or back for a gradient.
void rotate(const RopeRef& rope, int64_t position, bool back, double* x) {
  const int32_t pairs = rope.rotary_dim / 2;
  for (int32_t c = 0; c < pairs; ++c) {
    const double cos = rope.cos[position * pairs + c], sin = (back ? -1.0 : 1.0) * rope.sin[position * pairs + c];
    double& first = x[rope.interleaved ? 2 * c : c];
    double& second = x[rope.interleaved ? 2 * c + 1 : c + pairs];
    const double turned = first * cos - second * sin;
    second = first * sin + second * cos;
    first = turned;
  }
}
int64_t start_of(const int32_t* positions, int32_t b) { return positions ? positions[b] : 0; }
void rotate_query(const AttentionProblem& p, int32_t b, int32_t i, bool back, double* x) {
  if (p.rope.cos) rotate(p.rope, start_of(p.rope.q_positions, b) + i, back, x);
}
void rotate_key(const AttentionProblem& p, int32_t b, int32_t j, bool back, double* x) {
  if (p.rope.cos && p.rope.rotates_k) rotate(p.rope, start_of(p.rope.k_positions, b) + j, back, x);
}

// Four running sums: one would wait for each addition before the next.
double dot(const Vector& x, const Vector& y) {
  double sums[4] = {};
  const size_t whole = x.size() / 4 * 4;
  for (size_t d = 0; d < whole; d += 4) {
    for (size_t lane = 0; lane < 4; ++lane) sums[lane] += x[d + lane] * y[d + lane];
  }
  for (size_t d = whole; d < x.size(); ++d) sums[0] += x[d] * y[d];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// y[0, x.size()) += a * x
void add_scaled(double a, const Vector& x, double* y) {
  for (size_t d = 0; d < x.size(); ++d) y[d] += a * x[d];
}

bool mask_allows(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) {
  const int64_t* stride = p.mask.stride;
  return !p.mask.data || p.mask.data[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]] != 0;
}

double bias_at(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) {
  if (!p.bias.data) return 0;
  const int64_t* stride = p.bias.stride;
  return load_as_float(p.bias.data, p.bias.dtype, b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]);
}

double dropout_factor(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) {
  if (p.dropout_p <= 0.f) return 1;
  const auto row_head = static_cast<uint32_t>(b * p.Hq + h);
  const uint32_t key = dropout_key(p, b, j);
  const uint32_t word = dropout_words(p.dropout_seed, row_head, i, key)[key & 3];
  return word >= dropout_threshold(p.dropout_p) ? 1 / (1 - double{p.dropout_p}) : 0;
}

// The keys and values of one head that its batch entry has; the rest is never read.
struct KeysAndValues {
  std::vector<Vector> k, v;
};

KeysAndValues load_keys(const AttentionProblem& p, int32_t b, int32_t kv_head) {
  KeysAndValues kv;
  for (int32_t j = 0; j < key_count(p, b); ++j) {
    kv.k.push_back(load_key(p, p.k, b, kv_head, j, p.D));
    rotate_key(p, b, j, false, kv.k.back().data());
    kv.v.push_back(load_key(p, p.v, b, kv_head, j, p.Dv));
  }
  return kv;
}

// One visible key of a query row.
struct Entry {
  int32_t j;
  double dot;     // q . k
  double capped;  // t = softcap(scale * q . k), before ALiBi and bias
  double score;   // s
  double p = 0;   // probability
  double z;       // dropout factor
};

struct Row {
  std::vector<Entry> keys;  // a key that a bias of -inf hides counts as invisible
  double lse = -kInfinity;
  Vector o;
};

Vector load_rotated_query(const AttentionProblem& p, int32_t b, int32_t h, int32_t i) {
  Vector q = load_query(p, p.q, b, h, i, p.D);
  rotate_query(p, b, i, false, q.data());
  return q;
}

Row compute_row(const AttentionProblem& p, const KeysAndValues& kv, int32_t b, int32_t h, int32_t i) {
  Row row;
  row.o.assign(p.Dv, 0);
  const Vector q = load_rotated_query(p, b, h, i);
  const double pos = double(i) + position_offset(p, b);
  const KeyRange range = visible_keys(p, b, i);
  for (int32_t j = range.begin; j < range.end; ++j) {
    if (!sees(p, b, h, i, j) || !mask_allows(p, b, h, i, j)) continue;
    const double bias = bias_at(p, b, h, i, j);
    if (bias == -kInfinity) continue;
    Entry key{};
    key.j = j;
    key.dot = dot(q, kv.k[j]);
    const double scaled = p.scale * key.dot;
    key.capped = p.softcap > 0.f ? p.softcap * std::tanh(scaled / p.softcap) : scaled;
    key.score = key.capped + (p.alibi_slopes ? p.alibi_slopes[h] * (j - pos) : 0) + bias;
    key.z = dropout_factor(p, b, h, i, j);
    row.keys.push_back(key);
  }

  const double sink = p.sinks ? p.sinks[h] : -kInfinity;
  double m = sink;
  for (const Entry& key : row.keys) m = std::max(m, key.score);
  if (m == -kInfinity) return row;  // sees nothing: o = 0, lse = -inf
  double l = std::exp(sink - m);
  for (const Entry& key : row.keys) l += std::exp(key.score - m);
  row.lse = m + std::log(l);
  for (Entry& key : row.keys) {
    key.p = std::exp(key.score - m) / l;
    add_scaled(key.p * key.z, kv.v[key.j], row.o.data());
  }
  return row;
}

// Calls visit(kv, b, kv_head, h, i) for every query row.
template <typename Visit>
void for_each_row(const AttentionProblem& p, Visit visit) {
  for (int32_t b = 0; b < p.B; ++b) {
    for (int32_t kv_head = 0; kv_head < p.Hkv; ++kv_head) {
      const KeysAndValues kv = load_keys(p, b, kv_head);
      const int32_t group = p.Hq / p.Hkv;
      for (int32_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        for (int32_t i = 0; i < query_count(p, b); ++i) visit(kv, b, kv_head, h, i);
      }
    }
  }
}

// Dense tensors of keys: [B, Hkv, Nk, *], packed [Hkv, packed_keys, *] or pages [pages, Hkv, page_size, *].
int64_t key_rows(const AttentionProblem& p) {
  if (p.pages.table) return int64_t{p.pages.pages} * p.Hkv * p.pages.page_size;
  return int64_t{p.Hkv} * (p.key_starts ? p.packed_keys : int64_t{p.B} * p.Nk);
}
int64_t key_row(const AttentionProblem& p, int32_t b, int32_t kv_head, int32_t j) {
  const int64_t length = p.pages.table ? p.pages.page_size : p.key_starts ? p.packed_keys : p.Nk;
  return key_element(p, {p.Hkv * length, length, 1}, b, kv_head, j);
}

}  // namespace

ReferenceOutputs reference_forward(const AttentionProblem& p) {
  const int64_t rows = row_count(p);
  ReferenceOutputs out;
  out.o.assign(rows * p.Dv, 0);
  out.lse.assign(rows, -kInfinity);
  out.probs.assign(rows * p.Nk, 0);
  for_each_row(p, [&](const KeysAndValues& kv, int32_t b, int32_t, int32_t h, int32_t i) {
    const Row row = compute_row(p, kv, b, h, i);
    const int64_t r = row_index(p, b, h, i);
    std::copy(row.o.begin(), row.o.end(), out.o.begin() + r * p.Dv);
    out.lse[r] = row.lse;
    for (const Entry& key : row.keys) out.probs[r * p.Nk + key.j] = key.p;
  });
  return out;
}

// With delta_i = do_i . o_i - dlse_i:  dv_j += p z do_i,  ds = p (z do_i . v_j - delta_i),  and ds goes to the bias,
// the slopes and, through softcap and scale, to q and k. The sink's probability carries no value: its ds is -p delta.
ReferenceGradients reference_backward(const AttentionProblem& p, const TensorRef& d_o, const float* dlse) {
  ReferenceGradients grad;
  grad.dq.assign(row_count(p) * p.D, 0);
  grad.dk.assign(key_rows(p) * p.D, 0);
  grad.dv.assign(key_rows(p) * p.Dv, 0);
  if (p.sinks) grad.dsinks.assign(p.Hq, 0);
  if (p.alibi_slopes) grad.dalibi_slopes.assign(p.Hq, 0);

  // Strides of dbias: dense over the axes the bias has, 0 over those it is broadcast along.
  int64_t bias_stride[4] = {0, 0, 0, 0};
  if (p.bias.data) {
    const int64_t extent[4] = {p.B, p.Hq, p.Nq, p.Nk};
    int64_t size = 1;
    for (int axis = 3; axis >= 0; --axis) {
      if (p.bias.stride[axis] == 0) continue;
      bias_stride[axis] = size;
      size *= extent[axis];
    }
    grad.dbias.assign(size, 0);
  }

  for_each_row(p, [&](const KeysAndValues& kv, int32_t b, int32_t kv_head, int32_t h, int32_t i) {
    const Row row = compute_row(p, kv, b, h, i);
    if (row.lse == -kInfinity) return;  // sees nothing: no gradient
    const int64_t r = row_index(p, b, h, i);
    const Vector q = load_rotated_query(p, b, h, i);
    const Vector row_do = load_query(p, d_o, b, h, i, p.Dv);
    Vector dq(p.D, 0), dk(p.D);
    const double delta = dot(row_do, row.o) - (dlse ? dlse[r] : 0);
    const double pos = double(i) + position_offset(p, b);
    for (const Entry& key : row.keys) {
      const int64_t kv_row = key_row(p, b, kv_head, key.j);
      add_scaled(key.p * key.z, row_do, &grad.dv[kv_row * p.Dv]);
      const double dp = key.z == 0 ? 0 : key.z * dot(row_do, kv.v[key.j]);
      const double ds = key.p * (dp - delta);
      if (p.bias.data) {
        grad.dbias[b * bias_stride[0] + h * bias_stride[1] + i * bias_stride[2] + key.j * bias_stride[3]] += ds;
      }
      if (p.alibi_slopes) grad.dalibi_slopes[h] += ds * (key.j - pos);
      double slope = 1;  // of the softcap
      if (p.softcap > 0.f) {
        const double t = key.capped / p.softcap;
        slope = 1 - t * t;
      }
      const double d_dot = p.scale * slope * ds;
      add_scaled(d_dot, kv.k[key.j], dq.data());
      dk = q;
      rotate_key(p, b, key.j, true, dk.data());
      add_scaled(d_dot, dk, &grad.dk[kv_row * p.D]);
    }
    rotate_query(p, b, i, true, dq.data());
    add_scaled(1, dq, &grad.dq[r * p.D]);
    if (p.sinks) grad.dsinks[h] -= std::exp(p.sinks[h] - row.lse) * delta;
  });
  return grad;
}

}  // namespace mfa
