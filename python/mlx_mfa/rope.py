"""Attention with rotary position embedding, applied as queries and keys are loaded (arXiv:2104.09864)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Positions, Stream, make_options, positions
from ._type_errors import clear_type_errors
from .attention import Backend
from .kv_cache import attend_to_cache
from .rope_tables import make_rope_3d_tables


@clear_type_errors
def flash_attention_rope(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    rotary_cos: mx.array | None = None,
    rotary_sin: mx.array | None = None,
    scale: float | None = None,
    causal: bool = False,
    cache_seqlens: Positions = 0,
    rope_3d: Mapping[str, Any] | None = None,
    interleaved: bool = True,
    rotary_dim: int | None = None,
    stream: Stream = None,
    *,
    k_offset: Positions = None,
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
    """:func:`flash_attention` of queries and keys that are rotated by their positions as they are loaded.

    Pairs ``(a, b)`` of the first ``rotary_dim`` channels become ``(a cos - b sin, a sin + b cos)``, with the cosine and
    sine of the pair in the row of the token's position; channels behind pass through. Neither rotated queries nor keys
    are stored. Differentiable in ``q``, ``k`` and ``v`` as they are given; the tables get no gradient. Runs on CPU
    streams.

    Args:
        q (array): ``[B, Hq, Nq, D]``, float32, float16 or bfloat16.
        k, v (array): ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``.
        rotary_cos, rotary_sin (array): ``[positions, rotary_dim / 2]``, floating, used in float32.
        cache_seqlens (int, array or sequence of int): ``[B]`` or one for all: the position of query 0. Default 0.
        rope_3d (dict, optional): The arguments of :func:`make_rope_3d_tables` (``grid_h`` and ``grid_w``, others by
            default: ``num_frames`` 1, ``head_dim`` that of ``q``) in place of tables; all positions are from 0 then.
        interleaved (bool): Pairs are channels (2c, 2c + 1), else (c, c + rotary_dim / 2). Default True.
        rotary_dim (int, optional): Twice the columns of the tables, which is the default.
        k_offset (int, array or sequence of int, optional): The position of key 0. Default 0.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        scale, causal, softcap, alibi_slopes, dropout_p, window_size, attn_bias, backend, mask, sinks, kv_lengths,
            dropout_seed, stream: As :func:`flash_attention`; ``backend`` is ``"auto"`` or ``"mfa"``.

    Returns:
        array or tuple: ``out``, ``[B, Hq, Nq, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple ``(out, lse)``.

    Raises:
        ValueError: If shapes, dtypes, options, tables or positions are not as said here.
        RuntimeError: If positions that were still to be computed are outside the tables (when they are evaluated), or
            no kernel runs on the stream.
        TypeError: If an argument is of another type than said here.
    """
    options = {
        "scale": scale, "causal": causal, "softcap": softcap, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p,
        "window_size": window_size, "attn_bias": attn_bias, "backend": backend, "mask": mask, "sinks": sinks,
        "kv_lengths": kv_lengths, "dropout_seed": dropout_seed,
    }  # fmt: skip
    return _attend(
        "flash_attention_rope", q, k, v, rotary_cos, rotary_sin, cache_seqlens, k_offset, rope_3d, interleaved,
        rotary_dim, return_lse, stream, options,
    )  # fmt: skip


@clear_type_errors
def flash_attention_rope_unified(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    rotary_cos: mx.array | None = None,
    rotary_sin: mx.array | None = None,
    *,
    k_cache: mx.array | None = None,
    v_cache: mx.array | None = None,
    block_table: mx.array | None = None,
    seq_lens: mx.array | Sequence[int] | None = None,
    block_size: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    cache_seqlens: Positions = None,
    k_offset: Positions = None,
    interleaved: bool = True,
    rotary_dim: int | None = None,
    rope_3d: Mapping[str, Any] | None = None,
    return_updated_cache: bool = False,
    stream: Stream = None,
    return_lse: bool = False,
    **options: Any,
) -> mx.array | tuple[mx.array, ...]:
    """Rotary attention in any of three modes, which the arguments choose.

    * ``block_table``: ``k`` and ``v`` are pools of rotated keys; only ``q`` is rotated.
    * ``k_cache`` or ``return_updated_cache``: ``k`` and ``v`` are new tokens, which are rotated and appended to the
      cache of rotated keys, as :func:`flash_attention_kvcache` does (in place if ``seq_lens`` are given).
    * neither: as :func:`flash_attention_rope`, with ``k_offset`` the position of key 0.

    Args:
        q, k, v (array): As :func:`flash_attention_rope`; with ``block_table`` ``k`` and ``v`` are as ``k_cache`` and
            ``v_cache`` of :func:`flash_attention_kvcache`, with a cache as its ``k_new`` and ``v_new``.
        rotary_cos, rotary_sin, interleaved, rotary_dim, rope_3d: As :func:`flash_attention_rope`.
        k_cache, v_cache, block_table, seq_lens, block_size: As :func:`flash_attention_kvcache`.
        cache_seqlens (int, array or sequence of int, optional): The position of the first query and new key. Default: 0
            without a cache, else what the lengths say.
        k_offset (int, array or sequence of int, optional): The position of key 0, without a cache. Default 0.
        return_updated_cache (bool): Return the caches too. Default False.
        scale, causal, stream: As :func:`flash_attention`; ``causal`` is True by default.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        options: The modifiers of :func:`flash_attention`, by name.

    Returns:
        array or tuple: ``out``, then ``lse`` (base 2) with ``return_lse``, then both caches with
        ``return_updated_cache``.

    Raises:
        ValueError, RuntimeError, TypeError: As those two functions.
    """
    function = "flash_attention_rope_unified"
    with_cache = k_cache is not None or v_cache is not None or return_updated_cache
    standalone = block_table is None and not with_cache
    name, given = ("seq_lens", seq_lens) if standalone else ("k_offset", k_offset)
    if given is not None:
        mode = "without" if standalone else "with"
        raise ValueError(f"[{function}] {name} must not be given {mode} a cache; got {given!r}")
    if standalone:
        return _attend(
            function, q, k, v, rotary_cos, rotary_sin, 0 if cache_seqlens is None else cache_seqlens, k_offset, rope_3d,
            interleaved, rotary_dim, return_lse, stream, {"scale": scale, "causal": causal} | options,
        )  # fmt: skip
    if block_table is not None and with_cache:
        raise ValueError(f"[{function}] block_table excludes k_cache, v_cache and return_updated_cache; got both")
    rotary_cos, rotary_sin = _tables(function, q, rotary_cos, rotary_sin, rope_3d, cache_seqlens)
    pools = (k, v, None, None) if block_table is not None else (k_cache, v_cache, k, v)
    results = attend_to_cache(
        function, q, *pools, block_table=block_table, seq_lens=seq_lens, block_size=block_size, rotary_cos=rotary_cos,
        rotary_sin=rotary_sin, cache_seqlens=cache_seqlens, interleaved=interleaved, rotary_dim=rotary_dim,
        return_lse=return_lse, stream=stream, scale=scale, causal=causal, **options,
    )  # fmt: skip
    if return_updated_cache or block_table is not None:
        return results
    return results[:2] if return_lse else results[0]


def _attend(
    function: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array | None,
    sin: mx.array | None,
    q_positions: Positions,
    k_positions: Positions,
    rope_3d: Mapping[str, Any] | None,
    interleaved: bool,
    rotary_dim: int | None,
    return_lse: bool,
    stream: Stream,
    options: dict[str, Any],
) -> mx.array | tuple[mx.array, mx.array]:
    cos, sin = _tables(function, q, cos, sin, rope_3d, q_positions)
    of_q = positions(function, "cache_seqlens", q_positions)
    of_k = positions(function, "k_offset", k_positions)
    out, lse = _ext.attention_rope(
        q, k, v, cos, sin, interleaved, rotary_dim, of_q, of_k, True,
        make_options(function, stream=stream, **options), stream,
    )  # fmt: skip
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out


def _tables(
    function: str,
    q: mx.array,
    cos: mx.array | None,
    sin: mx.array | None,
    rope_3d: Mapping[str, Any] | None,
    offset: Positions,
) -> tuple[mx.array, mx.array]:
    """The tables that the arguments give."""
    if rope_3d is None:
        if cos is None or sin is None:
            raise ValueError(f"[{function}] rotary_cos and rotary_sin, or rope_3d, must be given; got neither")
        return cos, sin
    if cos is not None or sin is not None:
        raise ValueError(f"[{function}] rope_3d excludes rotary_cos and rotary_sin; got both")
    if not (offset is None or (isinstance(offset, int) and offset == 0)):
        raise ValueError(f"[{function}] rope_3d counts positions from 0; got cache_seqlens {offset!r}")
    if not {"grid_h", "grid_w"} <= set(rope_3d):
        raise ValueError(f"[{function}] rope_3d must have grid_h and grid_w; got {sorted(rope_3d)}")
    known = inspect.signature(make_rope_3d_tables).parameters.keys()
    if not set(rope_3d) <= known:
        raise ValueError(f"[{function}] rope_3d must have keys of {sorted(known)}; got {sorted(rope_3d)}")
    return make_rope_3d_tables(**({"num_frames": 1, "head_dim": q.shape[-1]} | dict(rope_3d)))
