"""Attention on packed arrays: q, k and v side by side, as one projection writes them. The parts are views."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import _ext
from ._type_errors import clear_type_errors
from .attention import Backend, Stream, attend


@clear_type_errors
def flash_attention_qkv_packed(
    qkv: mx.array,
    *,
    scale: float | None = None,
    causal: bool = False,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    stream: Stream = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    return_attn_weights: bool = False,
    window_size: Sequence[int] | None = None,
    return_lse: bool = False,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, ...]:
    """:func:`flash_attention` of the q, k and v that lie side by side in one array.

    The packed array is read in place, forward and backward; its gradient is one array of its shape, into which those of
    q, k and v are written once.

    Args:
        qkv (array): ``[B, N, (Hq + 2 * Hkv) * D]``, the heads of q, then of k, then of v; or ``[B, H, N, 3, D]``.
        num_heads (int, optional): ``Hq``: needed for the first layout; for the second it may only repeat ``H``.
        num_kv_heads (int, optional): ``Hkv``. Default ``num_heads``. In the second layout a number below ``H`` uses
            the first heads of k and v only.

        The others as :func:`flash_attention`.

    Returns:
        array or tuple: ``[B, Hq, N, D]``; with ``return_lse`` and ``return_attn_weights`` a tuple, as
        :func:`flash_attention` returns it.

    Raises:
        ValueError: If the sizes do not fit, and as :func:`flash_attention`.
        RuntimeError, TypeError: As :func:`flash_attention`.
    """
    function = "flash_attention_qkv_packed"
    q, k, v = _ext.unpack_qkv(qkv, num_heads, num_kv_heads, function, stream)
    return attend(
        function, q, k, v, scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, return_attn_weights=return_attn_weights, window_size=window_size, return_lse=return_lse,
        stream=stream, attn_bias=attn_bias, backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths,
        dropout_seed=dropout_seed,
    )  # fmt: skip


@clear_type_errors
def flash_attention_kv_packed(
    q: mx.array,
    kv: mx.array,
    *,
    scale: float | None = None,
    causal: bool = False,
    num_kv_heads: int | None = None,
    stream: Stream = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    return_attn_weights: bool = False,
    window_size: Sequence[int] | None = None,
    return_lse: bool = False,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, ...]:
    """:func:`flash_attention` of ``q`` over the k and v that lie side by side in one array.

    The packed array is read in place, forward and backward; its gradient is one array of its shape, into which those of
    k and v are written once.

    Args:
        q (array): ``[B, Hq, Nq, D]``.
        kv (array): ``[B, Nk, 2 * Hkv * D]``, the heads of k, then of v; or ``[B, Hkv, Nk, 2, D]``.
        num_kv_heads (int, optional): ``Hkv``: needed for the first layout; in the second a number below the heads that
            are there uses the first of them only.

        The others as :func:`flash_attention`.

    Returns:
        array or tuple: ``[B, Hq, Nq, D]``; with ``return_lse`` and ``return_attn_weights`` a tuple, as
        :func:`flash_attention` returns it.

    Raises:
        ValueError: If the sizes do not fit, and as :func:`flash_attention`.
        RuntimeError, TypeError: As :func:`flash_attention`.
    """
    function = "flash_attention_kv_packed"
    k, v = _ext.unpack_kv(kv, num_kv_heads, function, stream)
    return attend(
        function, q, k, v, scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, return_attn_weights=return_attn_weights, window_size=window_size, return_lse=return_lse,
        stream=stream, attn_bias=attn_bias, backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths,
        dropout_seed=dropout_seed,
    )  # fmt: skip
