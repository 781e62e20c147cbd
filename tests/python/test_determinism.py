"""The same call gives the same bits: run to run, in any batch or chunk, with any number of threads."""

import hashlib
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_mfa import _ext
from problems import (
    DTYPES,
    cpu_kernels_only,
    forward_and_gradients,
    gpu_only,
    make_case,
    make_problem,
    mfa,
    needs_kernels,
    random_arrays,
)

pytestmark = needs_kernels

PROBLEMS = {
    "prefill": {"B": 2, "Hq": 4, "Hkv": 2, "Nq": 200, "D": 32, "causal": True},
    "decode": {"B": 2, "Hq": 8, "Hkv": 2, "Nq": 1, "Nk": 1500, "D": 64},
    "everything": {
        "B": 2, "Hq": 4, "Hkv": 2, "Nq": 65, "Nk": 300, "D": 24, "causal": True, "window": (100, -1), "softcap": 3.0,
        "alibi": np.array([0.5, 0.1, 0.0, -0.1]), "bias": np.linspace(-1, 1, 4 * 300).reshape(1, 4, 1, 300),
        "sinks": np.array([0.5, -1, 0, 1]), "kv_lengths": np.array([300, 77]), "dropout_p": 0.2, "dropout_seed": 5,
    },
}  # fmt: skip


def digest(results):
    """A hash of all bits of named results."""
    h = hashlib.sha256()
    for name, x in sorted(results.items()):
        h.update(name.encode() + np.array(x.astype(mx.float32)).tobytes())
    return h.hexdigest()


def run(name, dtype):
    """The digest of the outputs and gradients of one of PROBLEMS."""
    case = make_case(make_problem(1, dtype=dtype, **PROBLEMS[name]))
    return digest(forward_and_gradients(case.problem, case.arrays, case.d_o_array, case.dlse))


@pytest.fixture
def set_threads():
    yield _ext.set_cpu_threads
    _ext.set_cpu_threads(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_hundred_runs_give_the_same_bits_with_one_thread_and_with_two(name, dtype, set_threads):
    case = make_case(make_problem(1, dtype=dtype, **PROBLEMS[name]))
    digests = set()
    for threads in (1, 2):
        set_threads(threads)
        for _ in range(100):
            digests.add(digest(forward_and_gradients(case.problem, case.arrays, case.d_o_array, case.dlse)))
    assert len(digests) == 1


def printed(program, **variables):
    """What a Python program prints in a process of its own with these environment variables."""
    paths = [os.path.dirname(__file__), *sys.path]
    env = os.environ | variables | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


ALL_DIGESTS = "import test_determinism as t\nfor n in t.PROBLEMS:\n  for d in t.DTYPES: print(n, d, t.run(n, d))"


def test_bits_do_not_depend_on_the_number_of_threads():
    outputs = [printed(ALL_DIGESTS, MFA_NUM_THREADS=threads) for threads in ("1", "2", "3")]
    assert outputs[0].count("\n") == len(PROBLEMS) * len(DTYPES)
    assert outputs[0] == outputs[1] == outputs[2]


@gpu_only
def test_bits_do_not_depend_on_cuda_graphs():
    outputs = [printed(ALL_DIGESTS, MLX_USE_CUDA_GRAPHS=use) for use in ("0", "1")]
    assert outputs[0].count("\n") == len(PROBLEMS) * len(DTYPES)
    assert outputs[0] == outputs[1]


def decode_rows(B):
    """Digests of B sequences that decode together, a query each."""
    q, k, v = random_arrays(2, (8, 8, 1, 64), (8, 2, 3000, 64), (8, 2, 3000, 64), dtype="bfloat16")
    out, lse = mfa.flash_attention(q[:B], k[:B], v[:B], return_lse=True)
    return [digest({"o": out[b], "lse": lse[b]}) for b in range(B)]


def test_decode_is_batch_invariant_where_that_is_asked_for():
    program = "import test_determinism as t\nfor B in (1, 3, 8): print(*t.decode_rows(B))"
    alone, three, eight = (line.split() for line in printed(program, MFA_BATCH_INVARIANT="1").splitlines())
    assert alone == eight[:1]
    assert three == eight[:3]
    assert len(set(eight)) == 8


@cpu_kernels_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq", [1, 5, 70])
def test_bits_of_a_sequence_do_not_depend_on_its_batch(Nq, dtype):
    q, k, v = random_arrays(2, (5, 4, Nq, 32), (5, 2, 300, 32), (5, 2, 300, 32), dtype=dtype)
    together, lse = mfa.flash_attention(q, k, v, causal=True, return_lse=True)
    for b in range(5):
        alone, alone_lse = mfa.flash_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True, return_lse=True)
        assert mx.array_equal(together[b : b + 1], alone)
        assert mx.array_equal(lse[b : b + 1], alone_lse)


@cpu_kernels_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 100])
def test_bits_of_a_row_do_not_depend_on_its_chunk(chunk, dtype):
    N = 270
    q, k, v = random_arrays(3, (1, 4, N, 32), (1, 2, N, 32), (1, 2, N, 32), dtype=dtype)
    whole, whole_lse = mfa.flash_attention(q, k, v, causal=True, return_lse=True)
    begins = range(0, N, chunk) if chunk > 3 else list(range(0, N, 37))
    for begin in begins:
        end = min(begin + chunk, N)
        part, lse = mfa.flash_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], causal=True, return_lse=True)
        assert mx.array_equal(part, whole[:, :, begin:end])
        assert mx.array_equal(lse, whole_lse[:, :, begin:end])


@cpu_kernels_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_memory_layout(dtype):
    p = make_problem(4, B=2, Hq=4, Hkv=2, Nq=65, Nk=130, D=40, dtype=dtype, causal=True)
    digests = set()
    for layout in ("dense", "bnhd", "gap", "stepped", "reversed", "packed", "column"):
        case = make_case(p, layout=layout)
        digests.add(digest(forward_and_gradients(p, case.arrays, case.d_o_array, case.dlse)))
    assert len(digests) == 1


@cpu_kernels_only
def test_bits_of_a_head_do_not_depend_on_the_other_heads():
    q, k, v = random_arrays(5, (1, 8, 65, 32), (1, 4, 130, 32), (1, 4, 130, 32))
    together = mfa.flash_attention(q, k, v)
    for h in range(4):
        alone = mfa.flash_attention(q[:, 2 * h : 2 * h + 2], k[:, h : h + 1], v[:, h : h + 1])
        assert mx.array_equal(together[:, 2 * h : 2 * h + 2], alone)


@cpu_kernels_only
def test_keys_that_no_row_sees_change_no_bit():
    q, k, v = random_arrays(6, (1, 2, 9, 32), (1, 2, 100, 32), (1, 2, 100, 32))
    short = mfa.flash_attention(q, k[:, :, :60], v[:, :, :60])
    assert mx.array_equal(mfa.flash_attention(q, k, v, kv_lengths=mx.array([60])), short)
