#include "support/random.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace mfa::testing {

int case_count(int full) {
  const char* text = std::getenv("MFA_TEST_SHARE");
  const double share = text ? std::atof(text) : MFA_TEST_SHARE;
  return std::max(1, static_cast<int>(std::lround(full * share)));
}

}  // namespace mfa::testing
