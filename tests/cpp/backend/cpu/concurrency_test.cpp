// Many threads call at once, and children of fork() call too: every result has the bits of a lonely call.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "common/thread_pool.h"
#include "support/kernels.h"
#include "support/sanitizer.h"

namespace mfa {
namespace {

using testing::AttentionCase;
using testing::CaseSpec;
using testing::Random;

std::vector<AttentionCase> make_cases() {
  std::vector<AttentionCase> cases;
  Random random(61);
  for (int i = 0; i < 8; ++i) {
    CaseSpec spec;
    spec.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
    spec.B = 2;
    spec.Hkv = 2;
    spec.Hq = 4;
    spec.D = spec.Dv = 64;
    spec.Nq = i % 2 ? 1 : 200;
    spec.Nk = i % 2 ? 3000 : 300;
    spec.causal = true;
    spec.sinks = spec.alibi = i % 3 == 0;
    spec.bias.axes = i % 4 == 0 ? 5 : testing::kAbsent;
    cases.emplace_back(spec, random.bits());
  }
  return cases;
}

std::vector<uint8_t> all_bytes(const AttentionCase& c) {
  const testing::ForwardResults forward = testing::run_forward(c.problem);
  std::vector<uint8_t> bytes = testing::bytes_of(forward);
  const std::vector<uint8_t> more =
      testing::bytes_of(testing::run_backward(c.problem, forward, c.d_o.ref(), c.dlse_or_null()));
  bytes.insert(bytes.end(), more.begin(), more.end());
  return bytes;
}

class CpuConcurrency : public ::testing::Test {
 protected:
  ~CpuConcurrency() override { set_thread_count(0); }
};

TEST_F(CpuConcurrency, CallsFromManyThreadsDoNotDisturbEachOther) {
  const std::vector<AttentionCase> cases = make_cases();
  std::vector<std::vector<uint8_t>> expected;
  set_thread_count(1);
  for (const AttentionCase& c : cases) expected.push_back(all_bytes(c));
  set_thread_count(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (size_t t = 0; t < 8; ++t) {
    callers.emplace_back([&, t] {
      for (int round = 0; round < 6; ++round) {
        const size_t i = (t + round) % cases.size();
        wrong.fetch_add(all_bytes(cases[i]) != expected[i]);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_F(CpuConcurrency, AChildOfForkComputesToo) {
  if (testing::kThreadSanitizer) GTEST_SKIP() << "children of fork() start threads";
  set_thread_count(2);
  const std::vector<AttentionCase> cases = make_cases();
  const std::vector<uint8_t> expected = all_bytes(cases[0]);
  const pid_t child = fork();
  if (child == 0) {
    alarm(120);
    _exit(all_bytes(cases[0]) == expected ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(all_bytes(cases[0]), expected);
}

}  // namespace
}  // namespace mfa
