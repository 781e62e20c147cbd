"""linear_problems.py: random operands of matrix products in any memory layout, float64 results and the error rule."""

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np
import oracle
import pytest
from problems import dtype_name, normal, to_mlx, to_numpy

DTYPES = ("float32", "float16", "bfloat16")
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)

on_cpu = pytest.mark.usefixtures("on_cpu")  # linear layers and what is around them have kernels for the CPU alone
needs_kernels = pytest.mark.skipif(not mfa.is_mfa_available(), reason="no kernels for this processor")


def view(x, dtype, layout):
    """``x`` [..., rows, columns] as an MLX array of ``layout``; the elements around it are NaN."""
    if layout == "dense":
        out = to_mlx(x, dtype)
    elif layout == "transposed":
        out = to_mlx(np.swapaxes(x, -1, -2), dtype).swapaxes(-1, -2)
    elif layout == "gap":
        parent = np.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), np.nan)
        parent[..., : x.shape[-2], 2 : 2 + x.shape[-1]] = x
        out = to_mlx(parent, dtype)[..., : x.shape[-2], 2 : 2 + x.shape[-1]]
    elif layout == "stepped":
        parent = np.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), np.nan)
        parent[..., ::2, ::3] = x
        out = to_mlx(parent, dtype)[..., ::2, ::3]
    elif layout == "reversed":
        out = to_mlx(x[..., ::-1, :], dtype)[..., ::-1, :]
    else:
        raise ValueError(layout)
    mx.eval(out)
    return out


LAYOUTS = ("dense", "transposed", "gap", "stepped", "reversed")


DRAWS = 16  # of plain programs: where there are few results the error of one may be small by chance


def plain(x, w, dtype, draw=0):
    """x @ w as a plain program computes it: float32 sums, one term after the other; the result rounded to dtype.

    The order is that of k or, with ``draw``, some other.
    """
    order = np.random.default_rng(draw).permutation(x.shape[-1]) if draw else range(x.shape[-1])
    shape = np.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    total = np.zeros((*shape, x.shape[-2], w.shape[-1]), np.float32)
    for k in order:
        total += x[..., :, k, None].astype(np.float32) * w[..., None, k, :].astype(np.float32)
    return oracle.round_to(total, dtype).astype(np.float64)


def assert_product(got, x, w, *, context="", add=0.0, alpha=1.0, w_plain=None):
    """max|got - exact| <= 2 max|plain - exact| + rounding of the result."""
    dtype = dtype_name(got)
    exact = alpha * (x @ w) + add
    got = to_numpy(got).astype(np.float64)
    assert got.shape == exact.shape, context
    if exact.size == 0:
        return
    assert np.isfinite(got).all(), context
    error, rough_error, largest = np.abs(got - exact).max(), 0.0, np.abs(exact).max()
    for draw in range(DRAWS):
        rough = plain(x, w if w_plain is None else w_plain, "float32", draw) * alpha + add
        rough = oracle.round_to(rough, dtype).astype(np.float64)
        rough_error = max(rough_error, np.abs(rough - exact).max())
        bound = 2 * rough_error + oracle.half_ulp(largest, dtype)
        if error <= bound:
            break
    assert error <= bound, f"{context}: error {error}, plain error {rough_error}, largest {largest}"


def quantise(seed, shape, group_size, bits, dtype):
    """Packed weights, scales and biases of random weights, and the float64 weights that they stand for."""
    rng = np.random.default_rng(seed)
    w = mx.array(rng.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))
    packed, scales, biases = mx.quantize(w, group_size, bits)
    return packed, scales, biases, dequantise(packed, scales, biases, group_size, bits)


def dequantise(packed, scales, biases, group_size, bits):
    """scale * code + bias in float64, from the packed bits."""
    words = np.ascontiguousarray(np.array(packed))
    bit = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = (bit.reshape(*bit.shape[:-1], -1, bits) << np.arange(bits, dtype=np.uint32)).sum(-1, dtype=np.int64)
    scales, biases = (np.repeat(to_numpy(a).astype(np.float64), group_size, axis=-1) for a in (scales, biases))
    return scales * codes + biases


__all__ = [
    "BITS", "DTYPES", "GROUPS", "LAYOUTS", "assert_product", "dequantise", "mfa", "needs_kernels", "normal", "plain",
    "quantise", "view",
]  # fmt: skip
