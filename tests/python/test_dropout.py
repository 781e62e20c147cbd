"""Dropout of softmax weights: the Philox mask of the oracle on every route, the same mask in the backward."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import DTYPES, ON_GPU, check, make_problem, mfa, random_arrays, routes

SEEDS = [0, 1, 81985529216486895, 2**64 - 1]


def kept(q, k, p, seed, **options):
    """Which weights survive: with V the identity the output is the matrix of weights."""
    B, Hkv, Nk, _ = k.shape
    v = mx.broadcast_to(mx.eye(Nk), (B, Hkv, Nk, Nk))
    return np.array(mfa.flash_attention(q, k, v, dropout_p=p, dropout_seed=seed, **options)) != 0


@routes
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.875])
def test_mask_is_exactly_that_of_philox(p, seed, route):
    for B, Hq, Hkv, Nq, Nk in ((2, 4, 2, 5, 70), (1, 2, 2, 67, 35), (1, 1, 1, 1, 130)):
        q, k = random_arrays(1, (B, Hq, Nq, 8), (B, Hkv, Nk, 8))
        assert np.array_equal(kept(q, k, p, seed, backend=route), oracle.dropout_keep(p, seed, B, Hq, Nq, Nk))


def test_mask_does_not_depend_on_the_modifiers():
    q, k = random_arrays(2, (1, 2, 30, 8), (1, 2, 50, 8))
    mask = oracle.dropout_keep(0.4, 5, 1, 2, 30, 50)
    causal = np.tril(np.ones((30, 50), bool), 20)
    assert np.array_equal(kept(q, k, 0.4, 5, causal=True, softcap=2.0), mask & causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 300), (33, 65), (130, 40)])
def test_outputs_and_gradients_use_the_same_mask(Nq, Nk, dtype):
    check(make_problem(3, B=2, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=32, dtype=dtype, dropout_p=0.3, dropout_seed=12345))


@routes
def test_dropout_combines_with_every_modifier_on_every_route(route):
    options = {"causal": True, "window": (40, -1), "softcap": 3.0, "sinks": np.array([0.5, -1, 0, 1])}
    options |= {"alibi": np.array([0.5, 0.25, 0, -0.1]), "bias": np.linspace(-1, 1, 65).reshape(1, 1, 1, 65)}
    p = make_problem(4, B=2, Hq=4, Hkv=2, Nq=33, Nk=65, D=16, dropout_p=0.5, dropout_seed=9, **options)
    check(p, backend=route)


@routes
def test_probability_zero_is_bitwise_no_dropout(route):
    q, k, v = random_arrays(5, *[(2, 4, 65, 32)] * 3)
    plain = mfa.flash_attention(q, k, v, causal=True, backend=route)
    assert mx.array_equal(mfa.flash_attention(q, k, v, causal=True, dropout_p=0.0, backend=route), plain)
    seeded = mfa.flash_attention(q, k, v, causal=True, dropout_p=0.0, dropout_seed=3, backend=route)
    assert mx.array_equal(seeded, plain)


@routes
def test_probability_one_gives_zeros_and_zero_gradients(route):
    q, k, v = random_arrays(6, *[(2, 4, 33, 16)] * 3)

    def total(q, k, v):
        return mfa.flash_attention(q, k, v, dropout_p=1.0, dropout_seed=3, backend=route).sum()

    value, gradients = mx.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
    assert value.item() == 0
    assert all((g == 0).all() for g in gradients)


def test_the_lse_is_that_without_dropout():
    q, k, v = random_arrays(7, *[(2, 4, 65, 32)] * 3)
    _, lse = mfa.flash_attention(q, k, v, return_lse=True)
    _, with_dropout = mfa.flash_attention(q, k, v, return_lse=True, dropout_p=0.5, dropout_seed=1)
    # On some GPUs dropout has kernels of its own.
    assert mx.allclose(lse, with_dropout, rtol=0, atol=2e-6) if ON_GPU else mx.array_equal(lse, with_dropout)


def test_a_seed_repeats_the_result_and_another_does_not():
    q, k, v = random_arrays(8, *[(1, 2, 65, 32)] * 3)
    runs = [mfa.flash_attention(q, k, v, dropout_p=0.5, dropout_seed=s) for s in (7, 7, 8, 7 + 2**32)]
    assert mx.array_equal(runs[0], runs[1])
    assert not mx.array_equal(runs[0], runs[2])
    assert not mx.array_equal(runs[0], runs[3])  # the high word counts


def test_a_seed_may_be_an_array_of_two_words():
    q, k, v = random_arrays(9, *[(1, 2, 33, 16)] * 3)
    words = mx.array([0x89ABCDEF, 0x01234567], dtype=mx.uint32)
    from_words = mfa.flash_attention(q, k, v, dropout_p=0.5, dropout_seed=words)
    assert mx.array_equal(from_words, mfa.flash_attention(q, k, v, dropout_p=0.5, dropout_seed=0x0123456789ABCDEF))


def test_without_a_seed_the_state_of_mlx_decides():
    q, k, v = random_arrays(10, *[(1, 2, 65, 32)] * 3)

    def run():
        return mfa.flash_attention(q, k, v, dropout_p=0.5)

    mx.random.seed(42)
    first, second = run(), run()
    mx.random.seed(42)
    assert mx.array_equal(run(), first)
    assert not mx.array_equal(first, second)


def test_random_state_only_moves_when_dropout_needs_it():
    q, k, v = random_arrays(11, *[(1, 2, 9, 16)] * 3)
    mx.random.seed(1)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(1)
    mx.eval(mfa.flash_attention(q, k, v), mfa.flash_attention(q, k, v, dropout_p=0.5, dropout_seed=1))
    mfa.explain(q, k, v, dropout_p=0.5)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


def test_share_of_kept_weights_is_right():
    N = 512
    q, k = random_arrays(12, (4, 1, N, 8), (4, 1, N, 8))
    for p in (0.1, 0.5):
        share = kept(q, k, p, 77).mean()
        assert abs(share - (1 - p)) < 4 * np.sqrt(p * (1 - p) / (4 * N * N))


def test_dropout_under_compile_and_checkpoint_keeps_forward_and_backward_together():
    q, k, v = random_arrays(13, *[(1, 2, 33, 16)] * 3)

    def total(q, k, v):
        return (mfa.flash_attention(q, k, v, dropout_p=0.5, dropout_seed=5) ** 2).sum()

    expected = mx.grad(total, argnums=(0, 1, 2))(q, k, v)
    for transformed in (
        mx.compile(mx.grad(total, argnums=(0, 1, 2))),
        mx.grad(mx.checkpoint(total), argnums=(0, 1, 2)),
    ):
        for got, want in zip(transformed(q, k, v), expected):
            assert mx.allclose(got, want, rtol=1e-5, atol=1e-6)
