"""Packed q, k and v: the same results as from separate arrays, gradients in one array, and nothing copied."""

import mlx.core as mx
import numpy as np
import pytest
from entry_points import BLOCKS, check_entry, run_block
from problems import (
    READ_IN_PLACE,
    keywords,
    make_case,
    make_problem,
    mfa,
    needs_kernels,
    random_arrays,
    random_case,
    to_mlx,
    to_numpy,
)


def packed_sizes(rng, self_attention):
    while True:
        B, Hkv, G = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice((1, 1, 2, 4)))
        Nq, Nk = (int(rng.choice((1, 7, 33, 64, 65, 129, 257))) for _ in range(2))
        Nk = Nq if self_attention else Nk
        if B * Hkv * G * Nq * Nk <= 2e5:
            D = int(rng.choice((1, 8, 17, 40, 64, 128)))
            return B, Hkv * G, Hkv, Nq, Nk, D, D


def fused(*arrays):
    """``[B, H, N, D]`` arrays as ``[B, N, heads * D]``."""
    tokens = np.concatenate([x.transpose(0, 2, 1, 3) for x in arrays], axis=2)
    B, N, heads, D = tokens.shape
    return tokens.reshape(B, N, heads * D)


def fused_parts(names, heads):
    def split(gradient):
        B, N, width = gradient.shape
        tokens = gradient.reshape(B, N, sum(heads), width // sum(heads)).transpose(0, 2, 1, 3)
        return dict(zip(names, np.split(tokens, np.cumsum(heads)[:-1], axis=1)))

    return split


def stacked(*arrays):
    """``[B, H, N, D]`` arrays as ``[B, H, N, len(arrays), D]``; NaN where one has fewer heads."""
    H = max(x.shape[1] for x in arrays)
    padded = [np.pad(x, [(0, 0), (0, H - x.shape[1])] + [(0, 0)] * 2, constant_values=np.nan) for x in arrays]
    return np.stack(padded, axis=3)


def stacked_parts(names, heads):
    def split(gradient):
        for i, count in enumerate(heads):
            assert (gradient[:, count:, :, i] == 0).all()  # heads that are there and not used
        return {n: gradient[:, :count, :, i] for i, (n, count) in enumerate(zip(names, heads))}

    return split


def as_view(x, rng, dtype):
    """``x``, or a view of it with other strides in a parent of NaN."""
    if rng.random() < 0.5:
        return to_mlx(x, dtype)
    parent = np.full((x.shape[0] + 1, *x.shape[1:-1], x.shape[-1] + 3), np.nan)
    parent[1:, ..., 2:-1] = x
    return to_mlx(parent, dtype)[1:, ..., 2:-1]


@needs_kernels
@pytest.mark.parametrize("block", BLOCKS)
def test_random_packed_qkv_is_attention_of_its_parts(block, seed):
    def check(rng, index):
        case = random_case(rng, sizes=lambda r: packed_sizes(r, True))
        _, Hq, Hkv, *_ = case.problem.shape
        heads = (Hq, Hkv, Hkv)
        arrays = [to_numpy(case.arrays[n]) for n in "qkv"]
        layout = fused if rng.random() < 0.5 else stacked
        parts = (fused_parts if layout is fused else stacked_parts)("qkv", heads)
        inputs = {"qkv": as_view(layout(*arrays), rng, case.problem.dtype)}
        inputs |= {n: x for n, x in case.arrays.items() if n not in "qkv"}

        def call(x):
            return mfa.flash_attention_qkv_packed(
                x["qkv"], num_heads=Hq, num_kv_heads=Hkv, return_lse=True, **keywords(case.problem, x)
            )

        check_entry(case, inputs, call, {"qkv": parts}, seed=index)

    run_block(block, seed, check)


@needs_kernels
@pytest.mark.parametrize("block", BLOCKS)
def test_random_packed_kv_is_attention_of_its_parts(block, seed):
    def check(rng, index):
        case = random_case(rng, sizes=lambda r: packed_sizes(r, False))
        _, _, Hkv, *_ = case.problem.shape
        arrays = [to_numpy(case.arrays[n]) for n in "kv"]
        layout = fused if rng.random() < 0.5 else stacked
        parts = (fused_parts if layout is fused else stacked_parts)("kv", (Hkv, Hkv))
        inputs = {"q": case.arrays["q"], "kv": as_view(layout(*arrays), rng, case.problem.dtype)}
        inputs |= {n: x for n, x in case.arrays.items() if n not in "qkv"}

        def call(x):
            return mfa.flash_attention_kv_packed(
                x["q"], x["kv"], num_kv_heads=Hkv, return_lse=True, **keywords(case.problem, x)
            )

        check_entry(case, inputs, call, {"kv": parts}, seed=index)

    run_block(block, seed, check)


def packed_arrays(B=2, H=4, Hkv=2, N=256, D=32):
    q, k, v = random_arrays(3, (B, H, N, D), (B, Hkv, N, D), (B, Hkv, N, D))
    token_major = [x.swapaxes(1, 2).reshape(B, N, -1) for x in (q, k, v)]
    return (q, k, v), mx.concatenate(token_major, axis=2), mx.concatenate(token_major[1:], axis=2)


def test_results_have_the_bits_of_separate_arrays():
    (q, k, v), qkv, kv = packed_arrays()
    expected = mfa.flash_attention(q, k, v, causal=True)
    assert mx.array_equal(mfa.flash_attention_qkv_packed(qkv, num_heads=4, num_kv_heads=2, causal=True), expected)
    assert mx.array_equal(mfa.flash_attention_kv_packed(q, kv, num_kv_heads=2, causal=True), expected)
    stacked_kv = mx.stack([k, v], axis=3)
    assert mx.array_equal(mfa.flash_attention_kv_packed(q, stacked_kv, causal=True), expected)
    equal_heads = mx.stack([q, q, q], axis=3)
    assert mx.array_equal(mfa.flash_attention_qkv_packed(equal_heads), mfa.flash_attention(q, q, q))


def test_fewer_kv_heads_than_are_stored_use_the_first():
    (q, k, v), _, _ = packed_arrays(H=4, Hkv=4)
    expected = mfa.flash_attention(q, k[:, :2], v[:, :2])
    qkv = mx.stack([q, k, v], axis=3)
    assert mx.array_equal(mfa.flash_attention_qkv_packed(qkv, num_kv_heads=2), expected)
    kv = mx.stack([k, v], axis=3)
    assert mx.array_equal(mfa.flash_attention_kv_packed(q, kv, num_kv_heads=2), expected)


LONG = {"B": 1, "H": 8, "Hkv": 8, "N": 4096, "D": 64}
FUSED = (LONG["B"], LONG["N"], 3 * LONG["H"] * LONG["D"])
STACKED = (LONG["B"], LONG["H"], LONG["N"], 3, LONG["D"])


@needs_kernels
@pytest.mark.parametrize("shape", [FUSED, STACKED], ids=["fused", "stacked"])
def test_packed_arrays_are_read_in_place(shape, peak_bytes):
    (qkv,) = random_arrays(5, shape)
    mx.eval(qkv)
    output = qkv.nbytes / 3
    options = {"causal": True, "window_size": (64, 0), **READ_IN_PLACE}

    def forward(x):
        return mfa.flash_attention_qkv_packed(x, num_heads=LONG["H"], **options)

    # The output and scratch; a copy of q, k or v would be as large as the output.
    assert peak_bytes(lambda: mx.eval(forward(qkv))) < 1.9 * output

    # The output, its cotangent, the three gradients and the packed gradient that they are joined to, and scratch of
    # dq in float32. A copy of the packed array, or of one part, would exceed it.
    (d_o,) = random_arrays(6, (1, LONG["H"], LONG["N"], LONG["D"]))
    mx.eval(d_o)
    separate = random_arrays(7, *[(1, LONG["H"], LONG["N"], LONG["D"])] * 3)
    mx.eval(separate)

    def dense(q, k, v):
        return mfa.flash_attention(q, k, v, **options)

    unpacked = peak_bytes(lambda: mx.eval(mx.vjp(dense, separate, [d_o])[1]))
    packed = peak_bytes(lambda: mx.eval(mx.vjp(forward, [qkv], [d_o])[1]))
    assert packed < unpacked + qkv.nbytes + 0.5 * output


def test_transformations_of_packed_attention():
    _, qkv, _ = packed_arrays(N=33)

    def f(x):
        return mfa.flash_attention_qkv_packed(x, num_heads=4, num_kv_heads=2, causal=True)

    assert mx.allclose(mx.compile(f)(qkv), f(qkv), atol=1e-6)
    both = mx.stack([qkv, qkv * 0.5])
    assert mx.allclose(mx.vmap(f)(both)[1], f(qkv * 0.5), atol=1e-6)


QKV_MISTAKES = {
    "rank 4": (lambda: (mx.zeros((2, 3, 4, 8)), {}), r"qkv must have shape .*\[B, H, N, 3, D\]; got \(2,3,4,8\)"),
    "rank 2": (lambda: (mx.zeros((2, 24)), {"num_heads": 1}), r"qkv must have shape"),
    "no head count": (lambda: (mx.zeros((2, 3, 24)), {}), r"num_heads is needed to take qkv of shape \(2,3,24\) apart"),
    "indivisible": (
        lambda: (mx.zeros((2, 3, 25)), {"num_heads": 4, "num_kv_heads": 2}),
        r"the last axis of qkv must be a multiple of num_heads \+ 2 \* num_kv_heads = 8; got 25",
    ),
    "no channels": (lambda: (mx.zeros((2, 3, 0)), {"num_heads": 4}), "the last axis of qkv must be a multiple"),
    "no heads": (lambda: (mx.zeros((2, 3, 24)), {"num_heads": 0}), "num_heads must be positive; got 0"),
    "negative kv heads": (
        lambda: (mx.zeros((2, 3, 24)), {"num_heads": 1, "num_kv_heads": -2}),
        "num_kv_heads must be positive; got -2",
    ),
    "two of three": (lambda: (mx.zeros((2, 4, 5, 2, 8)), {}), r"axis 3 of qkv \[B, H, N, 3, D\] must have extent 3"),
    "other heads": (
        lambda: (mx.zeros((2, 4, 5, 3, 8)), {"num_heads": 2}),
        "num_heads must be the heads of qkv, 4; got 2",
    ),
    "too many kv heads": (
        lambda: (mx.zeros((2, 4, 5, 3, 8)), {"num_kv_heads": 8}),
        "num_kv_heads must be at most the heads of qkv, 4; got 8",
    ),
}  # fmt: skip
KV_MISTAKES = {
    "rank 4": (lambda: (mx.zeros((2, 3, 4, 8)), {}), r"kv must have shape .*; got \(2,3,4,8\)"),
    "no head count": (
        lambda: (mx.zeros((2, 3, 24)), {}),
        r"num_kv_heads is needed to take kv of shape \(2,3,24\) apart",
    ),
    "indivisible": (
        lambda: (mx.zeros((2, 3, 25)), {"num_kv_heads": 2}),
        r"the last axis of kv must be a multiple of 2 \* num_kv_heads = 4; got 25",
    ),
    "no heads": (lambda: (mx.zeros((2, 3, 24)), {"num_kv_heads": 0}), "num_kv_heads must be positive; got 0"),
    "three of two": (lambda: (mx.zeros((2, 4, 5, 3, 8)), {}), r"axis 3 of kv \[B, Hkv, N, 2, D\] must have extent 2"),
    "too many heads": (
        lambda: (mx.zeros((2, 4, 5, 2, 8)), {"num_kv_heads": 5}),
        "num_kv_heads must be at most the heads of kv, 4; got 5",
    ),
}


@pytest.mark.parametrize("mistake", QKV_MISTAKES)
def test_mistake_in_packed_qkv_is_refused(mistake):
    make, words = QKV_MISTAKES[mistake]
    qkv, options = make()
    with pytest.raises(ValueError, match=rf"^\[flash_attention_qkv_packed\] .*{words}"):
        mfa.flash_attention_qkv_packed(qkv, **options)


@pytest.mark.parametrize("mistake", KV_MISTAKES)
def test_mistake_in_packed_kv_is_refused(mistake):
    make, words = KV_MISTAKES[mistake]
    kv, options = make()
    with pytest.raises(ValueError, match=rf"^\[flash_attention_kv_packed\] .*{words}"):
        mfa.flash_attention_kv_packed(mx.zeros((2, 4, 5, 8)), kv, **options)


def test_empty_packed_arrays():
    assert mfa.flash_attention_qkv_packed(mx.zeros((2, 0, 24)), num_heads=1).shape == (2, 1, 0, 8)
    assert mfa.flash_attention_qkv_packed(mx.zeros((0, 4, 3, 3, 8))).shape == (0, 4, 3, 8)
    q = mx.ones((2, 4, 3, 8))
    assert (mfa.flash_attention_kv_packed(q, mx.zeros((2, 0, 16)), num_kv_heads=1) == 0).all()


def test_what_lengths_hide_in_a_packed_array_is_not_read():
    p = make_problem(9, B=2, Hq=2, Nq=40, D=16, kv_lengths=np.array([40, 11]))
    case = make_case(p)
    arrays = [to_numpy(case.arrays[n]) for n in "qkv"]
    expected = mfa.flash_attention(*(case.arrays[n] for n in "qkv"), kv_lengths=[40, 11])
    for x in arrays[1:]:
        x[1, :, 11:] = np.nan
    qkv = to_mlx(fused(*arrays), "float32")
    assert mx.array_equal(mfa.flash_attention_qkv_packed(qkv, num_heads=2, kv_lengths=[40, 11]), expected)
