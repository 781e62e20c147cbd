#include "common/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdint>
#include <fstream>
#include <string>
#endif

namespace mfa {

#if defined(__linux__)
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack; older kernels refuse it

// Collapsing ignores what the system was told.
bool system_allows() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  return std::getline(file, modes) && modes.find("[never]") == std::string::npos;
}

}  // namespace

void prefer_huge_pages(const void* data, size_t bytes) {
  static const bool allowed = system_allows();
  if (!allowed || bytes == 0) return;
  const auto first = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t page = first / kHugePage * kHugePage; page < first + bytes; page += kHugePage)
    madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse);  // advice: it works without
}

void expect_huge_pages(const void* fresh, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(fresh);
  const uintptr_t first = (at + kHugePage - 1) / kHugePage * kHugePage, last = (at + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: it works without
}
#else
void prefer_huge_pages(const void*, size_t) {}
void expect_huge_pages(const void*, size_t) {}
#endif

}  // namespace mfa
