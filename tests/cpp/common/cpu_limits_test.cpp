#include "common/cpu_limits.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <optional>
#include <string>

namespace mfa {
namespace {

struct File {
  std::string name, text;
};

// A folder that stands for the root of the file system, filled with the given files.
class FakeRoot {
 public:
  explicit FakeRoot(std::initializer_list<File> files) {
    std::string pattern = testing::TempDir() + "mfa_cgroup_XXXXXX";
    root_ = mkdtemp(pattern.data());
    for (const auto& [name, text] : files) {
      const std::filesystem::path path = root_ + name;
      std::filesystem::create_directories(path.parent_path());
      std::ofstream(path) << text;
    }
  }
  ~FakeRoot() { std::filesystem::remove_all(root_); }
  std::optional<int> quota() const { return cgroup_cpu_quota(root_); }

 private:
  std::string root_;
};

TEST(CpuLimits, WithoutGroupsThereIsNoQuota) {
  EXPECT_EQ(FakeRoot(std::initializer_list<File>{}).quota(), std::nullopt);
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", "0::/\n"}}).quota(), std::nullopt);
}

TEST(CpuLimits, AVersion2QuotaIsRoundedUp) {
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", "0::/\n"}, File{"/sys/fs/cgroup/cpu.max", "150000 100000\n"}}).quota(),
            2);
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", "0::/\n"}, File{"/sys/fs/cgroup/cpu.max", "200000 100000\n"}}).quota(),
            2);
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", "0::/\n"}, File{"/sys/fs/cgroup/cpu.max", "10000 100000\n"}}).quota(),
            1);
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", "0::/\n"}, File{"/sys/fs/cgroup/cpu.max", "max 100000\n"}}).quota(),
            std::nullopt);
}

TEST(CpuLimits, TheTightestParentCounts) {
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", "0::/slice/service\n"},
                      File{"/sys/fs/cgroup/slice/cpu.max", "300000 100000\n"},
                      File{"/sys/fs/cgroup/slice/service/cpu.max", "800000 100000\n"}})
                .quota(),
            3);
}

TEST(CpuLimits, AContainersRootCountsWhenItsPathIsTheHosts) {
  EXPECT_EQ(
      FakeRoot({File{"/proc/self/cgroup", "0::/host/only/path\n"}, File{"/sys/fs/cgroup/cpu.max", "400000 100000\n"}})
          .quota(),
      4);
}

TEST(CpuLimits, AVersion1QuotaIsRead) {
  const std::string groups = "5:memory:/a\n4:cpu,cpuacct:/docker/x\n";
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", groups},
                      File{"/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "250000\n"},
                      File{"/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n"}})
                .quota(),
            3);
  EXPECT_EQ(FakeRoot({File{"/proc/self/cgroup", groups}, File{"/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"},
                      File{"/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}})
                .quota(),
            std::nullopt);
}

TEST(CpuLimits, AtLeastOneCoreIsUsable) { EXPECT_GE(usable_cores(), 1); }

}  // namespace
}  // namespace mfa
