"""Attention of packed sequences of different lengths. Arguments are adapted here; the C++ library checks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, integers, make_options, optional_tile_sides
from ._type_errors import clear_type_errors
from .attention import Backend
from .masks import BlockMask


@clear_type_errors
def flash_attention_varlen(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cu_seqlens_q: mx.array | Sequence[int],
    cu_seqlens_k: mx.array | Sequence[int],
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    block_mask: BlockMask | mx.array | None = None,
    stream: Stream = None,
    *,
    block_size: int | Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    window_size: Sequence[int] | None = None,
    return_lse: bool = False,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention within each of B sequences that are stored one after another, in one call.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` and the keys that ``cu_seqlens_k``
    says, and gets what :func:`flash_attention` gives for it alone, bit for bit. Positions, the axes of ``attn_bias``
    and ``mask``, ``kv_lengths`` and dropout count sequences and the rows within them. Lazy and differentiable as
    ``flash_attention``. Runs on CPU streams.

    Args:
        q (array): ``[1, Hq, packed queries, D]``, float32, float16 or bfloat16.
        k (array): ``[1, Hkv, packed keys, D]``.
        v (array): ``[1, Hkv, packed keys, Dv]``.
        cu_seqlens_q (array or sequence of int): ``[B + 1]``, integers that ascend from 0 to the packed queries; equal
            neighbours are an empty sequence.
        cu_seqlens_k (array or sequence of int): ``[B + 1]``, the same of the keys.
        max_seqlen_q (int, optional): No sequence has more queries. Default: the packed queries.
        max_seqlen_k (int, optional): No sequence has more keys. Default: the packed keys.
        block_mask (BlockMask or array, optional): The tiles that every sequence sees, of ``max_seqlen_q`` queries and
            ``max_seqlen_k`` keys: a :class:`BlockMask`, or bool as :func:`flash_attention_sparse` takes it.
        block_size (int or tuple of int, optional): ``(block_q, block_k)`` of a mask that is an array, as there.
        scale, causal, softcap, alibi_slopes, dropout_p, window_size, backend, sinks, dropout_seed, stream: As
            :func:`flash_attention`.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        attn_bias (array, optional): Floating, broadcastable to ``[B, Hq, max_seqlen_q, max_seqlen_k]``.
        mask (array, optional): bool, broadcastable likewise; True is visible.
        kv_lengths (array or sequence of int, optional): ``[B]``: sequence b sees its first ``kv_lengths[b]`` keys.

    Returns:
        array or tuple: ``out``, ``[1, Hq, packed queries, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple
        ``(out, lse)`` with float32 ``[1, Hq, packed queries]``.

    Raises:
        ValueError: If shapes, dtypes, options or the starts of sequences are not as said here.
        RuntimeError: If starts that were still to be computed are wrong (when they are evaluated), or no kernel runs
            on the stream.
        TypeError: If an argument is of another type than said here.
    """
    return _attend(
        "flash_attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        block_mask=block_mask, block_size=block_size, return_lse=return_lse, stream=stream, scale=scale, causal=causal,
        softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, window_size=window_size, attn_bias=attn_bias,
        backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths, dropout_seed=dropout_seed,
    )  # fmt: skip


@clear_type_errors
def flash_attention_varlen_qkv_packed(
    qkv: mx.array,
    cu_seqlens_q: mx.array | Sequence[int],
    cu_seqlens_k: mx.array | Sequence[int],
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    stream: Stream = None,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """:func:`flash_attention_varlen` of the q, k and v that lie side by side in one array, read in place.

    Args:
        qkv (array): ``[1, packed rows, (Hq + 2 * Hkv) * D]``, the heads of q, then of k, then of v; or ``[1, H, packed
            rows, 3, D]``.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: As :func:`flash_attention_varlen`.
        num_heads, num_kv_heads (int, optional): As :func:`flash_attention_qkv_packed`.
        **options: The keywords of :func:`flash_attention_varlen`.

    Returns:
        array or tuple: As :func:`flash_attention_varlen`.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention_varlen`, and if the packed sizes do not fit.
    """
    function = "flash_attention_varlen_qkv_packed"
    q, k, v = _ext.unpack_qkv(qkv, num_heads, num_kv_heads, function, stream)
    return _attend(function, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, stream=stream, **options)


@clear_type_errors
def flash_attention_varlen_kv_packed(
    q: mx.array,
    kv: mx.array,
    cu_seqlens_q: mx.array | Sequence[int],
    cu_seqlens_k: mx.array | Sequence[int],
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    num_kv_heads: int | None = None,
    stream: Stream = None,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """:func:`flash_attention_varlen` of ``q`` over the k and v that lie side by side in one array, read in place.

    Args:
        q (array): ``[1, Hq, packed queries, D]``.
        kv (array): ``[1, packed keys, 2 * Hkv * D]``, the heads of k, then of v; or ``[1, Hkv, packed keys, 2, D]``.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: As :func:`flash_attention_varlen`.
        num_kv_heads (int, optional): As :func:`flash_attention_kv_packed`.
        **options: The keywords of :func:`flash_attention_varlen`.

    Returns:
        array or tuple: As :func:`flash_attention_varlen`.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention_varlen`, and if the packed sizes do not fit.
    """
    function = "flash_attention_varlen_kv_packed"
    k, v = _ext.unpack_kv(kv, num_kv_heads, function, stream)
    return _attend(function, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, stream=stream, **options)


def _attend(
    function: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cu_seqlens_q: mx.array | Sequence[int],
    cu_seqlens_k: mx.array | Sequence[int],
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    block_mask: BlockMask | mx.array | None = None,
    block_size: int | Sequence[int] | None = None,
    return_lse: bool = False,
    stream: Stream = None,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """The call of ``function``, one of the entry points over packed sequences."""
    result: Any = _ext.attention_varlen(
        q, k, v, integers(function, "cu_seqlens_q", cu_seqlens_q), integers(function, "cu_seqlens_k", cu_seqlens_k),
        make_options(function, stream=stream, **options), max_seqlen_q, max_seqlen_k, block_mask,
        optional_tile_sides(block_size, function), return_lse, stream,
    )  # fmt: skip
    return (result[0], mx.multiply(result[1], LOG2_E, stream=stream)) if return_lse else result
