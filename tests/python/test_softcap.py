"""Softcap: scores become cap * tanh(score / cap), before ALiBi, bias and masks."""

import mlx.core as mx
import numpy as np
import pytest
from problems import DTYPES, check, make_problem, mfa, random_arrays, routes, to_numpy


@routes
@pytest.mark.parametrize("softcap", [0.5, 2.0, 50.0])
def test_softcap_agrees_with_the_oracle_on_every_route(softcap, route):
    check(make_problem(1, B=2, Hq=4, Hkv=2, Nq=33, Nk=65, D=24, softcap=softcap, causal=True), backend=route)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 300), (70, 129)])
def test_softcap_agrees_with_the_oracle_in_every_dtype(dtype, Nq, Nk):
    check(make_problem(2, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=64, dtype=dtype, softcap=1.0, window=(100, 0)))


def test_a_huge_softcap_is_no_softcap():
    q, k, v = random_arrays(3, *[(1, 2, 65, 32)] * 3)
    capped = mfa.flash_attention(q, k, v, softcap=1e6)
    assert mx.allclose(capped, mfa.flash_attention(q, k, v), rtol=0, atol=1e-5)


def test_softcap_of_zero_is_no_softcap():
    q, k, v = random_arrays(4, *[(1, 2, 65, 32)] * 3)
    assert mx.array_equal(mfa.flash_attention(q, k, v, softcap=0.0), mfa.flash_attention(q, k, v))


def test_scores_far_beyond_the_cap_saturate_without_overflow():
    q, k, v = random_arrays(5, *[(1, 2, 33, 32)] * 3)
    out, lse = mfa.flash_attention(q * 1e6, k * 1e6, v, softcap=30.0, return_lse=True)
    assert np.isfinite(to_numpy(out)).all()
    assert (np.array(lse) <= (30.0 + np.log(33) + 1e-3) / np.log(2)).all()
    gradients = mx.grad(lambda q, k: mfa.flash_attention(q, k, v, softcap=30.0).sum(), argnums=(0, 1))(q * 1e6, k * 1e6)
    assert all(np.isfinite(np.array(g)).all() for g in gradients)


def test_bias_is_added_after_the_cap():
    p = make_problem(6, Hq=2, Nq=9, Nk=20, D=16, softcap=1.0, bias=np.full((1, 1, 1, 20), 0.0))
    p.bias[..., 3] = 8.0
    check(p)


@pytest.mark.parametrize("N", [20, 70])
def test_softcap_with_grouped_heads(N):
    check(make_problem(7, B=2, Hq=8, Hkv=2, Nq=N, D=16, softcap=2.0, alibi=np.linspace(0, 0.5, 8)))


@pytest.mark.parametrize("backend", ["auto", "composed"])
@pytest.mark.parametrize("softcap", [1e-30, 1e-42, 1e-60])
def test_a_cap_that_float32_can_hardly_hold_still_caps(softcap, backend):
    v = mx.random.normal((1, 1, 9, 8))
    for x in (mx.random.normal((1, 1, 9, 8)), mx.zeros((1, 1, 9, 8))):
        out = mfa.flash_attention(x, x, v, softcap=softcap, backend=backend)
        np.testing.assert_allclose(to_numpy(out), to_numpy(mx.broadcast_to(mx.mean(v, 2, True), v.shape)), atol=1e-6)
