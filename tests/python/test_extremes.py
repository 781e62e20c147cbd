"""Lengths and magnitudes at which fused attention is known to go wrong elsewhere."""

import mlx.core as mx
import numpy as np
import pytest
from problems import DTYPES, check, make_problem, mfa, needs_kernels, random_arrays, to_mlx, to_numpy


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("N", [64, 192, 320])
def test_lengths_half_a_tile_past_a_multiple_of_128(N, D, dtype):
    mask = np.random.default_rng(N).random((1, 1, N, N)) < 0.8
    check(make_problem(1, Hq=2, Nq=N, D=D, dtype=dtype, causal=True))
    check(make_problem(2, Hq=2, Nq=N, D=D, dtype=dtype, mask=mask))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_a_log_sum_exp_far_from_zero(shift, dtype):
    bias = np.full((1, 1, 1, 192), shift)
    check(make_problem(3, Hq=2, Nq=192, D=64, dtype=dtype, bias=bias))
    check(make_problem(4, Hq=2, Nq=1, Nk=192, D=64, dtype=dtype, bias=bias))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_that_is_a_hundred_times_the_others(dtype):
    q, k, v = random_arrays(5, *[(1, 2, 200, 64)] * 3, dtype=dtype)
    factor = mx.where(mx.arange(64) == 7, 100.0, 1.0).astype(q.dtype)
    out = to_numpy(mfa.flash_attention(q * factor, k, v, scale=0.01, backend="mfa"))
    exact_q, exact_k = to_numpy(q * factor).astype(np.float64), to_numpy(k).astype(np.float64)
    scores = exact_q @ exact_k.swapaxes(-1, -2) * np.float32(0.01)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ to_numpy(v)
    assert np.abs(out - exact).max() < {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]


@needs_kernels
@pytest.mark.parametrize("exponent", [-90, -36, 36, 90])
@pytest.mark.parametrize("masked", [False, True])
def test_large_queries_meet_small_keys_and_values(exponent, masked):
    p = make_problem(6, Hq=2, Nq=70, Nk=130, D=40)
    q, k, v = (to_mlx(x, "float32") for x in (p.q, p.k, p.v))
    mask = {"mask": mx.array(np.random.default_rng(7).random((1, 1, 70, 130)) < 0.8)} if masked else {}
    power = 2.0**exponent
    expected = mfa.flash_attention(q, k, v, **mask)
    out = mfa.flash_attention(q * power, k / power, v / power, **mask) * power
    assert mx.allclose(out, expected, rtol=0, atol=4e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "Dv"), [(192, 128), (576, 512), (256, 256), (8, 200)])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 300), (130, 130)])
def test_wide_heads_and_value_heads_of_another_width(Nq, Nk, D, Dv, dtype):
    check(make_problem(6, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=D, Dv=Dv, dtype=dtype, causal=True))


@needs_kernels
@pytest.mark.parametrize("D", [40, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_a_million_times_their_neighbours(masked, D):
    N = 200
    q, k, v = (
        x.astype(np.float64) for x in np.random.default_rng(8).standard_normal((3, 1, 2, N, D)).astype("float32")
    )
    q[..., ::2, :] *= 2.0**-20  # next to rows whose scores are all but infinite
    k *= 2.0**20
    v *= 2.0 ** (np.arange(N)[:, None] // 5)  # a row sees no value much larger than its own
    hidden = np.arange(N) > np.arange(N)[:, None]
    scores = np.where(hidden, -np.inf, q @ k.swapaxes(-1, -2) * D**-0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ v
    visible = {"mask": mx.array(~hidden)} if masked else {"causal": True}
    out = to_numpy(mfa.flash_attention(*(to_mlx(x, "float32") for x in (q, k, v)), backend="mfa", **visible))
    assert np.all(np.abs(out - exact) <= 4e-6 * np.abs(exact).max(-1, keepdims=True))
