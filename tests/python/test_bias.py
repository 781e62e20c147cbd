"""Additive bias: any shape that broadcasts to [B, Hq, N, S], its gradient, -inf entries, no expansion in memory."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from problems import (
    DTYPES,
    READ_IN_PLACE,
    check,
    check_case,
    make_case,
    make_problem,
    mfa,
    normal,
    random_arrays,
    routes,
    to_mlx,
)

FULL = (2, 4, 33, 70)
BROADCASTS = list(itertools.product(*((1, n) for n in FULL)))


def biased_problem(seed, shape, bias_dtype="float32", dtype="float32", **options):
    bias = normal(np.random.default_rng(seed), shape, bias_dtype)
    return make_problem(seed, B=2, Hq=4, Hkv=2, Nq=33, Nk=70, D=16, dtype=dtype, bias=bias, **options)


@pytest.mark.parametrize("shape", BROADCASTS)
def test_every_broadcast_shape_and_its_gradient_agree_with_the_oracle(shape):
    check(biased_problem(sum(shape), shape))


@routes
@pytest.mark.parametrize("shape", [(1, 1, 1, 70), (1, 4, 1, 70), (1, 4, 33, 70), (2, 4, 33, 70), (2, 1, 1, 70)])
def test_shape_classes_of_the_replaced_package_on_every_route(shape, route):
    check(biased_problem(3, shape), backend=route)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_keeps_its_own_dtype(dtype, bias_dtype):
    p = biased_problem(4, (1, 4, 33, 70), bias_dtype, dtype)
    case = make_case(p)
    case.arrays["bias"] = to_mlx(p.bias, bias_dtype)
    assert check_case(case)["bias"].dtype == getattr(mx, bias_dtype)


@routes
@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (1, 4, 33, 70), (1, 1, 33, 1)])
def test_entries_of_minus_infinity_hide_keys(shape, route):
    rng = np.random.default_rng(5)
    p = biased_problem(5, shape)
    p.bias[rng.random(shape) < 0.5] = -np.inf
    check(p, backend=route)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_minus_infinity_are_empty(dtype):
    p = biased_problem(6, (1, 1, 33, 70), dtype=dtype)
    p.bias[:, :, 3] = -np.inf
    results = check(p)
    assert (np.array(results["o"].astype(mx.float32))[:, :, 3] == 0).all()
    assert np.isneginf(np.array(results["lse"])[:, :, 3]).all()


def test_padding_bias_of_minus_infinity_equals_kv_lengths():
    q, k, v = random_arrays(7, (2, 2, 5, 32), (2, 2, 90, 32), (2, 2, 90, 32))
    lengths = np.array([17, 90])
    padding = np.where(np.arange(90)[None, :] < lengths[:, None], 0.0, -np.inf)[:, None, None].astype(np.float32)
    biased = mfa.flash_attention(q, k, v, attn_bias=mx.array(padding))
    assert mx.allclose(biased, mfa.flash_attention(q, k, v, kv_lengths=mx.array(lengths)), rtol=0, atol=1e-6)


def test_zero_bias_is_no_bias():
    q, k, v = random_arrays(8, *[(1, 2, 65, 32)] * 3)
    biased = mfa.flash_attention(q, k, v, attn_bias=mx.zeros((1, 1, 65, 65)))
    assert mx.allclose(biased, mfa.flash_attention(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("modifier", [{"softcap": 2.0}, {"alibi": np.array([0.5, 0.25, 0.1, 0.0])}])
def test_bias_combines_with_modifiers_the_replaced_package_refused(modifier):
    check(biased_problem(9, (1, 4, 33, 70), causal=True, window=(30, 5), **modifier))


@pytest.mark.parametrize("view", ["transposed", "stepped", "offset", "reversed"])
def test_strided_biases_are_read_right(view):
    p = biased_problem(10, FULL)
    case = make_case(p)
    if view == "transposed":
        bias = to_mlx(p.bias.transpose(3, 2, 0, 1), "float32").transpose(2, 3, 1, 0)
    elif view == "stepped":
        parent = np.full(FULL[:3] + (3 * FULL[3],), np.nan)
        parent[..., ::3] = p.bias
        bias = to_mlx(parent, "float32")[..., ::3]
    elif view == "reversed":
        bias = to_mlx(p.bias[..., ::-1], "float32")[..., ::-1]
    else:
        padding = ((0, 1), (2, 0), (1, 1), (3, 4))
        bias = to_mlx(np.pad(p.bias, padding, constant_values=np.nan), "float32")[:2, 2:, 1:-1, 3:-4]
    mx.eval(bias)
    case.arrays["bias"] = bias
    check_case(case)


@pytest.mark.parametrize("shape", [(2, 1, 1, 2048), (1, 8, 1, 2048), (1, 1, 2048, 1)])
def test_broadcast_biases_are_not_expanded(shape, peak_bytes):
    N, Hq = 2048, 8
    q, k, v = random_arrays(11, *[(2, Hq, N, 16)] * 3)
    (bias,) = random_arrays(12, shape)
    mx.eval(q, k, v, bias)

    def loss(q, k, v, bias):
        return mfa.flash_attention(q, k, v, attn_bias=bias, **READ_IN_PLACE).sum()

    peak = peak_bytes(lambda: mx.eval(mx.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, bias)))
    assert peak < N * N * 4
