// attention_family_cpu.cpp: what packing, pages, rotary embedding, block lists, neighbourhoods and top-k cost, as
// ratios to the dense kernel in the same run.
//
// Each row checks its answer, then alternates calls of the subject with calls of a dense problem on one thread, by its
// CPU time; medians count. A rate is the subject's useful work per second over the dense one's (higher is better), a
// factor its time over that of its share of the dense work (lower is better).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <numeric>
#include <random>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/layout.h"
#include "attention/visibility.h"
#include "backend/cpu/attention.h"
#include "common/check.h"
#include "common/thread_pool.h"
#include "options.h"
#include "report.h"
#include "timing.h"

namespace mfa::bench {
namespace {

// A problem with its data: [batch, heads, rows, D] tensors, pools of pages [pages, rows, heads, D], unit normals.
class Subject {
 public:
  Subject(DType dtype, int32_t heads, int32_t queries, int32_t keys, int32_t D) {
    p.B = 1;
    p.Hq = p.Hkv = heads;
    p.Nq = queries;
    p.Nk = keys;
    p.D = p.Dv = D;
    p.dtype = dtype;
    p.scale = 1.f / std::sqrt(static_cast<float>(D));
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  // Allocates what the problem's shape needs.
  void fill() {
    const int64_t batches = p.query_starts ? 1 : p.B, rows = p.query_starts ? p.packed_queries : p.Nq;
    const int64_t key_batches = p.pages.table ? p.pages.pages : p.key_starts ? 1 : p.B;
    const int64_t key_rows = p.pages.table ? p.pages.page_size : p.key_starts ? p.packed_keys : p.Nk;
    p.q = tensor(q_, batches, p.Hq, rows, p.D, 1);
    const bool tokens_first = p.pages.table && !heads_first;
    p.k = tensor(k_, key_batches, p.Hkv, key_rows, p.D, 2, tokens_first);
    p.v = tensor(v_, key_batches, p.Hkv, key_rows, p.Dv, 3, tokens_first);
    const TensorRef o = tensor(o_, batches, p.Hq, rows, p.Dv, 4);
    out_.o = {const_cast<void*>(o.data), {o.stride[0], o.stride[1], o.stride[2]}};
    lse_.resize(static_cast<size_t>(row_count(p)));
    out_.lse = lse_.data();
  }

  void run() {
    if (keep > 0) {
      floors_.resize(lse_.size());
      const std::vector<int32_t> kept(static_cast<size_t>(p.B), keep);
      cpu::score_floors(p, kept.data(), floors_.data());
      AttentionProblem floored = p;
      floored.score_floor = floors_.data();
      cpu::attention_forward(floored, out_);
    } else {
      cpu::attention_forward(p, out_);
    }
  }

  // Pairs of a query and a key it sees, over all heads.
  double pairs() const {
    double sum = 0;
    for (int32_t b = 0; b < p.B; ++b)
      for (int32_t i = 0; i < query_count(p, b); ++i) {
        if (!p.blocks.offsets && p.neighbourhood.axes == 0) {
          const KeyRange range = visible_keys(p, b, i);
          sum += range.end - range.begin;
          continue;
        }
        for (int32_t j = 0; j < key_count(p, b); ++j) sum += sees(p, b, 0, i, j);
      }
    return sum * p.Hq;
  }

  // Compares a few rows with float64; the largest error relative to the row.
  double check() {
    run();
    std::mt19937 random(7);
    double worst = 0;
    for (int n = 0; n < 24; ++n) {
      const auto b = static_cast<int32_t>(random() % static_cast<uint32_t>(p.B));
      if (query_count(p, b) == 0) continue;
      const auto h = static_cast<int32_t>(random() % static_cast<uint32_t>(p.Hq));
      worst = std::max(worst, error(b, h, static_cast<int32_t>(random() % static_cast<uint32_t>(query_count(p, b)))));
    }
    const double tolerance = p.dtype == DType::f32 ? 1e-4 : 2e-2;
    if (!(worst <= tolerance)) throw std::runtime_error(concat("wrong answer: relative error ", worst));
    return worst;
  }

  AttentionProblem p;
  int32_t keep = 0;
  bool heads_first = false;  // a view of pools [pages, heads, rows, D]
  std::vector<int32_t> query_starts, key_starts, table, key_ids, query_ids;
  std::vector<int64_t> offsets, transposed_offsets;
  std::vector<float> cosines, sines;

 private:
  TensorRef tensor(std::vector<uint8_t>& storage, int64_t batches, int64_t heads, int64_t rows, int64_t width,
                   uint32_t seed, bool tokens_first = false) const {
    const int64_t count = batches * heads * rows * width;
    storage.resize(static_cast<size_t>(count) * size_of(p.dtype));
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> pool(4099);
    for (float& x : pool) x = normal(random);
    for (int64_t i = 0, at = 0; i < count; ++i) {
      if (i % width == 0) at = static_cast<int64_t>(random() % pool.size());  // rows differ
      store_from_float(storage.data(), p.dtype, i, pool[static_cast<size_t>(at + i % width) % pool.size()]);
    }
    if (tokens_first) return {storage.data(), {heads * rows * width, width, heads * width}};
    return {storage.data(), {heads * rows * width, rows * width, width}};
  }

  std::vector<double> load(const TensorRef& x, int64_t element, int32_t width) const {
    std::vector<double> row(static_cast<size_t>(width));
    for (int32_t d = 0; d < width; ++d) row[static_cast<size_t>(d)] = load_as_float(x.data, p.dtype, element + d);
    return row;
  }
  void rotate(std::vector<double>& x, int64_t position) const {
    if (!p.rope.cos) return;
    const int64_t pairs = p.rope.rotary_dim / 2;
    for (int64_t c = 0; c < pairs; ++c) {
      double &a = x[static_cast<size_t>(2 * c)], &b = x[static_cast<size_t>(2 * c + 1)];
      const double cos = p.rope.cos[position * pairs + c], sin = p.rope.sin[position * pairs + c], first = a;
      a = first * cos - b * sin;
      b = first * sin + b * cos;
    }
  }

  double error(int32_t b, int32_t h, int32_t i) const {
    std::vector<double> q = load(p.q, query_element(p, p.q.stride, b, h, i), p.D);
    rotate(q, i);
    std::vector<double> scores, exact(static_cast<size_t>(p.Dv));
    std::vector<int32_t> keys;
    for (int32_t j = 0; j < key_count(p, b); ++j) {
      if (!sees(p, b, h, i, j)) continue;
      std::vector<double> k = load(p.k, key_element(p, p.k.stride, b, h, j), p.D);
      rotate(k, j);
      scores.push_back(p.scale * std::inner_product(q.begin(), q.end(), k.begin(), 0.));
      keys.push_back(j);
    }
    double floor = -INFINITY, sum = 0, norm = 0, wrong = 0;
    if (keep > 0) {
      std::vector<double> sorted = scores;
      std::nth_element(sorted.begin(), sorted.begin() + keep - 1, sorted.end(), std::greater<>());
      floor = sorted[static_cast<size_t>(keep) - 1] - 1e-6;
    }
    for (size_t n = 0; n < keys.size(); ++n) {
      if (scores[n] < floor) continue;
      const double weight = std::exp(scores[n]);
      const std::vector<double> v = load(p.v, key_element(p, p.v.stride, b, h, keys[n]), p.Dv);
      sum += weight;
      for (size_t d = 0; d < v.size(); ++d) exact[d] += weight * v[d];
    }
    const int64_t at = query_element(p, out_.o.stride, b, h, i);
    for (int32_t d = 0; d < p.Dv; ++d) {
      const double x = sum == 0 ? 0 : exact[static_cast<size_t>(d)] / sum;
      norm += x * x;
      wrong += std::pow(load_as_float(out_.o.data, p.dtype, at + d) - x, 2);
    }
    return norm == 0 ? std::sqrt(wrong) : std::sqrt(wrong / norm);
  }

  std::vector<uint8_t> q_, k_, v_, o_;
  std::vector<float> lse_, floors_;
  AttentionOutputs out_;
};

using SubjectPtr = std::unique_ptr<Subject>;

struct Row {
  std::string work;
  bool is_rate = false;  // value: rate over the dense rate; else time over its share of the dense time
  double must = NAN;
  std::function<SubjectPtr()> subject, dense;
  double share = 0;  // of the dense work, if not that of the visible pairs
};

SubjectPtr dense(DType dtype, int32_t heads, int32_t queries, int32_t keys, int32_t D) {
  auto s = std::make_unique<Subject>(dtype, heads, queries, keys, D);
  s->fill();
  return s;
}

SubjectPtr packed(DType dtype, int32_t heads, const std::vector<int32_t>& lengths, int32_t D) {
  const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
  auto s = std::make_unique<Subject>(dtype, heads, longest, longest, D);
  s->query_starts = {0};
  for (int32_t length : lengths) s->query_starts.push_back(s->query_starts.back() + length);
  s->key_starts = s->query_starts;
  s->p.B = static_cast<int32_t>(lengths.size());
  s->p.query_starts = s->query_starts.data();
  s->p.key_starts = s->key_starts.data();
  s->p.packed_queries = s->p.packed_keys = s->query_starts.back();
  s->fill();
  return s;
}

SubjectPtr paged(DType dtype, int32_t heads, int32_t queries, int32_t keys, int32_t D, int32_t page_size,
                 bool heads_first) {
  auto s = std::make_unique<Subject>(dtype, heads, queries, keys, D);
  s->heads_first = heads_first;
  s->p.pages.page_size = page_size;
  s->p.pages.pages = (keys + page_size - 1) / page_size;
  s->table.resize(static_cast<size_t>(s->p.pages.pages));
  std::iota(s->table.begin(), s->table.end(), 0);
  std::shuffle(s->table.begin(), s->table.end(), std::mt19937(5));
  s->p.pages.table = s->table.data();
  s->fill();
  return s;
}

SubjectPtr rotated(DType dtype, int32_t heads, int32_t N, int32_t D) {
  auto s = std::make_unique<Subject>(dtype, heads, N, N, D);
  for (int32_t i = 0; i < N; ++i)
    for (int32_t c = 0; c < D / 2; ++c) {
      const double angle = i * std::pow(10000., -2. * c / D);
      s->cosines.push_back(static_cast<float>(std::cos(angle)));
      s->sines.push_back(static_cast<float>(std::sin(angle)));
    }
  s->p.rope.cos = s->cosines.data();
  s->p.rope.sin = s->sines.data();
  s->p.rope.positions = N;
  s->p.rope.rotary_dim = D;
  s->fill();
  return s;
}

SubjectPtr sparse(DType dtype, int32_t heads, int32_t N, int32_t D, int32_t tile, double density) {
  auto s = std::make_unique<Subject>(dtype, heads, N, N, D);
  BlockListRef& l = s->p.blocks;
  l.block_q = l.block_k = tile;
  l.query_blocks = l.key_blocks = (N + tile - 1) / tile;
  std::mt19937 random(11);
  s->offsets = {0};
  for (int32_t r = 0; r < l.query_blocks; ++r) {
    for (int32_t c = 0; c < l.key_blocks; ++c)
      if (random() < density * 4294967296.) s->key_ids.push_back(c);
    s->offsets.push_back(static_cast<int64_t>(s->key_ids.size()));
  }
  l.offsets = s->offsets.data();
  l.key_ids = s->key_ids.data();
  s->fill();
  return s;
}

SubjectPtr grid(DType dtype, int32_t heads, int32_t D, const std::vector<NeighbourhoodAxis>& axes) {
  int32_t tokens = 1;
  for (const NeighbourhoodAxis& a : axes) tokens *= a.size;
  auto s = std::make_unique<Subject>(dtype, heads, tokens, tokens, D);
  s->p.neighbourhood.axes = static_cast<int32_t>(axes.size());
  std::copy(axes.begin(), axes.end(), s->p.neighbourhood.axis);
  s->p.neighbourhood.shifts = true;
  s->fill();
  return s;
}

// The part of the pairs that boxes of at most 64 queries visit, each with the union of its windows: the boxes with the
// fewest of them, so that the yardstick does not follow what the kernel does.
double visited_share(const Subject& s) {
  constexpr int32_t kQueries = 64;
  const Neighbourhood& n = s.p.neighbourhood;
  const auto keys_along = [&](int32_t x, int32_t extent) {  // of a box, the mean over the queries
    const NeighbourhoodAxis& a = n.axis[x];
    double sum = 0;
    for (int32_t first = 0; first < a.size; first += extent) {
      const int32_t last = std::min(a.size, first + extent) - 1;
      sum += (last + 1 - first) * double(axis_window(n, a, last).end - axis_window(n, a, first).begin);
    }
    return sum / a.size;
  };
  double fewest = INFINITY;
  for (int32_t i = 1; i <= kQueries; ++i)
    for (int32_t j = 1; i * j <= kQueries; ++j) {
      const int32_t extent[3] = {i, j, kQueries / (i * j)};
      double keys = 1;
      for (int32_t x = 0; x < n.axes; ++x) keys *= keys_along(x, extent[x]);
      if (n.axes == 3 || i * j == kQueries) fewest = std::min(fewest, keys);
    }
  return fewest / s.p.Nk;
}

std::vector<Row> all_rows() {
  std::vector<Row> rows;
  const auto add = [&](std::string work, bool is_rate, double must, std::function<SubjectPtr()> subject,
                       std::function<SubjectPtr()> whole) {
    rows.push_back({std::move(work), is_rate, must, std::move(subject), std::move(whole)});
  };
  std::vector<int32_t> ragged;
  for (int32_t n = 0; n < 8; ++n) ragged.push_back(64 + 960 * n / 7);
  for (const DType type : {DType::f32, DType::bf16})
    for (const int32_t D : {64, 128})
      add(
          concat("packed 8 x (64..1024) ", name_of(type), " D ", D), true, 0.85,
          [=] { return packed(type, 8, ragged, D); }, [=] { return dense(type, 8, 1024, 1024, D); });
  for (const int32_t D : {64, 128})
    add(
        concat("packed 4096 x 16 f32 D ", D), true, 0.4,
        [=] { return packed(DType::f32, 8, std::vector<int32_t>(4096, 16), D); },
        [=] { return dense(DType::f32, 8, 1024, 1024, D); });
  for (const bool heads_first : {false, true}) {
    const char* order = heads_first ? ", heads first" : "";
    for (const int32_t page : {16, 64})
      add(
          concat("paged decode bf16 32k, page ", page, order), true, 0.9,
          [=] { return paged(DType::bf16, 8, 1, 32768, 128, page, heads_first); },
          [] { return dense(DType::bf16, 8, 1, 32768, 128); });
    for (const DType type : {DType::f32, DType::bf16})
      add(
          concat("paged prefill ", name_of(type), " D 64, page 16", order), true, 0.93,
          [=] { return paged(type, 8, 2048, 2048, 64, 16, heads_first); },
          [=] { return dense(type, 8, 2048, 2048, 64); });
  }
  for (const DType type : {DType::f32, DType::bf16})
    add(
        concat("rope ", name_of(type), " D 64, N 2048"), false, 1.05, [=] { return rotated(type, 8, 2048, 64); },
        [=] { return dense(type, 8, 2048, 2048, 64); });
  for (const int32_t D : {64, 128})
    for (const double density : {0.05, 0.2, 0.5})
      add(
          concat("lists 64x64 f32 D ", D, " N 4096, ", 100 * density, " %"), false, 1.25,
          [=] { return sparse(DType::f32, 4, 4096, D, 64, density); },
          [=] { return dense(DType::f32, 4, 4096, 4096, D); });
  const auto add_grid = [&](const char* name, double must, const std::vector<NeighbourhoodAxis>& axes, int32_t N) {
    for (const DType type : {DType::f32, DType::bf16})
      add(
          concat("neighbourhood ", name, " ", name_of(type), " D 64"), false, must,
          [=] { return grid(type, 2, 64, axes); }, [=] { return dense(type, 2, N, N, 64); });
  };
  add_grid("8x32x32 window 2x8x8", 1.6, {{8, 2, 1, 1, false}, {32, 8, 1, 1, false}, {32, 8, 1, 1, false}}, 8192);
  add_grid("64x64 window 16x16", 1.4, {{64, 16, 1, 1, false}, {64, 16, 1, 1, false}}, 4096);
  for (const int32_t D : {64, 128}) {
    add(
        concat("top-k 10 % f32 D ", D, " N 4096"), false, 2.2,
        [=] {
          SubjectPtr s = dense(DType::f32, 2, 4096, 4096, D);
          s->keep = 410;
          return s;
        },
        [=] { return dense(DType::f32, 2, 4096, 4096, D); });
  }
  return rows;
}

int run(const Options& options) {
  cpu::set_isa(options.isa);
  std::string reason;
  const std::optional<CpuKernelTraits> traits = cpu::kernel_traits(&reason);
  check(traits.has_value(), "attention_family_cpu", "kernels that this processor can run; ", reason);
  set_thread_count(1);
  const int reps = options.reps > 0 ? options.reps : options.quick ? 3 : 7;
  const Machine machine = describe_machine(traits->isa);
  const std::regex filter(options.filter);
  std::cout << summary(machine) << "\none thread, " << reps << " repeats\n";
  Table table({"work", "ms", "dense ms", "share of work", "value", "must", "error"});
  JsonWriter json(options.json);
  json.begin_object();
  write(json, machine);
  json.begin_array("rows");
  for (const Row& row : all_rows()) {
    if (!std::regex_search(row.work, filter)) continue;
    if (options.list) {
      std::cout << row.work << '\n';
      continue;
    }
    const SubjectPtr subject = row.subject(), whole = row.dense();
    const double error = subject->check();
    whole->check();
    const auto seconds = [](Subject& s) {
      const auto work = [&] { s.run(); };
      const int calls = calls_per_sample(seconds_per_call(CLOCK_MONOTONIC, 1, work), 5e-3);
      return seconds_per_call(CLOCK_THREAD_CPUTIME_ID, calls, work);
    };
    std::vector<double> one, other;
    for (int rep = 0; rep < reps; ++rep) {
      one.push_back(seconds(*subject));
      other.push_back(seconds(*whole));
    }
    const double share =
        subject->p.neighbourhood.axes > 0 ? visited_share(*subject) : subject->pairs() / whole->pairs();
    const double factor = median(one) / median(other) / share;
    const double value = row.is_rate ? 1 / factor : factor;
    table.add({row.work, number(median(one) * 1e3, 2), number(median(other) * 1e3, 2), number(share, 4),
               number(value, 2) + (row.is_rate ? " rate" : " x"), number(row.must, 2), number(error * 1e6, 1) + "e-6"});
    json.begin_object();
    json.field("work", row.work);
    json.field("seconds", median(one));
    json.field("dense_seconds", median(other));
    json.field("share", share);
    json.field("value", value);
    json.field("is_rate", row.is_rate);
    json.field("must", row.must);
    json.field("relative_error", error);
    json.end_object();
  }
  json.end_array();
  json.end_object();
  if (!options.list) std::cout << table.text();
  return 0;
}

}  // namespace
}  // namespace mfa::bench

int main(int argc, char** argv) {
  try {
    return mfa::bench::run(mfa::bench::parse_options(
        "attention_family_cpu", "what packing, pages and sparsity cost on the CPU, against the dense kernel", argc,
        argv));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
