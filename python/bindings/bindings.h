// bindings.h: the parts of the Python module `_ext`.
#pragma once

#include <nanobind/nanobind.h>

namespace mfa::python {

void bind_attention(nanobind::module_& m);
void bind_block_selection(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_diagnostics(nanobind::module_& m);
void bind_kv_cache(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_masks(nanobind::module_& m);
void bind_options(nanobind::module_& m);
void bind_packed(nanobind::module_& m);
void bind_prefix(nanobind::module_& m);
void bind_rope_tables(nanobind::module_& m);
void bind_sparse(nanobind::module_& m);
void bind_speculative(nanobind::module_& m);
void bind_paged(nanobind::module_& m);
void bind_varlen(nanobind::module_& m);

}  // namespace mfa::python
