"""Sliding windows: query i sees keys pos(i) - left <= j <= pos(i) + right; -1 leaves a side open."""

import mlx.core as mx
import numpy as np
import pytest
from problems import check, make_problem, mfa, normal, random_arrays, routes, to_numpy

WINDOWS = [(0, 0), (1, 0), (0, 3), (5, -1), (-1, 2), (16, 16), (64, 0), (130, 65)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("Nq", "Nk"), [(70, 70), (33, 150), (150, 33), (1, 129), (257, 257)])
def test_window_agrees_with_the_oracle(window, causal, Nq, Nk):
    check(make_problem(Nq, B=1, Hq=2, Hkv=1, Nq=Nq, Nk=Nk, D=20, window=window, causal=causal))


@pytest.mark.parametrize("window", [(0, 0), (1, 0)])
@pytest.mark.parametrize("N", [70, 150, 300])
def test_rows_that_see_one_key_of_many_keep_the_error_rule(N, window):
    """Their probability is 1 and their dS nothing but rounding, in the products of pairs too."""
    bias = normal(np.random.default_rng(N), (1, 4, N, N), "float32")
    check(make_problem(N, Hq=4, Hkv=2, Nq=N, Nk=N, D=64, dtype="bfloat16", bias=bias, window=window), seed=N)


@routes
@pytest.mark.parametrize(("Nq", "Nk"), [(20, 20), (7, 40), (40, 7)])
def test_window_is_anchored_alike_on_every_route(Nq, Nk, route):
    for causal in (False, True):
        check(make_problem(Nk, Hq=2, Nq=Nq, Nk=Nk, D=16, window=(3, 2), causal=causal), backend=route)


@routes
def test_open_window_is_no_window(route):
    q, k, v = random_arrays(1, (1, 2, 50, 16), (1, 2, 90, 16), (1, 2, 90, 16))
    for causal in (False, True):
        plain = mfa.flash_attention(q, k, v, causal=causal, backend=route)
        for window in ((-1, -1), [-1, -1], None):
            opened = mfa.flash_attention(q, k, v, causal=causal, window_size=window, backend=route)
            assert mx.array_equal(plain, opened)


def test_window_wider_than_the_sequence_is_no_window():
    q, k, v = random_arrays(2, (1, 2, 50, 16), (1, 2, 90, 16), (1, 2, 90, 16))
    plain = mfa.flash_attention(q, k, v)
    assert mx.array_equal(plain, mfa.flash_attention(q, k, v, window_size=(90, 50)))
    assert mx.array_equal(plain, mfa.flash_attention(q, k, v, window_size=(2**31 - 1, 2**31 - 1)))


@routes
def test_zero_window_sees_the_own_key_only(route):
    q, k, v = random_arrays(3, (1, 2, 20, 16), (1, 2, 33, 16), (1, 2, 33, 16))
    out = mfa.flash_attention(q, k, v, window_size=(0, 0), backend=route)
    assert np.array_equal(to_numpy(out), to_numpy(v[:, :, 13:]))


def test_rows_whose_window_lies_behind_the_keys_are_empty():
    q, k, v = random_arrays(4, (1, 1, 30, 8), (1, 1, 10, 8), (1, 1, 10, 8))
    out, lse = mfa.flash_attention(q, k, v, window_size=(2, 0), return_lse=True)
    empty = np.arange(30) - 2 >= 10
    assert (to_numpy(out)[:, :, empty] == 0).all()
    assert np.array_equal(np.isneginf(np.array(lse))[0, 0], empty)


def test_window_at_the_end_of_a_long_cache_reads_the_last_keys():
    q, k, v = random_arrays(5, (2, 4, 1, 32), (2, 2, 3000, 32), (2, 2, 3000, 32))
    windowed = mfa.flash_attention(q, k, v, causal=True, window_size=(99, -1))
    assert mx.allclose(windowed, mfa.flash_attention(q, k[:, :, -100:], v[:, :, -100:]), rtol=0, atol=1e-6)
