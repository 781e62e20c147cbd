// cpu_limits.h: how many processors this process may use: its affinity mask and its control groups' CPU quota.
#pragma once

#include <optional>
#include <string>

namespace mfa {

// Processors that the affinity mask and the quota leave, at least 1. Read anew at each call.
int usable_cores();

// CPUs of the tightest quota among the process's control groups (version 1 or 2) and their parents, rounded up; nullopt
// without a quota. `root` precedes /proc and /sys, so that tests bring their own files.
std::optional<int> cgroup_cpu_quota(const std::string& root = "");

}  // namespace mfa
