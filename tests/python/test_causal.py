"""Causal masking: query i sees key j iff j <= i + max(0, S - N), on every route, forward and backward."""

import mlx.core as mx
import numpy as np
import pytest
from problems import DTYPES, check, make_problem, mfa, random_arrays, routes, to_numpy

FEWER_EQUAL_MORE_KEYS = [(1, 1), (5, 3), (33, 7), (129, 64), (64, 64), (65, 65), (1, 129), (7, 40), (63, 257), (300, 2)]


@routes
@pytest.mark.parametrize(("Nq", "Nk"), FEWER_EQUAL_MORE_KEYS)
def test_causal_agrees_with_the_oracle(Nq, Nk, route):
    check(make_problem(Nq * 1000 + Nk, B=2, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=24, causal=True), backend=route)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Nq", "Nk"), FEWER_EQUAL_MORE_KEYS)
def test_causal_agrees_with_the_oracle_in_every_dtype(Nq, Nk, dtype):
    check(make_problem(Nq + Nk, Hq=2, Nq=Nq, Nk=Nk, D=64, dtype=dtype, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("Nq", "G", "D", "Dv"), [(1, 40, 64, 64), (1, 20, 576, 512), (3, 12, 128, 128), (16, 5, 72, 264)]
)
def test_a_few_queries_of_many_heads_to_a_key_head(Nq, G, D, Dv, dtype):
    options = {"causal": True, "window": (500, -1), "sinks": np.linspace(-1, 1, G), "alibi": np.linspace(0, 0.1, G)}
    check(make_problem(Nq + G, Hq=G, Hkv=1, Nq=Nq, Nk=700, D=D, Dv=Dv, dtype=dtype, **options))


@routes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Nq", "Nk"), FEWER_EQUAL_MORE_KEYS)
def test_asking_for_the_lse_does_not_change_the_output(Nq, Nk, causal, route):
    q, k, v = random_arrays(3, (1, 2, Nq, 32), (1, 2, Nk, 32), (1, 2, Nk, 32))
    alone = mfa.flash_attention(q, k, v, causal=causal, backend=route)
    with_lse, _ = mfa.flash_attention(q, k, v, causal=causal, backend=route, return_lse=True)
    if route == "sdpa":  # MLX's op has no lse: another implementation of the same function answers
        assert mx.allclose(alone, with_lse, rtol=0, atol=2e-6)
    else:
        assert mx.array_equal(alone, with_lse)


@routes
def test_more_queries_than_keys_never_leaves_a_row_empty(route):
    q, k, v = random_arrays(4, (1, 2, 9, 16), (1, 2, 4, 16), (1, 2, 4, 16))
    out, lse = mfa.flash_attention(q, k, v, causal=True, backend=route, return_lse=True)
    assert np.isfinite(np.array(lse)).all()
    assert np.array_equal(to_numpy(out[:, :, 0]), to_numpy(v[:, :, 0]))  # the first row sees the first key only
    full = mfa.flash_attention(q[:, :, 3:], k, v, backend=route)  # rows 3 and later see every key
    assert mx.allclose(out[:, :, 3:], full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 64, 100])
def test_prefill_in_chunks_equals_prefill_at_once(chunk):
    N = 200
    q, k, v = random_arrays(5, (1, 4, N, 32), (1, 2, N, 32), (1, 2, N, 32))
    whole = mfa.flash_attention(q, k, v, causal=True)
    parts = [
        mfa.flash_attention(q[:, :, i : i + chunk], k[:, :, : i + chunk], v[:, :, : i + chunk], causal=True)
        for i in range(0, N, chunk)
    ]
    assert mx.allclose(mx.concatenate(parts, axis=2), whole, rtol=0, atol=1e-6)


def test_a_query_before_the_keys_gets_nothing_from_later_ones():
    q, k, v = random_arrays(6, (1, 1, 70, 16), (1, 1, 70, 16), (1, 1, 70, 16))
    changed = mx.concatenate([v[:, :, :40], v[:, :, 40:] + 1000], axis=2)
    a, b = (mfa.flash_attention(q, k, x, causal=True) for x in (v, changed))
    assert mx.array_equal(a[:, :, :40], b[:, :, :40])
    assert (mx.abs(a[:, :, 40:] - b[:, :, 40:]) > 0).all()
