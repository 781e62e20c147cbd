// selection.h: which of a row of scored blocks to keep. Scores are float32 and ranked by (score descending, block
// ascending), a NaN below every number, so that every backend picks the same blocks.
#pragma once

#include <cstdint>
#include <span>

namespace mfa {

// Keeps the `k` best of the candidates, or all if there are fewer: sets keep[c] = 1. `candidates` ascend; they are
// reordered.
void keep_top(const float* scores, std::span<int32_t> candidates, int64_t k, uint8_t* keep);

// Keeps the shortest prefix of the ranking, of one block at least, whose weights add up to `mass` or more, or all if
// none does.
void keep_mass(const float* weights, std::span<int32_t> candidates, double mass, uint8_t* keep);

// Keeps the entries above the (budget + 1)-th largest, so at most `budget`, of those that are above 0: entries that
// tie with the first one left out are left out too.
void keep_budget(std::span<const double> weights, int64_t budget, uint8_t* keep);

// The softmax of scores[c] over the candidates, 0 elsewhere. Empty candidates: all 0.
void softmax(const float* scores, int32_t n, std::span<const int32_t> candidates, double* weights);

}  // namespace mfa
