"""Flash attention for MLX: softmax attention forward and backward, with every score modifier, without storing scores.

``flash_attention`` is the entry point; ``explain`` says which implementation runs a call and why.
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

__all__ = [
    "__version__",
    "diagnostics",
    "explain",
    "flash_attention",
    "get_device_info",
    "get_supported_configs",
    "is_mfa_available",
    "merge_attention_states",
    "warmup_kernels",
]
