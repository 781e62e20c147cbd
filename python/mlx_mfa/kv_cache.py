"""Attention over a cache of keys and values. Arguments are adapted here; the C++ library checks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Positions, Stream, integers, make_options, optional_integers, positions
from ._type_errors import clear_type_errors
from .attention import Backend
from .paged import check_page_size


@clear_type_errors
def flash_attention_kvcache(
    q: mx.array,
    k_cache: mx.array | None,
    v_cache: mx.array | None,
    *,
    k_new: mx.array | None = None,
    v_new: mx.array | None = None,
    block_table: mx.array | None = None,
    seq_lens: mx.array | Sequence[int] | None = None,
    block_size: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    window_size: Sequence[int] | None = None,
    rotary_cos: mx.array | None = None,
    rotary_sin: mx.array | None = None,
    cache_seqlens: Positions = None,
    interleaved: bool = True,
    rotary_dim: int | None = None,
    cache_batch_idx: mx.array | Sequence[int] | None = None,
    stream: Stream = None,
    rotate_cached_keys: bool | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, ...]:
    """Attention over a cache of keys and values, appending new ones to it first if they are given.

    ``block_table`` and ``seq_lens`` say what the caches are:

    * both: pools ``[pages, page_size, Hkv, D]`` as :func:`flash_attention_paged` takes them; sequence b has
      ``seq_lens[b]`` keys.
    * ``seq_lens`` alone: preallocated ``[B, Hkv, S, D]``; batch entry b has its first ``seq_lens[b]`` keys.
    * neither: ``[B, Hkv, S, D]``, all in use; appending concatenates and returns caches of ``S + n`` keys. None is an
      empty cache.

    New keys are written to tokens ``seq_lens[b] + t`` of pools and preallocated caches, **in place** if nothing but
    this call holds the cache when it is evaluated, which then takes the time of the new rows alone: let the names of
    the old caches go (``out, k_cache, v_cache = flash_attention_kvcache(q, k_cache, v_cache, ...)``) and evaluate each
    step before the next. Otherwise the caches are copied, and the arrays given keep what they hold. ``seq_lens`` are
    the lengths before the call; the caller adds the new keys.

    All options combine. Lazy and differentiable in ``q``, the new rows and the caches. Runs on CPU streams; without
    rotation, pages, ``seq_lens`` and ``cache_batch_idx`` also where :func:`flash_attention` does.

    Args:
        q (array): ``[B, Hq, N, D]``, floating; cast to the dtype of the caches, and the result cast back. Queries are
            the last of a sequence's keys, the new ones included.
        k_cache, v_cache (array or None): As above, of one dtype: float32, float16 or bfloat16.
        k_new, v_new (array, optional): ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]``: cast to the dtype of the caches.
        block_table (array, optional): ``[B, pages of a sequence]``, integers.
        seq_lens (array or sequence of int, optional): ``[B]``, integers.
        block_size (int, optional): The page size; it is that of the pools, and another one is an error.
        rotary_cos, rotary_sin (array, optional): ``[positions, rotary_dim / 2]``: rotates queries as they are loaded
            and new keys as they are stored, as :func:`flash_attention_rope` does.
        cache_seqlens (int, array or sequence of int, optional): ``[B]`` or one for all: the position of the first query
            and of the first new key. Default: what the lengths say, new keys following those of the cache and queries
            being the last.
        rotate_cached_keys (bool, optional): Whether the cache holds keys as they are given, all of which are then
            rotated at load, from position 0. Default: only a cache without ``seq_lens`` that is not appended to.
            Otherwise it holds rotated keys, and new ones are rotated before they are stored.
        cache_batch_idx (array or sequence of int, optional): ``[B]``: batch entry b has row ``cache_batch_idx[b]`` of
            the cache (or of ``block_table``) and of ``seq_lens``. Not for a cache that grows.
        interleaved, rotary_dim: As :func:`flash_attention_rope`.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        attn_bias, mask (array, optional): Broadcastable to ``[B, Hq, N, keys]``, where ``keys`` is the length of the
            cache as it is returned, or pages of a sequence * page_size.
        scale, causal, softcap, alibi_slopes, window_size, dropout_p, backend, sinks, dropout_seed, stream: As
            :func:`flash_attention`; ``causal`` is True by default.

    Returns:
        array or tuple: ``out``, ``[B, Hq, N, Dv]`` in the dtype of ``q``, then float32 ``lse`` ``[B, Hq, N]`` with
        ``return_lse``, then the caches with the new keys if there are some: ``(out, k_cache, v_cache)``.

    Raises:
        ValueError: If shapes, dtypes, options, lengths, table or positions are not as said here.
        RuntimeError: If such values were still to be computed and are wrong (when they are evaluated; nothing is
            written), or no kernel runs on the stream.
        TypeError: If an argument is of another type than said here.
    """
    return attend_to_cache(
        "flash_attention_kvcache", q, k_cache, v_cache, k_new, v_new, block_table=block_table, seq_lens=seq_lens,
        block_size=block_size, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
        interleaved=interleaved, rotary_dim=rotary_dim, rotate_cached_keys=rotate_cached_keys,
        cache_batch_idx=cache_batch_idx, return_lse=return_lse, stream=stream, scale=scale, causal=causal,
        softcap=softcap, alibi_slopes=alibi_slopes, window_size=window_size, dropout_p=dropout_p, attn_bias=attn_bias,
        backend=backend, mask=mask, sinks=sinks, dropout_seed=dropout_seed,
    )  # fmt: skip


@clear_type_errors
def flash_attention_kvcache_rope_append(
    q: mx.array,
    k_new: mx.array,
    v_new: mx.array,
    k_cache: mx.array | None,
    v_cache: mx.array | None,
    rotary_cos: mx.array,
    rotary_sin: mx.array,
    cache_seqlens: Positions = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    interleaved: bool = True,
    stream: Stream = None,
    seq_lens: mx.array | Sequence[int] | None = None,
    block_table: mx.array | None = None,
    **options: Any,
) -> tuple[mx.array, ...]:
    """Rotates queries and new keys, appends the keys and values to a cache and attends to all of it.

    Args:
        q, k_new, v_new, rotary_cos, rotary_sin, interleaved, scale, causal, stream: As
            :func:`flash_attention_kvcache`, of which this is another form.
        k_cache, v_cache (array, optional): As there; None is an empty cache.
        cache_seqlens (int, array or sequence of int, optional): The position of the first query and of the first new
            key. Default: behind the keys of the cache.
        seq_lens, block_table, options: As there. Without ``seq_lens`` the caches grow by concatenation.

    Returns:
        tuple: ``(out, k_cache, v_cache)``, with ``return_lse`` ``(out, lse, k_cache, v_cache)``.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention_kvcache`.
    """
    results = attend_to_cache(
        "flash_attention_kvcache_rope_append", q, k_cache, v_cache, k_new, v_new, rotary_cos=rotary_cos,
        rotary_sin=rotary_sin, cache_seqlens=cache_seqlens, scale=scale, causal=causal, interleaved=interleaved,
        stream=stream, seq_lens=seq_lens, block_table=block_table, **options,
    )  # fmt: skip
    assert isinstance(results, tuple)  # rows were appended, so the caches are returned
    return results


@clear_type_errors
def append_to_cache(
    cache: mx.array,
    rows: mx.array,
    starts: mx.array | Sequence[int],
    block_table: mx.array | None = None,
    *,
    stream: Stream = None,
) -> mx.array:
    """Writes the rows of new tokens into a cache of keys or values, in place if nothing else holds it.

    Args:
        cache (array): ``[B, H, S, D]`` or, with ``block_table``, a pool ``[pages, page_size, H, D]``; float32, float16
            or bfloat16.
        rows (array): ``[B, H, n, D]``, floating, cast to the dtype of ``cache``: row t is token ``starts[b] + t``.
        starts (array or sequence of int): ``[B]``, integers.
        block_table (array, optional): ``[B, pages of a sequence]``, integers. No page may be written by two sequences.
        stream (Stream or Device, optional): A CPU stream. Default: MLX's default stream.

    Returns:
        array: The cache with the rows: the memory of ``cache`` if nothing but this call holds that when it is
        evaluated, else a copy. Differentiable in ``cache`` and ``rows``.

    Raises:
        ValueError: If shapes, dtypes, starts or table do not fit.
        RuntimeError: If such values were still to be computed (when they are evaluated; nothing is written), or the
            stream is on a GPU.
    """
    return _ext.append_to_cache(cache, rows, integers("append_to_cache", "starts", starts), block_table, stream)


def attend_to_cache(
    function: str,
    q: mx.array,
    k_cache: mx.array | None,
    v_cache: mx.array | None,
    k_new: mx.array | None = None,
    v_new: mx.array | None = None,
    *,
    block_table: mx.array | None = None,
    seq_lens: mx.array | Sequence[int] | None = None,
    block_size: int | None = None,
    rotary_cos: mx.array | None = None,
    rotary_sin: mx.array | None = None,
    cache_seqlens: Positions = None,
    interleaved: bool = True,
    rotary_dim: int | None = None,
    rotate_cached_keys: bool | None = None,
    cache_batch_idx: mx.array | Sequence[int] | None = None,
    return_lse: bool = False,
    stream: Stream = None,
    **options: Any,
) -> mx.array | tuple[mx.array, ...]:
    """The call of ``function``, one of the entry points over caches."""
    for first, second, names in (
        (k_new, v_new, "k_new and v_new"),
        (rotary_cos, rotary_sin, "rotary_cos and rotary_sin"),
    ):
        if (first is None) != (second is None):
            raise ValueError(f"[{function}] {names} must be given together; got one of them")
    if block_table is not None and k_cache is not None:
        check_page_size(block_size, k_cache, function)
    lengths = optional_integers(function, "seq_lens", seq_lens)
    tables = optional_integers(function, "cache_batch_idx", cache_batch_idx)
    starts = positions(function, "cache_seqlens", cache_seqlens)
    if rotary_cos is None:
        for name, given in (("cache_seqlens", cache_seqlens), ("rotary_dim", rotary_dim),
                            ("rotate_cached_keys", rotate_cached_keys)):  # fmt: skip
            if given is not None and not (isinstance(given, int) and given == 0):
                raise ValueError(f"[{function}] {name} needs rotary tables; got {given!r} without")
    out, lse, k, v = _ext.attention_kvcache(
        q, k_cache, v_cache, k_new, v_new, block_table, lengths, tables,
        rotary_cos, rotary_sin, interleaved, rotary_dim, starts, rotate_cached_keys, return_lse,
        make_options(function, stream=stream, **options), stream,
    )  # fmt: skip
    results = [out]
    if return_lse:
        results.append(mx.multiply(lse, LOG2_E, stream=stream))
    if k is not None:
        results += [k, v]
    return tuple(results) if len(results) > 1 else out
