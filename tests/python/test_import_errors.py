"""Importing with an MLX that does not fit is one clear error."""

import mlx.core as mx
import pytest
from test_explain import in_new_process

IMPORT_WITH_VERSION = """
import importlib.metadata as metadata
import mlx.core as mx

def version(package):
    if package in {packages}:
        return "{version}"
    raise metadata.PackageNotFoundError(package)

metadata.version = version
mx.__version__ = "{version}"
import mlx_mfa
"""
# The packages that an installation has beside mlx, and what pip must be asked for: on Linux only an extra of mlx
# requires its library, so that plain "mlx==" would leave the library of the other version.
INSTALLED = {
    "cpu": ({"mlx-cpu"}, "mlx[cpu]=="),
    "cuda 12": ({"mlx-cuda-12"}, "mlx[cuda12]=="),
    "cuda 13": ({"mlx-cuda-13"}, "mlx[cuda13]=="),
    "metal": ({"mlx-metal"}, "mlx=="),
    "its own build": (set(), "mlx=="),
}


@pytest.mark.parametrize(
    ("version", "installed"), [("0.31.0", "cpu"), ("0.32.40", "cpu"), *(("0.33.0", name) for name in INSTALLED)]
)
def test_another_version_of_mlx_is_refused_with_the_remedy(version, installed):
    packages, requirement = INSTALLED[installed]
    run = in_new_process(IMPORT_WITH_VERSION.format(version=version, packages=packages))
    assert run.returncode != 0
    lines = run.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ImportError")]
    assert len(errors) == 1
    assert errors == lines[-1:]
    assert version in errors[0]
    assert mx.__version__ in errors[0]
    assert f'pip install "{requirement}{mx.__version__}"' in errors[0]
    assert "undefined symbol" not in run.stderr


def test_the_version_built_for_is_accepted():
    run = in_new_process("import mlx_mfa; print(mlx_mfa.__version__)")
    assert run.returncode == 0, run.stderr


def test_import_order_does_not_matter():
    for first in ("import mlx_mfa, mlx.core as mx", "import mlx.core as mx, mlx_mfa"):
        program = f"{first}\nx = mx.ones((1, 1, 3, 8))\nprint(mlx_mfa.flash_attention(x, x, x).sum().item())"
        run = in_new_process(program)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == "24.0"
