#include "attention/append.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "attention/validate.h"
#include "common/check.h"
#include "common/thread_pool.h"

namespace mfa {
namespace {

constexpr int64_t kBytesOfTask = 256 << 10;  // copied in some tens of microseconds

int64_t first_position(const CacheRows& p, int32_t b) { return p.rope.q_positions ? p.rope.q_positions[b] : 0; }

// The element of channel 0 of (b, h, token) in the cache.
int64_t cache_element(const CacheRows& p, int32_t b, int32_t h, int64_t token) {
  const int64_t (&stride)[3] = p.cache.stride;
  if (!p.pages.table) return b * stride[0] + h * stride[1] + token * stride[2];
  const int64_t page = p.pages.table[b * p.pages.table_stride + token / p.pages.page_size];
  return page * stride[0] + h * stride[1] + token % p.pages.page_size * stride[2];
}

// Turns the pairs of `x` by row `position` of the tables, `back` by the negative angle, into `out`.
template <typename T, DType kDType>
void turn(const RopeRef& rope, int64_t position, bool back, int32_t D, const T* x, T* out) {
  const int32_t half = rope.rotary_dim / 2;
  const int32_t step = rope.interleaved ? 2 : 1, apart = rope.interleaved ? 1 : half;
  const float *cos = rope.cos + position * half, *sin = rope.sin + position * half;
  for (int32_t c = 0; c < half; ++c) {
    const float a = to_float(x[c * step]), b = to_float(x[c * step + apart]);
    const float s = back ? -sin[c] : sin[c];
    store_from_float(out, kDType, c * step, a * cos[c] - b * s);
    store_from_float(out, kDType, c * step + apart, a * s + b * cos[c]);
  }
  std::copy(x + rope.rotary_dim, x + D, out + rope.rotary_dim);
}

template <typename T, DType kDType, bool kReads>
void move_rows(const CacheRows& p) {
  auto* const cache = static_cast<T*>(p.cache.data);
  auto* const rows = static_cast<T*>(p.rows.data);
  const int64_t count = int64_t{p.B} * p.H * p.N;
  const int64_t bytes_of_row = std::max<int64_t>(1, p.D * static_cast<int64_t>(sizeof(T)));
  const int64_t of_task = std::max<int64_t>(1, kBytesOfTask / bytes_of_row);
  const auto task = [&](int64_t index, int) {
    const int64_t end = std::min(count, (index + 1) * of_task);
    for (int64_t i = index * of_task; i < end; ++i) {
      const auto t = static_cast<int32_t>(i % p.N), h = static_cast<int32_t>(i / p.N % p.H);
      const auto b = static_cast<int32_t>(i / p.N / p.H);
      T* place = cache + cache_element(p, b, h, int64_t{p.starts[b]} + t);
      T* row = rows + b * p.rows.stride[0] + h * p.rows.stride[1] + t * p.rows.stride[2];
      const T* from = kReads ? place : row;
      T* to = kReads ? row : place;
      if (p.rope.cos) {
        turn<T, kDType>(p.rope, first_position(p, b) + t, kReads, p.D, from, to);
      } else {
        std::copy(from, from + p.D, to);
      }
    }
  };
  const int64_t tasks = (count + of_task - 1) / of_task;
  if (tasks == 1) {
    task(0, 0);
  } else if (tasks > 1) {
    parallel_for(tasks, task);
  }
}

template <bool kReads>
void move_rows(const CacheRows& p) {
  switch (p.dtype) {
    case DType::f32:
      return move_rows<float, DType::f32, kReads>(p);
    case DType::f16:
      return move_rows<float16, DType::f16, kReads>(p);
    case DType::bf16:
      return move_rows<bfloat16, DType::bf16, kReads>(p);
  }
}

void check_pages(const CacheRows& p, const char* function) {
  std::vector<std::pair<int32_t, int32_t>> written;  // page, batch entry
  for (int32_t b = 0; b < p.B && p.N > 0; ++b) {
    const int32_t* row = p.pages.table + b * p.pages.table_stride;
    const int32_t first = p.starts[b] / p.pages.page_size, last = (p.starts[b] + p.N - 1) / p.pages.page_size;
    for (int32_t t = p.attended ? 0 : first; t <= last; ++t) {
      check(row[t] >= 0 && row[t] < p.pages.pages, function, "block_table must name pages in [0, ", p.pages.pages,
            ") for the ", t < first ? "keys that a sequence has" : "tokens that are appended", "; got ", row[t],
            " at entry ", t, " of sequence ", b);
      if (t >= first) written.emplace_back(row[t], b);
    }
  }
  std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i) {
    check(written[i].first != written[i - 1].first, function, "each page may be appended to once; got page ",
          written[i].first, " for sequences ", written[i - 1].second, " and ", written[i].second);
  }
}

}  // namespace

void validate(const CacheRows& p, const char* function) {
  for (int32_t b = 0; b < p.B; ++b) {
    const int64_t start = p.starts[b];
    check(start >= 0 && start + p.N <= p.capacity, function, "sequences must have room for their lengths and the ", p.N,
          " new tokens, ", p.capacity, " in all; got length ", start, " for sequence ", b);
    if (p.rope.rotary_dim == 0) continue;
    const int32_t positions = p.rope.positions;
    if (!p.attended || !p.rope.rotates_k) {
      validate_positions(first_position(p, b), p.N, positions, b, "new keys", function);
    } else {
      validate_positions(0, p.starts[b] + p.N, positions, b, "keys", function);
    }
    if (p.query_positions) validate_positions(p.query_positions[b], p.queries, positions, b, "queries", function);
  }
  if (p.pages.table) check_pages(p, function);
}

void append_rows(const CacheRows& p) { move_rows<false>(p); }

void read_rows(const CacheRows& p) { move_rows<true>(p); }

}  // namespace mfa
