"""Attention of draft tokens of speculative decoding: chains and trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, integers, make_options
from ._type_errors import clear_type_errors
from .attention import Backend, attend
from .paged import attend_to_pages


class TreeMask(NamedTuple):
    """Which nodes of draft trees see which; with a leading axis of trees if several were given."""

    depths: mx.array
    """int32 ``[N]``: a node's position is the number of committed tokens plus its depth."""
    visible: mx.array
    """bool ``[N, N]``: node i sees node j."""
    bits: mx.array
    """uint32 ``[N, ceil(N / 32)]``: the same, node j as bit ``j % 32`` of word ``j // 32``."""


@clear_type_errors
def make_tree_mask(parents: mx.array | Sequence[int] | Sequence[Sequence[int]], *, stream: Stream = None) -> TreeMask:
    """The mask of draft trees: a node sees its ancestors and itself (arXiv:2305.09781).

    Args:
        parents (array or sequence of int): ``[N]``, or ``[B, N]`` for B trees: for each node the number of its parent,
            which comes before it, or -1 for a node that follows the committed tokens directly. An array is evaluated.
        stream (Stream or Device, optional): Where it runs. Default: MLX's default stream.

    Returns:
        TreeMask: ``depths``, ``visible`` and ``bits``.

    Raises:
        ValueError: If a parent is not a node before its child or -1, or the array is not of integers in one or two
            axes.
    """
    return TreeMask(*_ext.tree_mask(integers("make_tree_mask", "parents", parents), stream))


@clear_type_errors
def flash_attention_tree(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    parents: mx.array | Sequence[int] | Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    window_size: Sequence[int] | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    stream: Stream = None,
    dropout_p: float = 0.0,
    attn_bias: mx.array | None = None,
    mask: mx.array | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention of the nodes of draft trees over the committed tokens, their ancestors and themselves.

    ``k`` and ``v`` hold the committed tokens of each entry and, behind them, the keys of its N nodes, as they lie in a
    cache to which the tree was appended. A node's position is the number of committed tokens plus its depth; ALiBi and
    the window use it. The cache is read in place: attention over the committed tokens and attention within the tree
    are merged by their log-sum-exps. Lazy and differentiable.

    Args:
        q (array): ``[B, Hq, N, D]``, the nodes.
        k, v (array): ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``, ``Nk >= N``.
        parents (array or sequence of int): ``[N]``, or ``[B, N]`` for a tree of each entry, as
            :func:`make_tree_mask` takes it.
        window_size (tuple of int, optional): ``(left, right)``: of keys at most ``left`` positions back. It makes a
            mask of ``N * Nk`` bytes (times B with ``kv_lengths``).
        kv_lengths (array or sequence of int, optional): ``[B]``: entry b has the first ``kv_lengths[b]`` tokens, the
            tree included. Default: all.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        attn_bias, mask (array, optional): Broadcastable to ``[B, Hq, N, Nk]``, keys as they lie in the cache. What the
            tree hides stays hidden.
        dropout_p, dropout_seed: As :func:`flash_attention`, whose mask for ``q`` and ``k`` this is.
        scale, softcap, alibi_slopes, sinks, backend, stream: As :func:`flash_attention`.

    Returns:
        array or tuple: ``out``, ``[B, Hq, N, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple ``(out, lse)``
        with float32 ``[B, Hq, N]``.

    Raises:
        ValueError: If shapes, dtypes, options or parents are not as said here.
        RuntimeError, TypeError: As :func:`flash_attention`.
    """
    options = make_options(
        "flash_attention_tree", scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, window_size=window_size,
        backend=backend, sinks=sinks, kv_lengths=kv_lengths, dropout_p=dropout_p, dropout_seed=dropout_seed,
        attn_bias=attn_bias, mask=mask, stream=stream,
    )  # fmt: skip
    out, lse = _ext.attention_tree(q, k, v, integers("flash_attention_tree", "parents", parents), options, stream)
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out


@clear_type_errors
def flash_attention_speculative_verify(
    q_target: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    draft_ids: mx.array,
    *,
    scale: float | None = None,
    causal: bool = True,
    temperature: float = 1.0,
    stream: Stream = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    window_size: Sequence[int] | None = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention of draft tokens over a cache that holds them, with the score of the package that this one replaces.

    **The third result is a proxy with no relation to probabilities of a vocabulary**: the log-softmax, over the
    channels, of the mean over heads of the output divided by ``temperature``, at ``draft_ids`` clipped to
    ``[0, Dv - 1]``. To verify drafts, use the model's logits.

    Args:
        q_target (array): ``[B, Hq, N, D]``, the queries of N draft tokens.
        k_cache, v_cache (array): ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``, the draft tokens last.
        draft_ids (array): integers ``[B, N]``.
        causal (bool): Default True.
        temperature (float): Finite and positive. Default 1.
        scale, softcap, alibi_slopes, window_size, attn_bias, backend, mask, sinks, kv_lengths, dropout_p, dropout_seed,
            stream: As :func:`flash_attention`.

    Returns:
        tuple: ``(out, lse, logprobs)``: ``[B, Hq, N, Dv]`` in the dtype of ``q_target``; the **base-2** log-sum-exps,
        float32 ``[B, Hq, N]``; the proxy, float32 ``[B, N]``.

    Raises:
        ValueError: If ``draft_ids`` or ``temperature`` is not as said here, and as :func:`flash_attention`.
        RuntimeError, TypeError: As :func:`flash_attention`.
    """
    function = "flash_attention_speculative_verify"
    out, lse = attend(
        function, q_target, k_cache, v_cache, return_lse=True, stream=stream, scale=scale, causal=causal,
        softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, window_size=window_size, attn_bias=attn_bias,
        backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths, dropout_seed=dropout_seed,
    )  # fmt: skip
    return out, lse, _ext.draft_proxy_logprobs(out, draft_ids, temperature, function, stream)


@clear_type_errors
def flash_attention_speculative_verify_paged(
    q_target: mx.array,
    k_pages: mx.array,
    v_pages: mx.array,
    block_table: mx.array,
    seq_lens: mx.array | Sequence[int],
    draft_ids: mx.array,
    *,
    scale: float | None = None,
    causal: bool = True,
    block_size: int | None = None,
    cache_batch_idx: mx.array | Sequence[int] | None = None,
    temperature: float = 1.0,
    stream: Stream = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    window_size: Sequence[int] | None = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """:func:`flash_attention_speculative_verify` over a cache in pages.

    Args:
        q_target (array): ``[B, Hq, N, D]``, the queries of N draft tokens.
        k_pages, v_pages, block_table, seq_lens, block_size, cache_batch_idx: As :func:`flash_attention_paged`, the
            draft tokens the last of each sequence.
        draft_ids (array): integers ``[B, N]``.
        causal (bool): Default True.
        temperature (float): Finite and positive. Default 1.
        scale, softcap, alibi_slopes, window_size, attn_bias, backend, mask, sinks, dropout_p, dropout_seed, stream: As
            :func:`flash_attention_paged`.

    Returns:
        tuple: ``(out, lse, logprobs)``, as :func:`flash_attention_speculative_verify`.

    Raises:
        ValueError: If ``draft_ids`` or ``temperature`` is not as said here, and as :func:`flash_attention_paged`.
        RuntimeError, TypeError: As :func:`flash_attention_paged`.
    """
    function = "flash_attention_speculative_verify_paged"
    out, lse = attend_to_pages(
        function, q_target, k_pages, v_pages, block_table, seq_lens, block_size=block_size,
        cache_batch_idx=cache_batch_idx, return_lse=True, stream=stream, scale=scale, causal=causal, softcap=softcap,
        alibi_slopes=alibi_slopes, window_size=window_size, attn_bias=attn_bias, backend=backend, mask=mask,
        sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    return out, lse, _ext.draft_proxy_logprobs(out, draft_ids, temperature, function, stream)
