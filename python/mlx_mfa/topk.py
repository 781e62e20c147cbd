"""Attention to the keys of the largest scores. Arguments are adapted here; the C++ library checks them and decides."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, make_options, optional_tile_sides
from ._type_errors import clear_type_errors
from .attention import Backend
from .masks import BlockMask


@clear_type_errors
def flash_attention_topk(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    topk_ratio: float,
    scale: float | None = None,
    mask: BlockMask | mx.array | None = None,
    *,
    causal: bool = False,
    block_size: int | Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    window_size: Sequence[int] | None = None,
    return_lse: bool = False,
    stream: Stream = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    token_mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """:func:`flash_attention` in which each query keeps its keys of the largest scores.

    With ``k = max(1, ceil(topk_ratio * n))``, n being the keys of the batch entry, a row keeps the visible keys whose
    score is at least its k-th largest: ties with the k-th are kept, and a row that sees fewer keys keeps them all.
    Scores are the finished ones, with softcap, ALiBi, bias and masks. Exact, without storing the scores. Gradients are
    those of the kept keys: the selection is piecewise constant. Runs on CPU streams.

    Args:
        q, k, v (array): As :func:`flash_attention`.
        topk_ratio (float): In (0, 1].
        mask (BlockMask or array, optional): Visible tiles, as :func:`flash_attention_sparse` takes them.
        block_size (int or tuple of int, optional): The size of a tile of a mask that is an array.
        token_mask (array, optional): bool, broadcastable to ``[B, Hq, Nq, Nk]``: the ``mask`` of
            :func:`flash_attention`.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row, over its kept keys. Default False.
        scale, causal, softcap, alibi_slopes, dropout_p, window_size, attn_bias, backend, sinks, kv_lengths,
        dropout_seed, stream: As :func:`flash_attention`.

    Returns:
        array or tuple: ``out``, ``[B, Hq, Nq, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple ``(out, lse)``
        with float32 ``[B, Hq, Nq]``.

    Raises:
        ValueError: If ``topk_ratio`` or the mask is not as said here, and as :func:`flash_attention`.
        RuntimeError: If no kernel runs on the stream.
        TypeError: If an argument is of another type than said here.
    """
    options = make_options(
        "flash_attention_topk", scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, window_size=window_size, attn_bias=attn_bias, backend=backend, mask=token_mask,
        sinks=sinks, kv_lengths=kv_lengths, dropout_seed=dropout_seed, stream=stream,
    )  # fmt: skip
    tile = optional_tile_sides(block_size, "flash_attention_topk")
    out, lse = _ext.attention_topk(q, k, v, topk_ratio, mask, tile, options, return_lse, stream)
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out
