"""Properties that hold for any problem, with shapes and options drawn by hypothesis."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mfa, random_arrays

lengths = st.sampled_from([1, 2, 7, 8, 31, 33, 64, 65, 129, 257])
head_dims = st.sampled_from([1, 3, 8, 17, 32, 64, 80])
quick = settings(max_examples=30, deadline=None, derandomize=True)


@quick
@given(Nq=lengths, Nk=lengths, D=head_dims, seed=st.integers(0, 1000))
def test_the_order_of_the_keys_does_not_matter(Nq, Nk, D, seed):
    q, k, v = random_arrays(seed, (1, 2, Nq, D), (1, 2, Nk, D), (1, 2, Nk, D))
    order = mx.array(np.random.default_rng(seed).permutation(Nk))
    shuffled = mfa.flash_attention(q, k[:, :, order], v[:, :, order])
    assert mx.allclose(mfa.flash_attention(q, k, v), shuffled, rtol=0, atol=4e-6)


@quick
@given(N=lengths, D=head_dims, Dv=head_dims, causal=st.booleans(), seed=st.integers(0, 1000))
def test_outputs_are_averages_of_values(N, D, Dv, causal, seed):
    q, k, v = random_arrays(seed, (1, 2, N, D), (1, 2, N, D), (1, 2, N, Dv))
    out = mfa.flash_attention(q, k, v, causal=causal)
    slack = 1e-5
    assert (out <= v.max(axis=2, keepdims=True) + slack).all()
    assert (out >= v.min(axis=2, keepdims=True) - slack).all()


@quick
@given(Nq=lengths, Nk=lengths, D=head_dims, G=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 1000))
def test_grouped_heads_equal_repeated_ones(Nq, Nk, D, G, seed):
    q, k, v = random_arrays(seed, (2, 2 * G, Nq, D), (2, 2, Nk, D), (2, 2, Nk, D))
    grouped, lse = mfa.flash_attention(q, k, v, causal=True, return_lse=True)
    repeated = [mx.repeat(x, G, axis=1) for x in (k, v)]
    full, full_lse = mfa.flash_attention(q, *repeated, causal=True, return_lse=True)
    assert mx.allclose(grouped, full, rtol=0, atol=4e-6)
    assert mx.allclose(lse, full_lse, rtol=1e-5, atol=1e-5)


@quick
@given(Nq=lengths, Nk=lengths, D=head_dims, seed=st.integers(0, 1000))
def test_the_function_is_linear_in_the_values(Nq, Nk, D, seed):
    q, k, v, w = random_arrays(seed, (1, 2, Nq, D), *[(1, 2, Nk, D)] * 3)
    total = mfa.flash_attention(q, k, v + 2 * w)
    parts = mfa.flash_attention(q, k, v) + 2 * mfa.flash_attention(q, k, w)
    assert mx.allclose(total, parts, rtol=0, atol=1e-5)


@quick
@given(N=lengths, D=head_dims, shift=st.floats(-3, 3), seed=st.integers(0, 1000))
def test_a_constant_added_to_the_scores_moves_the_lse_only(N, D, shift, seed):
    q, k, v = random_arrays(seed, *[(1, 2, N, D)] * 3)
    out, lse = mfa.flash_attention(q, k, v, return_lse=True)
    moved, moved_lse = mfa.flash_attention(q, k, v, attn_bias=mx.full((1, 1, 1, 1), shift), return_lse=True)
    assert mx.allclose(out, moved, rtol=0, atol=4e-6)
    assert mx.allclose(moved_lse - lse, mx.full(lse.shape, shift / np.log(2)), rtol=0, atol=1e-4)


@quick
@given(Nq=lengths, Nk=lengths, left=st.integers(-1, 70), right=st.integers(-1, 70), causal=st.booleans())
def test_windows_equal_their_masks(Nq, Nk, left, right, causal):
    q, k, v = random_arrays(Nq + Nk, *[(1, 2, n, 16) for n in (Nq, Nk, Nk)])
    pos = np.arange(Nq)[:, None] + max(0, Nk - Nq)
    j = np.arange(Nk)[None, :]
    mask = np.ones((Nq, Nk), bool)
    if left >= 0:
        mask &= j >= pos - left
    if right >= 0:
        mask &= j <= pos + right
    if causal:
        mask &= j <= pos
    windowed, lse = mfa.flash_attention(q, k, v, causal=causal, window_size=(left, right), return_lse=True)
    masked, masked_lse = mfa.flash_attention(q, k, v, mask=mx.array(mask), return_lse=True)
    assert mx.allclose(windowed, masked, rtol=0, atol=4e-6)
    assert mx.allclose(lse, masked_lse, rtol=1e-5, atol=1e-5)
