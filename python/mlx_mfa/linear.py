"""Matrix products of linear layers on MLX arrays. Arguments are adapted here; the C++ library checks and computes."""

from __future__ import annotations

import mlx.core as mx

from . import _ext
from ._options import Stream
from ._type_errors import clear_type_errors


@clear_type_errors
def matmul(x: mx.array, w: mx.array, *, stream: Stream = None) -> mx.array:
    """``x @ w``, with float32 sums that are rounded once.

    On the CPU a row of the result has the same bits whatever rows travel with it and however many threads compute it.
    Arrays of any strides are read in place where their last axis, or for ``w`` one of the last two, is dense: a
    transposed view of weights costs nothing.

    Args:
        x (array): ``[..., M, K]`` or ``[K]``.
        w (array): ``[..., K, N]`` or ``[K]``; leading axes broadcast with those of ``x``.
        stream (Stream or Device, optional): Where it runs. Default: MLX's default stream. On a GPU this is MLX's own
            operation.

    Returns:
        array: ``[..., M, N]``, in the dtype that MLX promotes to: float32, float16 or bfloat16. The axis of a
        one-dimensional operand is absent.

    Raises:
        ValueError: If shapes or dtypes do not fit; the message says what was expected and what was received.
    """
    return _ext.matmul(x, w, stream)


@clear_type_errors
def addmm(
    c: mx.array, x: mx.array, w: mx.array, alpha: float = 1.0, beta: float = 1.0, *, stream: Stream = None
) -> mx.array:
    """``alpha * x @ w + beta * c``, rounded once.

    Args:
        c (array): Broadcasts to the shape of the result, never expanded in memory; not read if ``beta`` is 0.
        x, w (array): As :func:`matmul`.
        alpha, beta (float): Factors. Default 1.
        stream (Stream or Device, optional): Where it runs. Default: MLX's default stream.

    Returns:
        array: As :func:`matmul`.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    return _ext.addmm(c, x, w, alpha, beta, stream)


@clear_type_errors
def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    *,
    stream: Stream = None,
) -> mx.array:
    """``x`` by weights that :func:`mlx.core.quantize` packed (mode ``"affine"``), read where they lie.

    A weight is ``scale * code + bias`` and sums are float32. With 4 or 8 bits, ``transpose`` and ``x`` of 16 bits,
    groups of ``x`` become integers, within 2**-16 of the group's largest element, and their sums are exact
    (docs/linear.md). Elsewhere processors that multiply bfloat16 pairs round the weight to bfloat16 when ``x`` is
    bfloat16. Rows have the same bits in any batch, as with :func:`matmul`.

    Args:
        x (array): ``[..., M, K]`` or ``[K]``.
        w (array): uint32 ``[..., N, K * bits / 32]`` if ``transpose``, else ``[..., K, N * bits / 32]``.
        scales, biases (array): ``[..., rows of w, groups]``.
        transpose (bool): The stored rows are columns of the product. Default True.
        group_size (int): Codes that share a scale: 32, 64 or 128. Default 64.
        bits (int): Bits of a code: 2, 3, 4, 5, 6 or 8. Default 4.
        stream (Stream or Device, optional): Where it runs. Default: MLX's default stream.

    Returns:
        array: ``[..., M, N]`` in the dtype that ``x``, ``scales`` and ``biases`` promote to.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    return _ext.quantized_matmul(x, w, scales, biases, transpose, group_size, bits, stream)


@clear_type_errors
def gather_mm(
    x: mx.array,
    w: mx.array,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    *,
    stream: Stream = None,
) -> mx.array:
    """Products of matrices picked by indices: the layers of a mixture of experts.

    Entries that use the same matrix of ``w`` are computed together, in any order of the indices.

    Args:
        x (array): ``[..., M, K]``.
        w (array): ``[..., K, N]``.
        lhs_indices, rhs_indices (array, optional): Flat integer indices into the leading axes of ``x`` and of ``w``;
            they broadcast. Default: all in order.
        stream (Stream or Device, optional): Where it runs. Default: MLX's default stream.

    Returns:
        array: ``[*indices, M, N]``.

    Raises:
        ValueError: If shapes or dtypes do not fit, or an index whose value is known lies outside the leading axes.
        RuntimeError: When evaluated, if another index does; the array then holds NaN.
    """
    return _ext.gather_mm(x, w, lhs_indices, rhs_indices, stream)


@clear_type_errors
def gather_qmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    *,
    stream: Stream = None,
) -> mx.array:
    """:func:`gather_mm` with quantised ``w``.

    Args:
        x, lhs_indices, rhs_indices, stream: As :func:`gather_mm`.
        w, scales, biases, transpose, group_size, bits: As :func:`quantized_matmul`.

    Returns:
        array: ``[*indices, M, N]``.

    Raises:
        ValueError: If shapes or dtypes do not fit, or an index whose value is known lies outside the leading axes.
        RuntimeError: When evaluated, if another index does; the array then holds NaN.
    """
    return _ext.gather_qmm(x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, stream)


@clear_type_errors
def set_packed_weights_limit(bytes: int) -> int:
    """Bound the memory of packed copies of constant weights.

    Dense weights that :func:`matmul` and :func:`addmm` (and what the hooks bring them) multiply from eight times,
    with more than four rows and unchanged contents, are packed once in the order in which the kernels read them. The
    copy is kept while the array lives and the limit allows, the least recently used going first; results have the same
    bits. ``diagnostics()["packed_weights"]`` says how much is held, and drops the copies of arrays that are
    gone.

    A program that writes into an array's memory behind MLX's back, as through ``numpy.array(w, copy=False)``, must call
    this with 0 and then with the limit again for later products to see it. Arrays that MLX itself updates are safe.

    Args:
        bytes (int): 0 drops all copies and makes no more. Default of the process: ``MFA_PACKED_WEIGHTS_MB`` megabytes,
            else 512 MiB.

    Returns:
        int: The limit that was in force.

    Raises:
        TypeError: If negative or not an integer.
    """
    return _ext.set_packed_weights_limit(bytes)
