// plan_hopper.h: which problems the Hopper kernels (device/hopper_*.cuh) take, and their launches.
#pragma once

#include "backend/cuda/plan.h"

namespace mfa::cuda {

// What the wider of D and Dv is padded to, as the kernels are named; an x is before the columns of values, where they
// are fewer.
inline constexpr const char* kHopperColumns[] = {"64", "96", "128", "192", "256", "512", "576x512", "192x128"};
inline constexpr int kHopperSizes = 8, kWide = 5, kNarrowValues = 7;  // wide: "512", "576x512"
constexpr bool is_wide(int head_dim) { return head_dim >= kWide && head_dim < kNarrowValues; }

// Whether the forward kernels for 16-bit inputs take the problem.
bool hopper_takes(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device);

// Whether the forward kernels for float32 do.
bool hopper_splits(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device);

// Whether the backward kernels do.
bool hopper_takes_backward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device);

// Whether more than visibility by position and sinks changes the scores or weights.
bool is_modified(const AttentionProblem& p, const CallTraits& call);

void plan_hopper_forward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device,
                         ForwardPlan& plan);

void plan_hopper_split(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device,
                       ForwardPlan& plan);

// Replaces rows, queries and keys of `plan`.
void plan_hopper_backward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device,
                          BackwardPlan& plan);

}  // namespace mfa::cuda
