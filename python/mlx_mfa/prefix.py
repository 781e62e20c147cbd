"""Attention over a prefix that sequences share, and of prefill and decode together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, make_options, seed
from ._type_errors import clear_type_errors
from .attention import Backend, attend


@clear_type_errors
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
    dropout_p: float = 0.0,
    dropout_seed: int | mx.array | None = None,
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
        dropout_p, dropout_seed: As :func:`flash_attention`, whose mask for the concatenation this is. The prefix is
            then read for each entry.
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
        dropout_p=dropout_p, dropout_seed=dropout_seed, stream=stream,
    )  # fmt: skip
    out, lse = _ext.attention_cascade(q, k_prefix, v_prefix, k, v, options, stream)
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out


@clear_type_errors
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
    attn_bias: mx.array | None = None,
    mask: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | mx.array | None = None,
    return_lse: bool = False,
) -> tuple[mx.array, ...]:
    """Attention of a prefix over itself, with the keys and values that :func:`flash_attention_cascade` goes on from.

    Args:
        prefix_q, prefix_k, prefix_v (array): ``[B, Hq, P, D]``, ``[B, Hkv, P, D]``, ``[B, Hkv, P, Dv]``.
        causal (bool): Default True.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row, to merge the output with others. Default
            False.
        scale, softcap, window_size, alibi_slopes, sinks, backend, attn_bias, mask, kv_lengths, dropout_p, dropout_seed,
            stream: As :func:`flash_attention`.

    Returns:
        tuple: ``(out, prefix_k, prefix_v)``: the output, and the arrays given; with ``return_lse`` ``(out, lse,
        prefix_k, prefix_v)``.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention`.
    """
    results = attend(
        "make_shared_prefix_cache", prefix_q, prefix_k, prefix_v, return_lse=return_lse, stream=stream, scale=scale,
        causal=causal, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, window_size=window_size,
        attn_bias=attn_bias, backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths, dropout_seed=dropout_seed,
    )  # fmt: skip
    return (*results, prefix_k, prefix_v) if isinstance(results, tuple) else (results, prefix_k, prefix_v)


@clear_type_errors
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
    dropout_p: float = 0.0,
    dropout_seed: int | mx.array | None = None,
    kv_lengths_prefill: mx.array | Sequence[int] | None = None,
    kv_lengths_decode: mx.array | Sequence[int] | None = None,
    attn_bias_prefill: mx.array | None = None,
    attn_bias_decode: mx.array | None = None,
    mask_prefill: mx.array | None = None,
    mask_decode: mx.array | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[mx.array | tuple[mx.array, mx.array] | None, mx.array | tuple[mx.array, mx.array] | None]:
    """Attention of a chunk of prefill and of decoding sequences: on the CPU one launch, whose work the threads share.

    Each half gets the bits that a call of :func:`flash_attention` of its own would give it.

    Args:
        q_prefill, k_prefill, v_prefill (array or None): As q, k, v of :func:`flash_attention`; None: no prefill.
        q_decode, k_cache_decode, v_cache_decode (array or None): The same of the decoding sequences; None: none.
        causal (bool): Default True.
        kv_lengths_prefill, kv_lengths_decode (array or sequence of int, optional): ``kv_lengths`` of each half.
        attn_bias_prefill, attn_bias_decode, mask_prefill, mask_decode (array, optional): ``attn_bias`` and ``mask`` of
            each half.
        dropout_p, dropout_seed: As :func:`flash_attention`; batch entries count from 0 in each half.
        return_lse (bool): Also return the **base-2** log-sum-exps. Default False.
        scale, softcap, alibi_slopes, window_size, sinks, backend, stream: As :func:`flash_attention`, for both halves.

    Returns:
        tuple: ``(out_prefill, out_decode)``; with ``return_lse`` each is a tuple ``(out, lse)``. None for the half that
        is not there.

    Raises:
        ValueError: If there is neither half, or k or v of a half is missing; and as :func:`flash_attention`.
        RuntimeError, TypeError: As :func:`flash_attention`.
    """
    function = "flash_attention_splitfuse"
    halves = {
        "prefill": (q_prefill, k_prefill, v_prefill, kv_lengths_prefill, attn_bias_prefill, mask_prefill),
        "decode": (q_decode, k_cache_decode, v_cache_decode, kv_lengths_decode, attn_bias_decode, mask_decode),
    }
    if q_prefill is None and q_decode is None:
        raise ValueError(f"[{function}] q_prefill or q_decode must be given; got None for both")
    dropout_seed = seed(dropout_p, dropout_seed, stream, function)
    calls = []
    for name, (q, k, v, kv_lengths, attn_bias, mask) in halves.items():
        if q is None:
            continue
        if k is None or v is None:
            raise ValueError(f"[{function}] q_{name} needs keys and values; got None")
        options = make_options(
            function, scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes, window_size=window_size,
            sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed, kv_lengths=kv_lengths, attn_bias=attn_bias,
            mask=mask, backend=backend,
        )  # fmt: skip
        calls.append((q, k, v, options))
    results = iter(_ext.attention_together(calls, return_lse, stream))

    def of_half(q: mx.array | None) -> mx.array | tuple[mx.array, mx.array] | None:
        if q is None:
            return None
        out, lse = next(results)
        return out if lse is None else (out, mx.multiply(lse, LOG2_E, stream=stream))

    return of_half(q_prefill), of_half(q_decode)
