"""Dtypes: what is cast, what is refused, and the precision that each dtype promises."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import DTYPES, check, make_case, make_problem, mfa, random_arrays, routes, to_numpy


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_cast_to_the_dtype_of_the_queries(dtype, other):
    (q,) = random_arrays(1, (1, 4, 33, 32), dtype=dtype)
    k, v = random_arrays(2, (1, 2, 65, 32), (1, 2, 65, 32), dtype=other)
    wanted = getattr(mx, dtype)
    out = mfa.flash_attention(q, k, v)
    assert out.dtype == wanted
    assert mx.array_equal(out, mfa.flash_attention(q, k.astype(wanted), v.astype(wanted)))
    assert mx.array_equal(mfa.flash_attention(q, k.astype(wanted), v), out)


@pytest.mark.parametrize("other", DTYPES)
def test_gradients_come_back_in_the_dtype_of_their_input(other):
    (q,) = random_arrays(3, (1, 4, 33, 32), dtype="bfloat16")
    k, v = random_arrays(4, (1, 2, 65, 32), (1, 2, 65, 32), dtype=other)
    gradients = mx.grad(lambda q, k, v: mfa.flash_attention(q, k, v).sum(), argnums=(0, 1, 2))(q, k, v)
    assert [g.dtype for g in gradients] == [mx.bfloat16, k.dtype, v.dtype]


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [mx.int32, mx.int8, mx.uint8, mx.bool_, mx.complex64])
def test_other_dtypes_are_refused(name, dtype):
    arrays = dict(zip("qkv", random_arrays(5, *[(1, 2, 9, 16)] * 3)))
    arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(ValueError, match=rf"^\[flash_attention\] {name} must"):
        mfa.flash_attention(**arrays)


def test_float64_queries_are_refused():
    q = mx.zeros((1, 1, 2, 4), dtype=mx.float64, stream=mx.cpu)
    with pytest.raises(ValueError, match=r"^\[flash_attention\] q must be float32, float16 or bfloat16"):
        mfa.flash_attention(q, q, q)


@routes
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_route_is_within_the_rule_in_every_dtype(dtype, route):
    check(make_problem(6, B=2, Hq=4, Hkv=2, Nq=65, Nk=129, D=64, dtype=dtype, causal=True), backend=route)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_are_kept_in_float32(dtype):
    # Scores of some hundreds: their differences vanish when they are rounded to the dtype.
    p = make_problem(7, Hq=2, Nq=16, Nk=128, D=64, dtype=dtype)
    p.q = np.abs(p.q) + 8
    p.k = p.k + 8
    p.q, p.k = (oracle.round_to(x, dtype).astype(np.float64) for x in (p.q, p.k))
    check(p)


def test_float16_values_near_the_largest_do_not_overflow():
    q, k, v = random_arrays(8, *[(1, 2, 33, 16)] * 3, dtype="float16")
    large = mx.abs(v) * 0 + 60000
    assert np.array_equal(to_numpy(mfa.flash_attention(q, k, large)), np.full((1, 2, 33, 16), 60000, np.float32))


# Relative L2 errors of outputs and gradients that iid normal inputs give, and twice the table is the gate.
FLOORS = {"float16": (2.8e-4, 3.0e-4), "bfloat16": (2.3e-3, 2.6e-3), "float32": (5e-7, 6e-7)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_floors(dtype, causal):
    p = make_problem(9, B=1, Hq=1, Nq=1024, D=128, dtype=dtype, causal=causal)
    case = make_case(p)
    case.dlse[:] = 0
    answer = oracle.exact(p, case.d_o)
    a = case.arrays

    def function(q, k, v):
        return mfa.flash_attention(q, k, v, causal=causal)

    (out,), gradients = mx.vjp(function, [a["q"], a["k"], a["v"]], [case.d_o_array])

    def relative(x, reference):
        return np.linalg.norm(to_numpy(x) - reference) / np.linalg.norm(reference)

    of_output, of_gradients = FLOORS[dtype]
    assert relative(out, answer.o) <= 2 * of_output
    for name, gradient in zip("qkv", gradients):
        assert relative(gradient, getattr(answer, name)) <= 2 * of_gradients, name
