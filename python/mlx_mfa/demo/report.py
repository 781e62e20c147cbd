"""The demo's results as text tables and as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from .compare import Comparison


def blas_name() -> str:
    """The BLAS behind MLX's own matrix products: a preloaded one, else what MLX was built with."""
    for path in os.environ.get("LD_PRELOAD", "").replace(":", " ").split():
        name = os.path.basename(path)
        if any(word in name for word in ("blas", "mkl", "blis")):
            return f"{name}, preloaded"
    return "the BLAS of its wheel"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text: the first column left, the others right unless the header ends in a blank."""
    lines = [header, *rows]
    widths = [max(len(line[i].rstrip()) for line in lines) for i in range(len(header))]
    left = [i == 0 or title.endswith(" ") for i, title in enumerate(header)]

    def render(line: Sequence[str]) -> str:
        cells = [
            text.rstrip().ljust(width) if to_left else text.rstrip().rjust(width)
            for text, width, to_left in zip(line, widths, left, strict=True)
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([render(header), rule, *(render(row) for row in rows)])


def milliseconds(seconds: float) -> str:
    """Three significant digits or all whole ones: 0.0812, 3.21, 41.7, 1,234."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def model_table(comparison: Comparison) -> str:
    """The whole model: one line for each workload and column, ratios to the first column of the workload."""
    header = ["work", "run with ", "tokens/s", "ratio", "attention ms", "ratio", "share", "peak MB"]
    rows: list[list[str]] = []
    baseline = None
    for row in comparison.model:
        first = baseline is None or baseline.work != row.work
        if first or baseline is None:
            baseline = row
        rows.append(
            [
                row.work if first else "",
                row.column,
                f"{row.tokens_per_s:.1f}",
                "" if first else f"{row.tokens_per_s / baseline.tokens_per_s:.2f}x",
                milliseconds(row.attention_s),
                "" if first else f"{baseline.attention_s / row.attention_s:.1f}x",
                f"{100 * row.attention_share:.0f} %" if row.attention_share >= 0.01 else "< 1 %",
                f"{row.peak_bytes / 1e6:.0f}",
            ]
        )
    return table(header, rows)


def attention_table(comparison: Comparison) -> str:
    """Attention by itself, MLX's op against ours."""
    header = ["attention alone (batch 1)", "MLX ms", "ours ms", "ratio", "MLX error", "ours error"]
    rows = [
        [
            row.shape,
            milliseconds(row.stock_s),
            milliseconds(row.ours_s),
            f"{row.stock_s / row.ours_s:.1f}x",
            f"{row.stock_error:.1e}",
            f"{row.ours_error:.1e}",
        ]
        for row in comparison.attention
    ]
    return table(header, rows)


def report(comparison: Comparison, replies: Sequence[dict[str, Any]], model_name: str, dtype: str) -> str:
    """Everything that was measured, as text."""
    parts = []
    if comparison.model:
        parts += [
            model_table(comparison),
            "attention ms: all layers, for the whole prompt (prefill) or one token (decode), timed in a separate run.",
            "share: of the run. peak MB: MLX's memory, weights included. Linear layers are MLX's where not named.",
            f"Model {model_name}, {dtype}; stock MLX is {mx.__version__} with {blas_name()}.",
            "",
        ]
    if comparison.attention:
        parts += [attention_table(comparison), "Errors: largest difference from MLX in float32.", ""]
    for name, (equal, total) in total_agreement(replies).items():
        plural = "replies" if len(replies) > 1 else "reply"
        parts.append(f"Tokens of {name}: {equal} of {total} equal to stock MLX's, in {len(replies)} {plural}.")
    if comparison.skipped:
        parts.append(f"Left out to stay within the time of --quick: {'; '.join(comparison.skipped)}.")
    return "\n".join(parts)


def total_agreement(replies: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Equal and all tokens over all replies, for each column but the first."""
    totals: dict[str, tuple[int, int]] = {}
    for reply in replies:
        for name, counted in reply["agreement"].items():
            equal, total = totals.get(name, (0, 0))
            totals[name] = equal + counted["equal"], total + counted["total"]
    return totals


def as_json(comparison: Comparison, replies: Sequence[dict[str, Any]], model_name: str, dtype: str) -> dict[str, Any]:
    """Everything that was measured and generated, for ``json.dump``."""
    return {
        "model": model_name,
        "dtype": dtype,
        "mlx": mx.__version__,
        "blas": blas_name(),
        "replies": list(replies),
        **asdict(comparison),
    }
