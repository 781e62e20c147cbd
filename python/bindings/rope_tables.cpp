// rope_tables.cpp: mfa::rope_3d_tables for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include "bindings.h"
#include "mfa/rope_tables.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa::python {

void bind_rope_tables(nb::module_& m) {
  m.def(
      "rope_3d_tables",
      [](int grid_h, int grid_w, int num_frames, std::optional<int> d_h, std::optional<int> d_w, std::optional<int> d_t,
         int head_dim,
         double theta) { return rope_3d_tables(grid_h, grid_w, num_frames, {d_h, d_w, d_t}, head_dim, theta); },
      "grid_h"_a, "grid_w"_a, "num_frames"_a, "d_h"_a.none(), "d_w"_a.none(), "d_t"_a.none(), "head_dim"_a, "theta"_a,
      "Cosines and sines; as :func:`mlx_mfa.make_rope_3d_tables`.\n\nRaises:\n    ValueError: If a size does not "
      "fit.\n");
}

}  // namespace mfa::python
