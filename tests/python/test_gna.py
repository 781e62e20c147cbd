"""Neighbourhood attention: golden windows, the oracle with the window as a mask, limits, bad grids."""

import dataclasses
import itertools

import mlx.core as mx
import numpy as np
import pytest
from entry_points import BLOCKS, check_entry, run_block
from problems import cpu_kernels_only, golden, keywords, mfa, needs_kernels, random_arrays, random_case, to_numpy

routes = pytest.mark.parametrize("route", [pytest.param("mfa", marks=[needs_kernels, cpu_kernels_only]), "composed"])

NATTEN = {"boundary": "shift", "even_bias": "left"}


def axis_keys(L, window, stride, dilation, causal, boundary, even_bias):
    """The keys of every query along one axis, by the definitions of the papers and of the replaced package."""
    keys = []
    for i in range(L):
        phase, c = i % dilation, i // dilation
        size = len(range(phase, L, dilation))
        group = c // stride * stride
        if causal:
            last = min(group + stride - 1, size - 1)
            lo, hi = last - window + 1, c + 1
        else:
            before = (window - stride) // 2  # the rest of the window lies behind the queries that share it
            if even_bias == "left" and window % 2 == 0 and stride % 2 == 1:
                before += 1
            lo, hi = group - before, group - before + window
            if boundary == "shift":
                lo = min(max(lo, 0), max(size - window, 0))
                hi = lo + window
        keys.append([phase + dilation * t for t in range(max(lo, 0), min(hi, size))])
    return keys


def window_mask(shape, window, stride, dilation, causal, boundary="truncate", even_bias="right"):
    """Which token sees which, ``[tokens, tokens]``."""
    mask = np.ones((1, 1), bool)
    for axis in zip(shape, window, stride, dilation, causal):
        one = np.zeros((axis[0], axis[0]), bool)
        for i, keys in enumerate(axis_keys(*axis, boundary, even_bias)):
            one[i, keys] = True
        mask = np.kron(mask, one).astype(bool)
    return mask


def seen_by_attention(shape, window, stride, **options):
    """Which token sees which: equal scores, and values that name their key."""
    N = int(np.prod(shape))
    zeros, names = mx.zeros((1, 1, N, 8)), mx.eye(N)[None, None]
    return np.array(mfa.flash_attention_gna(zeros, zeros, names, shape, window, stride, **options))[0, 0] > 0


@routes
@pytest.mark.parametrize("case", golden("gna.json")["one_dim"], ids=lambda c: f"L{c['L']}w{c['window']}s{c['stride']}")
def test_golden_windows_of_one_axis(case, route):
    L, window, stride = case["L"], case["window"], case["stride"]
    options = {"dilation": case["dilation"], "causal": case["causal"], "backend": route}
    seen = seen_by_attention((L,), (window,), (stride,), **options, **NATTEN)
    assert [np.flatnonzero(row).tolist() for row in seen] == case["keys"]
    if case["truncated_convention"]:
        seen = seen_by_attention((L,), (window,), (stride,), backend=route)
        assert [np.flatnonzero(row).tolist() for row in seen] == [list(range(*r)) for r in case["truncated_convention"]]


@routes
@pytest.mark.parametrize("case", golden("gna.json")["three_dim"], ids=lambda c: str(c["dims"]))
def test_golden_windows_of_three_axes(case, route):
    seen = seen_by_attention(
        tuple(case["dims"]), tuple(case["window"]), tuple(case["stride"]),
        dilation=tuple(case["dilation"]), causal=tuple(case["causal"]), backend=route, **NATTEN,
    )  # fmt: skip
    assert seen.sum(1).tolist() == case["keys_per_query"]
    assert np.flatnonzero(seen[0]).tolist() == case["first_row"]
    h, n = 0, len(seen)
    for q, k in zip(*np.nonzero(seen)):
        h = (31 * h + int(q) * n + int(k) + 1) % 2147483647
    assert h == case["checksum"]


def test_all_small_axes():
    """Every length, window, stride and dilation up to 7, causal or not, with both rules at borders."""
    for L in range(1, 8):
        for window, dilation in itertools.product(range(1, L + 2), range(1, L + 1)):
            for stride, causal in itertools.product(range(1, window + 1), (False, True)):
                boundary, even_bias = (("truncate", "right"), ("shift", "left"))[(L + stride) % 2]
                options = {"boundary": boundary, "even_bias": even_bias}
                seen = seen_by_attention((L,), (window,), (stride,), dilation=dilation, causal=causal, **options)
                expected = window_mask((L,), (window,), (stride,), (dilation,), (causal,), **options)
                assert np.array_equal(seen, expected), (L, window, stride, dilation, causal, options)


def random_grid(rng):
    axes = int(rng.integers(1, 4))
    limits = {1: 400, 2: 20, 3: 8}
    shape = tuple(int(rng.integers(1, limits[axes] + 1)) for _ in range(axes))
    window = tuple(int(rng.integers(1, min(n + 2, 40) + 1)) for n in shape)
    stride = tuple(int(rng.integers(1, w + 1)) if rng.random() < 0.6 else 1 for w in window)
    dilation = tuple(int(rng.integers(1, min(n, 4) + 1)) if rng.random() < 0.3 else 1 for n in shape)
    causal = tuple(bool(rng.random() < 0.3) for _ in shape)
    return shape, window, stride, dilation, causal


@routes
@pytest.mark.parametrize("block", BLOCKS)
def test_random_neighbourhoods_are_attention_with_their_mask(block, route, seed):
    def check(rng, index):
        shape, window, stride, dilation, causal = random_grid(rng)
        N = int(np.prod(shape))

        def sizes(rng):
            while True:
                B, Hkv, G = int(rng.integers(1, 4)), int(rng.choice((1, 2, 3))), int(rng.choice((1, 1, 2, 4)))
                if B * Hkv * G * N * N <= 4e5:
                    D, Dv = (int(rng.choice((1, 8, 17, 40, 64, 72, 128))) for _ in range(2))
                    return B, Hkv * G, Hkv, N, N, D, Dv

        case = random_case(rng, sizes)
        p = case.problem
        rules = {"boundary": str(rng.choice(("truncate", "shift"))), "even_bias": str(rng.choice(("right", "left")))}
        tokens = window_mask(shape, window, stride, dilation, causal, **rules)[None, None]
        mask = tokens if p.mask is None else tokens & p.mask
        case.problem = dataclasses.replace(p, mask=mask, causal=False, window=None)
        case.label = f"grid {shape} {window} {stride} {dilation} {causal} {rules} {case.label}"

        def call(x):
            options = {n: o for n, o in keywords(p, x).items() if n not in ("causal", "window_size")}
            return mfa.flash_attention_gna(
                x["q"], x["k"], x["v"], shape, window, stride,
                dilation=dilation, causal=causal, return_lse=True, backend=route, **rules, **options,
            )  # fmt: skip

        check_entry(case, case.arrays, call, seed=index)

    run_block(block, seed, check)


@needs_kernels
@cpu_kernels_only
def test_results_have_the_bits_of_the_dense_call_with_the_mask():
    shape, window, stride = (4, 6, 7), (3, 4, 4), (1, 2, 1)
    N = int(np.prod(shape))
    mask = mx.array(window_mask(shape, window, stride, (1, 1, 1), (False,) * 3))
    for dtype in ("float32", "bfloat16"):
        q, k, v = random_arrays(2, (2, 4, N, 40), (2, 2, N, 40), (2, 2, N, 24), dtype=dtype)
        mine = mfa.flash_attention_gna(q, k, v, shape, window, stride, return_lse=True)
        expected = mfa.flash_attention(q, k, v, mask=mask, return_lse=True)
        assert all(mx.array_equal(a, b) for a, b in zip(mine, expected))


@needs_kernels
@cpu_kernels_only
def test_a_window_of_the_whole_grid_is_dense_attention():
    q, k, v = random_arrays(2, *[(1, 2, 60, 16)] * 3)
    out = mfa.flash_attention_gna(q, k, v, (3, 4, 5), (3, 4, 5), (1, 2, 1), boundary="shift")
    assert mx.array_equal(out, mfa.flash_attention(q, k, v))


def test_a_window_of_its_stride_is_blocked_attention():
    q, k, v = random_arrays(2, *[(1, 2, 64, 16)] * 3)
    out = mfa.flash_attention_gna(q, k, v, (64,), (16,), (16,))
    for first in range(0, 64, 16):
        alone = mfa.flash_attention(*(x[:, :, first : first + 16] for x in (q, k, v)))
        assert mx.allclose(out[:, :, first : first + 16], alone, atol=1e-6)


@needs_kernels
@cpu_kernels_only
def test_stride_one_of_one_axis_is_a_sliding_window():
    q, k, v = random_arrays(2, *[(1, 2, 300, 16)] * 3)
    for window, sides in ((9, (4, 4)), (10, (4, 5))):
        out = mfa.flash_attention_gna(q, k, v, (300,), (window,), (1,))
        assert mx.array_equal(out, mfa.flash_attention(q, k, v, window_size=sides))
    causal = mfa.flash_attention_gna(q, k, v, (300,), (10,), (1,), causal=True)
    assert mx.array_equal(causal, mfa.flash_attention(q, k, v, causal=True, window_size=(9, 0)))


@needs_kernels
@cpu_kernels_only
def test_a_nan_reaches_only_the_tokens_around_it():
    shape, window, stride = (5, 8, 8), (3, 3, 3), (1, 1, 1)
    q, k, v = random_arrays(2, *[(1, 2, 320, 16)] * 3)
    clean = to_numpy(mfa.flash_attention_gna(q, k, v, shape, window, stride))
    k[:, :, 150] = float("nan")
    out = to_numpy(mfa.flash_attention_gna(q, k, v, shape, window, stride))
    sees = window_mask(shape, window, stride, (1, 1, 1), (False,) * 3)[:, 150]
    assert np.isnan(out[:, :, sees]).all()
    assert np.array_equal(out[:, :, ~sees], clean[:, :, ~sees])


@needs_kernels
@cpu_kernels_only
def test_long_neighbourhoods_do_not_store_the_scores(peak_bytes):
    q, k, v = random_arrays(3, *[(1, 1, 16_384, 16)] * 3)
    mx.eval(q, k, v)

    def loss(q, k, v):
        return mfa.flash_attention_gna(q, k, v, (16, 32, 32), (3, 5, 5), (1, 1, 1)).sum()

    peak = peak_bytes(lambda: mx.eval(mx.grad(loss, argnums=(0, 1, 2))(q, k, v)))
    assert peak < 16_384**2 * 4 / 32


def arguments():
    x = mx.zeros((2, 2, 24, 8))
    return {"q": x, "k": x, "v": x, "seq_shape": (2, 3, 4), "window_size": (1, 3, 3), "stride": (1, 1, 2)}


MISTAKES = {
    "too few tokens": (
        {"seq_shape": (2, 3, 5)},
        r"q and k must have the tokens of seq_shape, \(2, 3, 5\); got 24 and 24",
    ),
    "other keys": ({"k": mx.zeros((2, 2, 25, 8)), "v": mx.zeros((2, 2, 25, 8))}, "must have the tokens of seq_shape"),
    "huge grid": ({"seq_shape": (2**30, 2**30, 2**30)}, "q and k must have the tokens of seq_shape"),
    "no axes": ({"seq_shape": ()}, r"seq_shape must have 1 to 3 axes; got \(\)"),
    "four axes": ({"seq_shape": (2, 3, 2, 2)}, r"seq_shape must have 1 to 3 axes; got \(2, 3, 2, 2\)"),
    "empty axis": ({"seq_shape": (2, 0, 4)}, r"seq_shape must be positive; got \(2, 0, 4\)"),
    "negative axis": ({"seq_shape": (-2, -3, 4)}, "seq_shape must be positive"),
    "windows": ({"window_size": (3, 3)}, "window_size must have one value for each of the 3 axes of seq_shape; got 2"),
    "strides": ({"stride": (1, 1, 1, 1)}, "stride must have one value for each of the 3 axes of seq_shape; got 4"),
    "dilations": ({"dilation": (1, 1)}, "dilation must have one value for each of the 3 axes of seq_shape; got 2"),
    "causals": ({"causal": (True,)}, "causal must have one value for each of the 3 axes of seq_shape; got 1"),
    "window of zero": ({"window_size": (1, 0, 3)}, r"window_size must be positive; got \(1, 0, 3\)"),
    "stride of zero": ({"stride": (0, 1, 1)}, r"stride must be 1 to window_size on each axis; got \(0, 1, 1\)"),
    "stride above the window": ({"stride": (2, 1, 1)}, "stride must be 1 to window_size on each axis"),
    "dilation of zero": ({"dilation": 0}, r"dilation must be 1 to seq_shape on each axis; got \(0, 0, 0\)"),
    "dilation above the axis": ({"dilation": (3, 1, 1)}, "dilation must be 1 to seq_shape on each axis"),
    "a number for a tuple": ({"window_size": 3}, "window_size must be a tuple of integers of 32 bits; got 3"),
    "fractions": ({"stride": (1.0, 1, 1)}, "stride must be a tuple of integers of 32 bits"),
    "beyond 32 bits": ({"window_size": (1, 3, 2**31)}, "window_size must be a tuple of integers of 32 bits"),
    "boundary": ({"boundary": "wrap"}, "boundary must be \"truncate\" or \"shift\"; got 'wrap'"),
    "even bias": ({"even_bias": "both"}, "even_bias must be \"right\" or \"left\"; got 'both'"),
    "q of rank 3": ({"q": mx.zeros((2, 24, 8))}, "q and k must have 4 dimensions"),
    "heads": ({"q": mx.zeros((2, 3, 24, 8))}, "the heads of q must be a multiple"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_refused_with_its_reason(mistake):
    change, words = MISTAKES[mistake]
    mfa.flash_attention_gna(**arguments())
    with pytest.raises(ValueError, match=rf"^\[flash_attention_gna\] .*{words}"):
        mfa.flash_attention_gna(**(arguments() | change))


def test_random_malformed_grids_are_refused_or_run(seed):
    rng = np.random.default_rng(seed)
    (x,) = random_arrays(1, (1, 1, 24, 8))
    values = (-(2**31), -1, 0, 1, 2, 3, 4, 6, 24, 2**31 - 1)
    good = ((24,), (4, 6), (2, 3, 4), (1, 24, 1))
    ran = 0
    for _ in range(10_000):
        shape = good[int(rng.integers(len(good)))]
        if rng.random() < 0.2:
            shape = tuple(int(n) for n in rng.choice(values, size=rng.integers(0, 5)))
        window, stride, dilation = (tuple(int(n) for n in rng.choice(values, size=len(shape))) for _ in range(3))
        causal = tuple(bool(c) for c in rng.random(len(shape)) < 0.5)
        boundary = str(rng.choice(("truncate", "shift")))
        stride = stride if rng.random() < 0.2 else (1,) * len(shape)
        dilation = dilation if rng.random() < 0.2 else 1
        try:
            out = mfa.flash_attention_gna(
                x, x, x, shape, window, stride, dilation=dilation, causal=causal, boundary=boundary
            )
        except ValueError:
            continue
        ran += 1
        assert mx.isfinite(out).all()
    assert 500 < ran < 9500
