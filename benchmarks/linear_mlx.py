"""Products of linear layers through the Python API beside MLX and, where it is installed, PyTorch.

Usage: python benchmarks/linear_mlx.py [--filter REGEX] [--reps N] [--budget S]

Every library multiplies the same numbers by the same weights [out, in]; its answer is compared with ours, and repeats
are interleaved. A library's column is its time over ours, and how far its answer is from ours relative to the largest
element. ``LD_PRELOAD=libopenblas.so.0`` shows MLX with OpenBLAS, which MLX uses for float32.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_mfa
import numpy as np
from mlx_mfa.bench import blas_of_mlx
from mlx_mfa.bench_peers import usable_cores
from mlx_mfa.demo.report import table


@dataclass(frozen=True)
class Case:
    """x [rows, K] by weights [N, K] in ``dtype``, quantised to ``bits`` in groups of 64 unless that is 0."""

    rows: int
    N: int
    K: int
    dtype: str
    bits: int = 0

    def __str__(self) -> str:
        kind = f"{self.bits} bits, {self.dtype}" if self.bits else self.dtype
        return f"{kind} {self.rows} x {self.N} x {self.K}"


CASES = [
    *(Case(m, 1024, 1024, d) for d in ("float32", "bfloat16", "float16") for m in (64, 256)),
    *(Case(m, 4096, 4096, d) for d in ("float32", "bfloat16") for m in (1, 4, 16)),
    Case(1, 49152, 576, "bfloat16"),
    *(Case(m, 4096, 4096, "bfloat16", bits) for bits in (4, 8) for m in (1, 16)),
]

Call = Callable[[], Any]


def mlx_calls(case: Case, x: mx.array, w: mx.array) -> tuple[Call, Call]:
    """Ours and MLX's, each evaluated."""
    if case.bits:
        q = mx.quantize(w, 64, case.bits)
        mx.eval(q)
        options = {"transpose": True, "group_size": 64, "bits": case.bits}
        return (
            lambda: mx.eval(mlx_mfa.quantized_matmul(x, *q, **options)),
            lambda: mx.eval(mx.quantized_matmul(x, *q, **options)),
        )
    return lambda: mx.eval(mlx_mfa.matmul(x, w.T)), lambda: mx.eval(mx.matmul(x, w.T))


def answer_of(case: Case, x: mx.array, w: mx.array, ours: bool) -> np.ndarray:
    """The product, as float32."""
    library = mlx_mfa if ours else mx
    if case.bits:
        out = library.quantized_matmul(x, *mx.quantize(w, 64, case.bits), group_size=64, bits=case.bits)
    else:
        out = library.matmul(x, w.T)
    return np.array(out.astype(mx.float32))


def torch_call(torch: Any, case: Case, x: mx.array, w: mx.array) -> Callable[[], np.ndarray] | None:
    """PyTorch's dense product; it has none for MLX's quantised weights on a CPU."""
    if case.bits:
        return None
    tensors = [torch.from_numpy(np.array(a.astype(mx.float32))).to(getattr(torch, case.dtype)) for a in (x, w)]
    return lambda: torch.nn.functional.linear(*tensors)


def measure(calls: dict[str, Call], reps: int, budget_s: float) -> dict[str, float]:
    """Median seconds of each call; one that is slow gets fewer samples, at least one."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(8):  # this library packs constant weights at the eighth product
        calls["ours"]()
    for _ in range(reps):
        for name, call in calls.items():
            if samples[name] and sum(samples[name]) > budget_s:
                continue
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows that match")
    parser.add_argument("--reps", type=int, default=15, metavar="N", help="samples of each library (default 15)")
    parser.add_argument("--budget", type=float, default=0.5, metavar="S", help="seconds for each library and row")
    args = parser.parse_args(argv)
    mx.set_default_device(mx.cpu)
    mlx_mfa.disable()  # mx.* below is MLX's own
    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
    try:
        import torch

        torch.set_num_threads(usable_cores())
    except ImportError:
        torch = None
    print(f"{usable_cores()} cores, mlx-mfa {mlx_mfa.__version__}, MLX {mx.__version__} with {blas_of_mlx()}")
    print(f"torch {torch.__version__}" if torch else "torch is not installed: left out")

    rows = []
    for case in (c for c in CASES if re.search(args.filter, str(c))):
        x, w = (
            mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, case.dtype))
            for seed, shape in enumerate(((case.rows, case.K), (case.N, case.K)))
        )
        mx.eval(x, w)
        calls = dict(zip(("ours", "MLX"), mlx_calls(case, x, w), strict=True))
        expected = answer_of(case, x, w, True)
        answers = {"MLX": answer_of(case, x, w, False)}
        if torch and (call := torch_call(torch, case, x, w)):
            calls["torch"] = call
            answers["torch"] = call().float().numpy()
        seconds = measure(calls, args.reps, args.budget)
        cells = [str(case), f"{seconds['ours'] * 1e3:.3f}"]
        for name in ("MLX", "torch"):
            if name not in seconds:
                cells += ["-", "-"]
                continue
            difference = np.abs(answers[name] - expected).max() / np.abs(expected).max()
            cells += [f"{seconds[name] / seconds['ours']:.1f}x", f"{difference:.0e}"]
        rows.append(cells)
    print(table(["rows x out x in", "ours ms", "MLX", "differs by", "torch", "differs by"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
