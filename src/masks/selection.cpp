#include "masks/selection.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace mfa {
namespace {

struct Ranking {
  const float* scores;
  float at(int32_t c) const { return std::isnan(scores[c]) ? -std::numeric_limits<float>::infinity() : scores[c]; }
  bool operator()(int32_t a, int32_t b) const { return at(a) > at(b) || (at(a) == at(b) && a < b); }
};

}  // namespace

void keep_top(const float* scores, std::span<int32_t> candidates, int64_t k, uint8_t* keep) {
  if (k < static_cast<int64_t>(candidates.size())) {
    std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), Ranking{scores});
    candidates = candidates.first(k);
  }
  for (const int32_t c : candidates) keep[c] = 1;
}

void keep_mass(const float* weights, std::span<int32_t> candidates, double mass, uint8_t* keep) {
  std::sort(candidates.begin(), candidates.end(), Ranking{weights});
  double total = 0;
  for (const int32_t c : candidates) {
    keep[c] = 1;
    total += weights[c];
    if (total >= mass) return;
  }
}

void keep_budget(std::span<const double> weights, int64_t budget, uint8_t* keep) {
  const int64_t n = static_cast<int64_t>(weights.size());
  double threshold = 0;  // of n entries or fewer all above 0 stay
  if (budget < n) {
    std::vector<double> sorted(weights.begin(), weights.end());
    std::nth_element(sorted.begin(), sorted.begin() + budget, sorted.end(), std::greater<>());
    threshold = sorted[budget];
  }
  for (int64_t i = 0; i < n; ++i) keep[i] = weights[i] > threshold;
}

void softmax(const float* scores, int32_t n, std::span<const int32_t> candidates, double* weights) {
  std::fill_n(weights, n, 0.0);
  const Ranking ranking{scores};
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const int32_t c : candidates) largest = std::max(largest, static_cast<double>(ranking.at(c)));
  if (!std::isfinite(largest)) {  // no candidate, or none that is a number: an even share each
    for (const int32_t c : candidates) weights[c] = 1.0 / static_cast<double>(candidates.size());
    return;
  }
  for (const int32_t c : candidates) sum += weights[c] = std::exp(ranking.at(c) - largest);
  for (const int32_t c : candidates) weights[c] /= sum;
}

}  // namespace mfa
