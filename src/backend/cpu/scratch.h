// scratch.h: 64-byte aligned working memory of the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace mfa::cpu {

// Owns `bytes` uninitialised bytes. Throws std::bad_alloc if they cannot be
// had.
class AlignedBuffer {
public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    if (bytes_ < bytes)
      throw std::bad_alloc();
    if (bytes_ == 0)
      return;
    data_.reset(std::aligned_alloc(64, bytes_));
    if (!data_)
      throw std::bad_alloc();
  }
  void *data() const { return data_.get(); }
  float *floats() const { return static_cast<float *>(data_.get()); }
  size_t bytes() const { return bytes_; }

private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_ = 0;
};

// The calling thread's working memory, at least `bytes`, kept for the next call
// (a few hundred kB a thread). It is not cleared and stays valid until the
// thread's next call.
inline void *thread_scratch(size_t bytes) {
  static thread_local AlignedBuffer buffer;
  if (buffer.bytes() < bytes)
    buffer = AlignedBuffer(bytes);
  return buffer.data();
}

} // namespace mfa::cpu
