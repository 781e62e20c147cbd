#include "backend/cuda/module.h"

#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>

#include "backend/cuda/plan_hopper.h"
#include "backend/cuda/tiles.h"
#include "common/check.h"

// The fat binaries, one for each source under device/, as CMake built them: machine code, and PTX for newer cards.
#define MFA_EMBED(name)                                                                                            \
  asm(".section .rodata\n.balign 64\n.hidden mfa_fatbin_" #name "\n.globl mfa_fatbin_" #name "\nmfa_fatbin_" #name \
      ":\n.incbin \"" MFA_CUDA_KERNELS "/" #name ".fatbin\"\n.byte 0\n.previous");                                 \
  extern "C" const unsigned char mfa_fatbin_##name[];

#define MFA_EMBED_DTYPES(stem) MFA_EMBED(stem##_f32) MFA_EMBED(stem##_f16) MFA_EMBED(stem##_bf16)
MFA_EMBED_DTYPES(forward_tiled)
MFA_EMBED(forward_decode_f16)
MFA_EMBED(forward_decode_bf16)
MFA_EMBED_DTYPES(backward_queries)
MFA_EMBED_DTYPES(backward_keys)
MFA_EMBED_DTYPES(term_gradients)
MFA_EMBED(hopper_forward)
MFA_EMBED(hopper_forward_split)
MFA_EMBED(hopper_forward_wide)
MFA_EMBED(hopper_backward)
MFA_EMBED(hopper_backward_fused)
MFA_EMBED(hopper_backward_modified)

namespace mfa::cuda {
namespace {

constexpr int kKernels = static_cast<int>(Kernel::count), kDTypes = 3, kSizes = kHopperSizes, kMaxDevices = 16;

enum Family {
  forward,
  decode,
  queries,
  keys,
  terms,
  hopper_forward,
  hopper_forward_wide,
  hopper_backward,
  hopper_backward_fused,
  hopper_backward_modified,
  kFamilies
};
constexpr const unsigned char* kImages[kFamilies][kDTypes] = {
    {mfa_fatbin_forward_tiled_f32, mfa_fatbin_forward_tiled_f16, mfa_fatbin_forward_tiled_bf16},
    {nullptr, mfa_fatbin_forward_decode_f16, mfa_fatbin_forward_decode_bf16},
    {mfa_fatbin_backward_queries_f32, mfa_fatbin_backward_queries_f16, mfa_fatbin_backward_queries_bf16},
    {mfa_fatbin_backward_keys_f32, mfa_fatbin_backward_keys_f16, mfa_fatbin_backward_keys_bf16},
    {mfa_fatbin_term_gradients_f32, mfa_fatbin_term_gradients_f16, mfa_fatbin_term_gradients_bf16},
    {mfa_fatbin_hopper_forward_split, mfa_fatbin_hopper_forward, mfa_fatbin_hopper_forward},
    {nullptr, mfa_fatbin_hopper_forward_wide, mfa_fatbin_hopper_forward_wide},
    {nullptr, mfa_fatbin_hopper_backward, mfa_fatbin_hopper_backward},
    {nullptr, mfa_fatbin_hopper_backward_fused, mfa_fatbin_hopper_backward_fused},
    {nullptr, mfa_fatbin_hopper_backward_modified, mfa_fatbin_hopper_backward_modified}};

Family family_of(const Launch& launch) {
  switch (launch.kernel) {
    case Kernel::forward_tiled:
    case Kernel::forward_few_rows:
    case Kernel::merge_splits:
      return forward;
    case Kernel::forward_decode:
      return decode;
    case Kernel::hopper_forward:
    case Kernel::hopper_forward_mask:
    case Kernel::hopper_forward_modified:
    case Kernel::hopper_split:
    case Kernel::hopper_mask_tiles:
      return is_wide(launch.head_dim) ? hopper_forward_wide : hopper_forward;
    case Kernel::hopper_backward_prepare:
    case Kernel::hopper_dq:
    case Kernel::hopper_dkv:
    case Kernel::hopper_dkv_shared:
      return hopper_backward;
    case Kernel::hopper_backward_fused:
      return hopper_backward_fused;
    case Kernel::hopper_dq_modified:
    case Kernel::hopper_dkv_modified:
    case Kernel::hopper_dkv_shared_modified:
      return hopper_backward_modified;
    case Kernel::backward_rows:
    case Kernel::backward_queries:
      return queries;
    case Kernel::backward_keys:
      return keys;
    default:
      return terms;
  }
}

struct Modules {
  std::mutex mutex;
  std::array<std::array<CUlibrary, kDTypes>, kFamilies> libraries{};
  std::atomic<CUfunction> functions[kMaxDevices][kKernels][kDTypes][kSizes] = {};
};

// Never destroyed: the driver may be gone before static objects are.
Modules& modules() {
  static Modules* all = new Modules;
  return *all;
}

}  // namespace

void check_driver(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* message = nullptr;
  cuGetErrorString(result, &message);
  throw std::runtime_error(concat("[mfa::cuda] ", what, " failed: ", message ? message : "unknown error"));
}

CUfunction function_of(const Launch& launch, int device) {
  if (device < 0 || device >= kMaxDevices)
    throw std::runtime_error(concat("[mfa::cuda] the CUDA device must be 0 to ", kMaxDevices - 1, "; got ", device));
  Modules& all = modules();
  const int dtype = static_cast<int>(launch.dtype);
  auto& slot = all.functions[device][static_cast<int>(launch.kernel)][dtype][launch.head_dim];
  if (CUfunction known = slot.load(std::memory_order_acquire)) return known;

  const std::lock_guard lock(all.mutex);
  const Family family = family_of(launch);
  CUlibrary& library = all.libraries[family][dtype];
  if (!library)
    check_driver(cuLibraryLoadData(&library, kImages[family][dtype], nullptr, nullptr, 0, nullptr, nullptr, 0),
                 "loading the kernels");
  const std::string name = name_of(launch);
  CUkernel kernel;
  check_driver(cuLibraryGetKernel(&kernel, library, name.c_str()), name.c_str());
  CUfunction function;
  check_driver(cuKernelGetFunction(&function, kernel), name.c_str());
  if (launch.shared_bytes > 0)
    check_driver(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                    static_cast<int>(launch.shared_bytes)),
                 "setting the shared memory of a kernel");
  slot.store(function, std::memory_order_release);
  return function;
}

}  // namespace mfa::cuda
