"""The options that the entry points of attention share, from Python arguments to the library's struct."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import _ext

Stream = mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None
Integers = mx.array | Sequence[int] | Sequence[Sequence[int]]
Positions = int | mx.array | Sequence[int] | None  # one for all, or one for each batch entry

LOG2_E = math.log2(math.e)
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


def make_options(
    function: str,
    *,
    window_size: Sequence[int] | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | mx.array | None = None,
    stream: Stream = None,
    **others: Any,
) -> _ext.AttentionOptions:
    """The options of a call of ``function``; ``others`` are passed on as they are."""
    left, right = (-1, -1) if window_size is None else window(window_size, function)
    return _ext.AttentionOptions(
        function=function,
        window_left=left,
        window_right=right,
        kv_lengths=optional_integers(function, "kv_lengths", kv_lengths),
        dropout_p=dropout_p,
        dropout_seed=seed(dropout_p, dropout_seed, stream, function),
        **others,
    )


def window(window_size: Sequence[int], function: str) -> tuple[int, int]:
    """The two sizes as int32: larger ones mean the same as the largest."""
    if isinstance(window_size, (tuple, list)) and len(window_size) == 2:
        try:
            left, right = (min(max(operator.index(n), _INT32_MIN), _INT32_MAX) for n in window_size)
            return left, right
        except TypeError:
            pass
    raise ValueError(f"[{function}] window_size must be a tuple of two integers; got {window_size!r}")


def integers(function: str, name: str, values: Integers) -> mx.array:
    """Integers given as a sequence as an array; an array keeps its dtype for the library to check."""
    if isinstance(values, mx.array):
        return values
    # MLX takes neither numpy's integers nor, everywhere, its arrays.
    listed = values.tolist() if hasattr(values, "tolist") else values
    numbers = [operator.index(n) if hasattr(n, "__index__") and not isinstance(n, bool) else n for n in listed]
    try:
        return mx.array(numbers) if numbers else mx.zeros((0,), mx.int32)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a number of more than 64 bits
        raise ValueError(f"[{function}] {name} must hold integers of 64 bits; got {reprlib.repr(values)}") from None


def optional_integers(function: str, name: str, values: Integers | None) -> mx.array | None:
    """The same of what may be left out."""
    return None if values is None else integers(function, name, values)


def positions(function: str, name: str, given: Positions) -> mx.array | None:
    """Positions of the batch entries: one for each, or one for all as an array of rank 0."""
    several: Any = given
    if hasattr(several, "tolist") and not isinstance(several, mx.array):
        several = several.tolist()
    if given is None or hasattr(several, "__iter__"):
        return optional_integers(function, name, several)
    number = operator.index(several)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"[{function}] {name} must hold integers of 64 bits; got {number}")
    return mx.array(number)


def seed(dropout_p: float, given: int | mx.array | None, stream: Stream, function: str) -> int | mx.array | None:
    """The seed for the library: drawn from MLX's random state where dropout needs one and none is given."""
    if given is None:
        if not 0 < dropout_p <= 1:  # none is needed, or the library refuses the probability
            return None
        # Eight uniform bytes: MLX's random integers have only the 24 bits of a float.
        return mx.random.randint(0, 256, (8,), dtype=mx.uint8, stream=stream).view(mx.uint32, stream=stream)
    if isinstance(given, mx.array):
        return given
    number = operator.index(given)
    if not 0 <= number < 2**64:
        raise ValueError(f"[{function}] dropout_seed must be in [0, 2**64); got {number}")
    return number


def tile_sides(block_size: int | Sequence[int], function: str) -> tuple[int, int]:
    """``(block_q, block_k)`` of a size that may be one number for both."""
    try:
        if not isinstance(block_size, (tuple, list)):
            side = operator.index(block_size)  # type: ignore[arg-type]
            return side, side
        if len(block_size) == 2:
            return operator.index(block_size[0]), operator.index(block_size[1])
    except TypeError:
        pass
    raise ValueError(f"[{function}] block_size must be an integer or a pair of integers; got {block_size!r}")


def optional_tile_sides(block_size: int | Sequence[int] | None, function: str) -> tuple[int, int] | None:
    """The same of what may be left out."""
    return None if block_size is None else tile_sides(block_size, function)
