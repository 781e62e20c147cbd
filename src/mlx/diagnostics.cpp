// diagnostics.cpp: what this build and this machine offer.
#include "mfa/diagnostics.h"

#include <stdexcept>

#include "backend/cpu/attention.h"
#include "common/thread_pool.h"
#include "mfa/version.h"
#include "mlx/gpu.h"

namespace mfa {

const char* version() { return MFA_VERSION; }
const char* built_for_mlx_version() { return MFA_MLX_VERSION; }

CpuInfo cpu_info() {
  CpuInfo info;
  info.isas = cpu::runnable_isas();
  info.threads = thread_count();
  try {
    if (const auto traits = cpu::kernel_traits(&info.reason)) {
      info.available = true;
      info.isa = traits->isa;
      info.native_bf16 = traits->native_bf16;
    }
  } catch (const std::invalid_argument& error) {  // the environment asks for what there is not
    info.reason = error.what();
  }
  return info;
}

GpuInfo gpu_info() {
  GpuInfo info;
  info.available = gpu_attention(&info.reason) != nullptr;
  return info;
}

void set_cpu_threads(int count) { set_thread_count(count); }
void set_cpu_isa(const std::string& isa) { cpu::set_isa(isa); }
double cpu_peak_gflops(bool native_bf16) { return cpu::peak_gflops(native_bf16); }
double cpu_read_bandwidth_gbps(size_t bytes) { return cpu::read_bandwidth_gbps(bytes); }

}  // namespace mfa
