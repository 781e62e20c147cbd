"""Sinks: one more logit a head that takes probability and has no value."""

import mlx.core as mx
import numpy as np
import pytest
from problems import DTYPES, check, check_case, make_case, make_problem, mfa, random_arrays, routes, to_mlx

SINKS = np.array([0.75, -0.5, 3.0, -20.0])


@routes
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 65), (33, 33), (70, 20)])
def test_sinks_agree_with_the_oracle_on_every_route(Nq, Nk, route):
    check(make_problem(Nq, B=2, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=16, causal=True, sinks=SINKS), backend=route)


@pytest.mark.parametrize("sinks_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_of_any_floating_dtype(dtype, sinks_dtype):
    p = make_problem(2, Hq=4, Nq=20, Nk=40, D=32, dtype=dtype, sinks=SINKS)
    case = make_case(p)
    case.arrays["sinks"] = to_mlx(SINKS, sinks_dtype)
    assert check_case(case)["sinks"].dtype == getattr(mx, sinks_dtype)


def test_a_sink_is_a_key_whose_value_is_zero():
    q, k, v = random_arrays(3, (1, 2, 9, 16), (1, 2, 30, 16), (1, 2, 30, 16))
    with_sink, lse = mfa.flash_attention(q, k, v, sinks=mx.zeros(2), return_lse=True)
    zero = mx.zeros((1, 2, 1, 16))  # its score is 0, as the sink is
    extended = [mx.concatenate([zero, x], axis=2) for x in (k, v)]
    expected, expected_lse = mfa.flash_attention(q, *extended, return_lse=True)
    assert mx.allclose(with_sink, expected, rtol=0, atol=1e-6)
    assert mx.allclose(lse, expected_lse, rtol=0, atol=1e-5)


@routes
def test_rows_without_keys_have_the_sink_as_lse(route):
    mask = np.ones((1, 1, 6, 10), bool)
    mask[:, :, 2:4] = False
    p = make_problem(4, B=2, Hq=4, Nq=6, Nk=10, D=8, sinks=SINKS, mask=mask)
    results = check(p, backend=route)
    assert (np.array(results["o"])[:, :, 2:4] == 0).all()


def test_sink_of_minus_infinity_is_no_sink():
    q, k, v = random_arrays(5, *[(1, 4, 65, 32)] * 3)
    plain, plain_lse = mfa.flash_attention(q, k, v, return_lse=True)
    out, lse = mfa.flash_attention(q, k, v, sinks=mx.full((4,), -mx.inf), return_lse=True)
    assert mx.allclose(out, plain, rtol=0, atol=1e-6)
    assert mx.allclose(lse, plain_lse, rtol=0, atol=1e-6)


def test_a_huge_sink_takes_everything_without_overflow():
    q, k, v = random_arrays(6, *[(1, 4, 9, 32)] * 3)
    out, lse = mfa.flash_attention(q, k, v, sinks=mx.full((4,), 1e4), return_lse=True)
    assert (out == 0).all()
    assert np.isfinite(np.array(lse)).all()


@pytest.mark.parametrize(
    "modifiers", [{"softcap": 2.0}, {"alibi": SINKS / 8}, {"window": (8, 0)}, {"dropout_p": 0.3, "dropout_seed": 4}]
)
def test_sinks_combine_with_every_modifier(modifiers):
    check(make_problem(7, B=2, Hq=4, Hkv=1, Nq=40, Nk=65, D=16, sinks=SINKS, **modifiers))
