// linear.cpp: mfa::matmul and its relatives, and the small layers, for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "mfa/layers.h"
#include "mfa/linear.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace mfa::python {
namespace {

using OptionalArray = std::optional<mx::array>;

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("matmul", &matmul, "x"_a, "w"_a, "stream"_a = nb::none(),
        "``x @ w``; as :func:`mlx_mfa.matmul`.\n\nRaises:\n    ValueError: If shapes or dtypes do not fit.\n");
  m.def(
      "addmm", &addmm, "c"_a, "x"_a, "w"_a, "alpha"_a = 1.f, "beta"_a = 1.f, "stream"_a = nb::none(),
      "``alpha * x @ w + beta * c``; as :func:`mlx_mfa.addmm`.\n\nRaises:\n    ValueError: If shapes or dtypes do not "
      "fit.\n");
  m.def("quantized_matmul", &quantized_matmul, "x"_a, "w"_a, "scales"_a, "biases"_a, "transpose"_a = true,
        "group_size"_a = 64, "bits"_a = 4, "stream"_a = nb::none(),
        "``x`` by quantised weights; as :func:`mlx_mfa.quantized_matmul`.\n\nRaises:\n    ValueError: If shapes or "
        "dtypes do not fit.\n");
  m.def("gather_mm", &gather_mm, "x"_a, "w"_a, "lhs_indices"_a = nb::none(), "rhs_indices"_a = nb::none(),
        "stream"_a = nb::none(),
        "Products of picked matrices; as :func:`mlx_mfa.gather_mm`.\n\nRaises:\n    ValueError: If shapes or dtypes do "
        "not fit.\n");
  m.def(
      "gather_qmm", &gather_qmm, "x"_a, "w"_a, "scales"_a, "biases"_a, "lhs_indices"_a = nb::none(),
      "rhs_indices"_a = nb::none(), "transpose"_a = true, "group_size"_a = 64, "bits"_a = 4, "stream"_a = nb::none(),
      "Products of picked quantised matrices; as :func:`mlx_mfa.gather_qmm`.\n\nRaises:\n    ValueError: If shapes or "
      "dtypes do not fit.\n");

  // What the hooks call: ours where it is routed there, else None.
  m.def(
      "try_matmul",
      [](const mx::array& x, const mx::array& w, mx::StreamOrDevice stream) -> OptionalArray {
        if (!routes_matmul(x, w, std::nullopt, stream)) return std::nullopt;
        return matmul(x, w, stream);
      },
      "x"_a, "w"_a, "stream"_a = nb::none(), "``x @ w``, or None if MLX should compute it or report what is wrong.");
  m.def(
      "try_imatmul",
      [](mx::array& x, const mx::array& w) {
        if (!routes_matmul(x, w, std::nullopt, {})) return false;
        x.overwrite_descriptor(matmul(x, w));
        return true;
      },
      "x"_a, "w"_a, "``x @= w``, or False if MLX should compute it or report what is wrong.");
  m.def(
      "try_addmm",
      [](const mx::array& c, const mx::array& x, const mx::array& w, float alpha, float beta,
         mx::StreamOrDevice stream) -> OptionalArray {
        if (!routes_matmul(x, w, c, stream)) return std::nullopt;
        return addmm(c, x, w, alpha, beta, stream);
      },
      "c"_a, "x"_a, "w"_a, "alpha"_a = 1.f, "beta"_a = 1.f, "stream"_a = nb::none(),
      "``alpha * x @ w + beta * c``, or None if MLX should compute it or report what is wrong.");
  m.def(
      "try_quantized_matmul",
      [](const mx::array& x, const mx::array& w, const mx::array& scales, const OptionalArray& biases, bool transpose,
         int group_size, int bits, mx::StreamOrDevice stream) -> OptionalArray {
        if (!routes_quantized_matmul(x, w, scales, biases, transpose, group_size, bits, stream)) return std::nullopt;
        return quantized_matmul(x, w, scales, *biases, transpose, group_size, bits, stream);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "transpose"_a = true, "group_size"_a = 64, "bits"_a = 4,
      "stream"_a = nb::none(), "The product, or None if MLX should compute it or report what is wrong.");
  m.def(
      "try_gather_mm",
      [](const mx::array& x, const mx::array& w, const OptionalArray& lhs, const OptionalArray& rhs,
         mx::StreamOrDevice stream) -> OptionalArray {
        if (!routes_gather(x, w, std::nullopt, std::nullopt, lhs, rhs, false, 0, 0, stream)) return std::nullopt;
        return gather_mm(x, w, lhs, rhs, stream);
      },
      "x"_a, "w"_a, "lhs_indices"_a = nb::none(), "rhs_indices"_a = nb::none(), "stream"_a = nb::none(),
      "The products, or None if MLX should compute them or report what is wrong.");
  m.def(
      "try_gather_qmm",
      [](const mx::array& x, const mx::array& w, const mx::array& scales, const OptionalArray& biases,
         const OptionalArray& lhs, const OptionalArray& rhs, bool transpose, int group_size, int bits,
         mx::StreamOrDevice stream) -> OptionalArray {
        if (!routes_gather(x, w, scales, biases, lhs, rhs, transpose, group_size, bits, stream)) return std::nullopt;
        return gather_qmm(x, w, scales, *biases, lhs, rhs, transpose, group_size, bits, stream);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "lhs_indices"_a = nb::none(), "rhs_indices"_a = nb::none(),
      "transpose"_a = true, "group_size"_a = 64, "bits"_a = 4, "stream"_a = nb::none(),
      "The products, or None if MLX should compute them or report what is wrong.");

  m.def(
      "packed_weights",
      [] {
        const PackedWeights now = packed_weights();
        nb::dict result;
        result["arrays"] = now.arrays;
        result["bytes"] = now.bytes;
        result["limit_bytes"] = now.limit_bytes;
        return result;
      },
      "Packed copies of constant weights.\n\nReturns:\n    dict: ``arrays``, ``bytes``, ``limit_bytes`` (int).\n");
  m.def("set_packed_weights_limit", &set_packed_weights_limit, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
        "As :func:`mlx_mfa.set_packed_weights_limit`.");
  m.def(
      "try_rms_norm",
      [](const mx::array& x, const OptionalArray& weight, float eps, mx::StreamOrDevice stream) -> OptionalArray {
        if (!fuses_rms_norm(x, weight, stream)) return std::nullopt;
        return rms_norm(x, weight, eps, stream);
      },
      "x"_a, "weight"_a.none(), "eps"_a, "stream"_a = nb::none(),
      "RMS norm as one operation, or None if MLX should compute it or report what is wrong.");
  m.def(
      "try_rope",
      [](const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
         const std::variant<int, mx::array>& offset, const OptionalArray& freqs,
         mx::StreamOrDevice stream) -> OptionalArray {
        const auto* number = std::get_if<int>(&offset);
        const mx::array first = number ? mx::array(*number, mx::int32) : std::get<mx::array>(offset);
        if (!fuses_rope(x, dims, base, first, freqs, stream)) return std::nullopt;
        return rope(x, dims, traditional, base, scale, first, freqs, stream);
      },
      "x"_a, "dims"_a, nb::kw_only(), "traditional"_a, "base"_a.none(), "scale"_a, "offset"_a, "freqs"_a = nb::none(),
      "stream"_a = nb::none(),
      "Rotary position encoding as one operation, or None if MLX should compute it or report what is wrong.");

  m.def(
      "try_swiglu",
      [](const mx::array& gate, const mx::array& x, mx::StreamOrDevice stream) -> OptionalArray {
        if (!fuses_swiglu(gate, x, stream)) return std::nullopt;
        return swiglu(gate, x, stream);
      },
      "gate"_a, "x"_a, "stream"_a = nb::none(),
      "``silu(gate) * x`` as one operation, or None if MLX should compute it or report what is wrong.");

  m.def("try_logsumexp", &try_logsumexp, "a"_a, "axis"_a = nb::none(), "keepdims"_a = false, nb::kw_only(),
        "stream"_a = nb::none(),
        "``logsumexp`` as one operation, or None if MLX should compute it or report what is wrong.");
  m.def("try_argmax", &try_argmax, "a"_a, "axis"_a = nb::none(), "keepdims"_a = false, nb::kw_only(),
        "stream"_a = nb::none(),
        "``argmax`` as one operation, or None if MLX should compute it or report what is wrong.");

  m.def(
      "linear_counters",
      [] {
        const LinearCounters now = linear_counters();
        nb::dict result;
        result["matmul"] = now.matmul;
        result["quantized_matmul"] = now.quantized_matmul;
        result["gather_mm"] = now.gather_mm;
        result["gather_qmm"] = now.gather_qmm;
        return result;
      },
      "Products built so far for this library's kernels, by kind.\n\nReturns:\n    dict: Kind to count.\n");
}

}  // namespace mfa::python
