// diagnostics.cpp: counters, machine and settings for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "mfa/diagnostics.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {

void bind_diagnostics(nb::module_& m) {
  m.attr("min_head_dim") = kMinHeadDim;
  m.attr("max_head_dim") = kMaxHeadDim;

  m.def(
      "counters",
      [] {
        const Counters now = counters();
        nb::dict result;
        result["mfa_cpu"] = now.mfa_cpu;
        result["mfa_cuda"] = now.mfa_cuda;
        result["mlx_sdpa"] = now.mlx_sdpa;
        result["composed"] = now.composed;
        return result;
      },
      "Calls of the process by route: graphs built, not evaluations.\n\nReturns:\n    dict: Route to count.\n");
  m.def("reset_counters", &reset_counters, "Sets all counters to 0.");

  m.def(
      "cpu_info",
      [] {
        const CpuInfo info = cpu_info();
        nb::dict result;
        result["available"] = info.available;
        result["reason"] = info.reason;
        result["isa"] = info.isa;
        result["isas"] = nb::cast(info.isas);
        result["native_bf16"] = info.native_bf16;
        result["threads"] = info.threads;
        return result;
      },
      R"(
What the kernels use of this processor.

Returns:
    dict: ``available`` (bool), ``reason`` (str, why not), ``isa`` (str, in use), ``isas`` (list of str, all that can run,
    best first), ``native_bf16`` (bool), ``threads`` (int).
)");
  m.def(
      "gpu_info",
      [] {
        const GpuInfo info = gpu_info();
        nb::dict result;
        result["available"] = info.available;
        result["reason"] = info.reason;
        return result;
      },
      R"(
Whether the library has kernels for the GPU that MLX runs on.

Returns:
    dict: ``available`` (bool), ``reason`` (str, why not).
)");
  m.def("set_cpu_threads", &set_cpu_threads, "count"_a, R"(
Sets the number of threads of the process's pool. Results do not depend on it.

Args:
    count (int): 0 sets the default: MFA_NUM_THREADS, else what the affinity mask and the cgroup quota allow.

Raises:
    ValueError: If negative.
)");
  m.def("set_cpu_isa", &set_cpu_isa, "isa"_a, R"(
Selects the instruction set of the kernels for the process.

Args:
    isa (str): One of ``cpu_info()["isas"]``; empty sets the default: MFA_CPU_ISA, else the best.

Raises:
    ValueError: If it is unknown or cannot run here.
)");
  m.def("cpu_peak_gflops", &cpu_peak_gflops, "native_bf16"_a = false, nb::call_guard<nb::gil_scoped_release>(), R"(
Measures one core in a register-only multiply-add loop of the instruction set in use.

Args:
    native_bf16 (bool): Of bfloat16 pairs instead of float32.

Returns:
    float: GFLOP/s.
)");
  m.def("cpu_read_bandwidth_gbps", &cpu_read_bandwidth_gbps, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(), R"(
Measures a sequential read by all threads.

Args:
    bytes (int): Size of the buffer that is read.

Returns:
    float: GB/s.
)");
}

}  // namespace mfa::python
