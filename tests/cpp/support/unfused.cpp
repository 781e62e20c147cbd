#include "support/unfused.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention/layout.h"
#include "attention/visibility.h"
#include "common/philox.h"
#include "support/attention_case.h"

namespace mfa::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float round_to(DType dtype, float x) {
  switch (dtype) {
    case DType::f32:
      return x;
    case DType::f16:
      return to_float(to_float16(x));
    case DType::bf16:
      return to_float(to_bfloat16(x));
  }
  return x;
}

// Turns the pairs of `x` by the angles of `position`, or back.
void rotate(const RopeRef& rope, int64_t position, bool back, float* x) {
  const int32_t pairs = rope.rotary_dim / 2;
  for (int32_t c = 0; c < pairs; ++c) {
    const float cos = rope.cos[position * pairs + c], sin = (back ? -1.f : 1.f) * rope.sin[position * pairs + c];
    float& first = x[rope.interleaved ? 2 * c : c];
    float& second = x[rope.interleaved ? 2 * c + 1 : c + pairs];
    const float turned = first * cos - second * sin;
    second = first * sin + second * cos;
    first = turned;
  }
}
int64_t query_position(const RopeRef& rope, int32_t b, int32_t i) {
  return (rope.q_positions ? rope.q_positions[b] : 0) + int64_t{i};
}
int64_t key_position(const RopeRef& rope, int32_t b, int32_t j) {
  return (rope.k_positions ? rope.k_positions[b] : 0) + int64_t{j};
}

// The rows of a sequence, of a tensor shaped like q and of one shaped like k.
std::vector<float> load_queries(const AttentionProblem& p, const TensorRef& x, int32_t b, int32_t h, int32_t columns) {
  const int32_t rows = query_count(p, b);
  std::vector<float> result(int64_t{rows} * columns);
  for (int32_t n = 0; n < rows; ++n)
    for (int32_t d = 0; d < columns; ++d)
      result[int64_t{n} * columns + d] = load_as_float(x.data, p.dtype, query_element(p, x.stride, b, h, n) + d);
  return result;
}
std::vector<float> load_keys(const AttentionProblem& p, const TensorRef& x, int32_t b, int32_t h, int32_t columns) {
  const int32_t rows = key_count(p, b);
  std::vector<float> result(int64_t{rows} * columns);
  for (int32_t n = 0; n < rows; ++n)
    for (int32_t d = 0; d < columns; ++d)
      result[int64_t{n} * columns + d] = load_as_float(x.data, p.dtype, key_element(p, x.stride, b, h, n) + d);
  return result;
}

// One running sum, as a plain loop has: the terms of a score are added in the order of the channels.
float product(const float* q, const float* k, int32_t size) {
  float sum = 0;
  for (int32_t d = 0; d < size; ++d) sum += q[d] * k[d];
  return sum;
}

// Eight running sums, as a vectorised product has.
float dot(const float* x, const float* y, int32_t size) {
  float sums[8] = {};
  int32_t d = 0;
  for (; d + 8 <= size; d += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += x[d + lane] * y[d + lane];
  for (; d < size; ++d) sums[d % 8] += x[d] * y[d];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

void add_scaled(float a, const float* x, float* y, int32_t size) {
  for (int32_t d = 0; d < size; ++d) y[d] += a * x[d];
}

double square(double x) { return x * x; }

// Standard deviation of the relative error of rounding to `dtype`, roughly: half the largest.
double rounding_deviation(DType dtype) {
  return dtype == DType::bf16 ? 0x1p-9 : dtype == DType::f16 ? 0x1p-12 : 0x1p-25;
}

double norm(const float* x, int32_t size) { return std::sqrt(dot(x, x, size)); }

double largest(const float* x, int32_t size) {
  double result = 0;
  for (int32_t d = 0; d < size; ++d) result = std::max(result, std::abs(double{x[d]}));
  return result;
}

void raise(double& x, double y) { x = std::max(x, y); }

}  // namespace

Unfused run_unfused(const AttentionProblem& p, const TensorRef& d_o, const float* dlse) {
  Unfused out;
  const auto [key_batches, key_heads, key_length, one] = key_shape(p, 1);
  const int64_t rows = row_count(p), kv_rows = key_batches * key_heads * key_length;
  out.o.values.assign(rows * p.Dv, 0.f);
  out.lse.assign(rows, -kInfinity);
  if (p.dtype == DType::f32) out.probs.assign(rows * p.Nk, 0.f);
  out.dq.values.assign(rows * p.D, 0.f);
  out.dk.values.assign(kv_rows * p.D, 0.f);
  out.dv.values.assign(kv_rows * p.Dv, 0.f);
  std::vector<double> dk_noise(kv_rows), dv_noise(kv_rows), dbias_noise, dsinks_noise(p.Hq), dslopes_noise(p.Hq);
  std::vector<double> dk_variance(kv_rows), dv_variance(kv_rows), dbias_variance, dsinks_variance(p.Hq),
      dslopes_variance(p.Hq);
  const double deviation = rounding_deviation(p.dtype);
  if (p.sinks) out.dsinks.values.assign(p.Hq, 0.f);
  if (p.alibi_slopes) out.dalibi_slopes.values.assign(p.Hq, 0.f);
  int64_t bias_stride[4] = {};
  if (p.bias.data) {
    const int64_t extent[4] = {p.B, p.Hq, p.Nq, p.Nk};
    int64_t size = 1;
    for (int axis = 3; axis >= 0; --axis) {
      if (p.bias.stride[axis] == 0) continue;
      bias_stride[axis] = size;
      size *= extent[axis];
    }
    out.dbias.values.assign(size, 0.f);
    dbias_noise.assign(size, 0.);
    dbias_variance.assign(size, 0.);
  }
  const uint64_t threshold = dropout_threshold(p.dropout_p);
  const float keep_scale = p.dropout_p < 1.f ? 1.f / (1.f - p.dropout_p) : 0.f;
  const int32_t group = p.Hq / p.Hkv;
  const bool turns_keys = p.rope.cos && p.rope.rotates_k;

  for (int32_t b = 0; b < p.B; ++b) {
    const int32_t keys = key_count(p, b);
    const int32_t offset = std::max(0, keys - query_count(p, b));
    for (int32_t h = 0; h < p.Hq; ++h) {
      const int32_t kv_head = h / group;
      std::vector<float> q = load_queries(p, p.q, b, h, p.D), k = load_keys(p, p.k, b, kv_head, p.D);
      const std::vector<float> v = load_keys(p, p.v, b, kv_head, p.Dv), grad = load_queries(p, d_o, b, h, p.Dv);
      if (p.rope.cos)
        for (int32_t i = 0; i < query_count(p, b); ++i)
          rotate(p.rope, query_position(p.rope, b, i), false, &q[int64_t{i} * p.D]);
      if (turns_keys)
        for (int32_t j = 0; j < keys; ++j) rotate(p.rope, key_position(p.rope, b, j), false, &k[int64_t{j} * p.D]);
      for (int32_t i = 0; i < query_count(p, b); ++i) {
        const int64_t r = row_index(p, b, h, i);
        const float* qi = &q[int64_t{i} * p.D];
        const float* gi = &grad[int64_t{i} * p.Dv];
        float* o = &out.o.values[r * p.Dv];

        // Forward: scores, softmax, probabilities rounded, output rounded.
        std::vector<int32_t> seen;
        std::vector<float> score, slope, z, prob;
        float m = p.sinks ? p.sinks[h] : -kInfinity;
        for (int32_t j = 0; j < keys; ++j) {
          if (!is_visible(p, b, h, i, j)) continue;
          float bias = 0.f;
          if (p.bias.data) {
            const int64_t* s = p.bias.stride;
            bias = load_as_float(p.bias.data, p.bias.dtype, b * s[0] + h * s[1] + i * s[2] + j * s[3]);
            if (bias == -kInfinity) continue;
          }
          float s = p.scale * product(qi, &k[int64_t{j} * p.D], p.D), d_softcap = 1.f;
          if (p.softcap > 0.f) {
            const float t = std::tanh(s / p.softcap);
            s = p.softcap * t;
            d_softcap = 1.f - t * t;
          }
          if (p.alibi_slopes) s += p.alibi_slopes[h] * static_cast<float>(j - (i + offset));
          s += bias;
          const bool kept = dropout_words(p.dropout_seed, b * p.Hq + h, i, j)[j & 3] >= threshold;
          seen.push_back(j);
          score.push_back(s);
          slope.push_back(d_softcap);
          z.push_back(kept ? keep_scale : 0.f);
          m = std::max(m, s);
          raise(out.largest_score, std::abs(s));
        }
        if (m == -kInfinity) continue;
        float l = p.sinks ? std::exp(p.sinks[h] - m) : 0.f;
        for (float s : score) l += std::exp(s - m);
        out.lse[r] = m + std::log(l);
        double o_noise = 0, o_variance = 0;
        for (size_t e = 0; e < seen.size(); ++e) {
          prob.push_back(round_to(p.dtype, std::exp(score[e] - m) / l));
          if (p.dtype == DType::f32) out.probs[r * p.Nk + seen[e]] = prob[e];
          const float* vj = &v[int64_t{seen[e]} * p.Dv];
          add_scaled(prob[e] * z[e], vj, o, p.Dv);
          const double term = prob[e] * z[e] * largest(vj, p.Dv);
          o_noise += term;
          o_variance += square(deviation * term);
        }
        raise(out.o.noise, o_noise);
        raise(out.o.spread, std::sqrt(o_variance));
        for (int32_t d = 0; d < p.Dv; ++d) o[d] = round_to(p.dtype, o[d]);

        // Backward, from the rounded output and the lse.
        const float delta = dot(gi, o, p.Dv) - (dlse ? dlse[r] : 0.f);
        const double delta_noise = norm(gi, p.Dv) * norm(o, p.Dv) + (dlse ? std::abs(dlse[r]) : 0.f);
        double delta_variance = 0;  // of delta, as the output in it is rounded
        for (int32_t d = 0; d < p.Dv; ++d) delta_variance += square(deviation * gi[d] * o[d]);
        for (size_t e = 0; e < seen.size(); ++e)  // and the probabilities that made it
          delta_variance += square(deviation * prob[e] * z[e] * dot(gi, &v[int64_t{seen[e]} * p.Dv], p.Dv));
        double dq_noise = 0, dq_variance = 0, largest_k = 0, slope_weight = 0;
        for (size_t e = 0; e < seen.size(); ++e) {
          const int32_t j = seen[e];
          const float* kj = &k[int64_t{j} * p.D];
          const float* vj = &v[int64_t{j} * p.Dv];
          const float dp = z[e] * dot(gi, vj, p.Dv);
          const float ds = prob[e] * (dp - delta);
          const double ds_noise = prob[e] * (z[e] * norm(gi, p.Dv) * norm(vj, p.Dv) + delta_noise);
          // The error of delta is one number for the row, that of the probabilities is new for each key.
          const double key_variance = square(deviation * ds), common_variance = square(prob[e]) * delta_variance;
          if (p.bias.data) {
            const int64_t at = b * bias_stride[0] + h * bias_stride[1] + i * bias_stride[2] + j * bias_stride[3];
            out.dbias.values[at] += ds;
            dbias_noise[at] += ds_noise;
            dbias_variance[at] += key_variance + (bias_stride[3] ? common_variance : prob[e] * delta_variance);
          }
          if (p.alibi_slopes) {
            out.dalibi_slopes.values[h] += ds * static_cast<float>(j - (i + offset));
            dslopes_noise[h] += ds_noise * std::abs(j - (i + offset));
            dslopes_variance[h] += key_variance * square(j - (i + offset));
            slope_weight += prob[e] * (j - (i + offset));
          }
          const float d_dot = p.scale * slope[e] * ds;
          add_scaled(d_dot, kj, &out.dq.values[r * p.D], p.D);
          const int64_t kv_row = key_row(p, b, kv_head, j);
          std::vector<float> turned(qi, qi + p.D);
          if (turns_keys) rotate(p.rope, key_position(p.rope, b, j), true, turned.data());
          add_scaled(d_dot, turned.data(), &out.dk.values[kv_row * p.D], p.D);
          add_scaled(prob[e] * z[e], gi, &out.dv.values[kv_row * p.Dv], p.Dv);
          const double k_size = std::abs(p.scale) * largest(kj, p.D), q_size = std::abs(p.scale) * largest(qi, p.D);
          raise(largest_k, k_size);
          dq_noise += ds_noise * k_size;
          dq_variance += key_variance * square(k_size);
          dk_variance[kv_row] += (key_variance + common_variance) * square(q_size);
          dv_variance[kv_row] += square(deviation * prob[e] * z[e] * largest(gi, p.Dv));
          dk_noise[kv_row] += ds_noise * q_size;
          dv_noise[kv_row] += prob[e] * z[e] * largest(gi, p.Dv);
        }
        if (p.rope.cos) rotate(p.rope, query_position(p.rope, b, i), true, &out.dq.values[r * p.D]);
        raise(out.dq.noise, dq_noise);
        raise(out.dq.spread, std::sqrt(dq_variance + delta_variance * square(largest_k)));
        dslopes_variance[h] += delta_variance * square(slope_weight);
        if (p.sinks) {
          const float sink_prob = std::exp(p.sinks[h] - out.lse[r]);
          out.dsinks.values[h] -= sink_prob * delta;
          dsinks_noise[h] += sink_prob * delta_noise;
          dsinks_variance[h] += square(sink_prob) * delta_variance;
        }
      }
    }
  }
  for (UnfusedResult* result : {&out.dq, &out.dk, &out.dv})
    for (float& x : result->values) x = round_to(p.dtype, x);
  const auto finish = [](UnfusedResult& result, const std::vector<double>& noise, const std::vector<double>& variance) {
    for (double x : noise) raise(result.noise, x);
    for (double x : variance) raise(result.spread, std::sqrt(x));
  };
  finish(out.dk, dk_noise, dk_variance);
  finish(out.dv, dv_noise, dv_variance);
  finish(out.dbias, dbias_noise, dbias_variance);
  finish(out.dsinks, dsinks_noise, dsinks_variance);
  finish(out.dalibi_slopes, dslopes_noise, dslopes_variance);
  return out;
}

}  // namespace mfa::testing
