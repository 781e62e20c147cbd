// The choice of an instruction set: the best by default, another by name, and clear refusals.
#include <gtest/gtest.h>
#include <stdlib.h>  // setenv is POSIX

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cpu/attention.h"
#include "common/check.h"

namespace mfa {
namespace {

class CpuIsa : public ::testing::Test {
 protected:
  ~CpuIsa() override {
    unsetenv("MFA_CPU_ISA");
    cpu::set_isa("");
  }
};

template <typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST_F(CpuIsa, TheBestIsTheDefault) {
  unsetenv("MFA_CPU_ISA");
  cpu::set_isa("");
  const std::vector<std::string> isas = cpu::runnable_isas();
  std::string reason;
  const std::optional<CpuKernelTraits> traits = cpu::kernel_traits(&reason);
  ASSERT_EQ(traits.has_value(), !isas.empty()) << reason;
  if (isas.empty()) {
    EXPECT_FALSE(reason.empty());
  } else {
    EXPECT_EQ(traits->isa, isas.front());
  }
}

TEST_F(CpuIsa, EachRunnableOneCanBeChosen) {
  for (const std::string& isa : cpu::runnable_isas()) {
    cpu::set_isa(isa);
    const CpuKernelTraits traits = cpu::kernel_traits().value();
    EXPECT_EQ(traits.isa, isa);
    EXPECT_GE(traits.lanes, 4);
    EXPECT_EQ(traits.max_row_tile % traits.lanes, 0);
    EXPECT_GE(traits.max_decode_rows, 1);

    cpu::set_isa("");
    setenv("MFA_CPU_ISA", isa.c_str(), 1);
    EXPECT_EQ(cpu::kernel_traits().value().isa, isa);
    unsetenv("MFA_CPU_ISA");
    cpu::set_isa("");
  }
}

TEST_F(CpuIsa, AnUnknownNameIsRefusedWithTheKnownOnes) {
  const std::string message = message_of([] { cpu::set_isa("mmx"); });
  EXPECT_NE(message.find("[set_isa]"), std::string::npos) << message;
  EXPECT_NE(message.find("mmx"), std::string::npos) << message;
  for (const std::string& isa : cpu::runnable_isas()) EXPECT_NE(message.find(isa), std::string::npos) << message;

  cpu::set_isa("");
  setenv("MFA_CPU_ISA", "mmx", 1);
  const std::string from_environment = message_of([] { cpu::kernel_traits(); });
  EXPECT_NE(from_environment.find("MFA_CPU_ISA"), std::string::npos) << from_environment;
  EXPECT_NE(from_environment.find("mmx"), std::string::npos) << from_environment;
}

TEST_F(CpuIsa, OneThatThisProcessorLacksIsRefused) {
  const std::vector<std::string> runnable = cpu::runnable_isas();
  for (const char* isa : {"avx2", "avx512", "avx512_bf16", "neon"}) {
    if (std::find(runnable.begin(), runnable.end(), isa) != runnable.end()) continue;
    const std::string message = message_of([&] { cpu::set_isa(isa); });
    EXPECT_NE(message.find(isa), std::string::npos) << message;
    for (const std::string& one : runnable) EXPECT_NE(message.find(one), std::string::npos) << message;
  }
}

TEST_F(CpuIsa, NothingRunsWhileANumberOfTheEnvironmentIsWrong) {
  for (const char* name : {"MFA_NUM_THREADS", "MFA_PACKED_WEIGHTS_MB"}) {
    cpu::set_isa("");
    setenv(name, "abc", 1);
    const std::string message = message_of([] { cpu::kernel_traits(); });
    unsetenv(name);
    EXPECT_EQ(message.find(concat("[", name, "] a whole number")), 0) << message;
    EXPECT_NE(message.find("abc"), std::string::npos) << message;
    EXPECT_TRUE(cpu::kernel_traits().has_value());
  }
}

TEST_F(CpuIsa, ThePeaksAreMeasured) {
  for (const std::string& isa : cpu::runnable_isas()) {
    cpu::set_isa(isa);
    EXPECT_GT(cpu::peak_gflops(false), 0.01) << isa;
    // 0 says that there is no such instruction.
    EXPECT_EQ(cpu::peak_gflops(true) > 0.01, cpu::kernel_traits().value().native_bf16) << isa;
  }
  EXPECT_TRUE(cpu::runnable_isas().empty() || cpu::read_bandwidth_gbps(1 << 22) > 0.001);
}

}  // namespace
}  // namespace mfa
