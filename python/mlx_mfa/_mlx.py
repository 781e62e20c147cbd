"""The MLX that this build of the package works with."""

from __future__ import annotations

import importlib.metadata

import mlx.core as mx

from ._build_info import MLX_VERSION
from ._version import __version__

# On Linux MLX's library is a package of its own, which `mlx` requires only under an extra.
_EXTRAS = {"mlx-cpu": "[cpu]", "mlx-cuda-12": "[cuda12]", "mlx-cuda-13": "[cuda13]"}


def _requirement() -> str:
    """What pip must install: with the library of the kind that is installed now."""
    for package, extra in _EXTRAS.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return f"mlx{extra}=={MLX_VERSION}"
    return f"mlx=={MLX_VERSION}"


def version_error() -> str | None:
    """Why the extension cannot work with the running MLX: its C++ interface changes from release to release."""
    found = mx.__version__  # type: ignore[attr-defined]
    if found == MLX_VERSION:
        return None
    return (
        f"mlx_mfa {__version__} was built for mlx {MLX_VERSION} and cannot work with mlx {found};"
        f' run: pip install "{_requirement()}"'
    )
