// packed.cpp: views of q, k and v in a packed array.
//
// The parts are outputs of MLX's Split, whose results share the buffer and whose gradient is one concatenation. Slices
// would pad each part's gradient with zeros to the packed size and add the padded arrays up.
#include "mfa/packed.h"

#include "common/check.h"
#include "mlx/ops.h"

namespace mfa {
namespace mx = mlx::core;
namespace {

void check_count(std::optional<int> count, const char* name, std::string_view function) {
  check(!count || *count > 0, function, name, " must be positive; got ", count.value_or(0));
}

// [B, N, heads * D] as views [B, heads of the part, N, D] of the parts that `ends` cuts the heads into.
std::vector<mx::array> split_heads(const mx::array& x, int heads, const mx::Shape& ends, mx::Stream s) {
  const auto tokens = mx::reshape(x, {x.shape(0), x.shape(1), heads, x.shape(2) / heads}, s);
  auto parts = mx::split(tokens, ends, 2, s);
  for (auto& part : parts) part = mx::swapaxes(part, 1, 2, s);
  return parts;
}

// [B, H, N, parts, D] as `parts` views [B, H, N, D].
std::vector<mx::array> split_tokens(const mx::array& x, mx::Stream s) {
  auto parts = mx::split(x, x.shape(3), 3, s);
  for (auto& part : parts) part = mx::squeeze(part, 3, s);
  return parts;
}

mx::array first_heads(const mx::array& x, int count, mx::Stream s) {
  if (x.shape(1) == count) return x;
  mx::Shape stop = x.shape();
  stop[1] = count;
  return mx::slice(x, mx::Shape(4, 0), std::move(stop), s);
}

}  // namespace

std::array<mx::array, 3> unpack_qkv(const mx::array& qkv, std::optional<int> num_heads, std::optional<int> num_kv_heads,
                                    mx::StreamOrDevice stream_or_device, std::string_view function) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  check(qkv.ndim() == 3 || qkv.ndim() == 5, function,
        "qkv must have shape [B, N, (Hq + 2 Hkv) * D] or [B, H, N, 3, D]; got ", qkv.shape());
  check_count(num_heads, "num_heads", function);
  check_count(num_kv_heads, "num_kv_heads", function);
  if (qkv.ndim() == 3) {
    check(num_heads.has_value(), function, "num_heads is needed to take qkv of shape ", qkv.shape(), " apart");
    const int Hq = *num_heads, Hkv = num_kv_heads.value_or(Hq), width = qkv.shape(2);
    const int64_t heads = Hq + 2 * int64_t{Hkv};
    check(width > 0 && width % heads == 0, function,
          "the last axis of qkv must be a multiple of num_heads + 2 * num_kv_heads = ", heads, "; got ", width);
    const auto parts = split_heads(qkv, static_cast<int>(heads), {Hq, Hq + Hkv}, s);
    return {parts[0], parts[1], parts[2]};
  }
  check(qkv.shape(3) == 3, function, "axis 3 of qkv [B, H, N, 3, D] must have extent 3; got shape ", qkv.shape());
  const int H = qkv.shape(1), Hkv = num_kv_heads.value_or(H);
  check(num_heads.value_or(H) == H, function, "num_heads must be the heads of qkv, ", H, "; got ",
        num_heads.value_or(H));
  check(Hkv <= H, function, "num_kv_heads must be at most the heads of qkv, ", H, "; got ", Hkv);
  const auto parts = split_tokens(qkv, s);
  return {parts[0], first_heads(parts[1], Hkv, s), first_heads(parts[2], Hkv, s)};
}

std::array<mx::array, 2> unpack_kv(const mx::array& kv, std::optional<int> num_kv_heads,
                                   mx::StreamOrDevice stream_or_device, std::string_view function) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  check(kv.ndim() == 3 || kv.ndim() == 5, function, "kv must have shape [B, N, 2 * Hkv * D] or [B, Hkv, N, 2, D]; got ",
        kv.shape());
  check_count(num_kv_heads, "num_kv_heads", function);
  if (kv.ndim() == 3) {
    check(num_kv_heads.has_value(), function, "num_kv_heads is needed to take kv of shape ", kv.shape(), " apart");
    const int64_t heads = 2 * int64_t{*num_kv_heads};
    const int width = kv.shape(2);
    check(width > 0 && width % heads == 0, function,
          "the last axis of kv must be a multiple of 2 * num_kv_heads = ", heads, "; got ", width);
    const auto parts = split_heads(kv, static_cast<int>(heads), {*num_kv_heads}, s);
    return {parts[0], parts[1]};
  }
  check(kv.shape(3) == 2, function, "axis 3 of kv [B, Hkv, N, 2, D] must have extent 2; got shape ", kv.shape());
  const int H = kv.shape(1), Hkv = num_kv_heads.value_or(H);
  check(Hkv <= H, function, "num_kv_heads must be at most the heads of kv, ", H, "; got ", Hkv);
  const auto parts = split_tokens(kv, s);
  return {first_heads(parts[0], Hkv, s), first_heads(parts[1], Hkv, s)};
}

}  // namespace mfa
