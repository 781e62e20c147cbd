// route.h: which implementation computes a call.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "backend/cpu/attention.h"
#include "mfa/diagnostics.h"
#include "mlx/request.h"

namespace mfa {

enum class Route { mfa_cpu, mfa_cuda, mlx_sdpa, composed };
const char* name_of(Route route);

// What the caller uses of the result.
struct WantedOutputs {
  bool lse = false;
  bool probs = false;
};

// Why a route cannot compute the call, or nullopt.
std::optional<std::string> cpu_refusal(const Request& request);
std::optional<std::string> cuda_refusal(const Request& request);
std::optional<std::string> sdpa_refusal(const Request& request, const WantedOutputs& wanted);

// The first route of `backend`'s order that does not refuse. Appends the refusals before it to `refusals` if that is
// given. Throws std::runtime_error, with the reason, if Backend::mfa refuses.
Route choose(const Request& request, Backend backend, const WantedOutputs& wanted,
             std::vector<Refusal>* refusals = nullptr);

// Builds what computes the call on the route that choose() gives: o, the natural lse if that is wanted (else what the
// route has of it), and probabilities if the request has them.
std::vector<mx::array> launch(Request request, Backend backend, const WantedOutputs& wanted);

}  // namespace mfa
