"""The log-sum-exp (base 2), its gradient, and merging attention over parts of the keys."""

import io
import re

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import (
    DTYPES,
    arrays_of,
    attention,
    check,
    make_problem,
    mfa,
    needs_kernels,
    random_arrays,
    routes,
    to_numpy,
)

# Acceptance numbers for float32 merges: relative for outputs, absolute for gradients of unit-size cotangents.
MERGED_OUTPUT, MERGED_GRADIENT = 2e-6, 1e-5


@routes
@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_is_the_base_2_logarithm_of_the_sum_of_exponentials(dtype, route):
    p = make_problem(1, B=2, Hq=4, Hkv=2, Nq=33, Nk=256, D=64, dtype=dtype)
    out, lse = attention(p, arrays_of(p), return_lse=True, backend=route)
    assert out.shape == (2, 4, 33, 64)
    assert lse.shape == (2, 4, 33)
    assert lse.dtype == mx.float32
    scores = np.repeat(p.q.reshape(2, 2, 66, 64) @ p.k.swapaxes(-1, -2), 1, 0).reshape(2, 4, 33, 256) / 8
    expected = np.log2(np.exp(scores).sum(-1))
    assert np.abs(np.array(lse) - expected).max() <= oracle.LSE_TOLERANCE * np.abs(expected).max()


@routes
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 300), (33, 65), (65, 33)])
def test_gradient_through_the_lse_alone(Nq, Nk, route):
    p = make_problem(2, B=1, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=16, causal=True)
    dlse = np.random.default_rng(0).standard_normal((1, 4, Nq)).astype(np.float32)
    rule = oracle.ErrorRule(p, np.zeros((1, 4, Nq, 16)), dlse)
    arrays = arrays_of(p)

    def objective(q, k, v):
        _, lse = attention(p, {"q": q, "k": k, "v": v}, return_lse=True, backend=route)
        return (lse * oracle.LN2 * mx.array(dlse)).sum()

    gradients = mx.grad(objective, argnums=(0, 1, 2))(arrays["q"], arrays["k"], arrays["v"])
    assert (gradients[2] == 0).all()
    for name, gradient in zip("qk", gradients):
        rule.check(name, np.array(gradient), "float32")


def test_output_gradients_do_not_depend_on_asking_for_the_lse():
    q, k, v = random_arrays(3, *[(1, 2, 65, 32)] * 3)

    def alone(q, k, v):
        return mfa.flash_attention(q, k, v, causal=True).square().sum()

    def with_lse(q, k, v):
        return mfa.flash_attention(q, k, v, causal=True, return_lse=True)[0].square().sum()

    for a, b in zip(mx.grad(alone, argnums=(0, 1, 2))(q, k, v), mx.grad(with_lse, argnums=(0, 1, 2))(q, k, v)):
        assert mx.array_equal(a, b)


def operations(arrays):
    """The names of the nodes that compute ``arrays``."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return re.findall(r'label ?= ?"([A-Za-z]+)"', dot.getvalue())


@needs_kernels
def test_what_is_not_used_is_not_computed():
    q, k, v, cotangent = random_arrays(9, *[(1, 2, 33, 16)] * 4)
    assert operations([mfa.flash_attention(q, k, v)]) == ["MfaAttention"]
    _, gradients = mx.vjp(mfa.flash_attention, [q, k, v], [cotangent])
    assert not {"Full", "Multiply"} & set(operations(gradients))  # of the lse's cotangent
    _, with_lse = mx.vjp(
        lambda q, k, v: mfa.flash_attention(q, k, v, return_lse=True), [q, k, v], [cotangent, mx.zeros((1, 2, 33))]
    )
    assert all(mx.array_equal(a, b) for a, b in zip(gradients, with_lse, strict=True))


def test_lse_of_huge_scores_does_not_overflow():
    p = make_problem(4, Hq=2, Nq=9, Nk=33, D=16)
    p.q *= 1000.0
    arrays = arrays_of(p)
    out, lse = attention(p, arrays, return_lse=True)
    oracle.assert_lse(np.array(lse) * oracle.LN2, oracle.exact(p).lse)
    assert np.isfinite(to_numpy(out)).all()


# ---------------------------------------------------------------------------------------------- merging

PARTS = {
    "two": [(0, 30), (30, 65)],
    "three": [(0, 1), (1, 40), (40, 65)],
    "seven": [(0, 9), (9, 9), (9, 17), (17, 18), (18, 50), (50, 65), (65, 65)],
}


def merged(q, k, v, parts, base="2", **options):
    """Attention over each part of the keys, merged from left to right."""
    o, lse = None, None
    for begin, end in parts:
        part_o, part_lse = mfa.flash_attention(q, k[:, :, begin:end], v[:, :, begin:end], return_lse=True, **options)
        if base == "e":
            part_lse = part_lse * oracle.LN2
        if o is None:
            o, lse = part_o, part_lse
        else:
            o, lse = mfa.merge_attention_states(o, lse, part_o, part_lse, base=base)
    return o, lse


@pytest.mark.parametrize("base", ["2", "e"])
@pytest.mark.parametrize("parts", PARTS)
def test_merging_parts_gives_the_whole(parts, base):
    q, k, v = random_arrays(5, (2, 4, 9, 32), (2, 2, 65, 32), (2, 2, 65, 32))
    whole, whole_lse = mfa.flash_attention(q, k, v, return_lse=True)
    o, lse = merged(q, k, v, PARTS[parts], base)
    assert mx.abs(o - whole).max() <= MERGED_OUTPUT * mx.abs(whole).max()
    if base == "e":
        lse = lse / oracle.LN2
    assert mx.abs(lse - whole_lse).max() <= oracle.LSE_TOLERANCE * mx.abs(whole_lse).max()


@pytest.mark.parametrize("parts", PARTS)
def test_gradients_of_a_merge_are_those_of_the_whole(parts):
    q, k, v, d_o, dlse = random_arrays(6, (1, 4, 9, 32), (1, 2, 65, 32), (1, 2, 65, 32), (1, 4, 9, 32), (1, 4, 9, 1))

    def objective(function):
        def loss(q, k, v):
            o, lse = function(q, k, v)
            return (o * d_o).sum() + (lse * dlse[..., 0]).sum()

        return mx.grad(loss, argnums=(0, 1, 2))(q, k, v)

    expected = objective(lambda q, k, v: mfa.flash_attention(q, k, v, return_lse=True))
    for got, want in zip(objective(lambda q, k, v: merged(q, k, v, PARTS[parts])), expected):
        assert mx.abs(got - want).max() <= MERGED_GRADIENT


def test_merging_does_not_depend_on_the_order_of_two_parts():
    q, k, v = random_arrays(7, (1, 2, 9, 16), (1, 2, 40, 16), (1, 2, 40, 16))
    a = mfa.flash_attention(q, k[:, :, :15], v[:, :, :15], return_lse=True)
    b = mfa.flash_attention(q, k[:, :, 15:], v[:, :, 15:], return_lse=True)
    for x, y in zip(mfa.merge_attention_states(*a, *b), mfa.merge_attention_states(*b, *a)):
        assert mx.array_equal(x, y)


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf])
def test_an_empty_part_changes_nothing_whatever_its_output_holds(poison):
    o, lse = random_arrays(8, (2, 3, 4), (2, 3))
    empty = mx.full(o.shape, poison), mx.full(lse.shape, -mx.inf)
    for merged_o, merged_lse in (
        mfa.merge_attention_states(o, lse, *empty),
        mfa.merge_attention_states(*empty, o, lse),
    ):
        assert mx.array_equal(merged_o, o)
        assert mx.allclose(merged_lse, lse, rtol=1e-6, atol=1e-6)


def test_two_empty_parts_give_an_empty_one_with_finite_gradients():
    o = mx.zeros((2, 3, 4))
    lse = mx.full((2, 3), -mx.inf)

    def loss(o_a, lse_a, o_b, lse_b):
        merged_o, merged_lse = mfa.merge_attention_states(o_a, lse_a, o_b, lse_b)
        return merged_o.sum() + mx.where(mx.isinf(merged_lse), 0.0, merged_lse).sum()

    merged_o, merged_lse = mfa.merge_attention_states(o, lse, o, lse)
    assert (merged_o == 0).all()
    assert np.isneginf(np.array(merged_lse)).all()
    for gradient in mx.grad(loss, argnums=(0, 1, 2, 3))(o, lse, o, lse):
        assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_keeps_the_dtype_and_takes_any_leading_shape(dtype):
    o_a, o_b = random_arrays(9, (5, 8), (5, 8), dtype=dtype)
    lse_a, lse_b = random_arrays(10, (5,), (5,))
    o, lse = mfa.merge_attention_states(o_a, lse_a, o_b, lse_b)
    assert o.dtype == getattr(mx, dtype)
    assert lse.dtype == mx.float32
    w = np.exp2(np.array(lse_a) - np.logaddexp2(np.array(lse_a), np.array(lse_b)))[:, None]
    expected = w * to_numpy(o_a) + (1 - w) * to_numpy(o_b)
    bound = 2e-6 * np.abs(expected).max() + 2 * oracle.half_ulp(float(np.abs(expected).max()), dtype)
    assert oracle.max_error(to_numpy(o), expected) <= bound


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"o_b": mx.zeros((2, 3, 5))}, "same shape"),
        ({"lse_a": mx.zeros((2, 4))}, "lse_a"),
        ({"o_b": mx.zeros((2, 3, 4), mx.float16)}, "same dtype"),
        ({"o_a": mx.zeros((2, 3, 4), mx.int32)}, "floating"),
        ({"lse_b": mx.zeros((2, 3), mx.int32)}, "floating"),
        ({"base": "10"}, "base"),
    ],
)
def test_merge_refuses_what_does_not_fit(change, words):
    arguments = {"o_a": mx.zeros((2, 3, 4)), "lse_a": mx.zeros((2, 3))}
    arguments |= {"o_b": mx.zeros((2, 3, 4)), "lse_b": mx.zeros((2, 3))} | change
    with pytest.raises(ValueError, match=rf"\[merge_attention_states\].*{words}"):
        mfa.merge_attention_states(**arguments)


def test_merging_a_shared_prefix_with_suffixes():
    q, k, v = random_arrays(11, (3, 2, 5, 16), (3, 2, 20, 16), (3, 2, 20, 16))
    prefix_k, prefix_v = random_arrays(12, (1, 2, 50, 16), (1, 2, 50, 16))
    wide = [mx.broadcast_to(x, (3, *x.shape[1:])) for x in (prefix_k, prefix_v)]
    shared = mfa.flash_attention(q, *wide, return_lse=True)
    own = mfa.flash_attention(q, k, v, causal=True, return_lse=True)
    o, _ = mfa.merge_attention_states(*shared, *own)
    whole = mfa.flash_attention(
        q, mx.concatenate([wide[0], k], axis=2), mx.concatenate([wide[1], v], axis=2), causal=True
    )
    assert mx.abs(o - whole).max() <= MERGED_OUTPUT * mx.abs(whole).max()


def test_lse_gradients_of_every_modifier():
    p = make_problem(
        13, B=2, Hq=4, Hkv=2, Nq=20, Nk=33, D=16, causal=True, softcap=2.0, sinks=np.array([0.5, 0, -1, 1])
    )
    check(p)
