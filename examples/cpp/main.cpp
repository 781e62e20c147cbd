// main.cpp: calls mfa::attention from C++, compares it with MLX's own attention, and takes gradients.
#include <mfa/attention.h>
#include <mfa/version.h>

#include <cmath>
#include <cstdlib>
#include <iostream>
#include <vector>

#include "mlx/mlx.h"

namespace mx = mlx::core;

namespace {

float max_difference(const mx::array& a, const mx::array& b) { return mx::max(mx::abs(a - b)).item<float>(); }

}  // namespace

int main() {
  // 8 query heads share 2 key and value heads; the queries are the last 64 positions of 300 tokens.
  const int B = 2, Hq = 8, Hkv = 2, Nq = 64, Nk = 300, D = 64;
  const mx::array q = mx::random::normal({B, Hq, Nq, D}, mx::random::key(0));
  const mx::array k = mx::random::normal({B, Hkv, Nk, D}, mx::random::key(1));
  const mx::array v = mx::random::normal({B, Hkv, Nk, D}, mx::random::key(2));

  mfa::AttentionOptions options;
  options.causal = true;
  const mx::array o = mfa::attention(q, k, v, options);
  const mx::array expected =
      mx::fast::scaled_dot_product_attention(q, k, v, 1.f / std::sqrt(static_cast<float>(D)), "causal");
  const float difference = max_difference(o, expected);
  std::cout << "mfa " << mfa::version() << ": largest difference from MLX's attention " << difference << "\n";

  // Modifiers combine, and everything has gradients.
  options.window_left = 128;
  options.softcap = 20.f;
  const auto loss = [&](const std::vector<mx::array>& in) {
    return mx::mean(mx::square(mfa::attention(in[0], in[1], in[2], options)));
  };
  const auto gradients = mx::grad(loss, std::vector<int>{0, 1, 2})({q, k, v});
  bool finite = true;
  for (const mx::array& gradient : gradients) finite = finite && mx::all(mx::isfinite(gradient)).item<bool>();
  std::cout << "gradients of q, k and v are " << (finite ? "finite" : "not finite") << "\n";

  return difference < 1e-5f && finite ? EXIT_SUCCESS : EXIT_FAILURE;
}
