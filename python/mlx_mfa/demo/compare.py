"""Stock MLX against this package in a real model: tokens per second, time in attention, peak memory, attention alone.

Whole-model times come from undisturbed runs. Time in attention comes from separate runs in which each call of the
attention function is evaluated by itself between two readings of the clock.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ..hooks import hooked
from ..integrations.mlx_lm import attention_function, patched_mlx_lm, rebind
from . import DemoError
from .progress import Progress

TIMED_LAYERS = 4  # of a prefill; all layers do the same work in attention, so four give the mean
SCORES_AS_TOKENS = 4e-6  # about how many tokens of prefill take as long as one score of stock attention
WARM_UP_TOKENS = 1  # of a decode run: the first token may make the cache grow


@dataclass(frozen=True)
class Column:
    """One way to run the model: ``context()`` puts it in force for a ``with`` block."""

    name: str
    context: Callable[[], AbstractContextManager[Any]]


def columns() -> list[Column]:
    """What is compared; the first is the baseline."""
    return [
        Column("stock MLX", lambda: hooked(False)),
        Column("mlx-mfa attention", lambda: _both(hooked(False), patched_mlx_lm())),
        Column("mlx-mfa attention, linear", lambda: _both(hooked(True), patched_mlx_lm())),
    ]


@contextlib.contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


@dataclass(frozen=True)
class AttentionShape:
    """One call of attention by itself."""

    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    dtype: str
    causal: bool

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.dtype} Hq{self.Hq} Hkv{self.Hkv} D{self.D} {self.Nq} x {self.Nk} {kind}"


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    reply_tokens: int
    prompts: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    decode_tokens: int
    attention: tuple[AttentionShape, ...]
    budget_s: float | None = None  # after this long no further row is begun


# The first rows have the heads of SmolLM2-135M. Decode is one query over a long cache.
SHORT_ATTENTION = (
    AttentionShape(9, 3, 512, 512, 64, "bfloat16", True),
    AttentionShape(9, 3, 512, 512, 64, "float32", True),
    AttentionShape(8, 8, 1024, 1024, 64, "float32", False),
    AttentionShape(9, 3, 1, 4096, 64, "bfloat16", False),
    AttentionShape(32, 8, 1, 4096, 128, "bfloat16", False),
)
LONG_ATTENTION = (
    AttentionShape(9, 3, 2048, 2048, 64, "bfloat16", True),
    AttentionShape(9, 3, 2048, 2048, 64, "float32", True),
    AttentionShape(8, 8, 2048, 2048, 128, "float32", False),
    AttentionShape(32, 8, 1, 32768, 128, "bfloat16", False),
)
QUICK = Sizes(20, 1, (64,), (64, 1024), 4, SHORT_ATTENTION, budget_s=85.0)
FULL = Sizes(48, 3, (512, 2048), (64, 4096), 32, SHORT_ATTENTION + LONG_ATTENTION)


@dataclass(frozen=True)
class ModelRow:
    """One workload in one column. Prefill: attention is the sum over layers; decode: it is for one token."""

    work: str
    column: str
    tokens_per_s: float
    seconds: float
    attention_s: float
    attention_share: float
    peak_bytes: int


@dataclass(frozen=True)
class AttentionRow:
    """Attention alone: median seconds of MLX's op and of ours, and the largest difference from float32 MLX."""

    shape: str
    stock_s: float
    ours_s: float
    stock_error: float
    ours_error: float


class _Enough(Exception):
    """Ends an instrumented run once enough calls have been timed."""


@contextlib.contextmanager
def timed_attention(max_calls: int | None = None) -> Iterator[list[float]]:
    """Time each call of mlx-lm's attention function, whichever is in force; yields the list that the seconds go to.

    The inputs are evaluated before the clock starts and the output before it stops. After ``max_calls`` calls the model
    is interrupted and the ``with`` block ends.
    """
    current = attention_function()
    seconds: list[float] = []

    def timed(queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        mx.eval(queries, keys, values, [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)])
        start = time.perf_counter()
        out = current(queries, keys, values, *args, **kwargs)
        mx.eval(out)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == max_calls:
            raise _Enough
        return out

    rebind(current, timed)
    try:
        yield seconds
    except _Enough:
        pass
    finally:
        rebind(timed, current)


def _new_cache(model: Any) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def run_prefill(model: Any, tokens: mx.array) -> None:
    """Process a prompt up to the logits of its last token, as mlx-lm does: all but one token, then the last."""
    cache = _new_cache(model)
    model(tokens[None, :-1], cache=cache)
    mx.eval([layer.state for layer in cache])
    mx.eval(model(tokens[None, -1:], cache=cache))


def run_decode(model: Any, cache: list[Any], token: mx.array, count: int) -> None:
    """Generate ``count`` tokens greedily, one at a time."""
    for _ in range(count):
        token = mx.argmax(model(token[None], cache=cache)[:, -1, :], axis=-1)
        mx.eval(token)


def filled_cache(model: Any, context: int) -> list[Any]:
    """A cache of ``context`` tokens whose keys and values are random: the time of a step does not depend on them."""
    probe = _new_cache(model)
    mx.eval(model(mx.zeros((1, 1), mx.int32), cache=probe))
    cache = _new_cache(model)
    for index, (layer, (keys, values)) in enumerate(zip(cache, (layer.state[:2] for layer in probe), strict=True)):
        fill = [
            mx.random.normal((*a.shape[:2], context, a.shape[3]), key=mx.random.key(2 * index + which)).astype(a.dtype)
            for which, a in enumerate((keys, values))
        ]
        mx.eval(layer.update_and_fetch(*fill))
    return cache


def _timed(run: Callable[[], None]) -> tuple[float, int]:
    """Seconds of one run and the peak of MLX's memory in it."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, mx.get_peak_memory()


def measure_prefill(model: Any, tokens: mx.array, column: Column) -> ModelRow:
    """Time the prefill of ``tokens`` in ``column``."""
    with column.context():
        seconds, peak = _timed(lambda: run_prefill(model, tokens))
        with timed_attention(max_calls=min(TIMED_LAYERS, len(model.layers))) as calls:
            run_prefill(model, tokens)
    # The last layer's attention over the prompt is never needed: only its keys and values are.
    attention = statistics.mean(calls) * (len(model.layers) - 1)
    return _model_row(f"prefill {tokens.size}", column, tokens.size, seconds, attention, attention / seconds, peak)


def measure_decode(model: Any, context: int, count: int, column: Column) -> ModelRow:
    """Time ``count`` steps over a cache of ``context`` tokens in ``column``."""
    token = mx.zeros((1,), mx.int32)
    with column.context():
        cache = filled_cache(model, context)
        run_decode(model, cache, token, WARM_UP_TOKENS)
        seconds, peak = _timed(lambda: run_decode(model, cache, token, count))
        with timed_attention() as calls:
            run_decode(model, cache, token, min(count, 2))
    attention = statistics.mean(calls) * len(model.layers)
    return _model_row(f"decode at {context}", column, count, seconds, attention, attention * count / seconds, peak)


def _model_row(
    work: str, column: Column, tokens: int, seconds: float, attention: float, share: float, peak: int
) -> ModelRow:
    return ModelRow(work, column.name, tokens / seconds, seconds, attention, min(share, 1.0), peak)


def measure_attention(shape: AttentionShape) -> AttentionRow:
    """Time MLX's attention op and ours on one random problem, and compare both with MLX's in float32."""
    from .. import flash_attention

    def draw(heads: int, length: int, seed: int) -> mx.array:
        return mx.random.normal((1, heads, length, shape.D), key=mx.random.key(seed)).astype(getattr(mx, shape.dtype))

    q, k, v = draw(shape.Hq, shape.Nq, 0), draw(shape.Hkv, shape.Nk, 1), draw(shape.Hkv, shape.Nk, 2)
    mx.eval(q, k, v)
    scale = shape.D**-0.5
    mask = "causal" if shape.causal else None

    def stock(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    with hooked(False):
        exact = stock(*(a.astype(mx.float32) for a in (q, k, v)))
    stock_s, stock_out = _median_seconds(lambda: stock(q, k, v))
    ours_s, ours_out = _median_seconds(lambda: flash_attention(q, k, v, scale=scale, causal=shape.causal))
    errors = [mx.abs(out.astype(mx.float32) - exact).max().item() for out in (stock_out, ours_out)]
    return AttentionRow(str(shape), stock_s, ours_s, *errors)


def _median_seconds(run: Callable[[], mx.array], budget_s: float = 0.5, most: int = 50) -> tuple[float, mx.array]:
    """Median over runs that fill ``budget_s``; the first run warms up and counts only if it is the only one."""
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        out = run()
        mx.eval(out)
        now = time.perf_counter()
        times.append(now - start)
        if now > end or len(times) > most:
            return statistics.median(times[1:] or times), out


def prompt_of(tokenizer: Any, length: int) -> mx.array:
    """``length`` tokens of plain English text."""
    text = "The old lighthouse stood at the end of the harbour, and every evening its keeper climbed the stairs. "
    tokens = list(tokenizer.encode(text))
    return mx.array((tokens * (length // len(tokens) + 1))[:length])


@dataclass
class Comparison:
    """The rows of the table, and the work that the time budget left out in some or all columns."""

    model: list[ModelRow]
    attention: list[AttentionRow]
    skipped: list[str]


def compare(model: Any, tokenizer: Any, sizes: Sizes, deadline: float | None = None) -> Comparison:
    """Run every workload of ``sizes`` in every column; begin none after ``deadline`` (of ``time.monotonic``).

    Raises:
        DemoError: The model keeps something else than keys and values, which cannot be filled to a length.
    """
    from mlx_lm.models.cache import KVCache

    other = next((layer for layer in _new_cache(model) if not isinstance(layer, KVCache)), None)
    if other is not None:
        raise DemoError(
            f"the comparison needs a model with plain KV caches; this one has {type(other).__name__};"
            " use --no-table to chat only"
        )
    result = Comparison([], [], [])
    # What is run, in which column, its weight in the bar, and where the row goes.
    jobs: list[tuple[str, str, float, list[Any], Callable[[], Any]]] = []
    # All columns of a workload run one after the other, so that they see the same state of the machine. The whole model
    # comes first: it is what a time budget should spare.
    for length in sizes.prefill:
        tokens = prompt_of(tokenizer, length)
        for column in columns():
            run = partial(measure_prefill, model, tokens, column)
            jobs.append((f"prefill {length}", column.name, length, result.model, run))
    for context in sizes.decode:
        for column in columns():
            run = partial(measure_decode, model, context, sizes.decode_tokens, column)
            jobs.append((f"decode at {context}", column.name, 3 * sizes.decode_tokens, result.model, run))
    for shape in sizes.attention:
        weight = shape.Hq * shape.Nq * shape.Nk * SCORES_AS_TOKENS
        jobs.append((str(shape), "attention alone", weight, result.attention, partial(measure_attention, shape)))

    with Progress("measuring", sum(weight for _, _, weight, _, _ in jobs)) as progress:
        for work, where, weight, rows, run in jobs:
            if deadline is not None and time.monotonic() > deadline:
                if work not in result.skipped:
                    result.skipped.append(work)
                continue
            progress.advance(0, label=f"{work}, {where}")
            rows.append(run())
            progress.advance(weight)
    return result
