"""Attention over a prefix that sequences share, and of prefill and decode together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, make_options
from .attention import Backend, flash_attention


def flash_attention_cascade(
    q: mx.array,
    k_prefix: mx.array,
    v_prefix: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    window_size: Sequence[int] | None = None,
    return_lse: bool = False,
    stream: Stream = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention over a prefix that all entries of the batch share, and behind it each entry's own keys.

    Gives what :func:`flash_attention` gives for the concatenation of prefix and own keys, up to rounding, but reads the
    prefix once for the whole batch: the query heads of all entries become one group of heads, and the two parts are
    merged by their log-sum-exps (arXiv:2402.05099). Every query stands behind the whole prefix, at position
    ``P + pos(i)``, where ``pos(i) = i + max(0, Nk - Nq)`` counts the own keys. Lazy and differentiable.

    Args:
        q (array): ``[B, Hq, Nq, D]``, float32, float16 or bfloat16.
        k_prefix, v_prefix (array): ``[1, Hkv, P, D]`` and ``[1, Hkv, P, Dv]``.
        k, v (array): ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``: the own keys, those of the queries among them.
        causal (bool): A query sees own keys up to its position, and the whole prefix. Default True.
        window_size (tuple of int, optional): As :func:`flash_attention`, over prefix and own keys. With ``kv_lengths``
            it makes a mask of ``B * Nq * P`` bytes, and the prefix is read for each entry.
        attn_bias, mask (array, optional): Of the own keys, broadcastable to ``[B, Hq, Nq, Nk]``.
        kv_lengths (array or sequence of int, optional): ``[B]``: entry b has the first ``kv_lengths[b]`` own keys.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        scale, softcap, alibi_slopes, backend, sinks, stream: As :func:`flash_attention`.

    Returns:
        array or tuple: ``out``, ``[B, Hq, Nq, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple ``(out, lse)``
        with float32 ``[B, Hq, Nq]``.

    Raises:
        ValueError: If shapes, dtypes or options are not as said here.
        RuntimeError, TypeError: As :func:`flash_attention`.
    """
    options = make_options(
        "flash_attention_cascade", scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes,
        window_size=window_size, attn_bias=attn_bias, backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths,
    )  # fmt: skip
    out, lse = _ext.attention_cascade(q, k_prefix, v_prefix, k, v, options, stream)
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out


def make_shared_prefix_cache(
    prefix_q: mx.array,
    prefix_k: mx.array,
    prefix_v: mx.array,
    *,
    scale: float | None = None,
    stream: Stream = None,
    causal: bool = True,
    softcap: float = 0.0,
    window_size: Sequence[int] | None = None,
    alibi_slopes: mx.array | None = None,
    sinks: mx.array | None = None,
    backend: Backend = "auto",
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention of a prefix over itself, with the keys and values that :func:`flash_attention_cascade` goes on from.

    Args:
        prefix_q, prefix_k, prefix_v (array): ``[B, Hq, P, D]``, ``[B, Hkv, P, D]``, ``[B, Hkv, P, Dv]``.
        causal (bool): Default True.
        scale, softcap, window_size, alibi_slopes, sinks, backend, stream: As :func:`flash_attention`.

    Returns:
        tuple: ``(out, prefix_k, prefix_v)``: the output, and the arrays given.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention`.
    """
    out = flash_attention(
        prefix_q, prefix_k, prefix_v, scale, causal, softcap, alibi_slopes, window_size=window_size, stream=stream,
        backend=backend, sinks=sinks,
    )  # fmt: skip
    return cast(mx.array, out), prefix_k, prefix_v


def flash_attention_splitfuse(
    q_prefill: mx.array | None,
    k_prefill: mx.array | None,
    v_prefill: mx.array | None,
    q_decode: mx.array | None,
    k_cache_decode: mx.array | None,
    v_cache_decode: mx.array | None,
    *,
    scale: float | None = None,
    causal: bool = True,
    stream: Stream = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    window_size: Sequence[int] | None = None,
    sinks: mx.array | None = None,
    kv_lengths_prefill: mx.array | Sequence[int] | None = None,
    kv_lengths_decode: mx.array | Sequence[int] | None = None,
    backend: Backend = "auto",
) -> tuple[mx.array | None, mx.array | None]:
    """Attention of a chunk of prefill and of decoding sequences: two problems of one graph, evaluated together.

    Args:
        q_prefill, k_prefill, v_prefill (array or None): As q, k, v of :func:`flash_attention`; None: no prefill.
        q_decode, k_cache_decode, v_cache_decode (array or None): The same of the decoding sequences; None: none.
        causal (bool): Default True.
        kv_lengths_prefill, kv_lengths_decode (array or sequence of int, optional): ``kv_lengths`` of each half.
        scale, softcap, alibi_slopes, window_size, sinks, backend, stream: As :func:`flash_attention`, for both halves.

    Returns:
        tuple: ``(out_prefill, out_decode)``; None for the half that is not there.

    Raises:
        ValueError: If there is neither half, or k or v of a half is missing; and as :func:`flash_attention`.
        RuntimeError, TypeError: As :func:`flash_attention`.
    """
    if q_prefill is None and q_decode is None:
        raise ValueError("[flash_attention_splitfuse] q_prefill or q_decode must be given; got None for both")

    def half(
        name: str,
        q: mx.array | None,
        k: mx.array | None,
        v: mx.array | None,
        kv_lengths: mx.array | Sequence[int] | None,
    ) -> mx.array | None:
        if q is None:
            return None
        if k is None or v is None:
            raise ValueError(f"[flash_attention_splitfuse] q_{name} needs keys and values; got None")
        out = flash_attention(
            q, k, v, scale, causal, softcap, alibi_slopes, window_size=window_size, stream=stream, backend=backend,
            sinks=sinks, kv_lengths=kv_lengths,
        )  # fmt: skip
        return cast(mx.array, out)

    prefill = half("prefill", q_prefill, k_prefill, v_prefill, kv_lengths_prefill)
    return prefill, half("decode", q_decode, k_cache_decode, v_cache_decode, kv_lengths_decode)
