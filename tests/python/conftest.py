"""conftest.py: what all Python tests share: the logged seed, and a clean MLX cache after each test."""

import gc
import os

# On NVIDIA GPUs MLX multiplies float32 matrices in tf32 unless told otherwise before it is first used: its own
# operations, and so the composed route, would not have float32's accuracy.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# The oracle's products are small: numpy's threads would wait for each other longer than they multiply.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import pytest

SEED = int(os.environ.get("MFA_TEST_SEED", "20240"))


def pytest_report_header():
    return f"MFA_TEST_SEED={SEED} MFA_TEST_CASES={os.environ.get('MFA_TEST_CASES', 'default')}"


@pytest.fixture
def seed():
    """The seed of random tests; MFA_TEST_SEED sets it."""
    return SEED


@pytest.fixture(autouse=True)
def clear_mlx_cache():
    """Each test starts from a known state: the same random numbers, and no buffers left of the one before."""
    mx.random.seed(SEED)
    yield
    gc.collect()
    gc.freeze()  # what lives on is not walked again: with the modules of models imported that is most of a test's time
    mx.clear_cache()


@pytest.fixture
def on_cpu():
    """The default device is the CPU: for what only its kernels do, on machines with a GPU too."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def peak_bytes():
    """A function that runs its argument and returns by how many bytes the peak exceeded what was allocated before."""

    def measure(function):
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        function()
        mx.synchronize()
        return mx.get_peak_memory() - before

    return measure
