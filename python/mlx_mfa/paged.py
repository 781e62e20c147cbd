"""Attention over keys and values in the pages of a pool. Arguments are adapted here; the C++ library checks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, integers, make_options, optional_integers
from ._type_errors import clear_type_errors
from .attention import Backend


@clear_type_errors
def flash_attention_paged(
    q: mx.array,
    k_pages: mx.array,
    v_pages: mx.array,
    block_table: mx.array,
    seq_lens: mx.array | Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = False,
    block_size: int | None = None,
    cache_batch_idx: mx.array | Sequence[int] | None = None,
    return_lse: bool = False,
    stream: Stream = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    window_size: Sequence[int] | None = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention whose keys and values lie in the pages of a pool, found through a table (arXiv:2309.06180).

    Key j of sequence b is token ``j % page_size`` of page ``block_table[b, j // page_size]``. The result is that of
    :func:`flash_attention` with the same keys in one piece and ``kv_lengths=seq_lens``, bit for bit and whatever pages
    they lie in; nothing is gathered or copied. Pages may be shared by sequences; pages that no sequence uses, and
    tokens behind the end of one, are not read. Queries are the last of a sequence's keys: prefill, chunked prefill and
    decoding are calls with more or fewer queries. Lazy and differentiable in ``q`` and both pools (the gradient of
    a shared page is the sum). Runs on CPU streams.

    Args:
        q (array): ``[B, Hq, N, D]``, floating; cast to the dtype of the pools, and the result cast back.
        k_pages (array): ``[pages, page_size, Hkv, D]``, float32, float16 or bfloat16. Any page size.
        v_pages (array): ``[pages, page_size, Hkv, Dv]``, of the same dtype.
        block_table (array): ``[B, pages of a sequence]``, integers. Entries behind the last key of a sequence are not
            read: -1 by custom.
        seq_lens (array or sequence of int): ``[B]``: the keys of each sequence, 0 to pages of a sequence * page_size.
        block_size (int, optional): The page size; it is that of the pools, and another one is an error.
        cache_batch_idx (array or sequence of int, optional): ``[B]``: sequence b has row ``cache_batch_idx[b]`` of
            ``block_table`` and ``seq_lens``.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        attn_bias, mask (array, optional): Broadcastable to ``[B, Hq, N, pages of a sequence * page_size]``.
        scale, causal, softcap, alibi_slopes, dropout_p, window_size, backend, sinks, dropout_seed, stream: As
            :func:`flash_attention`; ``backend`` is ``"auto"`` or ``"mfa"``.

    Returns:
        array or tuple: ``out``, ``[B, Hq, N, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple ``(out, lse)``
        with float32 ``[B, Hq, N]``. A sequence without keys gives 0.

    Raises:
        ValueError: If shapes, dtypes, options, table or lengths are not as said here.
        RuntimeError: If a table, lengths or indices that were still to be computed are wrong (when they are evaluated),
            or no kernel runs on the stream.
        TypeError: If an argument is of another type than said here.
    """
    return attend_to_pages(
        "flash_attention_paged", q, k_pages, v_pages, block_table, seq_lens, block_size=block_size,
        cache_batch_idx=cache_batch_idx, return_lse=return_lse, stream=stream, scale=scale, causal=causal,
        softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, window_size=window_size, attn_bias=attn_bias,
        backend=backend, mask=mask, sinks=sinks, dropout_seed=dropout_seed,
    )  # fmt: skip


@clear_type_errors
def flash_attention_paged_varlen(
    q: mx.array,
    k_pages: mx.array,
    v_pages: mx.array,
    block_table: mx.array,
    seq_lens_kv: mx.array | Sequence[int],
    cu_seqlens_q: mx.array | Sequence[int],
    *,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    block_size: int | None = None,
    cache_batch_idx: mx.array | Sequence[int] | None = None,
    stream: Stream = None,
    return_lse: bool = False,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    window_size: Sequence[int] | None = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """:func:`flash_attention_paged` of sequences with different numbers of queries, in one call.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` and row b of the table: some may be
    prefilled, some continued and some decoded. Each gets what a call of its own gives, bit for bit.

    Args:
        q (array): ``[1, Hq, packed queries, D]``.
        k_pages, v_pages, block_table, block_size, cache_batch_idx, return_lse: As :func:`flash_attention_paged`.
        seq_lens_kv (array or sequence of int): ``[B]``: the keys of each sequence.
        cu_seqlens_q (array or sequence of int): ``[B + 1]``, integers that ascend from 0 to the packed queries.
        max_seqlen_q (int, optional): No sequence has more queries. Default: the packed queries.
        attn_bias, mask (array, optional): Broadcastable to ``[B, Hq, max_seqlen_q, pages of a sequence * page_size]``;
            rows count within a sequence.
        scale, causal, softcap, alibi_slopes, dropout_p, window_size, backend, sinks, dropout_seed, stream: As
            :func:`flash_attention_paged`.

    Returns:
        array or tuple: ``out``, ``[1, Hq, packed queries, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple
        ``(out, lse)`` with float32 ``[1, Hq, packed queries]``.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention_paged`.
    """
    function = "flash_attention_paged_varlen"
    options = make_options(
        function, scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        window_size=window_size, attn_bias=attn_bias, backend=backend, mask=mask, sinks=sinks,
        dropout_seed=dropout_seed, stream=stream,
    )  # fmt: skip
    check_page_size(block_size, k_pages, function)
    lengths = integers(function, "seq_lens_kv", seq_lens_kv)
    tables = optional_integers(function, "cache_batch_idx", cache_batch_idx)
    starts = integers(function, "cu_seqlens_q", cu_seqlens_q)
    out, lse = _ext.attention_paged_varlen(
        q, k_pages, v_pages, block_table, lengths, tables, starts, max_seqlen_q, options, stream
    )
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out


def check_page_size(block_size: int | None, k_pages: mx.array, function: str) -> None:
    """Raises if ``block_size`` is given and not the page size of the pool."""
    if block_size is not None and k_pages.ndim == 4 and block_size != k_pages.shape[1]:
        raise ValueError(
            f"[{function}] block_size must be the page size of the pools, {k_pages.shape[1]}; got {block_size}"
        )


def attend_to_pages(
    function: str,
    q: mx.array,
    k_pages: mx.array,
    v_pages: mx.array,
    block_table: mx.array,
    seq_lens: mx.array | Sequence[int],
    *,
    block_size: int | None,
    cache_batch_idx: mx.array | Sequence[int] | None,
    return_lse: bool,
    stream: Stream,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """The call of ``function``, one of the entry points over pools with a query of each sequence in a batch."""
    check_page_size(block_size, k_pages, function)
    lengths = integers(function, "seq_lens", seq_lens)
    tables = optional_integers(function, "cache_batch_idx", cache_batch_idx)
    out, lse = _ext.attention_paged(
        q, k_pages, v_pages, block_table, lengths, tables, make_options(function, stream=stream, **options), stream
    )
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out
