// rule.cpp: what can be done with every rule: tighten it, and write it out.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/thread_pool.h"
#include "mfa/block_rules.h"

namespace mfa {
namespace {

// Runs row(r) for every row, some 2^16 elements to a task.
template <typename Row>
void for_rows(int64_t rows, int64_t columns, const Row& row) {
  const int64_t chunk = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, columns));
  parallel_for((rows + chunk - 1) / chunk, [&](int64_t task, int) {
    for (int64_t r = task * chunk; r < std::min(rows, (task + 1) * chunk); ++r) row(r);
  });
}

}  // namespace

BlockRule exact(BlockRule rule) {
  if (rule.mark_exact) rule.mark = std::exchange(rule.mark_exact, nullptr);
  return rule;
}

void write_tiles(const BlockRule& rule, uint8_t* out) {
  const int64_t NQ = rule.grid.query_blocks(), NK = rule.grid.key_blocks();
  if (NK == 0) return;
  for_rows(NQ, NK, [&](int64_t r) {
    std::memset(out + r * NK, 0, NK);
    rule.mark(static_cast<int32_t>(r), out + r * NK);
  });
}

void write_tokens(const BlockRule& rule, uint8_t* out) {
  const int64_t Nq = rule.grid.Nq, Nk = rule.grid.Nk;
  for_rows(Nq, Nk, [&](int64_t i) {
    for (int64_t j = 0; j < Nk; ++j) {
      out[i * Nk + j] = rule.sees(static_cast<int32_t>(i), static_cast<int32_t>(j));
    }
  });
}

}  // namespace mfa
