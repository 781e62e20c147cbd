// route.cpp: the public functions of attention: describe the call, choose a route, build its node or graph.
#include "mlx/route.h"

#include <algorithm>
#include <atomic>
#include <numbers>
#include <stdexcept>

#include "attention/plan.h"
#include "common/check.h"
#include "common/thread_pool.h"
#include "mfa/together.h"
#include "mlx/attention.h"
#include "mlx/attention_group.h"
#include "mlx/composed.h"
#include "mlx/fast.h"
#include "mlx/gpu.h"
#include "mlx/ops.h"

namespace mfa {
namespace {

std::atomic<uint64_t> calls[4];  // by Route

thread_local RouteRecorder* recorder = nullptr;  // the innermost of this thread

constexpr const char* kPlainOnly =
    "it takes only batched, dense arrays, without rotary tables, block lists, neighbourhoods or a top-k selection";

// From the kernels' lse / ln 2.
mx::array natural_lse(const mx::array& base2, mx::Stream s) {
  return mx::multiply(base2, mx::array(std::numbers::ln2_v<float>), s);
}

// o alone, by MLX's op. sdpa_refusal() has found nothing that it would compute differently.
mx::array mlx_sdpa(const Request& r) {
  const InputLayout at(r.params);
  std::optional<mx::array> bias, sinks;
  if (r.params.has_bias) bias = r.inputs[at.bias];
  if (r.params.has_sinks) sinks = r.inputs[at.sinks];
  const std::string mode = r.params.causal ? "causal" : "";
  return mx::fast::scaled_dot_product_attention(r.inputs[0], r.inputs[1], r.inputs[2], r.params.scale, mode, bias,
                                                sinks, false, r.stream);
}

}  // namespace

const char* name_of(Route route) {
  switch (route) {
    case Route::mfa_cpu:
      return "mfa_cpu";
    case Route::mfa_cuda:
      return "mfa_cuda";
    case Route::mlx_sdpa:
      return "mlx_sdpa";
    case Route::composed:
      return "composed";
  }
  return "unknown";
}

std::optional<std::string> cpu_refusal(const Request& r) {
  if (r.stream.device != mx::Device::cpu) return "the stream is on a GPU";
  std::string reason;
  const auto traits = cpu::kernel_traits(&reason);
  if (!traits) return reason;
  return unsupported(describe(r.params, r.inputs), *traits);
}

std::optional<std::string> cuda_refusal(const Request& r) {
  if (r.stream.device != mx::Device::gpu) return "the stream is on the CPU";
  std::string reason;
  GpuAttention* gpu = gpu_attention(&reason);
  if (!gpu) return reason;
  if (!r.params.plain()) return kPlainOnly;
  if (r.params.returns_probs) return "the CUDA kernels do not store the probabilities";
  if (r.params.has_dropout_keys) return "the CUDA kernels count the keys of dropout from 0";
  return gpu->refusal(describe(r.params, r.inputs));
}

std::optional<std::string> sdpa_refusal(const Request& r, const WantedOutputs& wanted) {
  const AttentionParams& p = r.params;
  const int B = r.inputs[0].shape(0), Nq = r.inputs[0].shape(2), Nk = r.inputs[1].shape(2);
  if (wanted.lse) return "MLX's op does not return the log-sum-exp";
  if (wanted.probs) return "MLX's op does not return the probabilities";
  if (p.softcap > 0.f) return "MLX's op has no softcap";
  if (p.has_alibi) return "MLX's op has no ALiBi";
  if (p.window_left >= 0 || p.window_right >= 0) return "MLX's op has no window";
  if (p.has_lengths) return "MLX's op has no lengths for each batch entry";
  if (p.has_seed) return "MLX's op has no dropout";
  if (!p.plain()) return kPlainOnly;
  if (p.has_mask || p.has_bias) return "MLX's op does not give 0 for a row that a mask or bias hides entirely";
  if (p.has_sinks && r.inputs[0].dtype() != mx::float32) return "MLX's op rounds the sinks to the dtype of q";
  if (p.causal && Nq > Nk) return "MLX's op aligns the causal diagonal otherwise when there are more queries than keys";
  if (B == 0 || Nq == 0 || Nk == 0) return "MLX's op takes no empty arrays";
  return std::nullopt;
}

Route choose(const Request& request, Backend backend, const WantedOutputs& wanted, std::vector<Refusal>* refusals) {
  auto accepts = [&](Route route, std::optional<std::string> reason) {
    if (reason && refusals) refusals->push_back({name_of(route), *reason});
    return !reason;
  };
  if (backend == Backend::automatic || backend == Backend::mfa) {
    const bool on_gpu = request.stream.device == mx::Device::gpu;
    const Route kernels = on_gpu ? Route::mfa_cuda : Route::mfa_cpu;
    const auto reason = on_gpu ? cuda_refusal(request) : cpu_refusal(request);
    if (accepts(kernels, reason)) return kernels;
    if (backend == Backend::mfa) {
      throw std::runtime_error(
          concat("[", request.params.function, "] backend=\"mfa\" cannot run this problem: ", *reason));
    }
    if (!request.params.composable()) {
      throw std::runtime_error(concat("[", request.params.function, "] no kernel can run this problem: ", *reason));
    }
  }
  if (!request.params.composable()) {
    throw std::runtime_error(concat("[", request.params.function,
                                    "] backend must be \"auto\" or \"mfa\": MLX's operations cannot run this problem"));
  }
  if (backend != Backend::composed && accepts(Route::mlx_sdpa, sdpa_refusal(request, wanted))) return Route::mlx_sdpa;
  return Route::composed;
}

Backend parse_backend(std::string_view name) {
  if (name == "auto") return Backend::automatic;
  if (name == "mfa") return Backend::mfa;
  if (name == "sdpa") return Backend::sdpa;
  if (name == "composed") return Backend::composed;
  check(name != "sage", "flash_attention",
        "backend must be \"auto\", \"mfa\", \"sdpa\" or \"composed\", as int8 attention is not part of this build; got "
        "\"sage\"");
  check(false, "flash_attention", "backend must be \"auto\", \"mfa\", \"sdpa\" or \"composed\"; got \"", name, "\"");
  return Backend::automatic;
}

namespace {

// What `route` does with the request.
Explanation explanation(const Request& request, Route route, std::vector<Refusal> refusals) {
  Explanation e;
  e.function = request.params.function;
  e.refusals = std::move(refusals);
  e.route = name_of(route);
  switch (route) {
    case Route::mfa_cpu: {
      const CpuKernelTraits traits = *cpu::kernel_traits();
      const ForwardPlan plan =
          plan_forward(describe(request.params, request.inputs), traits, thread_count(), request.params.returns_probs);
      e.kernel = name_of(plan.kernel);
      e.isa = traits.isa;
      e.row_tile = plan.row_tile;
      e.key_block = kKeyBlock;
      e.splits = plan.key_splits;
      e.tasks = plan.tasks;
      e.threads = thread_count();
      e.native_bf16 = plan.native_bf16;
      break;
    }
    case Route::mfa_cuda: {
      const GpuKernel kernel = gpu_attention()->kernel(request.params, describe(request.params, request.inputs));
      e.kernel = kernel.name;
      e.row_tile = kernel.row_tile;
      e.key_block = kernel.key_tile;
      e.splits = kernel.splits;
      e.tasks = kernel.blocks;
      break;
    }
    case Route::mlx_sdpa:
      e.kernel = "mlx.fast.scaled_dot_product_attention";
      break;
    case Route::composed:
      e.kernel = "graph of MLX operations, storing the scores";
      break;
  }
  return e;
}

}  // namespace

namespace {

// Chooses the route of a call that will be computed, for the counters and those who listen.
Route chosen(const Request& request, Backend backend, const WantedOutputs& wanted) {
  std::vector<Refusal> refusals;
  const Route route = choose(request, backend, wanted, recorder ? &refusals : nullptr);
  if (recorder) recorder->add(explanation(request, route, std::move(refusals)));
  calls[static_cast<int>(route)].fetch_add(1, std::memory_order_relaxed);
  return route;
}

std::vector<mx::array> launch_on(Route route, Request request, const WantedOutputs& wanted) {
  switch (route) {
    case Route::mfa_cpu:
    case Route::mfa_cuda: {
      // Gradients want the lse; an output that nobody wants costs the host as much as one that somebody does.
      request.params.returns_lse = wanted.lse || wanted.probs ||
                                   std::ranges::any_of(request.inputs, [](const auto& x) { return x.is_tracer(); });
      auto outputs = Attention::make(request.stream, request.params, std::move(request.inputs));
      if (wanted.lse) outputs[1] = natural_lse(outputs[1], request.stream);
      return outputs;
    }
    case Route::mlx_sdpa:
      return {mlx_sdpa(request)};
    case Route::composed:
      return composed_attention(request.params, request.inputs, request.stream);
  }
  throw std::logic_error("[flash_attention] unknown route");
}

}  // namespace

std::vector<mx::array> launch(Request request, Backend backend, const WantedOutputs& wanted) {
  const Route route = chosen(request, backend, wanted);
  return launch_on(route, std::move(request), wanted);
}

namespace {

// The outputs of each call.
std::vector<std::vector<mx::array>> launch_together(const std::vector<AttentionCall>& given,
                                                    mx::StreamOrDevice stream_or_device, const WantedOutputs& wanted,
                                                    const char* function) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  AttentionSources sources;
  sources.function = function;
  std::vector<Request> requests;
  for (const AttentionCall& c : given) {
    check(!c.options.return_probs, function, "return_probs must be false");
    requests.push_back(make_request(c.q, c.k, c.v, c.options, false, s, sources));
  }
  std::vector<Route> routes;
  for (size_t i = 0; i < given.size(); ++i) routes.push_back(chosen(requests[i], given[i].options.backend, wanted));
  const bool one_node =
      given.size() > 1 && std::ranges::all_of(routes, [](Route route) { return route == Route::mfa_cpu; });
  if (one_node) {
    auto outputs = AttentionGroup::make(s, requests);
    for (auto& o : outputs) o[1] = natural_lse(o[1], s);
    return outputs;
  }
  std::vector<std::vector<mx::array>> outputs;
  for (size_t i = 0; i < given.size(); ++i) outputs.push_back(launch_on(routes[i], std::move(requests[i]), wanted));
  return outputs;
}

}  // namespace

std::vector<mx::array> attention_together(const std::vector<AttentionCall>& given, mx::StreamOrDevice s,
                                          const char* function) {
  std::vector<mx::array> results;
  for (const auto& outputs : launch_together(given, s, {}, function)) results.push_back(outputs[0]);
  return results;
}

std::vector<AttentionResult> attention_together_with_lse(const std::vector<AttentionCall>& given, mx::StreamOrDevice s,
                                                         const char* function) {
  std::vector<AttentionResult> results;
  for (const auto& outputs : launch_together(given, s, {.lse = true}, function))
    results.push_back({outputs[0], outputs[1], std::nullopt});
  return results;
}

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                    mx::StreamOrDevice s) {
  return launch(make_request(q, k, v, options, false, s), options.backend, {})[0];
}

AttentionResult attention_with_lse(const mx::array& q, const mx::array& k, const mx::array& v,
                                   const AttentionOptions& options, mx::StreamOrDevice s) {
  const WantedOutputs wanted{.lse = true, .probs = options.return_probs};
  auto outputs = launch(make_request(q, k, v, options, options.return_probs, s), options.backend, wanted);
  AttentionResult result{outputs[0], outputs[1], std::nullopt};
  if (options.return_probs) result.probs = outputs[2];
  return result;
}

Explanation explain(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                    mx::StreamOrDevice s, bool returns_lse) {
  const WantedOutputs wanted{.lse = returns_lse, .probs = options.return_probs};
  const Request request = make_request(q, k, v, options, options.return_probs, s);
  std::vector<Refusal> refusals;
  const Route route = choose(request, options.backend, wanted, &refusals);
  return explanation(request, route, std::move(refusals));
}

RouteRecorder::RouteRecorder() : outer_(recorder) { recorder = this; }

RouteRecorder::~RouteRecorder() { recorder = outer_; }

void RouteRecorder::add(const Explanation& call) {
  calls_.push_back(call);
  if (outer_) outer_->add(call);
}

Counters counters() {
  auto read = [](Route route) { return calls[static_cast<int>(route)].load(std::memory_order_relaxed); };
  return {read(Route::mfa_cpu), read(Route::mfa_cuda), read(Route::mlx_sdpa), read(Route::composed)};
}

void reset_counters() {
  for (auto& count : calls) count.store(0, std::memory_order_relaxed);
}

}  // namespace mfa
