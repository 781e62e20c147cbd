"""return_attn_weights: the softmax weights before dropout, float32, differentiable."""

import dataclasses

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import (
    DTYPES,
    ON_GPU,
    arrays_of,
    attention,
    cpu_kernels_only,
    make_problem,
    mfa,
    normal,
    random_arrays,
    to_numpy,
)
from problems import routes as all_routes

# The CUDA kernels do not store probabilities: there the composed graph gives them.
routes = pytest.mark.parametrize("route", ["auto", "sdpa", "composed"]) if ON_GPU else all_routes

MODIFIERS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (5, 5), "causal": True},
    "softcap": {"softcap": 1.0},
    "bias": {"bias": np.linspace(-1, 1, 4 * 70).reshape(1, 4, 1, 70)},
    "mask": {"mask": np.arange(70).reshape(1, 1, 1, 70) % 3 > 0},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0])},
    "alibi": {"alibi": np.array([0.5, 0.25, 0.125, 0.0])},
    "kv_lengths": {"kv_lengths": np.array([0, 50])},
}


@routes
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_weights_agree_with_the_oracle(modifier, route):
    p = make_problem(1, B=2, Hq=4, Hkv=2, Nq=33, Nk=70, D=16, **MODIFIERS[modifier])
    rule = oracle.ErrorRule(p, names=("o", "probs"))
    out, weights = attention(p, arrays_of(p), return_attn_weights=True, backend=route)
    assert weights.dtype == mx.float32
    rule.check("probs", np.array(weights), "float32")
    rule.check("o", np.array(out), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 257), (65, 129), (3, 1)])
def test_rows_sum_to_one_and_weigh_the_values(dtype, Nq, Nk):
    p = make_problem(2, B=1, Hq=2, Nq=Nq, Nk=Nk, D=32, dtype=dtype, causal=True)
    out, weights = attention(p, arrays_of(p), return_attn_weights=True)
    assert out.dtype == getattr(mx, dtype)
    assert weights.dtype == mx.float32
    assert weights.shape == (1, 2, Nq, Nk)
    assert np.allclose(np.array(weights).sum(-1), 1, atol=1e-6)
    assert ON_GPU or mx.array_equal(out, attention(p, arrays_of(p)))


def test_hidden_keys_weigh_exactly_nothing_and_empty_rows_are_zero():
    mask = np.ones((1, 1, 6, 40), bool)
    mask[..., 10:] = False
    mask[:, :, 2] = False
    p = make_problem(3, Hq=2, Nq=6, Nk=40, D=8, mask=mask)
    _, weights = attention(p, arrays_of(p), return_attn_weights=True)
    weights = np.array(weights)
    assert (weights[..., 10:] == 0).all()
    assert (weights[:, :, 2] == 0).all()


def test_weights_are_those_before_dropout():
    q, k, v = random_arrays(4, *[(1, 2, 33, 16)] * 3)
    _, plain = mfa.flash_attention(q, k, v, return_attn_weights=True)
    _, dropped = mfa.flash_attention(q, k, v, return_attn_weights=True, dropout_p=0.5, dropout_seed=1)
    assert mx.array_equal(plain, dropped)


@cpu_kernels_only
def test_weights_and_lse_together():
    q, k, v = random_arrays(5, *[(1, 2, 33, 16)] * 3)
    out, lse, weights = mfa.flash_attention(q, k, v, return_lse=True, return_attn_weights=True)
    expected_out, expected_lse = mfa.flash_attention(q, k, v, return_lse=True)
    assert mx.array_equal(out, expected_out)
    assert mx.array_equal(lse, expected_lse)
    scores = to_numpy(q) @ to_numpy(k).swapaxes(-1, -2) / 4
    assert np.allclose(np.array(weights), np.exp(scores - np.array(lse)[..., None] * oracle.LN2), atol=1e-6)


@routes
def test_gradients_flow_through_the_weights(route):
    p = make_problem(6, B=2, Hq=4, Hkv=2, Nq=9, Nk=20, D=8, causal=True, softcap=2.0)
    d_weights = normal(np.random.default_rng(0), (2, 4, 9, 20), "float32")

    # The weights are the output where V is the identity.
    identity = dataclasses.replace(p, v=np.broadcast_to(np.eye(20), (2, 2, 20, 20)).copy())
    rule = oracle.ErrorRule(identity, d_weights)
    arrays = arrays_of(p)

    def objective(q, k):
        _, weights = attention(p, arrays | {"q": q, "k": k}, return_attn_weights=True, backend=route)
        return (weights * mx.array(d_weights.astype(np.float32))).sum()

    gradients = mx.grad(objective, argnums=(0, 1))(arrays["q"], arrays["k"])
    for name, gradient in zip("qk", gradients):
        rule.check(name, np.array(gradient), "float32")
