// plan_hopper.h: which problems the Hopper kernels (device/hopper_*.cuh) take, and their launches.
#pragma once

#include "backend/cuda/plan.h"

namespace mfa::cuda {

inline constexpr int kHopperColumns[] = {64, 96, 128, 192, 256};  // D and Dv, padded

// Whether the forward kernels take the problem.
bool hopper_takes(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device);

// Whether more than visibility by position and sinks changes the scores or weights.
bool is_modified(const AttentionProblem& p, const CallTraits& call);

Launch plan_hopper_forward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device, int& row_tile,
                           int& key_tile);

// Replaces rows, queries and keys of `plan`. For problems that are not modified.
void plan_hopper_backward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device,
                          BackwardPlan& plan);

}  // namespace mfa::cuda
