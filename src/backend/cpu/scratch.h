// scratch.h: 64-byte aligned working memory of the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mfa::cpu {

// Owns `bytes` uninitialised bytes. Throws std::bad_alloc if they cannot be had. Large buffers lie on huge pages where
// the system has them: they are touched for the first time with few page faults.
class AlignedBuffer {
 public:
  static constexpr size_t kHugePage = size_t{2} << 20;

  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes, bool huge_pages = false) {
    const size_t alignment = huge_pages || bytes >= 2 * kHugePage ? kHugePage : 64;
    bytes_ = (bytes + alignment - 1) / alignment * alignment;
    if (bytes_ < bytes) throw std::bad_alloc();
    if (bytes_ == 0) return;
    data_.reset(std::aligned_alloc(alignment, bytes_));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data_.get(), bytes_, MADV_HUGEPAGE);  // advice: it works without
#endif
  }
  void* data() const { return data_.get(); }
  float* floats() const { return static_cast<float*>(data_.get()); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_ = 0;
};

// The calling thread's working memory, at least `bytes`, kept for the next call. It is not cleared and stays valid
// until the thread's next call. It lies on a huge page where the system has them: the kernels fill most of the L2
// cache, and small pages, scattered in physical memory, would compete for its sets.
inline void* thread_scratch(size_t bytes) {
  static thread_local AlignedBuffer buffer;
  if (buffer.bytes() < bytes) {
    buffer = AlignedBuffer();  // frees the old one first
    buffer = AlignedBuffer(bytes, true);
  }
  return buffer.data();
}

}  // namespace mfa::cpu
