#include "backend/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "backend/cpu/attention.h"
#include "common/check.h"
#include "common/environment.h"

namespace mfa::cpu {
namespace {

struct Candidate {
  const char* name;
  const KernelTable* kernels;  // null: not built
  bool runs;
};

// Best first. Intel's processors multiply bfloat16 pairs at half the rate of float32, AMD's at twice that rate.
std::vector<Candidate> candidates() {
  std::vector<Candidate> out;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#if defined(MFA_HAVE_AVX512_BF16)
  const Candidate pairs{"avx512_bf16", &kernels_avx512_bf16(), bf16};
#else
  const Candidate pairs{"avx512_bf16", nullptr, bf16};
#endif
#if defined(MFA_HAVE_AVX512)
  const Candidate wide{"avx512", &kernels_avx512(), avx512};
#else
  const Candidate wide{"avx512", nullptr, avx512};
#endif
  out = __builtin_cpu_is("amd") ? std::vector{pairs, wide} : std::vector{wide, pairs};
#if defined(MFA_HAVE_AVX2)
  out.push_back({"avx2", &kernels_avx2(), avx2});
#else
  out.push_back({"avx2", nullptr, avx2});
#endif
#elif defined(__aarch64__)
#if defined(MFA_HAVE_NEON)
  out.push_back({"neon", &kernels_neon(), true});
#else
  out.push_back({"neon", nullptr, true});
#endif
#endif
  return out;
}

std::atomic<const KernelTable*> chosen{nullptr};

// The kernels called `name`; throws if they cannot run here.
const KernelTable* find(const std::string& name, const char* function) {
  std::string names, lacking;
  for (const Candidate& c : candidates()) {
    const bool usable = c.kernels && c.runs;
    if (usable) names += names.empty() ? c.name : std::string(", ") + c.name;
    if (name != c.name) continue;
    if (usable) return c.kernels;
    lacking = c.kernels ? ", which this processor lacks" : ", which this build lacks";
  }
  check(false, function, "one of the instruction sets ", names, " was expected; got ", name, lacking);
  return nullptr;
}

const KernelTable* best(std::string* reason) {
  for (const Candidate& c : candidates())
    if (c.kernels && c.runs) return c.kernels;
  if (reason) {
#if defined(__x86_64__)
    *reason =
        "the CPU kernels need AVX2, FMA, BMI2 and F16C, which this "
        "processor lacks";
#else
    *reason = "no CPU kernels were built for this processor";
#endif
  }
  return nullptr;
}

}  // namespace

const KernelTable* selected_kernels(std::string* reason) {
  if (const KernelTable* kernels = chosen.load(std::memory_order_acquire)) return kernels;
  check_environment();
  const char* name = std::getenv("MFA_CPU_ISA");
  const KernelTable* kernels = name && *name ? find(name, "MFA_CPU_ISA") : best(reason);
  chosen.store(kernels, std::memory_order_release);
  return kernels;
}

const KernelTable& require_kernels() {
  std::string reason;
  const KernelTable* kernels = selected_kernels(&reason);
  if (!kernels) throw std::runtime_error(reason);
  return *kernels;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> out;
  for (const Candidate& c : candidates())
    if (c.kernels && c.runs) out.emplace_back(c.name);
  return out;
}

void set_isa(const std::string& isa) {
  chosen.store(isa.empty() ? nullptr : find(isa, "set_isa"), std::memory_order_release);
}

}  // namespace mfa::cpu
