"""ALiBi: slope_h * (j - pos(i)) is added to the scores."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import DTYPES, check, check_case, golden, make_case, make_problem, mfa, random_arrays, routes, to_mlx

SLOPES = np.array(golden("attention.json")["alibi_slopes"]["4"])


@routes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Nq", "Nk"), [(33, 33), (1, 130), (70, 20)])
def test_alibi_agrees_with_the_oracle_on_every_route(Nq, Nk, causal, route):
    check(make_problem(Nq, B=2, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=16, alibi=SLOPES, causal=causal), backend=route)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alibi_agrees_with_the_oracle_in_every_dtype(dtype):
    check(make_problem(2, Hq=4, Hkv=1, Nq=65, Nk=129, D=64, dtype=dtype, alibi=SLOPES, causal=True))


@pytest.mark.parametrize("slopes_dtype", DTYPES)
def test_slopes_of_another_dtype_are_converted_not_reinterpreted(slopes_dtype):
    p = make_problem(3, Hq=4, Nq=33, D=16, alibi=SLOPES)  # powers of two: exact in every dtype
    case = make_case(p)
    case.arrays["alibi"] = to_mlx(SLOPES, slopes_dtype)
    assert check_case(case)["alibi"].dtype == getattr(mx, slopes_dtype)


def test_positions_are_those_of_the_last_queries():
    p = make_problem(4, B=2, Hq=4, Nq=3, Nk=50, D=16, alibi=SLOPES, kv_lengths=np.array([20, 50]))
    results = check(p)
    pos, _ = oracle.positions(p)
    assert pos.tolist() == [[17, 18, 19], [47, 48, 49]]
    assert np.isfinite(np.array(results["lse"])).all()


def test_positive_slopes_penalise_the_past():
    _, _, v = random_arrays(5, *[(1, 4, 64, 64)] * 3)
    zero = mx.zeros((1, 4, 64, 64))
    slopes = mx.array(SLOPES.astype(np.float32))
    _, weights = mfa.flash_attention(zero, zero, v, causal=True, alibi_slopes=slopes, return_attn_weights=True)
    last = np.array(weights)[0, :, -1]
    assert (np.diff(last, axis=-1) > 0).all()
    assert np.allclose(last[:, 1:] / last[:, :-1], np.exp(SLOPES)[:, None], rtol=1e-5)


def test_zero_slopes_are_no_slopes():
    q, k, v = random_arrays(6, *[(1, 4, 65, 32)] * 3)
    sloped = mfa.flash_attention(q, k, v, alibi_slopes=mx.zeros(4))
    assert mx.allclose(sloped, mfa.flash_attention(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("modifiers", [{"softcap": 2.0}, {"window": (9, 3)}, {"dropout_p": 0.2, "dropout_seed": 1}])
def test_alibi_combines_with_modifiers_the_replaced_package_refused(modifiers):
    check(make_problem(7, B=2, Hq=4, Hkv=2, Nq=40, Nk=65, D=16, alibi=SLOPES, **modifiers))
