"""kv_lengths: the keys of each batch entry; what lies behind them never matters."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import DTYPES, check, check_case, make_case, make_problem, mfa, random_arrays, routes, to_mlx, to_numpy

LENGTHS = np.array([0, 1, 64, 100])


def poisoned_case(p, poison=np.nan):
    """A case whose keys and values behind the lengths are ``poison``."""
    case = make_case(p)
    for name in ("k", "v"):
        stored = getattr(p, name).copy()
        for b, length in enumerate(p.kv_lengths):
            stored[b, :, length:] = poison
        case.arrays[name] = to_mlx(stored, p.dtype)
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq", [1, 3, 33, 100, 130])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_agree_with_the_oracle_and_poison_behind_them_is_not_read(Nq, causal, dtype):
    p = make_problem(Nq, B=4, Hq=4, Hkv=2, Nq=Nq, Nk=100, D=32, dtype=dtype, kv_lengths=LENGTHS, causal=causal)
    results = check_case(poisoned_case(p))
    for name in ("k", "v"):
        for b, length in enumerate(LENGTHS):
            assert (to_numpy(results[name])[b, :, length:] == 0).all()


@routes
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_is_contained_on_every_route(poison, route):
    p = make_problem(2, B=4, Hq=2, Nq=20, Nk=100, D=16, kv_lengths=LENGTHS, causal=True, window=(30, -1))
    check_case(poisoned_case(p, poison), backend=route)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Nq", [1, 40])
def test_each_entry_equals_attention_over_its_own_keys(Nq, causal):
    q, k, v = random_arrays(3, (4, 2, Nq, 16), (4, 2, 100, 16), (4, 2, 100, 16))
    out, lse = mfa.flash_attention(q, k, v, causal=causal, kv_lengths=mx.array(LENGTHS), return_lse=True)
    for b, n in enumerate(LENGTHS.tolist()):
        rows = slice(b, b + 1)
        if n == 0:
            assert (out[b] == 0).all()
            assert np.isneginf(np.array(lse[b])).all()
            continue
        alone, alone_lse = mfa.flash_attention(q[rows], k[rows, :, :n], v[rows, :, :n], causal=causal, return_lse=True)
        assert mx.allclose(out[rows], alone, rtol=0, atol=1e-6)
        assert mx.allclose(lse[rows], alone_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint32, mx.int16, mx.uint8])
def test_any_integer_dtype_is_accepted(dtype):
    q, k, v = random_arrays(4, (4, 2, 3, 16), (4, 2, 100, 16), (4, 2, 100, 16))
    expected = mfa.flash_attention(q, k, v, kv_lengths=mx.array(LENGTHS.astype(np.int32)))
    assert mx.array_equal(mfa.flash_attention(q, k, v, kv_lengths=mx.array(LENGTHS).astype(dtype)), expected)


def test_full_lengths_are_no_lengths():
    q, k, v = random_arrays(5, (2, 2, 30, 16), (2, 2, 100, 16), (2, 2, 100, 16))
    full = mfa.flash_attention(q, k, v, kv_lengths=mx.array([100, 100]), causal=True)
    assert mx.array_equal(full, mfa.flash_attention(q, k, v, causal=True))


def test_lengths_that_are_still_to_be_computed_are_clamped():
    q, k, v = random_arrays(6, (2, 2, 30, 16), (2, 2, 100, 16), (2, 2, 100, 16))
    mx.eval(q, k, v)
    base = mx.array([0, 100])
    mx.eval(base)
    out = mfa.flash_attention(q, k, v, kv_lengths=base * 3 - 50)  # -50 and 250
    assert mx.array_equal(out, mfa.flash_attention(q, k, v, kv_lengths=mx.array([0, 100])))


def test_decode_steps_over_a_growing_cache_give_what_a_prefill_gives():
    N = 70
    q, k, v = random_arrays(7, (1, 2, N, 32), (1, 2, N, 32), (1, 2, N, 32))
    whole = mfa.flash_attention(q, k, v, causal=True)
    steps = [
        mfa.flash_attention(q[:, :, t : t + 1], k, v, causal=True, kv_lengths=mx.array([t + 1])) for t in range(0, N, 9)
    ]
    assert mx.allclose(mx.concatenate(steps, axis=2), whole[:, :, ::9], rtol=0, atol=1e-6)


def test_sinks_of_sequences_without_keys():
    p = make_problem(8, B=2, Hq=2, Nq=4, Nk=9, D=8, kv_lengths=np.array([0, 9]), sinks=np.array([0.5, -1.0]))
    results = check(p)
    assert np.allclose(np.array(results["lse"])[0] * oracle.LN2, [[0.5] * 4, [-1.0] * 4])
