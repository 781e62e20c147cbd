"""What a block mask costs: builders at 65,536 tokens, as tiles and as lists, and selectors beside their attention.

Usage: python benchmarks/masks_cpu.py [--repeats N] [--only builders|selectors]

One line each: median and spread in milliseconds and the density; of selectors also the time of the dense attention that
they thin out. Answers are checked: lists say what the tiles say, and selectors keep as much as they should.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np

FRAMES, HEIGHT, WIDTH = 16, 64, 64
TOKENS = FRAMES * HEIGHT * WIDTH
VIDEO = (HEIGHT, WIDTH, FRAMES)

BUILDERS: dict[str, Callable[..., Any]] = {
    "spatial_3d, radii 8 and 2": lambda **kw: mfa.make_spatial_3d_mask(*VIDEO, 8, 2, **kw),
    "spatial_3d, radius 8, all frames": lambda **kw: mfa.make_spatial_3d_mask(*VIDEO, 8, FRAMES, **kw),
    "gna, window 5 x 17 x 17": lambda **kw: mfa.make_gna_mask((FRAMES, HEIGHT, WIDTH), (5, 17, 17), (1, 1, 1), **kw),
    "axial_temporal": lambda **kw: mfa.make_axial_temporal_mask(*VIDEO, **kw),
    "dilated_temporal, rate 4": lambda **kw: mfa.make_dilated_temporal_mask(*VIDEO, 4, **kw),
    "reference_frame": lambda **kw: mfa.make_reference_frame_mask(*VIDEO, [0], 8, 1, **kw),
    "sliding_window 1024": lambda **kw: mfa.make_sliding_window_mask(TOKENS, 1024, **kw),
    "causal": lambda **kw: mfa.make_causal_block_mask(TOKENS, **kw),
}


def milliseconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and half the spread between the quartiles, after two calls that warm up."""
    times = []
    for index in range(repeats + 2):
        start = time.perf_counter()
        call()
        if index >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), (high - low) / 2


def builders(repeats: int) -> None:
    print(f"builders, {TOKENS} tokens ({FRAMES} x {HEIGHT} x {WIDTH}), tiles of 32 x 16")
    for name, build in BUILDERS.items():
        lists = build(as_lists=True)
        assert np.array_equal(np.array(build()), np.array(lists.to_dense())), name
        cells = [milliseconds(lambda build=build, kw=kw: build(**kw), repeats) for kw in ({}, {"as_lists": True})]
        text = "   ".join(f"{kind} {m:6.2f} +- {s:.2f} ms" for kind, (m, s) in zip(("tiles", "lists"), cells))
        print(f"{name:34s} {text}   density {lists.density:.3f}", flush=True)


def selectors(repeats: int) -> None:
    B, H, N, D = 1, 4, 4096, 64
    q, k, v = (mx.random.normal((B, H, N, D)) for _ in range(3))
    mx.eval(q, k, v)
    dense, _ = milliseconds(lambda: mx.eval(mfa.flash_attention(q, k, v)), 3)
    print(f"selectors, B {B} H {H} N {N} D {D} float32; dense attention {dense:.1f} ms")
    table = {
        "topk_spatial, 26 of 64": lambda: mfa.make_topk_spatial_mask(q, k, 26, block_size=(64, 64), as_lists=True),
        "vsa, sparsity 0.9": lambda: mfa.make_vsa_mask(q, k, 0.9, as_lists=True),
        "sla, ratio 0.1": lambda: mfa.make_sla_mask(q, k, 0.1, as_lists=True),
        "draft, budget 102": lambda: mfa.make_draft_mask(q, k, 4, 8, 102, local_range=9, as_lists=True),
        "sparge, mass 0.9": lambda: mfa.make_sparge_mask(q, k, mass=0.9, similarity=-1, as_lists=True),
        "xattention, stride 16": lambda: mfa.make_xattention_mask(q, k, threshold=0.9, as_lists=True),
        "xattention, stride 8": lambda: mfa.make_xattention_mask(q, k, threshold=0.9, stride=8, as_lists=True),
    }
    for name, select in table.items():
        median, spread = milliseconds(select, repeats)
        mask = select()
        assert 0 < mask.density <= 1, name
        print(
            f"{name:34s} {median:6.2f} +- {spread:.2f} ms   {median / dense:.3f} of dense   density {mask.density:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=("builders", "selectors"))
    arguments = parser.parse_args()
    for name, run in (("builders", builders), ("selectors", selectors)):
        if arguments.only in (None, name):
            run(max(2, arguments.repeats))


if __name__ == "__main__":
    main()
