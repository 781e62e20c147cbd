"""Block-sparse attention. Arguments are adapted here; the C++ library checks them and decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, make_options, optional_tile_sides
from ._type_errors import clear_type_errors
from .attention import Backend
from .masks import BlockMask

_BACKWARDS = ("auto", "sdpa", "sdpa_sparse", "steel_sparse")


@clear_type_errors
def flash_attention_sparse(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    block_mask: BlockMask | mx.array,
    scale: float | None = None,
    causal: bool = False,
    stream: Stream = None,
    backward: str = "sdpa",
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
    """:func:`flash_attention` of which only the visible tiles of a mask are computed.

    Gives what ``flash_attention`` with the mask expanded to tokens gives, on the CPU bit for bit; tiles that are not
    visible are not read. All modifiers combine, forward and backward; the log-sum-exp is that of the visible keys, and
    a row without any gives 0 and no gradient.

    Args:
        q, k, v (array): As :func:`flash_attention`, of any dtype, head dimension and lengths that it takes.
        block_mask (BlockMask or array): The visible tiles. An array is bool ``[NQ, NK]``, ``[Hq, NQ, NK]`` or
            ``[B, Hq, NQ, NK]`` with ``NQ = ceil(Nq / block_q)`` and ``NK = ceil(Nk / block_k)``; it is evaluated and
            its lists are built in each call: make a :class:`BlockMask` of a mask that is used again, or in a function
            that is compiled.
        backward (str): Accepted for the sake of programs that give it (``"auto"``, ``"sdpa"``, ``"sdpa_sparse"`` or
            ``"steel_sparse"``); there is one backward, over the lists.
        block_size (int or tuple of int, optional): ``(block_q, block_k)`` of a mask that is an array. Default: 32 by
            32, or, above head dimension 64, 32 by 16 if the shape of the mask is of such tiles.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        scale, causal, softcap, alibi_slopes, dropout_p, window_size, attn_bias, backend, mask, sinks, kv_lengths,
        dropout_seed, stream: As :func:`flash_attention`.

    Returns:
        array or tuple: ``out``, ``[B, Hq, Nq, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple ``(out, lse)``
        with float32 ``[B, Hq, Nq]``.

    Raises:
        ValueError: If the mask does not fit q and k, ``backward`` is unknown, or as :func:`flash_attention`.
        RuntimeError: If no kernel runs on the stream.
        TypeError: If an argument is of another type than said here.
    """
    if backward not in _BACKWARDS:
        names = '", "'.join(_BACKWARDS)
        raise ValueError(f'[flash_attention_sparse] backward must be one of "{names}"; got {backward!r}')
    return _attend(
        "flash_attention_sparse", q, k, v, block_mask, block_size, return_lse=return_lse, stream=stream, scale=scale,
        causal=causal, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, window_size=window_size,
        attn_bias=attn_bias, backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths, dropout_seed=dropout_seed,
    )  # fmt: skip


@clear_type_errors
def sparse_attention_dispatch(
    Q: mx.array,
    K: mx.array,
    V: mx.array,
    mask: BlockMask | mx.array,
    *,
    block_tile: int | Sequence[int] = 16,
    scale: float | None = None,
    causal: bool = False,
    density_threshold: float = 0.02,
    density: float | None = None,
    precomputed_bias: mx.array | None = None,
    token_mask: mx.array | None = None,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """:func:`flash_attention_sparse` under the name and with the arguments of the package that this one replaces.

    Args:
        Q, K, V (array): As :func:`flash_attention_sparse`.
        mask (BlockMask or array): The visible tiles.
        block_tile (int or tuple of int): The size of a tile of a mask that is an array. Default 16.
        scale, causal: As :func:`flash_attention_sparse`.
        density_threshold, density, precomputed_bias: Accepted and not used: there is one path, whatever the density.
        token_mask (array, optional): The ``mask`` of :func:`flash_attention_sparse`, of tokens.
        **options: The other keywords of :func:`flash_attention_sparse`, except ``backward``.

    Returns:
        array or tuple: As :func:`flash_attention_sparse`.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention_sparse`.
    """
    return _attend(
        "sparse_attention_dispatch", Q, K, V, mask, block_tile, scale=scale, causal=causal, mask=token_mask, **options
    )


@clear_type_errors
def sparse_attention_nax(
    Q: mx.array,
    K: mx.array,
    V: mx.array,
    mask: BlockMask | mx.array,
    *,
    block_tile: int | Sequence[int] = 32,
    scale: float | None = None,
    causal: bool = False,
    token_mask: mx.array | None = None,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """:func:`flash_attention_sparse` under the name and with the arguments of the package that this one replaces.

    Args:
        Q, K, V (array): As :func:`flash_attention_sparse`.
        mask (BlockMask or array): The visible tiles.
        block_tile (int or tuple of int): The size of a tile of a mask that is an array. Default 32.
        scale, causal: As :func:`flash_attention_sparse`.
        token_mask (array, optional): The ``mask`` of :func:`flash_attention_sparse`, of tokens.
        **options: Its other keywords, except ``backward``.

    Returns:
        array or tuple: As :func:`flash_attention_sparse`.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention_sparse`.
    """
    return _attend(
        "sparse_attention_nax", Q, K, V, mask, block_tile, scale=scale, causal=causal, mask=token_mask, **options
    )


def _attend(
    function: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    block_mask: BlockMask | mx.array,
    block_size: int | Sequence[int] | None,
    *,
    return_lse: bool = False,
    stream: Stream = None,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """The call of ``function``, one of the names of block-sparse attention."""
    out, lse = _ext.attention_sparse(
        q, k, v, block_mask, optional_tile_sides(block_size, function),
        make_options(function, stream=stream, **options), return_lse, stream,
    )  # fmt: skip
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out
