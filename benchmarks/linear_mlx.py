"""Products of linear layers through the Python API beside MLX and, where they are installed, PyTorch and ONNX Runtime.

Usage: python benchmarks/linear_mlx.py [--filter REGEX] [--reps N] [--budget S] [--peers LIST] [--quick] [--json PATH]

Every library multiplies the same numbers by the same weights [out, in]; its answer is compared with ours, and repeats
are interleaved. A library's column is its time over ours, and how far its answer is from ours relative to the largest
element. Quantised weights have the zero point in the middle of the codes, so that ONNX Runtime's ``MatMulNBits`` takes
the very codes; it computes in float32 and rounds x to 8 bits. ``openblas`` is MLX itself with OpenBLAS preloaded,
which it then calls for float32: a second process, measured while this one waits.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_mfa
import numpy as np
from mlx_mfa.bench import blas_of_mlx
from mlx_mfa.bench_peers import usable_cores
from mlx_mfa.demo.report import table

GROUP = 64
PEERS = "openblas,torch,onnxruntime"


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
QUICK_CASES = [Case(64, 1024, 1024, "float32"), Case(1, 1024, 1024, "bfloat16"), Case(1, 1024, 1024, "bfloat16", 4)]

Call = Callable[[], Any]


class Inputs:
    """The arrays of a case: ``x``, and ``w`` or ``quantised``, (codes, scales, biases)."""

    def __init__(self, case: Case) -> None:
        self.case = case
        x, w = (
            mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, case.dtype))
            for seed, shape in enumerate(((case.rows, case.K), (case.N, case.K)))
        )
        self.x, self.w = x, w
        if case.bits:
            middle = 2 ** (case.bits - 1)
            groups = w.astype(mx.float32).reshape(case.N, -1, GROUP)
            scales = (mx.abs(groups).max(axis=-1) / (middle - 1)).astype(x.dtype)
            codes = mx.clip(mx.round(groups / scales[..., None].astype(mx.float32)) + middle, 0, 2 * middle - 1)
            codes = codes.astype(mx.uint32).reshape(case.N, -1, 32 // case.bits)
            words = (codes << (case.bits * mx.arange(32 // case.bits, dtype=mx.uint32))).sum(axis=-1).astype(mx.uint32)
            self.quantised = (words, scales, -middle * scales)
            mx.eval(self.quantised)
        mx.eval(x, w)

    def product(self, library: Any) -> mx.array:
        """By the functions of ``library``: this package or MLX."""
        if self.case.bits:
            return library.quantized_matmul(self.x, *self.quantised, group_size=GROUP, bits=self.case.bits)
        return library.matmul(self.x, self.w.T)


def evaluate(inputs: Inputs, library: Any) -> None:
    """The product by the functions of ``library``, computed."""
    mx.eval(inputs.product(library))


class Torch:
    """PyTorch's dense product; it has none for MLX's quantised weights on a CPU."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(usable_cores())
        self.torch, self.version = torch, torch.__version__

    def prepare(self, inputs: Inputs) -> tuple[Call, Callable[[], np.ndarray]] | None:
        """The call, and its answer as float32; None if there is no such product."""
        if inputs.case.bits:
            return None
        dtype = getattr(self.torch, inputs.case.dtype)
        arrays = (self.torch.from_numpy(np.array(a.astype(mx.float32))).to(dtype) for a in (inputs.x, inputs.w))
        call = partial(self.torch.nn.functional.linear, *arrays)
        return call, lambda: call().float().numpy()


class OnnxRuntime:
    """ONNX Runtime's product with quantised weights."""

    name = "onnxruntime"

    def __init__(self) -> None:
        import onnx
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        self.onnx, self.ort, self.version = onnx, onnxruntime, onnxruntime.__version__

    def prepare(self, inputs: Inputs) -> tuple[Call, Callable[[], np.ndarray]] | None:
        """As :meth:`Torch.prepare`."""
        case = inputs.case
        if not case.bits:
            return None
        helper, ort, kinds = self.onnx.helper, self.ort, self.onnx.TensorProto
        codes, scales, _ = inputs.quantised
        blocks = case.K // GROUP
        constants = {
            "w": np.array(codes).view(np.uint8).reshape(case.N, blocks, GROUP * case.bits // 8),
            "scales": np.array(scales.astype(mx.float32)).reshape(-1),
        }
        node = helper.make_node(
            "MatMulNBits",
            ["x", *constants],
            ["out"],
            domain="com.microsoft",
            K=case.K,
            N=case.N,
            bits=case.bits,
            block_size=GROUP,
            accuracy_level=4,
        )
        described = partial(helper.make_tensor_value_info, elem_type=kinds.FLOAT)
        graph = helper.make_graph(
            [node],
            "product",
            [described("x", shape=[case.rows, case.K])],
            [described("out", shape=[case.rows, case.N])],
            [self.onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        # Its threads may spin inside a run, but not on while the next library is measured.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        call = partial(session.run, ["out"], {"x": np.array(inputs.x.astype(mx.float32))})
        return call, lambda: call()[0]


class OpenBlas:
    """MLX's float32 product in a process that has OpenBLAS preloaded, if the linker finds it."""

    name = "openblas"

    def __init__(self) -> None:
        library = ctypes.util.find_library("openblas")
        if library is None:
            raise OSError("the linker finds no libopenblas")
        self.environment = os.environ | {"LD_PRELOAD": library}
        self.version = self._run("--blas")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, __file__, *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise OSError(f"MLX does not run with it: {(done.stderr.splitlines() or ['no message'])[-1]}")
        return done.stdout.strip()

    def measure(self, case: Case, reps: int, budget_s: float) -> tuple[float, float] | None:
        """Median seconds of MLX's product and how far it is from ours; None if it calls no BLAS."""
        if case.bits or case.dtype != "float32":
            return None
        arguments = [case.rows, case.N, case.K, reps, budget_s]
        seconds, difference = json.loads(self._run("--float32-of-mlx", *map(str, arguments)))
        return seconds, difference


def float32_of_mlx(rows: str, N: str, K: str, reps: str, budget_s: str) -> str:
    """What :meth:`OpenBlas.measure` reads from the process it starts."""
    inputs = Inputs(Case(int(rows), int(N), int(K), "float32"))
    expected, answer = (np.array(inputs.product(library)) for library in (mlx_mfa, mx))
    calls: dict[str, Call] = {name: partial(evaluate, inputs, lib) for name, lib in (("ours", mlx_mfa), ("MLX", mx))}
    seconds = measure(calls, int(reps), float(budget_s))["MLX"]
    return json.dumps([seconds, float(np.abs(answer - expected).max() / np.abs(expected).max())])


def available_peers(names: list[str]) -> tuple[list[Any], list[str]]:
    """Of the optional libraries in ``names`` those that are installed, and a line for each that is not."""
    peers, notes = [], []
    for peer in (OpenBlas, Torch, OnnxRuntime):
        if peer.name in names:
            try:
                peers.append(peer())
            except (ImportError, OSError) as error:
                notes.append(f"{peer.name} is not measured: {str(error).splitlines()[0]}")
    return peers, notes


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


def compare(case: Case, peers: list[Any], reps: int, budget_s: float) -> list[str]:
    """One row of the table."""
    inputs = Inputs(case)
    expected = np.array(inputs.product(mlx_mfa).astype(mx.float32))
    calls: dict[str, Call] = {"ours": partial(evaluate, inputs, mlx_mfa), "MLX": partial(evaluate, inputs, mx)}
    answers = {"MLX": np.array(inputs.product(mx).astype(mx.float32))}
    apart = {}
    for peer in peers:
        if isinstance(peer, OpenBlas):
            apart[peer.name] = peer.measure(case, reps, budget_s)
        elif prepared := peer.prepare(inputs):
            calls[peer.name], answer = prepared
            answers[peer.name] = answer()
    seconds = measure(calls, reps, budget_s)
    cells = [str(case), f"{seconds['ours'] * 1e3:.3f}"]
    for name in ("MLX", *(peer.name for peer in peers)):
        found = apart.get(name)
        if name in seconds:
            found = seconds[name], np.abs(answers[name] - expected).max() / np.abs(expected).max()
        cells += [f"{found[0] / seconds['ours']:.1f}x", f"{found[1]:.0e}"] if found else ["-", "-"]
    return cells


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table and, if wanted, writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows that match")
    parser.add_argument("--reps", type=int, default=15, metavar="N", help="samples of each library (default 15)")
    parser.add_argument("--budget", type=float, default=0.5, metavar="S", help="seconds for each library and row")
    parser.add_argument("--peers", default=PEERS, help="optional libraries to compare with, or 'none'")
    parser.add_argument("--quick", action="store_true", help="three small rows: a look, not a measurement")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table there")
    parser.add_argument("--blas", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--float32-of-mlx", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    mx.set_default_device(mx.cpu)
    mlx_mfa.disable()  # mx.* below is MLX's own
    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
    if args.blas or args.float32_of_mlx:
        print(float32_of_mlx(*args.float32_of_mlx) if args.float32_of_mlx else blas_of_mlx())
        return 0
    peers, notes = available_peers(args.peers.split(","))
    facts = [f"{usable_cores()} cores", f"mlx-mfa {mlx_mfa.__version__}", f"MLX {mx.__version__} with {blas_of_mlx()}"]
    facts += [f"{peer.name} {peer.version}" for peer in peers]
    print(", ".join(facts), *notes, sep="\n")

    cases = [c for c in (QUICK_CASES if args.quick else CASES) if re.search(args.filter, str(c))]
    rows = [compare(case, peers, args.reps, args.budget) for case in cases]
    header = ["rows x out x in", "ours ms", "MLX", "differs by"]
    for peer in peers:
        header += [peer.name, "differs by"]
    print(table(header, rows))
    if args.json:
        result = {"facts": facts, "notes": notes, "header": header, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
