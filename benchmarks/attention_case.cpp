#include "attention_case.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>

#include "attention/visibility.h"
#include "backend/cpu/attention.h"
#include "common/check.h"

namespace mfa::bench {
namespace {

constexpr int kCheckedRows = 4;

// What rounding of the probabilities and of the result to the dtype explains, with room for short rows; a wrong tile,
// mask or split gives errors near 1.
double forward_tolerance(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 2e-5;
    case DType::f16:
      return 4e-3;
    case DType::bf16:
      return 3e-2;
  }
  return 0;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(std::vector<double>& a, double w, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += w * b[i];
}

// |got - exact| / |exact|, Euclidean; NaN counts as infinite.
double relative_error(const std::vector<double>& got, const std::vector<double>& exact) {
  double difference = 0;
  for (size_t i = 0; i < exact.size(); ++i) difference += (got[i] - exact[i]) * (got[i] - exact[i]);
  const double error = std::sqrt(difference / std::max(dot(exact, exact), 1e-30));
  return std::isnan(error) ? INFINITY : error;
}

}  // namespace

AttentionCase::AttentionCase(const Shape& s, bool with_gradients) {
  problem_.B = 1;
  problem_.Hq = s.Hq;
  problem_.Hkv = s.Hkv;
  problem_.Nq = s.Nq;
  problem_.Nk = s.Nk;
  problem_.D = problem_.Dv = s.D;
  problem_.dtype = s.dtype;
  problem_.scale = 1.f / std::sqrt(static_cast<float>(s.D));
  problem_.causal = s.causal;
  problem_.window_left = s.window_left;
  problem_.window_right = s.window_right;
  q_ = random_tensor(s.Hq, s.Nq, 1);
  k_ = random_tensor(s.Hkv, s.Nk, 2);
  v_ = random_tensor(s.Hkv, s.Nk, 3);
  const auto stride = [&](int64_t index, int32_t heads, int32_t length) {
    return index == 0 ? int64_t{heads} * length * s.D : index == 1 ? int64_t{length} * s.D : int64_t{s.D};
  };
  for (int axis = 0; axis < 3; ++axis) {
    problem_.q.stride[axis] = stride(axis, s.Hq, s.Nq);
    problem_.k.stride[axis] = problem_.v.stride[axis] = stride(axis, s.Hkv, s.Nk);
  }
  problem_.q.data = q_.data();
  problem_.k.data = k_.data();
  problem_.v.data = v_.data();
  o_.resize(q_.size());
  lse_.resize(static_cast<size_t>(s.Hq) * static_cast<size_t>(s.Nq));
  if (with_gradients) {
    d_o_ = random_tensor(s.Hq, s.Nq, 4);
    dq_.resize(q_.size());
    dk_.resize(k_.size());
    dv_.resize(v_.size());
  }
}

// The sum of four uniform 16-bit numbers is near enough to normal and costs one multiplication chain an element.
AttentionCase::Buffer AttentionCase::random_tensor(int32_t heads, int32_t length, uint64_t seed) const {
  const int64_t count = int64_t{heads} * length * problem_.D;
  Buffer tensor(static_cast<size_t>(count) * size_of(problem_.dtype));
  const float to_unit_variance = std::sqrt(3.f) / 65536.f;
  uint64_t state = seed << 48;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t x = state += 0x9E3779B97F4A7C15u;  // splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    const uint64_t sum = (x & 0xffff) + ((x >> 16) & 0xffff) + ((x >> 32) & 0xffff) + (x >> 48);
    store_from_float(tensor.data(), problem_.dtype, i, (static_cast<float>(sum) - 131070.f) * to_unit_variance);
  }
  return tensor;
}

void AttentionCase::forward() {
  AttentionOutputs out;
  out.o.data = o_.data();
  std::copy_n(problem_.q.stride, 3, out.o.stride);
  out.lse = lse_.data();
  cpu::attention_forward(problem_, out);
}

void AttentionCase::backward() {
  AttentionGradientInputs in;
  in.o.data = o_.data();
  in.d_o.data = d_o_.data();
  in.lse = lse_.data();
  AttentionGradients out;
  out.dq.data = dq_.data();
  out.dk.data = dk_.data();
  out.dv.data = dv_.data();
  for (int axis = 0; axis < 3; ++axis) {
    in.o.stride[axis] = in.d_o.stride[axis] = out.dq.stride[axis] = problem_.q.stride[axis];
    out.dk.stride[axis] = out.dv.stride[axis] = problem_.k.stride[axis];
  }
  cpu::attention_backward(problem_, in, out);
}

double AttentionCase::key_value_bytes() const { return static_cast<double>(k_.size() + v_.size()); }

double AttentionCase::visible_pairs() const {
  double pairs = 0;
  for (int32_t i = 0; i < problem_.Nq; ++i) {
    const KeyRange keys = visible_keys(problem_, 0, i);
    pairs += keys.end - keys.begin;
  }
  return pairs * problem_.Hq;
}

double AttentionCase::visible_fraction() const {
  return visible_pairs() / (static_cast<double>(problem_.Hq) * problem_.Nq * problem_.Nk);
}

std::vector<double> AttentionCase::row(const void* data, int64_t index) const {
  std::vector<double> out(static_cast<size_t>(problem_.D));
  for (int32_t d = 0; d < problem_.D; ++d)
    out[static_cast<size_t>(d)] = load_as_float(data, problem_.dtype, index * problem_.D + d);
  return out;
}

// p[j] of a query row for every key, zero where it is not visible, and the row's log-sum-exp.
std::vector<double> AttentionCase::probabilities(int32_t head, int32_t query, double* lse) const {
  const int32_t kv_head = head / (problem_.Hq / problem_.Hkv);
  const KeyRange keys = visible_keys(problem_, 0, query);
  const std::vector<double> q = row(problem_.q.data, int64_t{head} * problem_.Nq + query);
  std::vector<double> p(static_cast<size_t>(problem_.Nk), 0.0);
  double top = -INFINITY, sum = 0;
  for (int32_t j = keys.begin; j < keys.end; ++j) {
    const double s = problem_.scale * dot(q, row(problem_.k.data, int64_t{kv_head} * problem_.Nk + j));
    p[static_cast<size_t>(j)] = s;
    top = std::max(top, s);
  }
  for (int32_t j = keys.begin; j < keys.end; ++j) {
    double& x = p[static_cast<size_t>(j)];
    sum += x = std::exp(x - top);
  }
  for (double& x : p) x /= sum;
  *lse = top + std::log(sum);
  return p;
}

double AttentionCase::judge(const char* what, double error, double tolerance) const {
  if (!(error <= tolerance))
    throw std::runtime_error(concat("wrong answer: ", what, " is off by ", error, " of its size, tolerance ", tolerance,
                                    " (", name_of(problem_.dtype), ", Hq ", problem_.Hq, ", Hkv ", problem_.Hkv,
                                    ", Nq ", problem_.Nq, ", Nk ", problem_.Nk, ", D ", problem_.D, ")"));
  return error;
}

double AttentionCase::check_forward() {
  std::mt19937 random(7);
  double worst = 0;
  for (int n = 0; n < kCheckedRows; ++n) {
    const int32_t head = static_cast<int32_t>(random() % static_cast<uint32_t>(problem_.Hq));
    const int32_t query = static_cast<int32_t>(random() % static_cast<uint32_t>(problem_.Nq));
    double lse;
    const std::vector<double> p = probabilities(head, query, &lse);
    std::vector<double> exact(static_cast<size_t>(problem_.D), 0.0);
    const int64_t first_key = int64_t{head / (problem_.Hq / problem_.Hkv)} * problem_.Nk;
    for (int32_t j = 0; j < problem_.Nk; ++j)
      if (const double w = p[static_cast<size_t>(j)]; w != 0) add_scaled(exact, w, row(problem_.v.data, first_key + j));
    const int64_t index = int64_t{head} * problem_.Nq + query;
    judge("lse", relative_error({lse_[static_cast<size_t>(index)]}, {lse}), problem_.dtype == DType::f32 ? 2e-5 : 2e-3);
    worst =
        std::max(worst, judge("o", relative_error(row(o_.data(), index), exact), forward_tolerance(problem_.dtype)));
  }
  return worst;
}

// dq of random query rows, dk and dv of random keys, from the same o that the kernel was given.
double AttentionCase::check_backward() {
  std::mt19937 random(11);
  const AttentionProblem& p = problem_;
  const int32_t group = p.Hq / p.Hkv;
  const double tolerance = 2 * forward_tolerance(p.dtype);
  double worst = 0, lse;
  const auto head_row = [](int32_t head, int32_t length, int32_t i) { return int64_t{head} * length + i; };
  for (int n = 0; n < kCheckedRows; ++n) {
    const int32_t head = static_cast<int32_t>(random() % static_cast<uint32_t>(p.Hq));
    const int32_t query = static_cast<int32_t>(random() % static_cast<uint32_t>(p.Nq));
    const int64_t index = head_row(head, p.Nq, query);
    const std::vector<double> probs = probabilities(head, query, &lse), d_o = row(d_o_.data(), index);
    const double delta = dot(d_o, row(o_.data(), index));
    std::vector<double> exact(static_cast<size_t>(p.D), 0.0);
    for (int32_t j = 0; j < p.Nk; ++j) {
      const double w = probs[static_cast<size_t>(j)];
      if (w == 0) continue;
      const int64_t key = head_row(head / group, p.Nk, j);
      add_scaled(exact, p.scale * w * (dot(d_o, row(v_.data(), key)) - delta), row(k_.data(), key));
    }
    worst = std::max(worst, judge("dq", relative_error(row(dq_.data(), index), exact), tolerance));
  }
  for (int n = 0; n < kCheckedRows; ++n) {
    const int32_t kv_head = static_cast<int32_t>(random() % static_cast<uint32_t>(p.Hkv));
    // Not the last keys: under a causal mask so few queries see them that their gradients cancel less predictably.
    const int32_t key = static_cast<int32_t>(random() % static_cast<uint32_t>(std::max(1, p.Nk / 2)));
    const int64_t key_index = head_row(kv_head, p.Nk, key);
    const std::vector<double> k = row(k_.data(), key_index), v = row(v_.data(), key_index);
    std::vector<double> dk(static_cast<size_t>(p.D), 0.0), dv(static_cast<size_t>(p.D), 0.0);
    for (int32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int32_t i = 0; i < p.Nq; ++i) {
        const KeyRange keys = visible_keys(p, 0, i);
        if (key < keys.begin || key >= keys.end) continue;
        const int64_t index = head_row(head, p.Nq, i);
        const std::vector<double> q = row(q_.data(), index), d_o = row(d_o_.data(), index);
        const double w = std::exp(p.scale * dot(q, k) - double{lse_[static_cast<size_t>(index)]});
        add_scaled(dv, w, d_o);
        add_scaled(dk, p.scale * w * (dot(d_o, v) - dot(d_o, row(o_.data(), index))), q);
      }
    }
    worst = std::max(worst, judge("dk", relative_error(row(dk_.data(), key_index), dk), tolerance));
    worst = std::max(worst, judge("dv", relative_error(row(dv_.data(), key_index), dv), tolerance));
  }
  return worst;
}

}  // namespace mfa::bench
