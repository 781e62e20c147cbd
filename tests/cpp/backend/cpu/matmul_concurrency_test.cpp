// Many threads multiply at once: every result has the bits of a lonely call.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "common/thread_pool.h"
#include "support/kernels.h"
#include "support/matmul_case.h"

namespace mfa {
namespace {

using testing::MatmulCase;
using testing::MatmulSpec;

TEST(CpuMatmulConcurrency, CallsFromManyThreadsDoNotDisturbEachOther) {
  std::vector<std::unique_ptr<MatmulCase>> cases;
  std::vector<std::vector<uint8_t>> expected;
  set_thread_count(1);
  for (int i = 0; i < 8; ++i) {
    MatmulSpec spec;
    spec.M = i % 2 ? 1 : 70;
    spec.N = 1500;
    spec.K = 320;
    spec.dtype = i % 3 == 0 ? DType::f32 : DType::bf16;
    spec.bits = i % 4 == 1 ? 4 : 0;
    cases.push_back(std::make_unique<MatmulCase>(spec, static_cast<uint64_t>(i)));
    cases.back()->run();
    expected.push_back(cases.back()->result_bytes());
    cases.back()->clear_result();
  }
  set_thread_count(3);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> callers;
  for (size_t i = 0; i < cases.size(); ++i)
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 3; ++repeat) {
        cases[i]->run();
        wrong += cases[i]->result_bytes() != expected[i];
      }
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
  set_thread_count(0);
}

}  // namespace
}  // namespace mfa
