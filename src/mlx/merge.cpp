// merge.cpp: joins attention over two sets of keys.
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
#include "mlx/merge.h"

#include <limits>
#include <numbers>
#include <tuple>

#include "common/check.h"
#include "mfa/attention.h"
#include "mlx/ops.h"

namespace mfa {
namespace mx = mlx::core;
namespace {

constexpr const char* kFunction = "merge_attention_states";

void check_part(const mx::array& o, const mx::array& lse, const char* part) {
  check(mx::issubdtype(o.dtype(), mx::floating), kFunction, "o_", part, " must have a floating dtype; got ", o.dtype());
  check(mx::issubdtype(lse.dtype(), mx::floating), kFunction, "lse_", part, " must have a floating dtype; got ",
        lse.dtype());
  check(o.ndim() >= 1 && lse.shape() == mx::Shape(o.shape().begin(), o.shape().end() - 1), kFunction, "lse_", part,
        " must have the shape of o_", part, " without its last axis; got ", lse.shape(), " and ", o.shape());
}

}  // namespace

std::pair<mx::array, mx::array> merge_attention_states(const mx::array& o_a, const mx::array& lse_a,
                                                       const mx::array& o_b, const mx::array& lse_b,
                                                       mx::StreamOrDevice stream_or_device, LogBase base) {
  check_part(o_a, lse_a, "a");
  check_part(o_b, lse_b, "b");
  check(o_a.shape() == o_b.shape(), kFunction, "o_a and o_b must have the same shape; got ", o_a.shape(), " and ",
        o_b.shape());
  check(o_a.dtype() == o_b.dtype(), kFunction, "o_a and o_b must have the same dtype; got ", o_a.dtype(), " and ",
        o_b.dtype());

  const mx::Stream s = mx::to_stream(stream_or_device);
  const mx::array zero(0.f), one(1.f), minus_infinity(-std::numeric_limits<float>::infinity());
  auto natural = [&](const mx::array& lse) {
    const auto x = mx::astype(lse, mx::float32, s);
    return base == LogBase::two ? mx::multiply(x, mx::array(std::numbers::ln2_v<float>), s) : x;
  };
  const auto a = natural(lse_a), b = natural(lse_b);

  // The maximum cancels, so it carries no gradient. 0 stands for it where both parts are empty, so that no difference
  // of infinities is formed, in the gradients neither.
  auto m = mx::maximum(a, b, s);
  m = mx::stop_gradient(mx::where(mx::equal(m, minus_infinity, s), zero, m, s), s);
  const auto weight_a = mx::exp(mx::subtract(a, m, s), s), weight_b = mx::exp(mx::subtract(b, m, s), s);
  const auto sum = mx::add(weight_a, weight_b, s);
  const auto empty = mx::equal(sum, zero, s);
  const auto safe_sum = mx::where(empty, one, sum, s);

  auto share = [&](const mx::array& o, const mx::array& lse, const mx::array& weight) {
    const auto present = mx::expand_dims(mx::not_equal(lse, minus_infinity, s), -1, s);
    const auto value = mx::where(present, mx::astype(o, mx::float32, s), zero, s);
    return mx::multiply(mx::expand_dims(mx::divide(weight, safe_sum, s), -1, s), value, s);
  };
  const auto o = mx::add(share(o_a, a, weight_a), share(o_b, b, weight_b), s);
  auto lse = mx::where(empty, minus_infinity, mx::add(m, mx::log(safe_sum, s), s), s);
  if (base == LogBase::two) lse = mx::multiply(lse, mx::array(std::numbers::log2e_v<float>), s);
  return {mx::astype(o, o_a.dtype(), s), lse};
}

AttentionResult merge_parts(const AttentionResult& a, const AttentionResult& b, const std::optional<mx::array>& sinks,
                            mx::Dtype dtype, mx::Stream s) {
  const auto wide = [&](const mx::array& x) { return mx::astype(x, mx::float32, s); };
  auto [out, lse] = merge_attention_states(wide(a.out), a.lse, wide(b.out), b.lse, s);
  if (sinks) {
    const auto logits = mx::reshape(wide(*sinks), {1, lse.shape(1), 1}, s);
    const auto nothing = mx::broadcast_to(mx::array(0.f), out.shape(), s);
    std::tie(out, lse) = merge_attention_states(out, lse, nothing, mx::broadcast_to(logits, lse.shape(), s), s);
  }
  return {mx::astype(out, dtype, s), lse, std::nullopt};
}

}  // namespace mfa
