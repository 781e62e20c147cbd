"""NaN and infinity: what is hidden never reaches a result, what is visible does."""

import mlx.core as mx
import numpy as np
import pytest
from problems import (
    DTYPES,
    arrays_of,
    attention,
    forward_and_gradients,
    make_case,
    make_problem,
    mfa,
    needs_kernels,
    normal,
    random_arrays,
    routes,
    to_mlx,
    to_numpy,
)

POISONS = [np.nan, np.inf, -np.inf]


def poisoned(p, names, index, poison):
    """The arrays of ``p`` with ``poison`` at ``index`` of the named ones."""
    arrays = arrays_of(p)
    for name in names:
        values = getattr(p, name).copy()
        values[index] = poison
        arrays[name] = to_mlx(values, p.dtype)
    return arrays


HIDING = {
    "mask": lambda Nk: {"mask": np.arange(Nk).reshape(1, 1, 1, Nk) % 5 != 2},
    "bias": lambda Nk: {"bias": np.where(np.arange(Nk).reshape(1, 1, 1, Nk) % 5 != 2, 0.5, -np.inf)},
    "kv_lengths": lambda Nk: {"kv_lengths": np.array([Nk - 7])},
}


@routes
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("Nq", [1, 40])
@pytest.mark.parametrize("hiding", HIDING)
def test_keys_hidden_from_all_rows_reach_no_output_and_no_gradient(hiding, Nq, poison, route):
    Nk = 90
    p = make_problem(1, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=16, **HIDING[hiding](Nk))
    hidden = np.arange(Nk) >= Nk - 7 if hiding == "kv_lengths" else np.arange(Nk) % 5 == 2
    case = make_case(p)
    clean = forward_and_gradients(p, case.arrays, case.d_o_array, case.dlse, backend=route)
    dirty_arrays = poisoned(p, ("k", "v"), (slice(None), slice(None), hidden), poison)
    dirty = forward_and_gradients(p, dirty_arrays, case.d_o_array, case.dlse, backend=route)
    for name in clean:
        assert mx.array_equal(clean[name], dirty[name]), name
    for name in ("k", "v"):
        assert (to_numpy(dirty[name])[:, :, hidden] == 0).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(("Nq", "Nk", "D"), [(1, 90, 16), (40, 90, 16), (300, 300, 16), (70, 90, 192), (70, 90, 512)])
def test_keys_hidden_by_a_bias_of_minus_infinity_reach_nothing(Nq, Nk, D, poison, dtype):
    p = make_problem(2, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=D, dtype=dtype, **HIDING["bias"](Nk))
    hidden = np.arange(Nk) % 5 == 2
    case = make_case(p)
    clean = forward_and_gradients(p, case.arrays, case.d_o_array, case.dlse, backend="mfa")
    dirty_arrays = poisoned(p, ("k", "v"), (slice(None), slice(None), hidden), poison)
    dirty = forward_and_gradients(p, dirty_arrays, case.d_o_array, case.dlse, backend="mfa")
    for name in clean:
        assert mx.array_equal(clean[name], dirty[name]), name


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("names", [("k",), ("v",), ("k", "v")])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (20, 0)}, {"causal": True, "window": (30, -1)}])
def test_rows_that_do_not_see_a_poisoned_key_are_untouched(options, names, poison, dtype):
    N, j = 150, 70
    p = make_problem(3, Hq=2, Nq=N, D=16, dtype=dtype, **options)
    clean = attention(p, arrays_of(p), backend="mfa")
    dirty = attention(p, poisoned(p, names, (0, 0, j), poison), backend="mfa")
    rows = np.arange(N)
    left = options.get("window", (N, -1))[0]
    sees = (rows >= j) & (rows <= j + left)
    clean, dirty = to_numpy(clean), to_numpy(dirty)
    assert np.array_equal(clean[0, 0, ~sees], dirty[0, 0, ~sees])
    assert np.array_equal(clean[0, 1], dirty[0, 1])
    assert not np.isfinite(dirty[0, 0, sees]).all(axis=-1).any() or names == ("k",)


@needs_kernels
def test_gradients_of_rows_that_do_not_see_a_poisoned_key_are_untouched():
    N, j = 150, 70
    p = make_problem(4, Hq=1, Nq=N, D=16, causal=True)
    # Only rows before the poisoned key have a cotangent; the others give NaN to what they see.
    case = make_case(p)
    window = 10
    p.window = (window, 0)
    clean = forward_and_gradients(p, case.arrays, case.d_o_array, case.dlse, backend="mfa")
    dirty_arrays = poisoned(p, ("k", "v"), (0, 0, j), np.nan)
    dirty = forward_and_gradients(p, dirty_arrays, case.d_o_array, case.dlse, backend="mfa")
    rows = np.arange(N)
    sees = (rows >= j) & (rows <= j + window)
    assert np.array_equal(to_numpy(clean["q"])[0, 0, ~sees], to_numpy(dirty["q"])[0, 0, ~sees])
    apart = (rows < j - window) | (rows > j + window)  # keys that share no row with the poisoned one
    for name in ("k", "v"):
        assert np.array_equal(to_numpy(clean[name])[0, 0, apart], to_numpy(dirty[name])[0, 0, apart]), name


@routes
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_visible_nan_is_not_swallowed(name, route):
    p = make_problem(5, Hq=2, Nq=20, Nk=70, D=16)
    out = to_numpy(attention(p, poisoned(p, (name,), (0, 1, 33), np.nan), backend=route))
    assert np.isnan(out[0, 1]).all()
    assert np.isfinite(out[0, 0]).all()


@routes
def test_a_nan_query_spoils_its_own_row_only(route):
    p = make_problem(6, Hq=2, Nq=20, Nk=70, D=16)
    clean = to_numpy(attention(p, arrays_of(p), backend=route))
    dirty = to_numpy(attention(p, poisoned(p, ("q",), (0, 1, 7), np.nan), backend=route))
    assert np.isnan(dirty[0, 1, 7]).all()
    keep = np.ones((1, 2, 20), bool)
    keep[0, 1, 7] = False
    assert np.allclose(clean[keep], dirty[keep], rtol=0, atol=1e-6)


@needs_kernels
def test_rows_that_see_nothing_are_zero_even_if_the_query_is_nan():
    mask = np.ones((1, 1, 6, 10), bool)
    mask[:, :, 2] = False
    p = make_problem(7, Hq=2, Nq=6, Nk=10, D=8, mask=mask)
    case = make_case(p)
    dirty_arrays = case.arrays | poisoned(p, ("q",), (0, 0, 2), np.nan)
    results = forward_and_gradients(p, dirty_arrays, case.d_o_array, case.dlse)
    clean = forward_and_gradients(p, case.arrays, case.d_o_array, case.dlse)
    for name in clean:
        assert mx.array_equal(clean[name], results[name]), name


@pytest.mark.parametrize("poison", POISONS)
def test_bias_of_hidden_keys_does_not_matter(poison):
    rng = np.random.default_rng(8)
    mask = rng.random((1, 1, 20, 70)) < 0.7
    p = make_problem(8, Hq=2, Nq=20, Nk=70, D=16, mask=mask, bias=normal(rng, (1, 1, 20, 70), "float32"))
    case = make_case(p)
    clean = forward_and_gradients(p, case.arrays, case.d_o_array, case.dlse)
    bias = np.where(mask, p.bias, poison)
    dirty_arrays = case.arrays | {"bias": to_mlx(bias, "float32")}
    dirty = forward_and_gradients(p, dirty_arrays, case.d_o_array, case.dlse)
    for name in clean:
        assert mx.array_equal(clean[name], dirty[name]), name


def test_infinite_values_that_are_visible_show_in_their_channel_only():
    q, k, v = random_arrays(9, *[(1, 1, 9, 8)] * 3)
    values = np.array(v)
    values[0, 0, 4, 3] = np.inf
    out = np.array(mfa.flash_attention(q, k, mx.array(values)))
    assert np.isposinf(out[..., 3]).all()
    assert np.isfinite(np.delete(out, 3, axis=-1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_finite_inputs_are_finite(dtype):
    for magnitude in (1e-20, 1e-3, 1.0, 100.0):
        q, k, v = (x * magnitude for x in random_arrays(10, *[(1, 2, 65, 32)] * 3, dtype=dtype))
        gradients = mx.grad(lambda *x: mfa.flash_attention(*x, causal=True).sum(), argnums=(0, 1, 2))(q, k, v)
        for x in (mfa.flash_attention(q, k, v, causal=True), *gradients):
            assert np.isfinite(to_numpy(x)).all()
