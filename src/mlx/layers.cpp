#include "mlx/layers.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "backend/cpu/attention.h"
#include "common/check.h"
#include "layers/reductions.h"
#include "layers/rms_norm.h"
#include "layers/rope.h"
#include "layers/swiglu.h"
#include "mfa/layers.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/evaluate.h"
#include "mlx/fast.h"
#include "mlx/operands.h"
#include "mlx/ops.h"
#include "mlx/request.h"
#include "mlx/transforms.h"

namespace mfa {
namespace {

using OptionalArray = std::optional<mx::array>;

bool is_supported(mx::Dtype dtype) { return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16; }

bool on_cpu(const mx::Stream& s) { return s.device == mx::Device::cpu && cpu::kernel_traits().has_value(); }

}  // namespace

// ---- derivatives and maps -------------------------------------------------------------------------------------------
void FusedLayer::eval_gpu(const std::vector<mx::array>&, mx::array&) {
  throw std::runtime_error(concat("[", name(), "::eval_gpu] this primitive runs on CPU streams only"));
}

Composition FusedLayer::with_fixed(const std::vector<mx::array>& primals, const std::vector<int>& argnums) const {
  return [this, primals, argnums](const std::vector<mx::array>& changing) {
    std::vector<mx::array> inputs = primals;
    for (size_t i = 0; i < argnums.size(); ++i) inputs[argnums[i]] = changing[i];
    return composition_(inputs);
  };
}

std::vector<mx::array> FusedLayer::jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                                       const std::vector<int>& argnums) {
  std::vector<mx::array> changing;
  for (const int i : argnums) changing.push_back(primals[i]);
  return mx::jvp(with_fixed(primals, argnums), changing, tangents).second;
}

std::vector<mx::array> FusedLayer::vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                                       const std::vector<int>& argnums, const std::vector<mx::array>&) {
  std::vector<mx::array> changing;
  for (const int i : argnums) changing.push_back(primals[i]);
  return mx::vjp(with_fixed(primals, argnums), changing, cotangents).second;
}

std::pair<std::vector<mx::array>, std::vector<int>> FusedLayer::vmap(const std::vector<mx::array>& inputs,
                                                                     const std::vector<int>& axes) {
  return {mx::vmap(composition_, axes)(inputs), {0}};
}

// ---- RMS norm -------------------------------------------------------------------------------------------------------
void RmsNorm::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  if (out.size() == 0) return;
  mx::array x = with_dense_last_axis(inputs[0], stream());
  RmsNormProblem p;
  p.D = x.shape(-1);
  p.rows = static_cast<int64_t>(x.size()) / p.D;
  p.stride = p.D;
  if (x.ndim() > 1) {
    const auto stride = row_stride(x, x.shape());
    if (stride) {
      p.stride = *stride;
    } else {
      x = with_dense_rows(x, stream());
    }
  }
  p.dtype = to_dtype(x.dtype());
  p.x = x.data<void>();
  if (inputs.size() > 1) {
    p.weight = inputs[1].data<void>();
    p.weight_stride = inputs[1].strides(0);
  }
  p.eps = eps_;
  p.out = out.data<void>();
  mx::cpu::get_command_encoder(stream()).dispatch([p] { rms_norm(p); });
}

bool RmsNorm::is_equivalent(const Primitive& other) const { return eps_ == static_cast<const RmsNorm&>(other).eps_; }

bool fuses_rms_norm(const mx::array& x, const OptionalArray& weight, mx::StreamOrDevice s) {
  if (!on_cpu(mx::to_stream(s)) || x.ndim() < 1 || !is_supported(x.dtype())) return false;
  return !weight || (weight->ndim() == 1 && weight->shape(0) == x.shape(-1) && weight->dtype() == x.dtype());
}

mx::array rms_norm(const mx::array& x, const OptionalArray& weight, float eps, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream);
  if (!fuses_rms_norm(x, weight, s)) return mx::fast::rms_norm(x, weight, eps, s);
  Composition composition = [eps, s](const std::vector<mx::array>& in) -> std::vector<mx::array> {
    return {mx::fast::rms_norm(in[0], in.size() > 1 ? OptionalArray(in[1]) : std::nullopt, eps, s)};
  };
  std::vector<mx::array> inputs = {x};
  if (weight) inputs.push_back(*weight);
  return mx::array(x.shape(), x.dtype(), std::make_shared<RmsNorm>(s, std::move(composition), eps), std::move(inputs));
}

// ---- SwiGLU ---------------------------------------------------------------------------------------------------------
void Swiglu::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  if (out.size() == 0) return;
  const mx::array gate = with_dense_rows(inputs[0], stream()), x = with_dense_rows(inputs[1], stream());
  const SwigluProblem p{static_cast<int64_t>(out.size()), to_dtype(x.dtype()), gate.data<void>(), x.data<void>(),
                        out.data<void>()};
  mx::cpu::get_command_encoder(stream()).dispatch([p] { swiglu(p); });
}

bool fuses_swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice s) {
  return on_cpu(mx::to_stream(s)) && gate.shape() == x.shape() && gate.dtype() == x.dtype() && is_supported(x.dtype());
}

mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream);
  Composition composition = [s](const std::vector<mx::array>& in) -> std::vector<mx::array> {
    return {mx::multiply(mx::multiply(in[0], mx::sigmoid(in[0], s), s), in[1], s)};
  };
  if (!fuses_swiglu(gate, x, s)) return composition({gate, x})[0];
  return mx::array(x.shape(), x.dtype(), std::make_shared<Swiglu>(s, std::move(composition)), {gate, x});
}

// ---- reductions of logits -------------------------------------------------------------------------------------------
void Reduction::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  const mx::array x = with_dense_rows(inputs[0], stream());
  ReductionProblem p;
  p.rows = static_cast<int64_t>(out.size());
  p.D = static_cast<int64_t>(x.size()) / p.rows;
  p.dtype = to_dtype(x.dtype());
  p.x = x.data<void>();
  p.out = out.data<void>();
  mx::cpu::get_command_encoder(stream()).dispatch([p, reduce = arg_max_ ? arg_max : log_sum_exp] { reduce(p); });
}

bool Reduction::is_equivalent(const Primitive& other) const {
  const auto& o = static_cast<const Reduction&>(other);
  return arg_max_ == o.arg_max_ && all_ == o.all_ && keepdims_ == o.keepdims_;
}

std::vector<mx::Shape> Reduction::output_shapes(const std::vector<mx::array>& inputs) {
  mx::Shape shape = inputs[0].shape();
  const auto reduced = all_ ? shape.begin() : shape.end() - 1;
  if (keepdims_) {
    std::fill(reduced, shape.end(), 1);
  } else {
    shape.erase(reduced, shape.end());
  }
  return {shape};
}

namespace {

// Rows are reduced by tasks of their own; short ones MLX reduces as fast.
constexpr int64_t kShortRow = 256;

bool reduces(const mx::array& x, std::optional<int> axis, const mx::Stream& s) {
  const int axes = static_cast<int>(x.ndim());
  if (!on_cpu(s) || axes < 1 || !is_supported(x.dtype())) return false;
  if (axis && *axis != -1 && *axis != axes - 1) return false;
  const int64_t D = axis ? x.shape(-1) : static_cast<int64_t>(x.size());
  return x.size() > 0 && D >= kShortRow && D <= std::numeric_limits<uint32_t>::max();
}

OptionalArray reduction(const mx::array& x, std::optional<int> axis, bool keepdims, bool arg_max, const mx::Stream& s) {
  if (!reduces(x, axis, s)) return std::nullopt;
  Composition composition = [=](const std::vector<mx::array>& in) -> std::vector<mx::array> {
    if (arg_max) return {axis ? mx::argmax(in[0], *axis, keepdims, s) : mx::argmax(in[0], keepdims, s)};
    return {axis ? mx::logsumexp(in[0], *axis, keepdims, s) : mx::logsumexp(in[0], keepdims, s)};
  };
  auto primitive = std::make_shared<Reduction>(s, std::move(composition), arg_max, !axis.has_value(), keepdims);
  mx::Shape shape = primitive->output_shapes({x})[0];
  return mx::array(std::move(shape), arg_max ? mx::uint32 : x.dtype(), std::move(primitive), {x});
}

}  // namespace

OptionalArray try_logsumexp(const mx::array& x, std::optional<int> axis, bool keepdims, mx::StreamOrDevice stream) {
  return reduction(x, axis, keepdims, false, mx::to_stream(stream));
}

OptionalArray try_argmax(const mx::array& x, std::optional<int> axis, bool keepdims, mx::StreamOrDevice stream) {
  return reduction(x, axis, keepdims, true, mx::to_stream(stream));
}

// ---- rotary position encoding ---------------------------------------------------------------------------------------
void Rope::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  if (out.size() == 0) return;
  mx::array x = with_dense_last_axis(inputs[0], stream());
  // [B, ..., T, D] with all axes between taken as one.
  const int axes = static_cast<int>(x.ndim());
  RopeProblem p;
  p.B = x.shape(0);
  p.T = x.shape(-2);
  p.D = x.shape(-1);
  p.H = static_cast<int64_t>(x.size()) / (p.B * p.T * p.D);
  if (axes > 4) x = with_dense_rows(x, stream());
  p.stride[0] = x.strides(0);
  p.stride[1] = axes == 4 ? x.strides(1) : p.T * p.D;
  p.stride[2] = x.strides(-2);
  p.dims = params_.dims;
  p.dtype = to_dtype(x.dtype());
  p.x = x.data<void>();
  p.out = out.data<void>();
  p.traditional = params_.traditional;
  p.scale = params_.scale;
  p.base = params_.base;
  if (inputs.size() > 2) p.periods = with_dense_rows(inputs[2], stream()).data<float>();
  const mx::array offset = with_dense_rows(inputs[1], stream());
  p.offsets = offset.data<int32_t>();
  p.offset_each = offset.size() > 1;
  mx::cpu::get_command_encoder(stream()).dispatch([p] { rope(p); });
}

bool Rope::is_equivalent(const Primitive& other) const { return params_ == static_cast<const Rope&>(other).params_; }

bool fuses_rope(const mx::array& x, int dims, std::optional<float> base, const mx::array& offset,
                const OptionalArray& freqs, mx::StreamOrDevice s) {
  if (!on_cpu(mx::to_stream(s)) || x.ndim() < 3 || !is_supported(x.dtype())) return false;
  if (dims < 2 || dims % 2 != 0 || dims > x.shape(-1) || base.has_value() == freqs.has_value()) return false;
  if (freqs && (freqs->ndim() != 1 || freqs->shape(0) != dims / 2 || freqs->dtype() != mx::float32)) return false;
  if (!mx::issubdtype(offset.dtype(), mx::integer)) return false;
  return offset.ndim() == 0 || (offset.ndim() == 1 && (offset.shape(0) == 1 || offset.shape(0) == x.shape(0)));
}

mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               const mx::array& offset, const OptionalArray& freqs, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream);
  if (!fuses_rope(x, dims, base, offset, freqs, s))
    return mx::fast::rope(x, dims, traditional, base, scale, offset, freqs, s);
  Composition composition = [=](const std::vector<mx::array>& in) -> std::vector<mx::array> {
    return {mx::fast::rope(in[0], dims, traditional, base, scale, in[1],
                           in.size() > 2 ? OptionalArray(in[2]) : std::nullopt, s)};
  };
  std::vector<mx::array> inputs = {x, offset.dtype() == mx::int32 ? offset : mx::astype(offset, mx::int32, s)};
  if (freqs) inputs.push_back(*freqs);
  const RopeParams params{dims, traditional, base.value_or(0.f), scale};
  return mx::array(x.shape(), x.dtype(), std::make_shared<Rope>(s, std::move(composition), params), std::move(inputs));
}

}  // namespace mfa
