#include "support/golden_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "attention/visibility.h"
#include "common/philox.h"
#include "support/json.h"

namespace mfa::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<float> floats(const Json& json) {
  const std::vector<double> flat = json.flat();
  return {flat.begin(), flat.end()};
}

// A dense [1, H, N, D] tensor.
TensorRef dense(const std::vector<float>& data, int64_t heads, int64_t rows, int64_t columns) {
  return {data.data(), {heads * rows * columns, rows * columns, columns}};
}

void expect_near(const std::vector<double>& got, const std::vector<double>& expected, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isinf(expected[i])) {
      EXPECT_EQ(got[i], expected[i]) << what << "[" << i << "]";
    } else {
      EXPECT_NEAR(got[i], expected[i], tolerance * std::max(1., std::abs(expected[i]))) << what << "[" << i << "]";
    }
  }
}

struct GoldenCase {
  explicit GoldenCase(const Json& json);

  AttentionProblem problem;
  int32_t offset;  // pos(i) - i in the golden file
  uint32_t dropout_offset = 0;
  std::vector<float> q, k, v, d_o, slopes, sinks, bias, dlse;
  std::vector<size_t> bias_shape;
  const float* dlse_or_null() const { return dlse.empty() ? nullptr : dlse.data(); }

  bool sees(int32_t i, int32_t j) const {
    const AttentionProblem& p = problem;
    const int32_t pos = i + offset;
    return (!p.causal || j <= pos) && (p.window_left < 0 || j >= pos - p.window_left) &&
           (p.window_right < 0 || j <= pos + p.window_right);
  }
};

GoldenCase::GoldenCase(const Json& json) {
  AttentionProblem& p = problem;
  p.B = 1;
  p.Hq = std::stoi(json["H"].text());
  p.Hkv = std::stoi(json["Hk"].text());
  p.Nq = std::stoi(json["Nq"].text());
  p.Nk = std::stoi(json["Nk"].text());
  p.D = p.Dv = std::stoi(json["D"].text());
  q = floats(json["q"]);
  k = floats(json["k"]);
  v = floats(json["v"]);
  d_o = floats(json["dO"]);
  p.q = dense(q, p.Hq, p.Nq, p.D);
  p.k = dense(k, p.Hkv, p.Nk, p.D);
  p.v = dense(v, p.Hkv, p.Nk, p.Dv);

  const Json& options = json["options"];
  const auto number = [&](const char* name, double otherwise) {
    return options.has(name) ? options[name].number() : otherwise;
  };
  offset = static_cast<int32_t>(number("q_offset", p.Nk - p.Nq));
  p.scale = static_cast<float>(number("scale", 1 / std::sqrt(p.D)));
  p.softcap = static_cast<float>(number("softcap", 0));
  p.causal = options.has("causal") && options["causal"].is_true();
  if (options.has("window")) {
    p.window_left = std::stoi(options["window"][0].text());
    p.window_right = std::stoi(options["window"][1].text());
  }
  if (options.has("alibi")) {
    slopes = floats(options["alibi"]);
    p.alibi_slopes = slopes.data();
    EXPECT_TRUE(p.causal || options["alibi_mode"].text() == "signed");
  }
  if (options.has("sink")) {
    sinks = floats(options["sink"]);
    p.sinks = sinks.data();
  }
  if (options.has("bias")) {
    bias = floats(options["bias"]);
    bias_shape = options["bias"].shape();
    p.bias.data = bias.data();
    int64_t size = 1;
    for (int axis = 3; axis >= 0; --axis) {
      p.bias.stride[axis] = bias_shape[axis] > 1 ? size : 0;
      size *= static_cast<int64_t>(bias_shape[axis]);
    }
  }
  if (options.has("dlse")) dlse = floats(options["dlse"]);
  if (options.has("dropout")) {
    p.dropout_p = static_cast<float>(options["dropout"].number());
    p.dropout_seed = options["seed"].unsigned_integer();
    dropout_offset = static_cast<uint32_t>(options["offset"].unsigned_integer());
  }
}

// The same problem with causal and window limits stated by a boolean mask.
Solution solve_with_mask(const GoldenCase& golden, const Solver& solve) {
  AttentionProblem p = golden.problem;
  std::vector<uint8_t> mask;
  for (int32_t i = 0; i < p.Nq; ++i)
    for (int32_t j = 0; j < p.Nk; ++j) mask.push_back(golden.sees(i, j));
  p.mask = {mask.data(), {0, 0, p.Nk, 1}};
  p.causal = false;
  p.window_left = p.window_right = -1;
  EXPECT_EQ(p.alibi_slopes, nullptr);  // would still use our positions
  return solve(p, dense(golden.d_o, p.Hq, p.Nq, p.Dv), golden.dlse_or_null());
}

// Each query row as a problem of one row and one head, its keep factors multiplied into the values.
Solution solve_by_rows(const GoldenCase& golden, const Solver& solve) {
  const AttentionProblem& whole = golden.problem;
  const int32_t Nq = whole.Nq, Nk = whole.Nk, D = whole.D;
  Solution sum;
  sum.dk.assign(golden.k.size(), 0);
  sum.dv.assign(golden.v.size(), 0);
  sum.dsinks.assign(golden.sinks.size(), 0);
  sum.dbias.assign(golden.bias.size(), 0);
  const int64_t* stride = whole.bias.stride;
  for (int32_t h = 0; h < whole.Hq; ++h) {
    for (int32_t i = 0; i < Nq; ++i) {
      const size_t kv_begin = static_cast<size_t>(h / (whole.Hq / whole.Hkv)) * Nk * D;
      std::vector<float> values(golden.v.begin() + kv_begin, golden.v.begin() + kv_begin + Nk * D), bias;
      std::vector<double> z;
      std::vector<uint8_t> mask;
      for (int32_t j = 0; j < Nk; ++j) {
        const uint32_t word = dropout_words(whole.dropout_seed, h, i, j, golden.dropout_offset)[j & 3];
        z.push_back(word >= dropout_threshold(whole.dropout_p) ? 1 / (1 - double{whole.dropout_p}) : 0);
        for (int32_t d = 0; d < D; ++d) values[j * D + d] = static_cast<float>(values[j * D + d] * z[j]);
        mask.push_back(golden.sees(i, j));
        const float alibi = golden.slopes.empty() ? 0.f : golden.slopes[h] * static_cast<float>(j - i - golden.offset);
        bias.push_back(alibi +
                       (golden.bias.empty() ? 0.f : golden.bias[h * stride[1] + i * stride[2] + j * stride[3]]));
      }
      const size_t row = static_cast<size_t>(h) * Nq + i;
      AttentionProblem p;
      p.B = p.Hq = p.Hkv = p.Nq = 1;
      p.Nk = Nk;
      p.D = p.Dv = D;
      p.q = {&golden.q[row * D], {0, 0, 0}};
      p.k = {&golden.k[kv_begin], {0, 0, D}};
      p.v = {values.data(), {0, 0, D}};
      p.scale = whole.scale;
      p.softcap = whole.softcap;
      if (whole.sinks) p.sinks = &golden.sinks[h];
      p.bias = {bias.data(), DType::f32, {0, 0, 0, 1}};
      p.mask = {mask.data(), {0, 0, 0, 1}};
      const Solution part =
          solve(p, {&golden.d_o[row * D], {0, 0, 0}}, golden.dlse.empty() ? nullptr : &golden.dlse[row]);
      sum.o.insert(sum.o.end(), part.o.begin(), part.o.end());
      sum.lse.push_back(part.lse[0]);
      sum.dq.insert(sum.dq.end(), part.dq.begin(), part.dq.end());
      for (int32_t j = 0; j < Nk; ++j) {
        for (int32_t d = 0; d < D; ++d) {
          sum.dk[kv_begin + j * D + d] += part.dk[j * D + d];
          sum.dv[kv_begin + j * D + d] += part.dv[j * D + d] * z[j];
        }
        if (!golden.bias.empty()) sum.dbias[h * stride[1] + i * stride[2] + j * stride[3]] += part.dbias[j];
      }
      if (whole.sinks) sum.dsinks[h] += part.dsinks[0];
    }
  }
  return sum;
}

const Json& attention_json() {
  static const Json json = Json::golden("attention.json");
  return json;
}

}  // namespace

std::vector<std::string> golden_case_names() {
  std::vector<std::string> names;
  for (const Json& json : attention_json()["cases"]) names.push_back(json["name"].text());
  return names;
}

void check_golden_case(const std::string& name, const Solver& solve, double tolerance, double gradient_tolerance) {
  const Json& cases = attention_json()["cases"];
  const auto found = std::find_if(cases.begin(), cases.end(), [&](const Json& c) { return c["name"].text() == name; });
  ASSERT_NE(found, cases.end());
  const GoldenCase golden(*found);
  const AttentionProblem& p = golden.problem;

  Solution got;
  if (p.dropout_p > 0.f) {
    got = solve_by_rows(golden, solve);
  } else if ((p.causal || p.window_left >= 0 || p.window_right >= 0) && golden.offset != position_offset(p, 0)) {
    got = solve_with_mask(golden, solve);
  } else {
    got = solve(p, dense(golden.d_o, p.Hq, p.Nq, p.Dv), golden.dlse_or_null());
  }
  expect_near(got.o, (*found)["O"].flat(), tolerance, "o");
  expect_near(got.lse, (*found)["lse"].flat(), tolerance, "lse");
  expect_near(got.dq, (*found)["dq"].flat(), gradient_tolerance, "dq");
  expect_near(got.dk, (*found)["dk"].flat(), gradient_tolerance, "dk");
  expect_near(got.dv, (*found)["dv"].flat(), gradient_tolerance, "dv");
  EXPECT_EQ(found->has("dbias"), p.bias.data != nullptr);
  EXPECT_EQ(found->has("dsink"), p.sinks != nullptr);
  if (p.bias.data) expect_near(got.dbias, (*found)["dbias"].flat(), gradient_tolerance, "dbias");
  if (p.sinks) expect_near(got.dsinks, (*found)["dsink"].flat(), gradient_tolerance, "dsinks");
}

void check_golden_merge(const Solver& solve, double tolerance) {
  const Json& merge = attention_json()["merge"];
  const std::vector<float> q = floats(merge["q"]), k = floats(merge["k"]), v = floats(merge["v"]);
  AttentionProblem p;
  p.B = 1;
  p.Hq = p.Hkv = static_cast<int32_t>(merge["q"][0].size());
  p.Nq = static_cast<int32_t>(merge["q"][0][0].size());
  p.D = p.Dv = static_cast<int32_t>(merge["q"][0][0][0].size());
  const auto keys = static_cast<int32_t>(merge["k"][0][0].size());
  p.scale = 1.f / std::sqrt(static_cast<float>(p.D));
  p.q = dense(q, p.Hq, p.Nq, p.D);
  const std::vector<float> d_o(q.size(), 0.f);

  std::vector<Solution> parts;
  for (size_t s = 0; s < merge["parts"].size(); ++s) {
    const auto begin = static_cast<int32_t>(merge["parts"][s][0].number());
    p.Nk = static_cast<int32_t>(merge["parts"][s][1].number()) - begin;
    p.k = dense(k, p.Hkv, keys, p.D);
    p.v = dense(v, p.Hkv, keys, p.Dv);
    p.k.data = &k[static_cast<size_t>(begin) * p.D];
    p.v.data = &v[static_cast<size_t>(begin) * p.Dv];
    parts.push_back(solve(p, dense(d_o, p.Hq, p.Nq, p.Dv), nullptr));
    expect_near(parts[s].o, merge["part_O"][s].flat(), tolerance, "part o");
    expect_near(parts[s].lse, merge["part_lse"][s].flat(), tolerance, "part lse");
  }
  Solution whole;
  for (size_t r = 0; r < parts[0].lse.size(); ++r) {
    double m = -kInfinity, l = 0;
    for (const Solution& part : parts) m = std::max(m, part.lse[r]);
    std::vector<double> o(p.Dv, 0);
    for (const Solution& part : parts) {
      const double w = std::exp(part.lse[r] - m);
      l += w;
      for (int32_t d = 0; d < p.Dv; ++d) o[d] += w * part.o[r * p.Dv + d];
    }
    for (double& x : o) whole.o.push_back(x / l);
    whole.lse.push_back(m + std::log(l));
  }
  expect_near(whole.o, merge["O"].flat(), tolerance, "merged o");
  expect_near(whole.lse, merge["lse"].flat(), tolerance, "merged lse");
}

}  // namespace mfa::testing
