"""Time of appending tokens to a KV cache against its length: in place, and when something else holds the cache.

Usage: python benchmarks/append.py [--tokens N] [--repeats N] [--dtype float32]

Prints one line for each length: microseconds (median, and the range of the middle half) for a dense cache and for pages
of 16, which include MLX's evaluation of the node; the same when the cache is held elsewhere and so copied; and the time
in place divided by that of the shortest cache. The rows are compared with what was stored.
"""

from __future__ import annotations

import argparse
import statistics
import time

import mlx.core as mx
import mlx_mfa as mfa

H, D, PAGE = 8, 128, 16


def microseconds(step, repeats):
    """The median and the quartiles of ``step()``, after a warm-up."""
    samples = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        step()
        if i >= 3:
            samples.append((time.perf_counter() - start) * 1e6)
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, low, high


def measure(length, tokens, dtype, repeats, paged, held):
    """Appends ``tokens`` behind ``length`` tokens again and again."""
    capacity = -(-(length + tokens) // PAGE) * PAGE
    cache = mx.zeros((capacity // PAGE, PAGE, H, D) if paged else (1, H, capacity, D), dtype)
    rows = mx.random.normal((1, H, tokens, D)).astype(dtype)
    table = mx.arange(capacity // PAGE)[None] if paged else None
    starts = mx.array([length])
    mx.eval(cache, rows, starts, [] if table is None else table)
    holders = []

    def step():
        nonlocal cache
        holders[:] = [cache] if held else []
        cache = mfa.append_to_cache(cache, rows, starts, table)
        mx.eval(cache)

    result = microseconds(step, repeats)
    stored = cache.reshape(1, capacity, H, D).swapaxes(1, 2) if paged else cache
    assert mx.array_equal(stored[:, :, length : length + tokens], rows).item()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768, 65536])
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(f"{args.tokens} token(s), {args.dtype}, {H} heads of {D}, {mfa.get_device_info()['device_name']}")
    shortest = {}
    for length in args.lengths:
        cells = []
        for paged in (False, True):
            middle, low, high = measure(length, args.tokens, getattr(mx, args.dtype), args.repeats, paged, False)
            ratio = middle / shortest.setdefault(paged, middle)
            name = "pages" if paged else "dense"
            cells.append(f"{name} {middle:7.1f} us [{low:.1f}, {high:.1f}] ratio {ratio:.2f}")
        copied, _, _ = measure(length, args.tokens, getattr(mx, args.dtype), max(5, args.repeats // 20), False, True)
        print(f"{length:6d} keys: " + "; ".join(cells) + f"; copied {copied:9.1f} us", flush=True)


if __name__ == "__main__":
    main()
