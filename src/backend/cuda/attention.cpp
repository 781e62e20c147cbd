// attention.cpp: attention on MLX's CUDA streams: arrays in, parameters out, launches through MLX's encoder, so that
// they become nodes of the graphs that MLX builds.
#include <cuda.h>

#include <atomic>
#include <cstdlib>
#include <numbers>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "backend/cuda/module.h"
#include "backend/cuda/params.h"
#include "backend/cuda/plan.h"
#include "common/check.h"
#include "common/philox.h"
#include "mlx/backend/cuda/device.h"
#include "mlx/gpu.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace mfa::cuda {
namespace {

using mx::cu::CommandEncoder;

// ---- arrays ---------------------------------------------------------------------------------------------------------

// Gives `out`, of which `primitive` is a node, memory of MLX's device pool. The pool's allocator is not exported, but
// Exp, given an empty array that is not contiguous, allocates its output there and returns before it launches anything.
void allocate(mx::array& out, mx::Stream stream) {
  static const mx::array empty = [] {
    mx::array x({0}, mx::float32, nullptr, {});
    mx::array::Flags flags{};
    x.set_data(mx::allocator::malloc(0), 0, {1}, flags);
    return x;
  }();
  if (out.size() == 0) {
    out.set_data(mx::allocator::malloc(0));
    return;
  }
  mx::Exp(stream).eval_gpu({empty}, out);
  if (!out.data_shared_ptr() || !out.buffer().ptr())
    throw std::runtime_error("[mfa::cuda] MLX did not allocate an output as MLX " MFA_MLX_VERSION
                             " does, for which this library was built");
}

mx::array scratch(mx::Shape shape, mx::Dtype dtype, mx::Stream stream, CommandEncoder& encoder) {
  mx::array x(std::move(shape), dtype, std::make_shared<mx::Exp>(stream), {});
  allocate(x, stream);
  encoder.add_temporary(x);
  encoder.set_output_array(x);
  return x;
}

template <typename T>
T* pointer(const mx::array& x) {
  return x.size() == 0 ? nullptr : const_cast<T*>(mx::gpu_ptr<T>(const_cast<mx::array&>(x)));
}

// MLX's own copy as a part of this node.
mx::array dense_copy(const mx::array& x, mx::Stream stream, CommandEncoder& encoder) {
  std::vector<mx::array> out = {mx::contiguous(x, false, stream)};
  out[0].primitive().eval_gpu({x}, out);
  out[0].detach();
  encoder.add_temporary(out[0]);
  return out[0];
}

bool repeats(const mx::array& x) {
  for (int i = 0; i < static_cast<int>(x.ndim()); ++i)
    if (x.shape(i) > 1 && x.strides(i) == 0) return true;
  return false;
}

// A call in the making: the encoder and what its launches read.
struct Call {
  mx::Stream stream;
  CommandEncoder& encoder;

  mx::array with_dense_last_axis(const mx::array& x) {
    return use(x.shape(-1) <= 1 || x.strides(-1) == 1 || x.size() == 0 ? x : dense_copy(x, stream, encoder));
  }
  mx::array with_dense_rows(const mx::array& x) {
    return use(x.flags().row_contiguous || x.size() == 0 ? x : dense_copy(x, stream, encoder));
  }
  mx::array use(const mx::array& x) {
    if (x.size() > 0) encoder.set_input_array(x);
    return x;
  }
  Tensor tensor(const mx::array& given) {
    const mx::array x = with_dense_last_axis(given);
    return {pointer<void>(x), {x.strides(0), x.strides(1), x.strides(2)}};
  }
  template <typename T>
  const T* dense(const mx::array& x) {
    return pointer<T>(with_dense_rows(x));
  }
  MutableTensor output(mx::array& x) {
    encoder.set_output_array(x);
    return {pointer<void>(x), {x.strides(0), x.strides(1), x.strides(2)}};
  }
  template <typename... Params>
  void launch(const Launch& launch, const Params&... params) {
    if (launch.grid[0] == 0) return;
    const CUfunction function = function_of(launch, encoder.device().cuda_device());
    encoder.add_kernel_node_ex(function, dim3(launch.grid[0], launch.grid[1], launch.grid[2]), dim3(launch.threads),
                               dim3(1, 1, 1), launch.shared_bytes, const_cast<Params&>(params)...);
  }
};

// The stride of an axis as a broadcast term of the scores sees it: an axis of extent 1 is not stepped along.
void set_strides(int64_t (&stride)[4], const mx::array& x) {
  for (int i = 0; i < 4; ++i) stride[i] = x.shape(i) == 1 ? 0 : x.strides(i);
}

Problem make_problem(const AttentionParams& params, const AttentionProblem& p, const std::vector<mx::array>& inputs,
                     bool dense_bias, Call& call) {
  constexpr float kLog2e = std::numbers::log2e_v<float>;
  const InputLayout at(params);
  Problem result{};
  result.B = p.B, result.Hq = p.Hq, result.Hkv = p.Hkv, result.Nq = p.Nq, result.Nk = p.Nk;
  result.D = p.D, result.Dv = p.Dv, result.G = p.Hq / p.Hkv;
  result.q = call.tensor(inputs[0]);
  result.k = call.tensor(inputs[1]);
  result.v = call.tensor(inputs[2]);
  result.scale = p.scale;
  result.scale_log2 = p.scale * kLog2e;
  result.softcap = p.softcap;
  result.softcap_log2 = p.softcap * kLog2e;
  result.scale_over_softcap = p.softcap > 0.f ? p.scale / p.softcap : 0.f;
  set_windows(result, p.causal, p.window_left, p.window_right);
  if (params.has_lengths) result.kv_lengths = call.dense<int32_t>(inputs[at.kv_lengths]);
  if (params.has_alibi) result.alibi_slopes = call.dense<float>(inputs[at.alibi]);
  if (params.has_sinks) result.sinks = call.dense<float>(inputs[at.sinks]);
  if (params.has_bias) {
    const mx::array& given = inputs[at.bias];
    const mx::array bias = dense_bias && repeats(given) ? call.with_dense_rows(given) : call.use(given);
    result.bias.data = pointer<void>(bias);
    result.bias.dtype = element_of(to_dtype(bias.dtype()));
    set_strides(result.bias.stride, bias);
  }
  if (params.has_mask) {
    result.mask.data = pointer<uint8_t>(call.use(inputs[at.mask]));
    set_strides(result.mask.stride, inputs[at.mask]);
  }
  if (params.has_seed) {
    result.dropout_seed = call.dense<uint32_t>(inputs[at.seed]);
    result.dropout_threshold = dropout_threshold(p.dropout_p);
    result.dropout_scale = p.dropout_p < 1.f ? 1.f / (1.f - p.dropout_p) : 0.f;
  }
  return result;
}

CallTraits traits_of(const AttentionParams& params) {
  CallTraits traits;
  traits.alibi = params.has_alibi;
  traits.bias = params.has_bias;
  traits.mask = params.has_mask;
  traits.lengths = params.has_lengths;
  traits.dropout = params.has_seed;
  return traits;
}

// ---- Hopper's tensor copies -----------------------------------------------------------------------------------------

// [B, H, N, D] as tensor maps take it: the strides of axes that are not stepped along do not count.
bool is_mappable(const Tensor& x, int B, int H, int N) {
  const int extent[3] = {B, H, N};
  bool fits = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int a = 0; a < 3; ++a) fits = fits && (extent[a] == 1 || (x.stride[a] > 0 && x.stride[a] % 8 == 0));
  return fits;
}

bool has_words(const Mask& mask, int Nk) {
  return reinterpret_cast<uintptr_t>(mask.data) % 16 == 0 && mask.stride[3] == 1 && Nk % 16 == 0 &&
         mask.stride[0] % 16 == 0 && mask.stride[1] % 16 == 0 && mask.stride[2] % 16 == 0;
}

// Boxes of 64 channels and `rows` rows, zeros outside.
CUtensorMap tensor_map(const Tensor& x, Element dtype, int B, int H, int N, int D, int rows) {
  constexpr int kSize = 2;
  const cuuint64_t extents[4] = {cuuint64_t(D), cuuint64_t(N), cuuint64_t(H), cuuint64_t(B)};
  const int extent[3] = {N, H, B};
  const int64_t stride[3] = {x.stride[2], x.stride[1], x.stride[0]};
  cuuint64_t bytes[3];
  for (int a = 0; a < 3; ++a) bytes[a] = cuuint64_t(extent[a] == 1 ? D : stride[a]) * kSize;
  const cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  check_driver(cuTensorMapEncodeTiled(
                   &map, dtype == Element::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                   const_cast<void*>(x.data), extents, bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
               "encoding a tensor map");
  return map;
}

bool is_mapped(const Problem& p) {
  return is_mappable(p.q, p.B, p.Hq, p.Nq) && is_mappable(p.k, p.B, p.Hkv, p.Nk) && is_mappable(p.v, p.B, p.Hkv, p.Nk);
}

// Launches in flight at the same time must have different counters of tiles.
HopperSchedule with_slot(HopperSchedule schedule) {
  static std::atomic<uint32_t> next{0};
  schedule.slot = static_cast<int32_t>(next.fetch_add(1, std::memory_order_relaxed) % HopperSchedule::slots);
  return schedule;
}

// The maps of q, k and v for a launch, in the order of the kernels' parameters.
struct Maps {
  CUtensorMap q, k, v;
  Maps(const Problem& p, const Launch& launch)
      : q(tensor_map(p.q, launch.dtype, p.B, p.Hq, p.Nq, p.D, launch.query_box)),
        k(tensor_map(p.k, launch.dtype, p.B, p.Hkv, p.Nk, p.D, launch.key_box)),
        v(tensor_map(p.v, launch.dtype, p.B, p.Hkv, p.Nk, p.Dv, launch.key_box)) {}
};

// Float32 inputs as parts, in scratch memory: what splits them is launched, and the next launch waits for it.
struct Parts {
  SplitOperands operands;
  CUtensorMap maps[3];

  Parts(Call& call, const ForwardPlan& plan, const ForwardParams& f) {
    const Problem& p = f.p;
    const int heads[] = {p.Hq, p.Hkv, p.Hkv}, rows[] = {p.Nq, p.Nk, p.Nk};
    const int box[] = {plan.attention.query_box, plan.attention.key_box, plan.attention.key_box};
    std::vector<mx::array> written;
    const auto take = [&](mx::Shape shape, mx::Dtype dtype) {
      return written.emplace_back(scratch(std::move(shape), dtype, call.stream, call.encoder));
    };
    for (int i = 0; i < 3; ++i) {
      const int entries = hopper::split_parts * p.B, tiles = (rows[i] + hopper::split_rows - 1) / hopper::split_rows;
      const mx::array parts = take({entries, heads[i], rows[i], plan.split_columns}, mx::float16);
      operands.parts[i] = pointer<void>(parts);
      operands.tiles[i] = pointer<SplitTileFacts>(take({p.B, heads[i], tiles, int{sizeof(SplitTileFacts)}}, mx::uint8));
      maps[i] = tensor_map({operands.parts[i], {parts.strides(0), parts.strides(1), parts.strides(2)}}, Element::f16,
                           entries, heads[i], rows[i], plan.split_columns, box[i]);
    }
    call.launch(plan.split, f, operands);
    for (const auto& x : written) call.use(x);
  }
};

// Launches what finds the tiles that a mask shows; the next launch waits for it.
void find_shown_tiles(Call& call, const ForwardPlan& plan, ForwardParams& f) {
  const auto words = scratch({plan.shown_words()}, mx::uint32, call.stream, call.encoder);
  const auto* grid = plan.mask_tiles.grid;
  const int row = static_cast<int>(grid[0]), plane = static_cast<int>(grid[0] * grid[1]);
  const bool per_batch = f.p.mask.stride[0] != 0, per_head = f.p.mask.stride[1] != 0;
  f.shown = {pointer<uint32_t>(words),
             {per_batch ? plane * (per_head ? f.p.Hq : 1) : 0, per_head ? plane : 0, f.p.mask.stride[2] != 0 ? row : 0},
             plan.key_tile};
  call.launch(plan.mask_tiles, f);
  call.use(words);
}

void launch_forward(Call& call, const Launch& launch, const ForwardParams& f) {
  if (!is_hopper(launch.kernel)) return call.launch(launch, f);
  const Maps maps(f.p, launch);
  call.launch(launch, f, with_slot(launch.schedule), maps.q, maps.k, maps.v);
}

void launch_backward(Call& call, const Launch& launch, const BackwardParams& f) {
  if (launch.query_box == 0) return call.launch(launch, f);
  const Maps maps(f.p, launch);
  const CUtensorMap d_o = tensor_map(f.d_o, launch.dtype, f.p.B, f.p.Hq, f.p.Nq, f.p.Dv, launch.query_box);
  call.launch(launch, f, with_slot(launch.schedule), maps.q, maps.k, maps.v, d_o);
}

// ---- the device -----------------------------------------------------------------------------------------------------

DeviceTraits read_traits(int ordinal) {
  auto attribute = [&](CUdevice_attribute name) {
    CUdevice device;
    int value = 0;
    check_driver(cuDeviceGet(&device, ordinal), "finding the CUDA device");
    check_driver(cuDeviceGetAttribute(&value, name, device), "reading an attribute of the CUDA device");
    return value;
  };
  const char* invariant = std::getenv("MFA_BATCH_INVARIANT");
  return {10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
              attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
          attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
          attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
          invariant && std::string_view(invariant) == "1"};
}

class CudaAttention final : public GpuAttention {
 public:
  explicit CudaAttention(const DeviceTraits& traits) : traits_(traits) {}

  std::optional<std::string> refusal(const AttentionProblem& p) override { return unsupported(p, traits_); }

  GpuKernel kernel(const AttentionParams& params, const AttentionProblem& p) override {
    const ForwardPlan plan = plan_forward(p, traits_of(params), traits_);
    return {name_of(plan.attention), plan.row_tile, plan.key_tile, plan.splits,
            int64_t{plan.attention.grid[0]} * plan.splits};
  }

  void forward(const AttentionParams& params, const AttentionProblem& p, const std::vector<mx::array>& inputs,
               std::vector<mx::array>& outputs, mx::Stream stream) override {
    for (auto& out : outputs) allocate(out, stream);
    if (outputs[0].size() == 0) return;
    Call call{stream, mx::cu::get_command_encoder(stream)};
    const auto write_outputs = [&](ForwardParams& f) {
      f.o = call.output(outputs[0]);
      f.lse = params.returns_lse ? static_cast<float*>(call.output(outputs[1]).data) : nullptr;
    };
    ForwardParams f{};
    f.p = make_problem(params, p, inputs, false, call);
    CallTraits traits = traits_of(params);
    traits.mapped = is_mapped(f.p);
    traits.mask_in_words = has_words(f.p.mask, p.Nk);
    for (int a = 0; a < 3; ++a) traits.mask_varies[a] = f.p.mask.stride[a] != 0;
    const ForwardPlan plan = plan_forward(p, traits, traits_);
    f.lse_base2 = true;
    f.splits = plan.splits;
    f.split_keys = plan.split_keys;
    if (plan.splits == 1) {
      std::optional<Parts> parts;
      if (plan.split.threads > 0) parts.emplace(call, plan, f);
      if (plan.mask_tiles.threads > 0) find_shown_tiles(call, plan, f);
      write_outputs(f);
      if (parts)
        call.launch(plan.attention, f, parts->operands, with_slot(plan.attention.schedule), parts->maps[0],
                    parts->maps[1], parts->maps[2]);
      else
        launch_forward(call, plan.attention, f);
      return;
    }
    const auto o_part = scratch({plan.splits, p.B * p.Hq, p.Nq, p.Dv}, mx::float32, stream, call.encoder);
    const auto lse_part = scratch({plan.splits, p.B * p.Hq, p.Nq}, mx::float32, stream, call.encoder);
    f.o_part = pointer<float>(o_part);
    f.lse_part = pointer<float>(lse_part);
    call.launch(plan.attention, f);
    call.use(o_part);
    call.use(lse_part);
    write_outputs(f);
    call.launch(plan.merge, f);
  }

  void backward(const AttentionParams& params, const WantedGradients& wanted, const AttentionProblem& p,
                const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream stream) override {
    mx::array* of[kGradients] = {};
    for (int g = 0, next = 0; g < kGradients; ++g)
      if (wanted[g]) of[g] = &outputs[next++];
    auto output = [&](Gradient g) { return of[static_cast<int>(g)]; };
    for (auto& out : outputs) allocate(out, stream);
    Call call{stream, mx::cu::get_command_encoder(stream)};
    const int first = InputLayout(params).count;

    BackwardParams f{};
    f.p = make_problem(params, p, inputs, output(Gradient::bias) != nullptr, call);
    f.o = call.tensor(inputs[first]);
    f.lse = call.dense<float>(inputs[first + 1]);
    f.d_o = call.tensor(inputs[first + 2]);
    f.dlse = call.dense<float>(inputs[first + 3]);
    f.lse_base2 = true;
    BiasAxes axes;
    if (mx::array* dbias = output(Gradient::bias)) {
      set_strides(f.dbias_stride, *dbias);
      for (int a = 0; a < 4; ++a) axes.summed[a] = f.dbias_stride[a] == 0;
    }
    CallTraits traits = traits_of(params);
    traits.mapped = is_mapped(f.p) && is_mappable(f.o, p.B, p.Hq, p.Nq) && is_mappable(f.d_o, p.B, p.Hq, p.Nq);
    const BackwardPlan plan = plan_backward(p, traits, axes, traits_);
    f.Nq_padded = plan.Nq_padded;

    if (plan.lse.threads > 0) {
      // Attention without values.
      const auto lse = scratch({p.B, p.Hq, p.Nq}, mx::float32, stream, call.encoder);
      ForwardParams scores{};
      scores.p = f.p;
      scores.p.Dv = 0;
      scores.p.dropout_seed = nullptr;
      scores.splits = 1;
      scores.lse = pointer<float>(lse);
      scores.lse_base2 = true;
      call.launch(plan.lse, scores);
      f.lse = pointer<float>(call.use(lse));
    }
    const auto delta = scratch({p.B * p.Hq, plan.Nq_padded}, mx::float32, stream, call.encoder);
    const auto lse2 = scratch({p.B * p.Hq, plan.Nq_padded}, mx::float32, stream, call.encoder);
    f.delta = pointer<float>(delta);
    f.lse2 = pointer<float>(lse2);
    const auto has = [&](Gradient g) { return output(g) && output(g)->size() > 0; };
    const bool fused = plan.fused.threads > 0 && has(Gradient::q) && has(Gradient::k) && has(Gradient::v);
    std::optional<mx::array> sums, turns;
    if (fused) {
      const int tiles = hopper::fused_query_tiles(p.Nq);
      sums = scratch({p.B * p.Hq, tiles * hopper::fused_tile, plan.fused_columns}, mx::float32, stream, call.encoder);
      turns = scratch({p.B * p.Hq * tiles + 1}, mx::int32, stream, call.encoder);
      f.dq_sums = pointer<float>(*sums);
      f.dq_turns = pointer<int32_t>(*turns);
    }
    call.launch(plan.rows, f);

    // The launches below read the inputs and `delta` and `lse2`, and write nothing in common.
    auto next = [&] {
      call.use(delta);
      call.use(lse2);
    };
    next();
    if (has(Gradient::q) && !fused) {
      f.dq = call.output(*output(Gradient::q));
      launch_backward(call, plan.queries, f);
      next();
    }
    if (has(Gradient::k) || has(Gradient::v)) {
      if (has(Gradient::k)) f.dk = call.output(*output(Gradient::k));
      if (has(Gradient::v)) f.dv = call.output(*output(Gradient::v));
      if (fused) {
        call.use(*turns);
        call.encoder.set_output_array(*sums);
        f.dq = call.output(*output(Gradient::q));
      }
      launch_backward(call, fused ? plan.fused : plan.keys, f);
      next();
    }
    if (mx::array* dbias = output(Gradient::bias); dbias && dbias->size() > 0) {
      call.encoder.set_output_array(*dbias);
      f.dbias = pointer<float>(*dbias);
      call.launch(plan.bias, f);
      next();
    }
    mx::array *dsinks = output(Gradient::sinks), *dalibi = output(Gradient::alibi);
    if (dsinks || dalibi) {
      if (dalibi) {
        const auto parts = scratch({p.B * p.Hq, p.Nq}, mx::float32, stream, call.encoder);
        f.dalibi_part = pointer<float>(parts);
        call.launch(plan.slopes, f);
        next();
        call.use(parts);
        call.encoder.set_output_array(*dalibi);
        f.dalibi_slopes = pointer<float>(*dalibi);
      }
      if (dsinks) {
        call.encoder.set_output_array(*dsinks);
        f.dsinks = pointer<float>(*dsinks);
      }
      call.launch(plan.heads, f);
    }
  }

 private:
  DeviceTraits traits_;
};

}  // namespace
}  // namespace mfa::cuda

// The entry of this library. nullptr, and why, if its kernels cannot run here.
extern "C" [[gnu::visibility("default")]] mfa::GpuAttention* mfa_cuda_attention(std::string* reason) {
  try {
    static mfa::cuda::CudaAttention attention(
        mfa::cuda::read_traits(mlx::core::cu::device(mlx::core::Device(mlx::core::Device::gpu)).cuda_device()));
    return &attention;
  } catch (const std::exception& error) {
    *reason = error.what();
    return nullptr;
  }
}
