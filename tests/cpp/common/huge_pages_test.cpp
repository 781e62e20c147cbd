// Memory moved to huge pages keeps its contents; what cannot be moved is left as it is.
#include "common/huge_pages.h"

#include <gtest/gtest.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace mfa {
namespace {

constexpr size_t kHugePage = size_t{2} << 20, kBytes = 6 * kHugePage;

class Mapping {
 public:
  Mapping() {
    data_ = static_cast<uint32_t*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    madvise(data_, kBytes, MADV_NOHUGEPAGE);  // until it is filled, whatever the system does by itself
    for (size_t i = 0; i < kBytes / sizeof(*data_); ++i) data_[i] = static_cast<uint32_t>(i * 2654435761u);
    madvise(data_, kBytes, MADV_HUGEPAGE);
  }
  ~Mapping() { munmap(data_, kBytes); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint32_t* data() const { return data_; }
  bool is_intact() const {
    for (size_t i = 0; i < kBytes / sizeof(*data_); ++i)
      if (data_[i] != static_cast<uint32_t>(i * 2654435761u)) return false;
    return true;
  }
  // What /proc says of huge pages in it, and in neighbours that the system has joined to it.
  size_t huge_kilobytes() const {
    std::ifstream maps("/proc/self/smaps");
    bool inside = false;
    size_t total = 0;
    for (std::string line; std::getline(maps, line);) {
      uintptr_t begin = 0, end = 0;
      char dash = 0;
      std::istringstream head(line);
      if (head >> std::hex >> begin >> dash >> end && dash == '-') {
        const auto at = reinterpret_cast<uintptr_t>(data_);
        inside = begin < at + kBytes && end > at;
      }
      if (inside && line.rfind("AnonHugePages:", 0) == 0) total += std::stoul(line.substr(14));
    }
    return total;
  }

 private:
  uint32_t* data_;
};

bool machine_collapses() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  if (!std::getline(file, modes) || modes.find("[never]") != std::string::npos) return false;
  const Mapping probe;
  const auto middle = (reinterpret_cast<uintptr_t>(probe.data()) / kHugePage + 2) * kHugePage;
  return madvise(reinterpret_cast<void*>(middle), kHugePage, 25) == 0;
}

TEST(HugePages, MemoryMovesAndKeepsItsContents) {
  const Mapping memory;
  prefer_huge_pages(memory.data() + 1000, kBytes - 8000);
  EXPECT_TRUE(memory.is_intact());
  if (!machine_collapses()) GTEST_SKIP() << "no huge pages on demand";
  EXPECT_GE(memory.huge_kilobytes(), 4 * kHugePage / 1024);
}

TEST(HugePages, WhatCannotMoveStays) {
  prefer_huge_pages(nullptr, 0);
  static const char constant[] = "of the program's file";
  prefer_huge_pages(constant, sizeof(constant));
  EXPECT_STREQ(constant, "of the program's file");
  const Mapping memory;
  ASSERT_EQ(munmap(reinterpret_cast<char*>(memory.data()) + kHugePage, kHugePage), 0);
  prefer_huge_pages(memory.data(), kBytes);  // a hole in the middle
  EXPECT_EQ(memory.data()[1], 2654435761u);
  EXPECT_EQ(memory.data()[kBytes / sizeof(uint32_t) - 1], static_cast<uint32_t>((kBytes / 4 - 1) * 2654435761u));
}

}  // namespace
}  // namespace mfa
#endif
