// module.cpp: the Python module `_ext`. It adapts arguments; the library decides.
#include <nanobind/nanobind.h>

#include <exception>
#include <string>

#include "bindings.h"
#include "mfa/errors.h"
#include "mfa/version.h"
#include "mlx/array.h"

namespace nb = nanobind;

NB_MODULE(_ext, m) {
  nb::module_::import_("mlx.core");
  // Arrays convert only if MLX and this module agree on nanobind's ABI and domain; without this check each call would
  // fail with a TypeError that does not say why.
  if (!nb::type<mlx::core::array>().is_valid()) {
    const std::string message = std::string(
                                    "mlx_mfa._ext was built for another nanobind than the installed mlx uses; "
                                    "reinstall both: pip install --force-reinstall mlx-mfa \"mlx==") +
                                mfa::built_for_mlx_version() + "\"";
    throw nb::import_error(message.c_str());
  }
  // MLX's module sees this translator too: both are of one domain.
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const mfa::NotImplemented& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    }
  });
  m.doc() = "Attention for MLX in C++; see mlx_mfa for the documented functions.";
  m.attr("__version__") = mfa::version();
  m.attr("built_for_mlx_version") = mfa::built_for_mlx_version();
  mfa::python::bind_options(m);
  mfa::python::bind_attention(m);
  mfa::python::bind_decoder(m);
  mfa::python::bind_diagnostics(m);
  mfa::python::bind_kv_cache(m);
  mfa::python::bind_linear(m);
  mfa::python::bind_masks(m);
  mfa::python::bind_block_selection(m);
  mfa::python::bind_packed(m);
  mfa::python::bind_prefix(m);
  mfa::python::bind_rope_tables(m);
  mfa::python::bind_sparse(m);
  mfa::python::bind_speculative(m);
  mfa::python::bind_paged(m);
  mfa::python::bind_varlen(m);
}
