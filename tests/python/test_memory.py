"""Memory: O(N) forward and backward, inputs read in place, nothing left behind."""

import os
import pathlib

import mlx.core as mx
import numpy as np
import pytest
from problems import LAYOUTS, READ_IN_PLACE, make_problem, mfa, needs_kernels, random_arrays, strided

pytestmark = needs_kernels

LONG = 16384


def test_long_sequences_forward_and_backward_do_not_store_the_scores(peak_bytes):
    q, k, v = random_arrays(1, *[(1, 1, LONG, 16)] * 3)
    mx.eval(q, k, v)

    def loss(q, k, v):
        return mfa.flash_attention(q, k, v, causal=True).sum()

    peak = peak_bytes(lambda: mx.eval(mx.grad(loss, argnums=(0, 1, 2))(q, k, v)))
    assert peak < LONG * LONG * 4 / 32


def test_every_modifier_together_does_not_store_the_scores(peak_bytes):
    N = 4096
    q, k, v, bias, slopes, sinks = random_arrays(2, *[(1, 2, N, 16)] * 3, (1, 2, 1, N), (2,), (2,))
    mask = mx.random.uniform(shape=(1, 1, 1, N)) < 0.9
    mx.eval(q, k, v, bias, slopes, sinks, mask)

    def loss(q, k, v, bias, slopes, sinks):
        out, lse = mfa.flash_attention(
            q, k, v, causal=True, softcap=5.0, alibi_slopes=slopes * 0.01, dropout_p=0.1, window_size=(3000, -1),
            return_lse=True, attn_bias=bias, mask=mask, sinks=sinks, kv_lengths=mx.array([N - 5]), dropout_seed=3,
        )  # fmt: skip
        return out.sum() + lse.sum()

    gradient = mx.grad(loss, argnums=tuple(range(6)))
    peak = peak_bytes(lambda: mx.eval(gradient(q, k, v, bias, slopes, sinks)))
    assert peak < 2 * N * N * 4 / 16


def test_peak_memory_grows_linearly_with_the_length(peak_bytes):
    peaks = []
    for N in (2048, 8192):
        q, k, v = random_arrays(3, *[(1, 1, N, 16)] * 3)
        mx.eval(q, k, v)

        def loss(q, k, v):
            return mfa.flash_attention(q, k, v, causal=True, window_size=(200, -1)).sum()

        peaks.append(peak_bytes(lambda: mx.eval(mx.grad(loss, argnums=(0, 1, 2))(q, k, v))))  # noqa: B023
    assert peaks[1] < 5 * peaks[0]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "column"])
def test_strided_inputs_are_read_in_place(layout, peak_bytes):
    p = make_problem(4, B=2, Hq=4, Nq=512, D=64)
    q, k, v = (strided(getattr(p, n), "float32", layout) for n in "qkv")
    output = p.q.size * 4
    peak = peak_bytes(lambda: mx.eval(mfa.flash_attention(q, k, v, **READ_IN_PLACE)))
    assert peak < 1.9 * output  # the output and scratch: a copy of one input would add as much again


def test_grouped_heads_do_not_repeat_keys_and_values(peak_bytes):
    q, k, v = random_arrays(5, (1, 32, 1, 64), (1, 1, 8192, 64), (1, 1, 8192, 64))
    mx.eval(q, k, v)
    peak = peak_bytes(lambda: mx.eval(mfa.flash_attention(q, k, v)))
    assert peak < k.nbytes


def test_broadcast_keys_are_not_expanded(peak_bytes):
    q, k, v = random_arrays(6, (16, 2, 4, 32), (1, 2, 2048, 32), (1, 2, 2048, 32))
    k, v = (mx.broadcast_to(x, (16, 2, 2048, 32)) for x in (k, v))
    mx.eval(q, k, v)
    peak = peak_bytes(lambda: mx.eval(mfa.flash_attention(q, k, v)))
    assert peak < 16 * 2 * 2048 * 32 * 4 / 2


def test_calls_leave_nothing_behind():
    arrays = random_arrays(7, *[(1, 4, 256, 32)] * 3)
    mx.eval(arrays)

    def step():
        mx.eval(mx.grad(lambda q, k, v: mfa.flash_attention(q, k, v).sum(), argnums=(0, 1, 2))(*arrays))
        mx.synchronize()

    step()
    before = mx.get_active_memory()
    for _ in range(50):
        step()
    assert mx.get_active_memory() == before


def available_bytes():
    """Memory that this process can still take, by the machine and its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


@pytest.mark.skipif(available_bytes() < 12 * 2**30, reason="needs 12 GiB of free memory")
def test_offsets_beyond_32_bits_are_addressed():
    D, rows = 64, 2**31 // 64
    zero, one = mx.array(0.0, dtype=mx.float16), mx.array(1.0, dtype=mx.float16)
    parent = mx.concatenate([mx.broadcast_to(zero, (rows, D)), mx.broadcast_to(one, (1, D))])
    k = parent[::rows][None, None]  # two keys, 2^31 elements apart
    q = mx.ones((1, 1, 3, D), dtype=mx.float16)
    out, lse = mfa.flash_attention(q, k, k, return_lse=True)
    weight = 1 / (1 + np.exp(-8.0))  # scores 0 and 64 / 8
    assert np.allclose(np.array(out.astype(mx.float32)), weight, atol=1e-3)
    assert np.allclose(np.array(lse) * np.log(2), np.log1p(np.exp(8.0)), atol=1e-4)
    mx.eval(k)
    gradients = mx.grad(lambda q, k, v: (mfa.flash_attention(q, k, v) * q).sum(), argnums=(0, 1, 2))
    near = mx.contiguous(k)
    for far_gradient, near_gradient in zip(gradients(q, k, k), gradients(q, near, near), strict=True):
        assert mx.array_equal(far_gradient, near_gradient)
