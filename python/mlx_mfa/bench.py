"""Speed of ``flash_attention`` beside other libraries' attention, in one run: ``mlx-mfa bench``.

Every library gets the same inputs and threads and its answer is compared with ours. Repeats are interleaved, so that a
slower minute of the machine slows all of them; the figures are medians, and ratios are what to quote.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .bench_peers import Inputs, Ours, Unsupported, available_peers, usable_cores

_MIN_SAMPLE_S = 0.01
_SETTLE_S = 0.01  # lets another library's threads go to sleep before the next one is timed


@dataclass(frozen=True)
class Case:
    """One row: a shape and what is computed. ``padding`` hides that fraction of the keys, at the end."""

    name: str
    dtype: str
    queries: int
    keys: int
    dim: int
    heads: int = 8
    kv_heads: int = 8
    causal: bool = False
    window: tuple[int, int] | None = None
    padding: float = 0.0
    gradients: bool = False
    quick: bool = False

    @property
    def title(self) -> str:
        text = f"{self.name} {self.dtype} D {self.dim}"
        if self.queries != self.keys:
            return f"{text}, {self.keys} keys, {self.heads} heads of {self.kv_heads}"
        return f"{text} N {self.keys}"


def all_cases() -> list[Case]:
    """The rows of the full run; those marked ``quick`` make the short one."""
    cases = []
    for dtype in ("float32", "bfloat16", "float16"):
        for queries, dim in ((512, 64), (2048, 64), (2048, 128)):
            quick = queries == 512
            cases.append(Case("forward full", dtype, queries, queries, dim, quick=quick))
            cases.append(Case("forward causal", dtype, queries, queries, dim, causal=True, quick=quick))
    cases += [
        Case("forward causal", "float32", 4096, 4096, 64, causal=True),
        Case("window 256 causal", "float32", 4096, 4096, 64, causal=True, window=(256, 0)),
        Case("padding 1/4", "float32", 2048, 2048, 64, padding=0.25),
        Case("forward + backward", "float32", 512, 512, 64, gradients=True, quick=True),
        Case("forward + backward", "float32", 2048, 2048, 64, gradients=True),
        Case("forward + backward causal", "float32", 2048, 2048, 64, causal=True, gradients=True),
        Case("forward + backward", "float32", 2048, 2048, 128, gradients=True),
        Case("forward + backward", "bfloat16", 2048, 2048, 64, gradients=True),
    ]
    for dtype, quick in (("float32", False), ("float16", False), ("bfloat16", True)):
        cases.append(Case("decode", dtype, 1, 32768, 128, heads=32, quick=quick))
    return cases


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Unit-variance tensors of ``case``, rounded to its dtype."""
    rng = np.random.default_rng(seed)

    def tensor(heads: int, length: int) -> np.ndarray:
        x = rng.standard_normal((1, heads, length, case.dim), dtype=np.float32)
        if case.dtype == "float32":
            return x
        return np.array(mx.array(x).astype(getattr(mx, case.dtype)).astype(mx.float32))

    padding = None
    if case.padding > 0:
        padding = np.arange(case.keys)[None, None, None, :] < round(case.keys * (1 - case.padding))
    return Inputs(
        q=tensor(case.heads, case.queries),
        k=tensor(case.kv_heads, case.keys),
        v=tensor(case.kv_heads, case.keys),
        d_o=tensor(case.heads, case.queries) if case.gradients else None,
        dtype=case.dtype,
        scale=case.dim**-0.5,
        causal=case.causal,
        window=case.window,
        padding=padding,
    )


def work_of(case: Case, inputs: Inputs) -> tuple[str, float]:
    """The unit of the case's rate and the work of one call in it, in units of 1e9."""
    if inputs.is_decode:
        return "GB/s", (inputs.k.size + inputs.v.size) * (4 if case.dtype == "float32" else 2) * 1e-9
    seen = float(np.broadcast_to(inputs.visible(), (1, 1, case.queries, case.keys)).sum())
    return "GFLOP/s", (14 if case.gradients else 4) * case.heads * seen * case.dim * 1e-9


class _PeakMemory:
    """Growth of this process's resident peak inside a ``with`` block, in MiB; None where Linux cannot tell."""

    growth_mib: float | None = None

    @staticmethod
    def _status(key: str) -> float:
        match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(match.group(1)) / 1024 if match else float("nan")

    def __enter__(self) -> _PeakMemory:
        gc.collect()
        mx.clear_cache()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory of earlier rows hides what this one takes
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before: float | None = self._status("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.growth_mib = max(0.0, self._status("VmHWM") - self._before)


class _Contestant:
    """One peer on one case: its first call (memory, answer) and its samples."""

    def __init__(self, peer: Any, inputs: Inputs):
        self.name = peer.name
        self.samples: list[float] = []
        self.run, self.answers = peer.prepare(inputs)
        memory = _PeakMemory()
        with memory:
            start = time.perf_counter()
            self.run()
            self.first_s = time.perf_counter() - start
        self.memory_mib = memory.growth_mib
        self.calls = max(1, min(1000, int(_MIN_SAMPLE_S / max(self.first_s, 1e-6))))

    def sample(self) -> None:
        time.sleep(_SETTLE_S)
        if self.calls > 1:  # short calls: the first after a pause finds sleeping threads and cold caches
            self.run()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.run()
        self.samples.append((time.perf_counter() - start) / self.calls)


def measure_case(case: Case, peers: Iterable[Any], reps: int = 7, budget_s: float = 4.0) -> dict[str, Any]:
    """Measures one row.

    Args:
        case (Case): What to compute.
        peers (iterable): From :func:`~mlx_mfa.bench_peers.available_peers`; ours first.
        reps (int): Samples of each library, interleaved.
        budget_s (float): A library slower than ``reps`` calls in this time gets fewer samples, at least one: its first
            call if that alone took longer.

    Returns:
        dict: the case, the unit and ``results`` by library: ``median_s``, ``spread``, ``samples``, ``rate``,
        ``memory_mib``, ``max_difference`` from our answer and ``ratio`` (its time over ours), or ``skipped``.
    """
    inputs = make_inputs(case)
    unit, work = work_of(case, inputs)
    results: dict[str, dict[str, Any]] = {}
    running: list[_Contestant] = []
    ours: list[np.ndarray] = []
    for peer in peers:
        try:
            contestant = _Contestant(peer, inputs)
        except Unsupported as reason:
            results[peer.name] = {"skipped": str(reason)}
            continue
        except Exception as error:  # a peer that cannot run a case must not end the others' measurement
            if isinstance(peer, Ours):
                raise
            results[peer.name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            continue
        answers = contestant.answers()
        ours = ours or answers
        difference = max(float(np.max(np.abs(a - b))) for a, b in zip(answers, ours, strict=True))
        results[peer.name] = {"memory_mib": contestant.memory_mib, "max_difference": difference}
        running.append(contestant)
    for contestant in running:
        if contestant.first_s > budget_s:
            contestant.samples.append(contestant.first_s)
    for _ in range(reps):
        for contestant in running:
            if sum(contestant.samples) * contestant.calls < budget_s:
                contestant.sample()
    reference = statistics.median(running[0].samples)
    for contestant in running:
        middle = statistics.median(contestant.samples)
        low, high = np.quantile(contestant.samples, [0.25, 0.75])
        results[contestant.name].update(
            median_s=middle,
            spread=float(high - low) / middle,
            samples=len(contestant.samples),
            rate=work / middle,
            ratio=middle / reference,
        )
    return {**asdict(case), "title": case.title, "unit": unit, "results": results}


def call_overhead(batches: int = 15, calls: int = 200) -> dict[str, float]:
    """What a call costs beside its arithmetic: microseconds of one evaluated tiny call, medians of interleaved batches.

    Returns:
        dict: ``add_us`` for ``mx.add`` of two small arrays, ``mlx_us`` for MLX's attention, ``ours_us`` for ours and
        ``beyond_one_op_us``, ours less ``add_us``.
    """
    from . import flash_attention

    q, k = mx.ones((1, 1, 1, 32)), mx.ones((1, 1, 4, 32))
    mx.eval(q, k)
    subjects: dict[str, Callable[[], mx.array]] = {
        "add_us": lambda: mx.add(q, q),
        "mlx_us": lambda: mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0),
        "ours_us": lambda: flash_attention(q, k, k),
    }
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(batches):
        for name, call in subjects.items():
            mx.eval(call())
            start = time.perf_counter()
            for _ in range(calls):
                mx.eval(call())
            samples[name].append((time.perf_counter() - start) / calls * 1e6)
    out = {name: statistics.median(values) for name, values in samples.items()}
    out["beyond_one_op_us"] = out["ours_us"] - out["add_us"]
    return out


class _SymbolInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def blas_of_mlx() -> str:
    """The library that MLX's float32 products call, as far as the dynamic linker tells.

    Preloaded libraries come first, as they do for MLX: a "speed-up over MLX" means little without this name.
    """
    if sys.platform == "darwin":
        return "Accelerate"
    try:
        maps = Path("/proc/self/maps").read_text()
        mlx_library = re.search(r"(/\S*libmlx\.so\S*)", maps)
        for handle in (ctypes.CDLL(None), ctypes.CDLL(mlx_library.group(1)) if mlx_library else None):
            if handle is None or not hasattr(handle, "cblas_sgemm"):
                continue
            info = _SymbolInfo()
            address = ctypes.cast(handle.cblas_sgemm, ctypes.c_void_p)
            if not ctypes.CDLL(None).dladdr(address, ctypes.byref(info)) or not info.file:
                continue
            path = info.file.decode()
            library = ctypes.CDLL(path)
            if hasattr(library, "openblas_get_corename"):
                library.openblas_get_corename.restype = ctypes.c_char_p
                return f"{Path(path).name} (OpenBLAS, core {library.openblas_get_corename().decode()})"
            return f"{Path(path).name} (not OpenBLAS)"
    except (OSError, AttributeError, ValueError):
        pass
    return "unknown"


def machine_info(peers: Iterable[Any], threads: int) -> dict[str, Any]:
    """Processor, load, versions and libraries: what a figure of this module needs beside it."""
    from . import __version__, get_device_info

    model = re.search(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    load = os.getloadavg()[0]
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": usable_cores(),
        "threads": threads,
        "load_before": load,
        "noisy": load > 0.5 * usable_cores(),
        "python": platform.python_version(),
        "mlx_mfa": __version__,
        "mlx": mx.__version__,
        "blas_of_mlx": blas_of_mlx(),
        "peers": {peer.name: peer.version for peer in peers if hasattr(peer, "version")},
        "device": get_device_info(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def comparison_rows(measured: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """Head and body of the comparison table; a peer's cell is its time over ours and its largest difference."""
    ours, others = names[0], names[1:]
    head = ["work", f"{ours} ms", "rate", "MiB"]
    for name in others:
        head += [name, "MiB", "differs by"]
    rows = [head]
    for row in measured:
        own = row["results"][ours]
        cells = [row["title"], f"{own['median_s'] * 1e3:.2f}", f"{own['rate']:.1f} {row['unit']}", _mib(own)]
        for name in others:
            result = row["results"].get(name, {"skipped": ""})
            if "skipped" in result:
                cells += ["-", "-", "-"]
            else:
                cells += [f"{result['ratio']:.2f}x", _mib(result), f"{result['max_difference']:.1e}"]
        rows.append(cells)
    return rows


def _mib(result: dict[str, Any]) -> str:
    return "-" if result["memory_mib"] is None else f"{result['memory_mib']:.0f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mlx-mfa bench`` to ``parser``."""
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows whose title matches")
    parser.add_argument("--reps", type=int, default=None, metavar="N", help="samples of a row (default 7, quick 3)")
    parser.add_argument("--budget", type=float, default=None, metavar="S", help="seconds for each library and row")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="of every library (default: all)")
    parser.add_argument("--peers", default="torch,onnxruntime", help="optional libraries to compare with, or 'none'")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rows: a look, not a measurement")
    parser.add_argument("--json", default=None, metavar="PATH", help="also write the result to this file")


def run(args: argparse.Namespace) -> int:
    """Runs ``mlx-mfa bench`` with parsed options and returns its exit status."""
    for name in ("reps", "threads", "budget"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            print(f"[bench] --{name} must be positive; got {value}", file=sys.stderr)
            return 2
    try:
        cases = [c for c in all_cases() if re.search(args.filter, c.title) and (c.quick or not args.quick)]
    except re.error as error:
        print(f"[bench] --filter must be a regular expression; got {args.filter!r}: {error}", file=sys.stderr)
        return 2
    if not cases:
        print(f"[bench] --filter must match a row; got {args.filter!r}", file=sys.stderr)
        return 2
    threads = args.threads or usable_cores()
    if args.threads:
        os.environ["MFA_NUM_THREADS"] = str(args.threads)
    reps = args.reps or (3 if args.quick else 7)
    budget_s = args.budget or (1.0 if args.quick else 4.0)

    mx.set_default_device(mx.cpu)
    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
    peers, notes = available_peers(threads, args.peers.split(","))
    machine = machine_info(peers, threads)
    versions = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    print(f"{machine['cpu']}, {threads} of {machine['cores']} cores, load before {machine['load_before']:.2f}")
    print(f"mlx-mfa {machine['mlx_mfa']}, MLX {machine['mlx']} with {machine['blas_of_mlx']}, {versions}".rstrip(", "))
    if machine["noisy"]:
        print("NOISY: other work was running; do not quote")
    for note in notes:
        print(note)

    measured = []
    for number, case in enumerate(cases, start=1):
        _progress(f"{number}/{len(cases)} {case.title}")
        measured.append(measure_case(case, peers, reps, budget_s))
    _progress("")
    print("A library's column is its time over ours; MiB is the growth of the peak memory in one call.")
    print(_aligned(comparison_rows(measured, [peer.name for peer in peers])))
    overhead = call_overhead()
    print(
        f"A tiny call: ours {overhead['ours_us']:.1f} us, MLX's attention {overhead['mlx_us']:.1f}, one mx.add "
        f"{overhead['add_us']:.1f}; ours beyond one op {overhead['beyond_one_op_us']:.1f} us (must 10, aim 3)"
    )
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "notes": notes, "repeats": reps, "quick": args.quick, "overhead": overhead}
        result["rows"] = measured
        path.write_text(json.dumps(result, indent=2, default=str) + "\n")
        print(f"written to {path}")
    return 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """``python -m mlx_mfa.bench``: the same as ``mlx-mfa bench``."""
    parser = argparse.ArgumentParser(prog="mlx-mfa bench", description=(__doc__ or "").split("\n", 1)[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
