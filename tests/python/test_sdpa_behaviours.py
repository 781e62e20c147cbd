"""What MLX's own fused attention promises, as promises of ours: a program can change one for the other."""

import math

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import DTYPES, arrays_of, attention, check, make_problem, mfa, random_arrays, to_numpy


def sdpa(q, k, v, **options):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, **options)


def assert_as_good_as_sdpa(p, out, theirs):
    """Both are close to the exact answer: ours by the rule, and no further from theirs than both errors allow."""
    rule = oracle.ErrorRule(p)
    rule.check("o", to_numpy(out), p.dtype)
    bound = oracle.max_error(to_numpy(theirs), rule.answer.o) + rule.bound("o", p.dtype)
    assert oracle.max_error(to_numpy(out), to_numpy(theirs)) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("Nq", "Nk", "Hq", "Hkv"), [(1, 128, 8, 8), (1, 257, 8, 2), (128, 128, 4, 1), (63, 129, 4, 4)])
def test_prefill_and_decode_shapes(Nq, Nk, Hq, Hkv, D, dtype):
    p = make_problem(1, B=1, Hq=Hq, Hkv=Hkv, Nq=Nq, Nk=Nk, D=D, dtype=dtype)
    arrays = arrays_of(p)
    assert_as_good_as_sdpa(p, attention(p, arrays), sdpa(arrays["q"], arrays["k"], arrays["v"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 65), (32, 32), (31, 64), (100, 131)])
def test_causal(Nq, Nk, dtype):
    p = make_problem(2, B=2, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=64, dtype=dtype, causal=True)
    arrays = arrays_of(p)
    theirs = sdpa(arrays["q"], arrays["k"], arrays["v"], mask="causal")
    assert_as_good_as_sdpa(p, attention(p, arrays), theirs)


@pytest.mark.parametrize("shape", [(1, 1, 20, 70), (2, 1, 1, 70), (2, 4, 20, 70), (20, 70), (1, 4, 1, 70)])
def test_boolean_and_additive_masks(shape):
    rng = np.random.default_rng(3)
    mask = rng.random(shape) < 0.7
    mask[..., 0] = True  # theirs promises nothing for rows that see no key
    for options in ({"mask": mask}, {"bias": np.where(mask, 0.0, -np.inf)}, {"bias": np.where(mask, 0.25, -1.5)}):
        p = make_problem(3, B=2, Hq=4, Hkv=2, Nq=20, Nk=70, D=32, **options)
        arrays = arrays_of(p)
        given = arrays["mask"] if "mask" in arrays else arrays["bias"]
        assert_as_good_as_sdpa(p, attention(p, arrays), sdpa(arrays["q"], arrays["k"], arrays["v"], mask=given))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masks_of_a_wider_dtype_than_the_queries(dtype):
    bias = np.random.default_rng(4).standard_normal((1, 1, 20, 70)).astype(np.float32)
    p = make_problem(4, Hq=4, Nq=20, Nk=70, D=32, dtype=dtype, bias=bias.astype(np.float64))
    check(p)  # ours takes it as it is, in float32


@pytest.mark.parametrize("Nq", [1, 7, 33])
def test_sinks(Nq):
    p = make_problem(5, B=2, Hq=8, Hkv=2, Nq=Nq, Nk=130, D=64, sinks=np.linspace(-2, 2, 8).astype(np.float32))
    arrays = arrays_of(p)
    theirs = sdpa(arrays["q"], arrays["k"], arrays["v"], sinks=arrays["sinks"])
    assert_as_good_as_sdpa(p, attention(p, arrays), theirs)


@pytest.mark.parametrize("layout", ["heads last", "sliced", "broadcast"])
def test_inputs_that_are_not_contiguous(layout):
    if layout == "heads last":
        q, k, v = (x.swapaxes(1, 2) for x in random_arrays(6, (2, 33, 8, 64), (2, 33, 4, 64), (2, 33, 4, 64)))
    elif layout == "sliced":
        q, k, v = (x[:, ::2, 1:-1] for x in random_arrays(7, (2, 16, 35, 64), (2, 8, 35, 64), (2, 8, 35, 64)))
    else:
        q, k, v = (mx.broadcast_to(x, (2, 4, 33, 64)) for x in random_arrays(8, *[(1, 1, 33, 64)] * 3))
    assert mx.allclose(mfa.flash_attention(q, k, v), sdpa(q, k, v), rtol=0, atol=2e-6)
    dense = [mx.contiguous(x) for x in (q, k, v)]
    assert mx.array_equal(mfa.flash_attention(q, k, v), mfa.flash_attention(*dense))


def test_slices_of_a_cache_that_is_larger_than_what_is_used():
    q, cache_k, cache_v = random_arrays(9, (1, 8, 1, 64), (1, 2, 512, 64), (1, 2, 512, 64))
    for used in (1, 31, 256, 300, 512):
        k, v = cache_k[:, :, :used], cache_v[:, :, :used]
        assert mx.allclose(mfa.flash_attention(q, k, v), sdpa(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Hkv", [1, 2, 8])
def test_gradients(Hkv, causal):
    q, k, v, d_o = random_arrays(10, (2, 8, 33, 32), (2, Hkv, 40, 32), (2, Hkv, 40, 32), (2, 8, 33, 32))

    def ours(q, k, v):
        return (mfa.flash_attention(q, k, v, causal=causal) * d_o).sum()

    def theirs(q, k, v):
        return (sdpa(q, k, v, mask="causal" if causal else None) * d_o).sum()

    for got, want in zip(mx.grad(ours, argnums=(0, 1, 2))(q, k, v), mx.grad(theirs, argnums=(0, 1, 2))(q, k, v)):
        assert got.shape == want.shape
        assert mx.allclose(got, want, rtol=1e-4, atol=2e-5)


def test_gradient_of_an_additive_mask_and_of_sinks():
    q, k, v, bias, sinks = random_arrays(11, *[(2, 4, 20, 32)] * 3, (1, 4, 20, 20), (4,))

    def ours(bias, sinks):
        return mfa.flash_attention(q, k, v, attn_bias=bias, sinks=sinks).square().sum()

    def theirs(bias, sinks):
        return sdpa(q, k, v, mask=bias, sinks=sinks).square().sum()

    for got, want in zip(mx.grad(ours, argnums=(0, 1))(bias, sinks), mx.grad(theirs, argnums=(0, 1))(bias, sinks)):
        assert mx.allclose(got, want, rtol=1e-4, atol=2e-5)


def test_values_of_another_head_dim():
    for D, Dv in ((64, 32), (192, 128), (576, 512), (16, 80)):
        check(make_problem(12, B=1, Hq=4, Hkv=1, Nq=9, Nk=40, D=D, Dv=Dv, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_over_a_long_cache(dtype):
    for Nk in (4096, 5000):
        check(make_problem(13, B=1, Hq=4, Hkv=1, Nq=1, Nk=Nk, D=64, dtype=dtype))


def test_explicit_scale_and_positional_arguments():
    q, k, v = random_arrays(14, *[(1, 2, 9, 16)] * 3)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal")
    assert mx.allclose(mfa.flash_attention(q, k, v, 0.1, True), expected, rtol=0, atol=1e-6)
    everything = mfa.flash_attention(q, k, v, 0.1, True, 0.0, None, 0.0, False, None, False, None, None, "auto")
    assert mx.array_equal(everything, mfa.flash_attention(q, k, v, scale=0.1, causal=True))
    with pytest.raises(TypeError):
        mfa.flash_attention(q, k, v, 0.1, True, 0.0, None, 0.0, False, None, False, None, None, "auto", None)


def test_scale_of_zero_averages_the_values():
    q, k, v = random_arrays(15, *[(1, 2, 9, 16)] * 3)
    out = mfa.flash_attention(q, k, v, scale=0.0)
    assert mx.allclose(out, mx.broadcast_to(v.mean(axis=2, keepdims=True), out.shape), rtol=0, atol=1e-6)


def test_one_key_gives_its_value():
    q, k, v = random_arrays(16, (2, 4, 9, 16), (2, 2, 1, 16), (2, 2, 1, 8))
    out, lse = mfa.flash_attention(q, k, v, return_lse=True)
    assert mx.array_equal(out, mx.broadcast_to(mx.repeat(v, 2, axis=1), out.shape))
    expected = (q * mx.repeat(k, 2, axis=1)).sum(-1) / 4 / math.log(2)
    assert mx.allclose(lse, expected, rtol=1e-5, atol=1e-5)
