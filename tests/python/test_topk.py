"""Top-k attention: the oracle with the kept keys as a mask, ties, counts, limits, bad input."""

import dataclasses
import math

import mlx.core as mx
import numpy as np
import oracle
import pytest
from entry_points import BLOCKS, check_entry, run_block
from problems import cpu_kernels_only, keywords, mfa, needs_kernels, random_arrays, random_case, to_numpy

pytestmark = [needs_kernels, cpu_kernels_only]


def exact_scores(p):
    """The finished scores in float64, -inf where a key is hidden, and how far a float32 evaluation may be off."""
    _, Hq, Hkv, _, Nk, D, _ = p.shape
    k = p.k.repeat(Hq // Hkv, axis=1)
    scale = float(np.float32(D**-0.5 if p.scale is None else p.scale))
    s = scale * p.q @ k.swapaxes(-1, -2)
    size = abs(scale) * (np.abs(p.q) @ np.abs(k).swapaxes(-1, -2))
    if p.softcap > 0:
        s = p.softcap * np.tanh(s / p.softcap)
        size = size + p.softcap
    if p.alibi is not None:
        distance = np.arange(Nk)[None, None, :] - oracle.positions(p)[0][:, :, None]
        alibi = np.asarray(p.alibi)[None, :, None, None] * distance[:, None]
        s, size = s + alibi, size + np.abs(alibi)
    if p.bias is not None:
        s = s + p.bias
        size = size + np.abs(np.where(np.isinf(p.bias), 0, p.bias))
    # Sums of float32 are off by about half an ulp of what they add up; four times that is beyond what occurs.
    return np.where(oracle.visible(p), s, -np.inf), 2.4e-7 * size.max(initial=1.0)


def kept_keys(p, ratio):
    """The mask that the selection stands for, and whether no score is so near the threshold that rounding decides."""
    s, slack = exact_scores(p)
    lengths = oracle.positions(p)[1]
    Nk = s.shape[-1]
    if Nk == 0:
        return np.isfinite(s), True
    ordered = -np.sort(-s, axis=-1)
    counts = np.array([min(max(1, math.ceil(ratio * int(n))), Nk) for n in lengths])
    index = np.broadcast_to(counts[:, None, None, None] - 1, (*s.shape[:-1], 1))
    floor = np.take_along_axis(ordered, index, -1)
    with np.errstate(invalid="ignore"):
        near = np.abs(s - floor) <= 2 * slack
    decided = (near.sum(-1) <= 1) | np.isneginf(floor[..., 0])
    return (s >= floor) & np.isfinite(s), bool(decided.all())


def topk_sizes(rng):
    while True:
        B, Hkv, G = int(rng.integers(1, 3)), int(rng.choice((1, 2))), int(rng.choice((1, 1, 2, 4)))
        Nq, Nk = int(rng.choice((1, 1, 3, 7, 17, 33))), int(rng.choice((1, 7, 31, 64, 65, 129, 257, 300, 513)))
        if B * Hkv * G * Nq * Nk <= 2e4:
            D, Dv = (int(rng.choice((8, 17, 40, 64, 72, 128))) for _ in range(2))
            return B, Hkv * G, Hkv, Nq, Nk, D, Dv


@pytest.mark.parametrize("block", BLOCKS)
def test_random_selections_are_attention_with_the_kept_keys_as_a_mask(block, seed):
    def check(rng, index):
        # Draws again where two scores are within rounding of a threshold: either answer would be right there.
        for _ in range(50):
            case = random_case(rng, topk_sizes)
            ratio = float(rng.choice((1e-6, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0)))
            p = case.problem
            B, Hq, _, Nq, Nk, _, _ = p.shape
            blocks = None
            if rng.random() < 0.3:
                tile = (16, 32)
                visible = rng.random((B, Hq, -(-Nq // tile[0]), -(-Nk // tile[1]))) < 0.7
                blocks = mfa.BlockMask(mx.array(visible), tile, q_len=Nq, kv_len=Nk)
                tokens = visible.repeat(tile[0], 2).repeat(tile[1], 3)[:, :, :Nq, :Nk]
                p = dataclasses.replace(p, mask=tokens if p.mask is None else tokens & p.mask)
            kept, decided = kept_keys(p, ratio)
            if decided:
                break
        assert decided
        own = case.problem
        case.problem = dataclasses.replace(p, mask=kept)
        case.label = f"ratio {ratio} blocks {blocks} {case.label}"

        def call(x):
            options = keywords(own, x)
            options["token_mask"] = options.pop("mask")
            return mfa.flash_attention_topk(x["q"], x["k"], x["v"], ratio, mask=blocks, return_lse=True, **options)

        check_entry(case, case.arrays, call, seed=index)

    run_block(block, seed, check)


def seen(q, k, ratio, **options):
    """Which keys each row keeps: values name their key."""
    Nk = k.shape[2]
    names = mx.broadcast_to(mx.eye(Nk), (k.shape[0], k.shape[1], Nk, Nk))
    return np.array(mfa.flash_attention_topk(q, k, names, ratio, **options)) > 0


@pytest.mark.parametrize("Nq", [1, 5, 100])
@pytest.mark.parametrize("Nk", [1, 2, 64, 255, 256, 257, 500])
def test_each_row_keeps_the_count_it_should(Nq, Nk):
    q, k = random_arrays(3, (2, 4, Nq, 32), (2, 2, Nk, 32))
    scores = np.array(q).astype(np.float64) @ np.array(k).astype(np.float64).repeat(2, axis=1).swapaxes(-1, -2)
    for ratio in (1e-9, 0.05, 0.3, 0.999, 1.0):
        count = max(1, math.ceil(ratio * Nk))
        kept = seen(q, k, ratio, scale=0.1)
        assert (kept.sum(-1) == count).all()
        assert np.where(kept, scores, np.inf).min(-1).min() >= -np.inf
        smallest, largest_dropped = np.where(kept, scores, np.inf).min(-1), np.where(kept, -np.inf, scores).max(-1)
        assert (smallest >= largest_dropped - 1e-4).all()


def test_ties_with_the_threshold_are_kept():
    q, k = mx.ones((1, 1, 3, 8)), mx.ones((1, 1, 40, 8))
    assert seen(q, k, 0.1).all()  # all scores are the same
    k[:, :, 10:13] = 2.0
    assert np.flatnonzero(seen(q, k, 2 / 40)[0, 0, 0]).tolist() == [10, 11, 12]
    assert seen(q, k, 4 / 40).all()


def test_rows_that_see_fewer_keys_than_they_may_keep_keep_all():
    q, k = random_arrays(3, (1, 1, 50, 16), (1, 1, 50, 16))
    kept = seen(q, k, 0.5, causal=True)[0, 0]
    assert (kept.sum(1) == np.minimum(np.arange(50) + 1, 25)).all()
    assert not kept[np.triu_indices(50, 1)].any()


def test_the_count_follows_the_length_of_each_entry():
    q, k = random_arrays(3, (3, 2, 4, 16), (3, 1, 80, 16))
    lengths = [80, 30, 1]
    for given in (lengths, mx.array(lengths), mx.array(lengths, mx.int64) * 1):
        kept = seen(q, k, 0.1, kv_lengths=given)
        assert (kept.sum(-1) == np.array([8, 3, 1])[:, None, None]).all()


def test_a_ratio_of_one_is_attention():
    for Nq in (1, 70):
        q, k, v = random_arrays(3, (2, 4, Nq, 16), (2, 2, 90, 16), (2, 2, 90, 16))
        for options in ({}, {"causal": True}, {"softcap": 2.0, "window_size": (9, 9)}):
            mine = mfa.flash_attention_topk(q, k, v, 1.0, return_lse=True, **options)
            expected = mfa.flash_attention(q, k, v, return_lse=True, **options)
            assert all(mx.array_equal(a, b) for a, b in zip(mine, expected))


def test_the_bits_are_those_of_the_dense_call_with_the_kept_keys():
    for Nq in (1, 40):
        q, k, v = random_arrays(3, (2, 4, Nq, 32), (2, 2, 560, 32), (2, 2, 560, 24))
        mask = mx.array(seen(q, k, 0.1))
        mine = mfa.flash_attention_topk(q, k, v, 0.1, return_lse=True)
        expected = mfa.flash_attention(q, k, v, mask=mask, return_lse=True)
        assert all(mx.array_equal(a, b) for a, b in zip(mine, expected))


def test_gradients_flow_through_kept_keys_only():
    q, k, v = random_arrays(3, (1, 1, 1, 16), (1, 1, 50, 16), (1, 1, 50, 16))
    kept = seen(q, k, 0.1)[0, 0, 0]
    dk, dv = mx.grad(lambda k, v: mfa.flash_attention_topk(q, k, v, 0.1).sum(), argnums=(0, 1))(k, v)
    for gradient in (dk, dv):
        assert (np.abs(np.array(gradient)[0, 0]).max(-1) > 0).tolist() == kept.tolist()


def test_what_is_hidden_is_not_read():
    q, k, v = random_arrays(9, (1, 2, 30, 32), (1, 1, 300, 32), (1, 1, 300, 32))
    visible = np.array([[True, False, True, False, True]])
    hidden = mx.array(~visible.repeat(64)[:300])[None, None, :, None]
    nan = mx.array(float("nan"))
    blocks = mfa.BlockMask(mx.array(visible), (32, 64), q_len=30, kv_len=300)
    expected = mfa.flash_attention_topk(q, k, v, 0.1, mask=blocks)
    poisoned = [mx.where(hidden, nan, x) for x in (k, v)]
    assert mx.array_equal(mfa.flash_attention_topk(q, *poisoned, 0.1, mask=blocks), expected)
    expected = mfa.flash_attention_topk(q, k, v, 0.1, kv_lengths=[200])
    poisoned = [mx.where((mx.arange(300) >= 200)[None, None, :, None], nan, x) for x in (k, v)]
    assert mx.array_equal(mfa.flash_attention_topk(q, *poisoned, 0.1, kv_lengths=[200]), expected)


def test_visible_nan_and_infinity_end_in_time_and_stay_in_their_rows():
    q, k, v = random_arrays(9, (1, 1, 40, 16), (1, 1, 600, 16), (1, 1, 600, 16))
    clean = to_numpy(mfa.flash_attention_topk(q, k, v, 0.1))
    q[:, :, 7] = float("nan")
    q[:, :, 9] = float("inf")
    out = to_numpy(mfa.flash_attention_topk(q, k, v, 0.1))
    others = [i for i in range(40) if i not in (7, 9)]
    assert np.array_equal(out[:, :, others], clean[:, :, others])
    assert np.isnan(out[:, :, 7]).all()
    k[:, :, ::3] = float("nan")
    assert np.isnan(to_numpy(mfa.flash_attention_topk(q, k, v, 0.1))).any()


def test_a_selection_takes_memory_of_the_lengths_not_of_their_product(peak_bytes):
    N = 8192
    q, k, v = random_arrays(3, *[(1, 1, N, 16)] * 3)
    mx.eval(q, k, v)
    peak = peak_bytes(lambda: mx.eval(mfa.flash_attention_topk(q, k, v, 0.02)))
    assert peak < N * N * 4 / 32


def test_compiled_and_vectorised_selections():
    q, k, v = random_arrays(3, (2, 2, 20, 16), (2, 2, 60, 16), (2, 2, 60, 16))

    def f(q, k, v):
        return mfa.flash_attention_topk(q, k, v, 0.2, causal=True)

    expected = f(q, k, v)
    assert mx.array_equal(mx.compile(f)(q, k, v), expected)
    stacked = mx.vmap(f)(*(mx.stack([x, x * 0.5]) for x in (q, k, v)))
    assert mx.array_equal(stacked[0], expected)
    assert mx.array_equal(stacked[1], f(q * 0.5, k * 0.5, v * 0.5))


def arguments():
    return {
        "q": mx.zeros((2, 4, 70, 8)),
        "k": mx.zeros((2, 2, 90, 8)),
        "v": mx.zeros((2, 2, 90, 6)),
        "topk_ratio": 0.1,
    }


MISTAKES = {
    "ratio of zero": ({"topk_ratio": 0.0}, r"topk_ratio must be in \(0, 1\]; got 0"),
    "negative ratio": ({"topk_ratio": -0.5}, r"topk_ratio must be in \(0, 1\]; got -0.5"),
    "ratio above one": ({"topk_ratio": 1.01}, r"topk_ratio must be in \(0, 1\]; got 1.01"),
    "ratio not a number": ({"topk_ratio": float("nan")}, r"topk_ratio must be in \(0, 1\]; got nan"),
    "infinite ratio": ({"topk_ratio": float("inf")}, r"topk_ratio must be in \(0, 1\]; got inf"),
    "float mask": ({"mask": mx.ones((3, 3))}, "block_mask must be bool; got float32"),
    "too few tiles": ({"mask": mx.ones((3, 2), mx.bool_)}, r"block_mask must have tiles of \(32, 32\) for 70 queries"),
    "tile of a pair too many": ({"block_size": (1, 2, 3)}, "block_size must be an integer or a pair of integers"),
    "token mask": ({"token_mask": mx.ones((3, 3), mx.bool_)}, "mask must be broadcastable"),
    "head dims": ({"k": mx.zeros((2, 2, 90, 7))}, "q and k must have the same head dimension; got 8 and 7"),
    "lengths": ({"kv_lengths": [91, 3]}, r"kv_lengths must be in \[0, Nk\] = \[0, 90\]; got 91"),
    "sinks of key heads": ({"sinks": mx.zeros(2)}, r"sinks must have shape \(4,\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_refused_with_its_reason(mistake):
    change, words = MISTAKES[mistake]
    mfa.flash_attention_topk(**arguments())
    with pytest.raises(ValueError, match=rf"^\[flash_attention_topk\] .*{words}"):
        mfa.flash_attention_topk(**(arguments() | change))


def test_other_backends_say_that_they_cannot():
    with pytest.raises(RuntimeError, match=r"^\[flash_attention_topk\] backend must be \"auto\" or \"mfa\""):
        mfa.flash_attention_topk(**arguments(), backend="composed")
