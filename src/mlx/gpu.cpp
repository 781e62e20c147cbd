#include "mlx/gpu.h"

#include <dlfcn.h>

#include <filesystem>

#include "common/check.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/gpu/device_info.h"

namespace mfa {
namespace {

struct Loaded {
  GpuAttention* attention = nullptr;
  std::string reason;
};

Loaded load() {
  if (!mx::gpu::is_available()) return {nullptr, "MLX sees no GPU"};
  if (!mx::cu::is_available()) return {nullptr, "there are no kernels of this library for MLX's GPU backend"};
  // MLX's other builds lack symbols that the library needs, so it is no dependency of this one.
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&load), &self)) return {nullptr, "the folder of libmfa is not known"};
  const auto path = std::filesystem::path(self.dli_fname).replace_filename("libmfa_cuda.so");
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return {nullptr, concat("this build has no CUDA part: ", path.string())};
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return {nullptr, concat("the CUDA part cannot be loaded: ", dlerror())};
  using Entry = GpuAttention* (*)(std::string*);
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "mfa_cuda_attention"));
  if (!entry) return {nullptr, concat("the CUDA part is not of this build: ", dlerror())};
  Loaded result;
  result.attention = entry(&result.reason);
  return result;
}

}  // namespace

GpuAttention* gpu_attention(std::string* reason) {
  static const Loaded loaded = load();
  if (reason) *reason = loaded.reason;
  return loaded.attention;
}

}  // namespace mfa
