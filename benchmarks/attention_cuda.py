"""Attention on one GPU: this library beside MLX's own op and PyTorch's cuDNN path, in the same run.

usage: attention_cuda.py [--filter REGEX] [--reps N] [--json PATH] [--peers mlx,torch]

Device time: the median over repeats of the time of a batch of independent calls, some 20 ms of them, evaluated together
and waited for, with the graphs that MLX makes of them by default.
The batch rotates among several sets of inputs where one would fit in the cache. Work counts the visible pairs: 4 D
operations each forward, 10 D backward; decode counts the bytes of K and V. Answers are compared with float32 attention
first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time

TORCH_PROGRAM = "--torch-worker"
L2_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int = 0
    causal: bool = False
    mask: str = ""  # "bool", "block" (a quarter of 256 x 256 blocks, the diagonal among them, is shown), "additive"
    kind: str = "forward"  # "forward", "backward" (forward and backward together), "decode"
    dtype: str = "bfloat16"

    @property
    def value_dim(self) -> int:
        return self.Dv or self.D

    def work(self) -> float:
        """Floating-point operations, or bytes for decode."""
        if self.kind == "decode":
            size = 4 if self.dtype == "float32" else 2
            return float(size) * self.B * self.Hkv * self.Nk * (self.D + self.value_dim)
        pairs = self.B * self.Hq * self.Nq * self.Nk * (0.5 if self.causal else 1.0)
        return pairs * 2.0 * (self.D + self.value_dim) * (3.5 if self.kind == "backward" else 1.0)

    def bytes_of_inputs(self) -> int:
        return 2 * self.B * (self.Hq * self.Nq * self.D + self.Hkv * self.Nk * (self.D + self.value_dim))


def cases() -> list[Case]:
    """All rows of the table."""
    rows = []
    for D in (64, 128, 192, 256):
        for causal in (False, True):
            suffix = "causal" if causal else "full"
            rows.append(Case(f"forward D{D} {suffix} 16k", 1, 16, 16, 16384, 16384, D, causal=causal))
            rows.append(Case(f"forward D{D} {suffix} 4k", 4, 16, 16, 4096, 4096, D, causal=causal))
    rows.append(Case("forward D192/128 causal 8k", 1, 16, 16, 8192, 8192, 192, 128, causal=True))
    rows.append(Case("forward D576/512 causal 8k", 1, 16, 16, 8192, 8192, 576, 512, causal=True))
    rows.append(Case("forward D512 causal 4k", 4, 16, 16, 4096, 4096, 512, causal=True))
    for D in (80, 96, 112, 512):
        rows.append(Case(f"forward D{D} full 4k", 4, 16, 16, 4096, 4096, D))
    for D in (64, 128, 256):
        for causal in (False, True):
            suffix = "causal" if causal else "full"
            rows.append(Case(f"backward D{D} {suffix} 16k", 1, 16, 16, 16384, 16384, D, causal=causal, kind="backward"))
            rows.append(Case(f"backward D{D} {suffix} 4k", 4, 16, 16, 4096, 4096, D, causal=causal, kind="backward"))
    for D in (64, 128):
        for mask in ("bool", "additive"):
            rows.append(Case(f"{mask} mask D{D} 4k", 4, 16, 16, 4096, 4096, D, mask=mask))
            rows.append(Case(f"backward {mask} mask D{D} 4k", 4, 16, 16, 4096, 4096, D, mask=mask, kind="backward"))
        rows.append(Case(f"block mask D{D} 4k", 4, 16, 16, 4096, 4096, D, mask="block"))
    for B in (32, 1):
        for D in (128, 256):
            rows.append(Case(f"decode B{B} 8k D{D}", B, 32, 8, 1, 8192, D, kind="decode"))
    rows.append(Case("decode B1 8k D64", 1, 32, 8, 1, 8192, 64, kind="decode"))
    rows.append(Case("decode B1 2k D128", 1, 32, 8, 1, 2048, 128, kind="decode"))
    rows.append(Case("decode B32 8k D128 one key head", 32, 32, 1, 1, 8192, 128, kind="decode"))
    rows.append(Case("decode B8 8k D576/512 one key head", 8, 128, 1, 1, 8192, 576, 512, kind="decode"))
    for D in (64, 128):
        for causal in (False, True):
            name = f"forward float32 D{D} {'causal' if causal else 'full'} 4k"
            rows.append(Case(name, 1, 16, 16, 4096, 4096, D, causal=causal, dtype="float32"))
    return rows


def repeats(case: Case) -> tuple[int, int]:
    """Calls of a batch and sets of inputs."""
    seconds = case.work() / (2e12 if case.kind == "decode" else 20e12 if case.dtype == "float32" else 400e12)
    calls = max(1, min(1000 if case.kind == "decode" else 40, round(0.02 / max(seconds, 1e-6))))
    sets = max(1, min(calls, 1 + L2_BYTES * 2 // case.bytes_of_inputs())) if case.kind == "decode" else 1
    return calls, sets


def median_time(run, wait, calls: int, reps: int) -> float:
    """Seconds a call of `run(n)`, which starts call n."""
    times = []
    run()
    wait()
    for _ in range(reps):
        start = time.perf_counter()
        run()
        wait()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------- MLX


def mlx_rows(selected: list[Case], reps: int, with_sdpa: bool) -> list[dict]:
    """Times of this library and of MLX's op."""
    import mlx.core as mx
    import mlx_mfa as mfa

    def arrays(case, seed):
        mx.random.seed(seed)
        dtype = getattr(mx, case.dtype)
        shapes = [
            (case.B, case.Hq, case.Nq, case.D),
            (case.B, case.Hkv, case.Nk, case.D),
            (case.B, case.Hkv, case.Nk, case.value_dim),
        ]
        x = [mx.random.normal(s, dtype=dtype) for s in shapes]
        mx.eval(x)
        return x

    results = []
    for case in selected:
        calls, sets = repeats(case)
        inputs = [arrays(case, seed) for seed in range(sets)]
        mask = None
        if case.mask:
            mask = mx.random.uniform(shape=(1, 1, case.Nq, case.Nk)) < 0.9
            if case.mask == "block":
                mask = mask & shown_blocks(mx, case)
            if case.mask == "additive":
                mask = mx.where(mask, 0.0, -1.0).astype(mx.bfloat16)
            mx.eval(mask)
        scale = case.D**-0.5
        keyword = {"bool": "mask", "block": "mask", "additive": "attn_bias"}.get(case.mask)

        def ours(q, k, v, case=case, mask=mask, keyword=keyword):
            extra = {keyword: mask} if keyword else {}
            return mfa.flash_attention(q, k, v, causal=case.causal, **extra)

        def theirs(q, k, v, case=case, mask=mask, scale=scale):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if case.causal else mask)

        row = {"name": case.name, **dataclasses.asdict(case), "work": case.work()}
        row["route"] = mfa.explain(*inputs[0], causal=case.causal, **({keyword: mask} if keyword else {}))["kernel"]
        for name, function in (("mfa", ours), ("mlx", theirs)):
            if name == "mlx" and not with_sdpa:
                continue
            if case.kind == "backward":
                cotangent = mx.random.normal(inputs[0][0].shape[:3] + (case.value_dim,), dtype=getattr(mx, case.dtype))
                mx.eval(cotangent)

                def step(q, k, v, function=function, cotangent=cotangent):
                    outs, grads = mx.vjp(function, [q, k, v], [cotangent])
                    return [*outs, *grads]
            else:
                step = function
            try:
                if name == "mfa":
                    row["max_error"] = check(mx, case, step, inputs[0], mask)
                mx.clear_cache()
                mx.reset_peak_memory()
                before = mx.get_active_memory()
                mx.eval(step(*inputs[0]))
                row[f"{name}_peak_mib"] = (mx.get_peak_memory() - before) / 2**20
                run = lambda: mx.eval([step(*inputs[n % sets]) for n in range(calls)])  # noqa: E731, B023
                row[name] = median_time(run, mx.synchronize, calls, reps)
            except (RuntimeError, ValueError, AssertionError) as error:
                row[f"{name}_error"] = str(error)[:200]
        results.append(row)
        show(row)
        inputs = mask = None
        mx.clear_cache()
    results.append(host_time(mx, mfa))
    return results


def shown_blocks(mx, case):
    """A quarter of the blocks of 256 x 256, among them the diagonal's."""
    n = case.Nq // 256
    blocks = (mx.random.uniform(shape=(n, n)) < 0.25 - 0.75 / (n - 1)) | mx.eye(n, dtype=mx.bool_)
    return mx.repeat(mx.repeat(blocks, 256, axis=0), 256, axis=1)


def check(mx, case, step, inputs, mask):
    """The largest error of a few rows of the output against float32; raises if it is large."""
    q, k, v = inputs
    out = step(q, k, v)
    out = out[0] if isinstance(out, list) else out
    rows = sorted({0, case.Nq // 3, case.Nq - 1})
    worst = 0.0
    for h in (0, case.Hq - 1):
        kh = h // (case.Hq // case.Hkv)
        qs = mx.stack([q[-1, h, r] for r in rows]).astype(mx.float32)
        s = (qs * case.D**-0.5) @ k[-1, kh].astype(mx.float32).T
        for n, r in enumerate(rows):
            row = s[n]
            if case.causal:
                row = mx.where(mx.arange(case.Nk) <= r + case.Nk - case.Nq, row, -mx.inf)
            if case.mask in ("bool", "block"):
                row = mx.where(mask[0, 0, r], row, -mx.inf)
            if case.mask == "additive":
                row = row + mask[0, 0, r].astype(mx.float32)
            exact = mx.softmax(row) @ v[-1, kh].astype(mx.float32)
            worst = max(worst, mx.abs(exact - out[-1, h, r].astype(mx.float32)).max().item())
    limit = 5e-3 if case.dtype == "float32" else 4e-2
    assert worst < limit, f"wrong answer: off by {worst}"
    return worst


def host_time(mx, mfa) -> dict:
    """Microseconds of the host for a call in a chain: to build it, and to submit it to the device."""
    x = mx.random.normal((1, 4, 64, 64), dtype=mx.bfloat16)
    mx.eval(x)
    n = 1000

    def chain(function):
        y = x
        for _ in range(n):
            y = function(y)
        return y

    row = {"name": "host us per call, chain of 1000"}
    for name, function in (
        ("mfa", lambda y: mfa.flash_attention(y, x, x)),
        ("mlx", lambda y: mx.fast.scaled_dot_product_attention(y, x, x, scale=0.125)),
        ("mlx abs", mx.abs),
    ):
        builds, submits = [], []
        mx.eval(chain(function))
        for _ in range(7):
            start = time.perf_counter()
            y = chain(function)
            middle = time.perf_counter()
            mx.async_eval(y)
            submits.append((time.perf_counter() - middle) / n * 1e6)
            mx.eval(y)
            builds.append((middle - start) / n * 1e6)
        row[name] = {"build_us": statistics.median(builds), "submit_us": statistics.median(submits)}
    print(json.dumps(row), flush=True)
    return row


# ---------------------------------------------------------------------------------------------- PyTorch


def torch_rows(selected: list[Case], reps: int) -> list[dict]:
    """Times of PyTorch's scaled_dot_product_attention on its cuDNN path, and of a device copy."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    results = []
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = median_time(lambda: [y.copy_(x) for _ in range(5)], torch.cuda.synchronize, 5, reps)
    results.append({"name": "device copy GB/s", "torch": 2 * x.numel() / copy * 1e-9})
    x = y = None
    for case in selected:
        calls, sets = repeats(case)
        dtype = getattr(torch, case.dtype)
        try:
            inputs = [
                [
                    torch.randn(s, dtype=dtype, device="cuda", requires_grad=case.kind == "backward")
                    for s in (
                        (case.B, case.Hq, case.Nq, case.D),
                        (case.B, case.Hkv, case.Nk, case.D),
                        (case.B, case.Hkv, case.Nk, case.value_dim),
                    )
                ]
                for _ in range(sets)
            ]
            mask = None
            if case.mask:
                mask = torch.rand((1, 1, case.Nq, case.Nk), device="cuda") < 0.9
                if case.mask == "block":
                    n = case.Nq // 256
                    blocks = torch.rand((n, n), device="cuda") < 0.25 - 0.75 / (n - 1)
                    blocks |= torch.eye(n, dtype=torch.bool, device="cuda")
                    mask &= blocks.repeat_interleave(256, 0).repeat_interleave(256, 1)
                if case.mask == "additive":
                    mask = torch.where(mask, 0.0, -1.0).to(dtype)
            backend = SDPBackend.CUDNN_ATTENTION if case.dtype != "float32" else SDPBackend.EFFICIENT_ATTENTION

            def step(q, k, v, case=case, mask=mask, backend=backend):
                with sdpa_kernel(backend):
                    out = functional.scaled_dot_product_attention(
                        q, k, v, attn_mask=mask, is_causal=case.causal, enable_gqa=case.Hq != case.Hkv
                    )
                if case.kind == "backward":
                    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
                return out

            run = lambda: [step(*inputs[n % sets]) for n in range(calls)]  # noqa: E731, B023
            seconds = median_time(run, torch.cuda.synchronize, calls, reps)
            results.append({"name": case.name, "torch": seconds})
        except (RuntimeError, ValueError) as error:
            results.append({"name": case.name, "torch_error": str(error)[:200]})
        inputs = mask = None
        torch.cuda.empty_cache()
    return results


def show(row: dict) -> None:
    """One line of progress."""
    unit, factor = ("GB/s", 1e-9) if row["kind"] == "decode" else ("TFLOP/s", 1e-12)
    parts = [
        f"{n} {row['work'] / row[n] * factor:8.1f} {unit}" if n in row else f"{n} {row.get(n + '_error', '')[:80]}"
        for n in ("mfa", "mlx")
    ]
    print(f"{row['name']:28} {'  '.join(parts)}  err {row.get('max_error', -1):.1e}  {row['route']}", flush=True)


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--json", default="")
    parser.add_argument("--peers", default="mlx,torch")
    parser.add_argument(TORCH_PROGRAM, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    selected = [c for c in cases() if re.search(options.filter, c.name)]
    if options.torch_worker:
        print(json.dumps(torch_rows(selected, options.reps)))
        return 0

    torch_results = []
    if "torch" in options.peers:
        # Its NVIDIA libraries must not be those that MLX was pointed at.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
        done = subprocess.run(
            [sys.executable, __file__, TORCH_PROGRAM, "--filter", options.filter, "--reps", str(options.reps)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            torch_results = json.loads(done.stdout)
        else:
            print(f"PyTorch left out: {done.stderr[-500:]}")
    rows = mlx_rows(selected, options.reps, "mlx" in options.peers)
    by_name = {row["name"]: row for row in torch_results}
    for row in rows:
        row.update({k: v for k, v in by_name.pop(row["name"], {}).items() if k != "name"})
    rows.extend(by_name.values())
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    print("\n| case | ours | MLX | PyTorch cuDNN | ours / PyTorch | ours / MLX | peak MiB ours / MLX |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if "work" not in row:
            print(f"| {row['name']} | {json.dumps({k: v for k, v in row.items() if k != 'name'})} | | | | | |")
            continue
        factor = 1e-9 if row["kind"] == "decode" else 1e-12

        def rate(name, row=row, factor=factor):
            return f"{row['work'] / row[name] * factor:.0f}" if name in row else "-"

        def ratio(name, row=row):
            return f"{row[name] / row['mfa']:.2f}" if name in row and "mfa" in row else "-"

        peaks = f"{row.get('mfa_peak_mib', 0):.0f} / {row.get('mlx_peak_mib', 0):.0f}"
        cells = [rate("mfa"), rate("mlx"), rate("torch"), ratio("torch"), ratio("mlx"), peaks]
        print(f"| {row['name']} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
