"""Neighbourhood attention. Arguments are adapted here; the C++ library checks them and decides."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, make_options
from ._type_errors import clear_type_errors
from .attention import Backend


@clear_type_errors
def flash_attention_gna(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    seq_shape: Sequence[int],
    window_size: Sequence[int],
    stride: Sequence[int],
    scale: float | None = None,
    stream: Stream = None,
    *,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    boundary: Literal["truncate", "shift"] = "truncate",
    even_bias: Literal["right", "left"] = "right",
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Generalised neighbourhood attention (arXiv:2504.16922): a token attends to a window of its grid around it.

    Tokens lie row-major on a grid of one to three axes. Along an axis ``stride`` queries share one window of
    ``window_size`` keys around them, and a query sees the product of its windows. With dilation d an axis is d
    interleaved sequences, each with that rule for itself. Exact for every head dimension, differentiable; the rule is
    that of ``boundary="truncate"`` and ``even_bias="right"`` in the package that this one replaces, and of ``"shift"``
    and ``"left"`` in NATTEN.

    Args:
        q, k, v (array): As :func:`flash_attention`, each of ``prod(seq_shape)`` tokens.
        seq_shape (tuple of int): Extents of the grid, 1 to 3 of them.
        window_size (tuple of int): Keys of a window, for each axis.
        stride (tuple of int): Queries that share a window, for each axis, at most ``window_size``.
        dilation (int or tuple of int): At most the extent of the axis. Default 1.
        causal (bool or tuple of bool): On such an axis a query sees keys up to itself, and the window ends at the last
            of the queries that share it. Default False.
        boundary (str): ``"truncate"``: a window that reaches past the grid is cut. ``"shift"``: it is moved inside and
            keeps its size. Default ``"truncate"``.
        even_bias (str): The side on which an even window with an odd stride has one key more: ``"right"`` or
            ``"left"``. Default ``"right"``.
        return_lse (bool): Also return the **base-2** log-sum-exp of each row. Default False.
        scale, softcap, alibi_slopes, dropout_p, attn_bias, backend, mask, sinks, kv_lengths, dropout_seed, stream: As
            :func:`flash_attention`; they count tokens in the order of the grid.

    Returns:
        array or tuple: ``out``, ``[B, Hq, N, Dv]`` in the dtype of ``q``; with ``return_lse`` a tuple ``(out, lse)``
        with float32 ``[B, Hq, N]``.

    Raises:
        ValueError: If the grid, the window or the stride is not as said here, and as :func:`flash_attention`.
        RuntimeError: If no kernel runs on the stream.
        TypeError: If an argument is of another type than said here.
    """
    if boundary not in ("truncate", "shift"):
        raise ValueError(f'[flash_attention_gna] boundary must be "truncate" or "shift"; got {boundary!r}')
    if even_bias not in ("right", "left"):
        raise ValueError(f'[flash_attention_gna] even_bias must be "right" or "left"; got {even_bias!r}')
    axes = _integers("seq_shape", seq_shape)
    dilations = _integers("dilation", dilation if isinstance(dilation, (tuple, list)) else [dilation] * len(axes))
    causals = _booleans("causal", causal if isinstance(causal, (tuple, list)) else [causal] * len(axes))
    options = make_options(
        "flash_attention_gna", scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        attn_bias=attn_bias, backend=backend, mask=mask, sinks=sinks, kv_lengths=kv_lengths, dropout_seed=dropout_seed,
        stream=stream,
    )  # fmt: skip
    out, lse = _ext.attention_gna(
        q, k, v, axes, _integers("window_size", window_size), _integers("stride", stride), dilations, causals,
        boundary == "shift", even_bias == "left", options, return_lse, stream,
    )  # fmt: skip
    return (out, mx.multiply(lse, LOG2_E, stream=stream)) if return_lse else out


def _integers(name: str, values: object) -> list[int]:
    """The values of a tuple or list as int32."""
    if isinstance(values, (tuple, list)):
        try:
            numbers = [operator.index(n) for n in values]
        except TypeError:
            pass
        else:
            if all(-(2**31) <= n < 2**31 for n in numbers):
                return numbers
    raise ValueError(f"[flash_attention_gna] {name} must be a tuple of integers of 32 bits; got {values!r}")


def _booleans(name: str, values: list[object] | tuple[object, ...]) -> list[bool]:
    """The values as bool, if they are that or a number 0 or 1."""
    numbers = [n.item() if hasattr(n, "item") and getattr(n, "size", 1) == 1 else n for n in values]
    if not all(isinstance(n, int) and n in (0, 1) for n in numbers):
        raise ValueError(f"[flash_attention_gna] {name} must be a bool or one for each axis; got {values!r}")
    return [bool(n) for n in numbers]
