"""Flash attention for MLX: softmax attention forward and backward, with every score modifier, without storing scores.

``flash_attention`` is the entry point; ``explain`` says which implementation runs a call and why. On the CPU, importing
the package also puts its matrix products in the place of MLX's, which are slow there: see ``mlx_mfa.hooks``.
"""

import mlx.core as _mx

from ._build_info import MLX_VERSION as _MLX_VERSION
from ._version import __version__

# MLX's C++ interface changes between releases: with another one the extension fails to load with an undefined symbol.
if _mx.__version__ != _MLX_VERSION:
    raise ImportError(
        f"mlx_mfa {__version__} was built for mlx {_MLX_VERSION} and cannot work with mlx {_mx.__version__};"
        f' run: pip install "mlx=={_MLX_VERSION}"'
    )

from .attention import explain, flash_attention, merge_attention_states
from .device import diagnostics, get_device_info, get_supported_configs, is_mfa_available, warmup_kernels
from .hooks import disable, enable, enable_by_default, hooks_status
from .kv_cache import append_to_cache, flash_attention_kvcache, flash_attention_kvcache_rope_append
from .linear import addmm, gather_mm, gather_qmm, matmul, quantized_matmul
from .packed import flash_attention_kv_packed, flash_attention_qkv_packed
from .paged import flash_attention_paged, flash_attention_paged_varlen
from .rope import flash_attention_rope, flash_attention_rope_unified
from .rope_tables import make_rope_3d_tables
from .varlen import flash_attention_varlen

enable_by_default()
del enable_by_default

__all__ = [
    "__version__",
    "addmm",
    "append_to_cache",
    "diagnostics",
    "disable",
    "enable",
    "explain",
    "flash_attention",
    "flash_attention_kv_packed",
    "flash_attention_kvcache",
    "flash_attention_kvcache_rope_append",
    "flash_attention_paged",
    "flash_attention_paged_varlen",
    "flash_attention_qkv_packed",
    "flash_attention_rope",
    "flash_attention_rope_unified",
    "flash_attention_varlen",
    "gather_mm",
    "gather_qmm",
    "get_device_info",
    "get_supported_configs",
    "hooks_status",
    "is_mfa_available",
    "make_rope_3d_tables",
    "matmul",
    "merge_attention_states",
    "quantized_matmul",
    "warmup_kernels",
]
