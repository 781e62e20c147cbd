#include "common/cpu_limits.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sched.h>
#endif

namespace mfa {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

int affinity_count() {
#ifdef __linux__
  // The kernel refuses a mask smaller than its own, so grow until it fits.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (!set) break;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const bool known = sched_getaffinity(0, bytes, set) == 0;
    const int count = known ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int64_t quota_in_cpus(int64_t quota_us, int64_t period_us) {
  if (quota_us <= 0 || period_us <= 0) return kUnlimited;
  return quota_us / period_us + (quota_us % period_us != 0);
}

// "max 100000" or "150000 100000".
int64_t read_quota_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  int64_t quota = 0, period = 0;
  return file >> quota >> period ? quota_in_cpus(quota, period) : kUnlimited;
}

int64_t read_quota_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  int64_t quota = 0, period = 0;
  return quota_file >> quota && period_file >> period ? quota_in_cpus(quota, period) : kUnlimited;
}

// The tightest quota from `group` up to the root of the hierarchy mounted at `mount`. Inside a container the path may
// be that of the host, which does not exist here; the walk then ends at the container's own root.
template <typename ReadQuota>
int64_t tightest_quota(const std::string& mount, std::string group, ReadQuota read_quota) {
  int64_t cpus = kUnlimited;
  for (;;) {
    while (!group.empty() && group.back() == '/') group.pop_back();
    cpus = std::min(cpus, read_quota(mount + group));
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return cpus;
    group.resize(slash);
  }
}

bool lists_cpu_controller(const std::string& controllers) {
  std::istringstream names(controllers);
  for (std::string name; std::getline(names, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

}  // namespace

std::optional<int> cgroup_cpu_quota(const std::string& root) {
  int64_t cpus = kUnlimited;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "hierarchy-id:controllers:path"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), group = line.substr(second + 1);
    if (controllers.empty()) {
      for (const char* mount : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"})
        cpus = std::min(cpus, tightest_quota(root + mount, group, read_quota_v2));
    } else if (lists_cpu_controller(controllers)) {
      for (const std::string& name : {controllers, std::string("cpu")})
        cpus = std::min(cpus, tightest_quota(root + "/sys/fs/cgroup/" + name, group, read_quota_v1));
    }
  }
  if (cpus == kUnlimited) return std::nullopt;
  return static_cast<int>(std::min<int64_t>(cpus, std::numeric_limits<int>::max()));
}

int usable_cores() { return std::min(affinity_count(), cgroup_cpu_quota().value_or(std::numeric_limits<int>::max())); }

}  // namespace mfa
