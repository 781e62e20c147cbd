"""The small layers behind the hooks, RMS norm and rotary position encoding: float64, MLX's transformations."""

import functools

import mlx.core as mx
import mlx_mfa
import numpy as np
import oracle
import pytest
from linear_problems import DTYPES, needs_kernels, normal, on_cpu
from mlx_mfa import _ext
from problems import to_mlx, to_numpy

pytestmark = [needs_kernels, on_cpu]


def assert_close(got, exact, dtype, terms=1.0):
    bound = oracle.half_ulp(np.abs(exact).max(), dtype) * 1.01 + 2.0**-22 * terms * np.abs(exact).max()
    assert np.abs(to_numpy(got) - exact).max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576,), (3, 1), (2, 3, 64), (200, 577), (0, 8)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(dtype, shape, weighted):
    rng = np.random.default_rng(1)
    x, weight = normal(rng, shape, dtype), normal(rng, shape[-1:], dtype)
    exact = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * (weight if weighted else 1.0)
    got = _ext.try_rms_norm(to_mlx(x, dtype), to_mlx(weight, dtype) if weighted else None, 1e-5)
    assert (got.shape, got.dtype) == (shape, getattr(mx, dtype))
    if exact.size:
        assert_close(got, exact, dtype, terms=4)


def test_rms_norm_of_views():
    x = normal(np.random.default_rng(2), (4, 6, 32), "float32")
    array = to_mlx(x, "float32")
    for view, values in (
        (array[:, ::2], x[:, ::2]),
        (array.swapaxes(0, 1), x.swapaxes(0, 1)),
        (array[..., ::2], x[..., ::2]),
        (array[::-1], x[::-1]),
        (mx.broadcast_to(array[:1], (4, 6, 32)), np.broadcast_to(x[:1], x.shape)),
    ):
        exact = values / np.sqrt((values * values).mean(-1, keepdims=True) + 1e-5)
        assert_close(_ext.try_rms_norm(view, None, 1e-5), exact, "float32", terms=4)


def turned(x, dims, traditional, base, scale, offset, freqs=None):
    """x [B, H, T, D] in float64; offset is a number or [B]."""
    half = dims // 2
    frequency = base ** (-np.arange(half) / half) if freqs is None else 1.0 / freqs
    positions = scale * (np.asarray(offset).reshape(-1, 1) + np.arange(x.shape[2]))
    angle = (positions[..., None] * frequency)[:, None]
    first, second = (slice(0, dims, 2), slice(1, dims, 2)) if traditional else (slice(0, half), slice(half, dims))
    out = x.copy()
    out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    out[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("traditional", [True, False])
@pytest.mark.parametrize(("dims", "D"), [(64, 64), (32, 64), (2, 3)])
@pytest.mark.parametrize("offset", [0, 1000000, "array", "each"])
def test_rope(dtype, traditional, dims, D, offset):
    x = normal(np.random.default_rng(3), (2, 3, 70, D), dtype)
    number = {"array": 5, "each": np.array([7, 900])}.get(offset, offset)
    given = mx.array(number) if isinstance(offset, str) else number
    got = _ext.try_rope(
        to_mlx(x, dtype), dims, traditional=traditional, base=10000.0, scale=0.5, offset=given, freqs=None
    )
    assert_close(got, turned(x, dims, traditional, 10000.0, 0.5, number), dtype, terms=4)


def test_rope_with_given_periods_and_other_layouts():
    x = normal(np.random.default_rng(4), (2, 9, 3, 16), "float32")
    freqs = np.exp(np.linspace(0, 5, 8)).astype(np.float32)
    options = {"traditional": False, "base": None, "scale": 1.0, "offset": 11, "freqs": mx.array(freqs)}
    exact = turned(x.swapaxes(1, 2), 16, False, None, 1.0, 11, freqs.astype(np.float64))
    heads_last = to_mlx(x, "float32").swapaxes(1, 2)
    assert_close(_ext.try_rope(heads_last, 16, **options), exact, "float32", terms=4)
    three = _ext.try_rope(to_mlx(exact[:, 0], "float32"), 16, **options)
    assert_close(three, turned(exact[:, :1], 16, False, None, 1.0, 11, freqs.astype(np.float64))[:, 0], "float32", 8)
    five = _ext.try_rope(heads_last.reshape(2, 3, 1, 9, 16), 16, **options)
    assert_close(five.reshape(exact.shape), exact, "float32", terms=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5000), (2, 3, 33), (0, 4)])
def test_swiglu(dtype, shape):
    rng = np.random.default_rng(6)
    gate, x = normal(rng, shape or (1,), dtype) * 4, normal(rng, shape or (1,), dtype)
    got = _ext.try_swiglu(to_mlx(gate, dtype).reshape(shape), to_mlx(x, dtype).reshape(shape))
    assert (got.shape, got.dtype) == (shape, getattr(mx, dtype))
    if x.size:
        assert_close(got.reshape(x.shape), gate / (1 + np.exp(-gate)) * x, dtype, terms=4)


def test_swiglu_of_large_numbers_and_of_views():
    gate = mx.array([1000.0, -1000.0, float("inf"), 0.0])
    assert _ext.try_swiglu(gate, mx.ones((4,))).tolist() == [1000.0, 0.0, float("inf"), 0.0]
    gate = mx.random.normal((6, 8))
    x = mx.random.normal((8, 6)).T
    assert_close(_ext.try_swiglu(gate[::2], x[::2]), to_numpy(gate[::2] * mx.sigmoid(gate[::2]) * x[::2]), "float32", 4)
    assert _ext.try_swiglu(gate, x[:1]) is None


REDUCTIONS = {"logsumexp": (mx.logsumexp, _ext.try_logsumexp), "argmax": (mx.argmax, _ext.try_argmax)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256,), (3, 1000), (2, 3, 333), (1, 49152), (1, 4096), (2, 8193)])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("keepdims", [True, False])
def test_reductions_of_logits(dtype, shape, axis, keepdims):
    x = normal(np.random.default_rng(7), shape, dtype) * 6
    array = to_mlx(x, dtype)
    x = to_numpy(array).astype(np.float64)
    largest = x.max(axis=axis, keepdims=True)
    exact = np.log(np.exp(x - largest).sum(axis=axis, keepdims=True)) + largest
    got = _ext.try_logsumexp(array, axis, keepdims)
    with mlx_mfa.hooks.hooked(False):
        expected = mx.logsumexp(array, axis, keepdims), mx.argmax(array, axis, keepdims)
    assert (got.shape, got.dtype) == (expected[0].shape, array.dtype)
    assert_close(got, exact.reshape(got.shape), dtype)
    place = _ext.try_argmax(array, axis, keepdims)
    assert (place.shape, place.dtype) == (expected[1].shape, mx.uint32)
    assert mx.array_equal(place, expected[1]).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [{}, {7: "nan"}, {5000: "nan", 9000: "nan"}, {8999: "inf", 3: "inf"}, {0: "-inf"}])
@pytest.mark.parametrize("filling", [0.0, float("-inf")])
def test_reductions_of_what_is_not_finite_and_of_ties(dtype, places, filling):
    x = np.full(9001, filling)
    for place, value in places.items():
        x[place] = float(value)
    array = mx.array(x, getattr(mx, dtype))
    with mlx_mfa.hooks.hooked(False):
        expected = mx.logsumexp(array), mx.argmax(array)
    assert mx.array_equal(_ext.try_logsumexp(array), expected[0], equal_nan=True).item()
    assert _ext.try_argmax(array).item() == expected[1].item()


def test_reductions_of_views_and_what_is_left_to_mlx():
    x = mx.random.normal((300, 600))
    for view in (x.T, x[:, ::2], x[::3], mx.broadcast_to(x[:1], (4, 600)), x[:, ::-1]):
        dense = mx.array(to_numpy(view))
        for mlx, ours in REDUCTIONS.values():
            for axis in (None, -1):
                with mlx_mfa.hooks.hooked(False):
                    expected = mlx(dense, axis)
                assert mx.allclose(ours(view, axis), expected).item()
    for _, ours in REDUCTIONS.values():
        assert ours(x, 0) is None
        assert ours(x[:, :100], -1) is None
        assert ours(mx.zeros((0, 600)), -1) is None
        assert ours(mx.array(1.0)) is None
        assert ours(x.astype(mx.int32)) is None
        assert ours(x, 1) is not None


def test_a_row_is_reduced_to_the_same_bits_alone_and_among_others():
    x = mx.random.normal((9, 5000))
    together = _ext.try_logsumexp(x, -1, True)
    assert all(mx.array_equal(together[i], _ext.try_logsumexp(x[i], -1, True)).item() for i in range(9))


def test_a_compiled_reduction_takes_other_shapes():
    @functools.partial(mx.compile, shapeless=True)
    def both(x):
        return mx.logsumexp(x, -1), mx.argmax(x, -1, keepdims=True), mx.logsumexp(x)

    with mlx_mfa.hooks.hooked(True):
        for shape in ((2, 300), (5, 400)):
            assert [a.shape for a in both(mx.ones(shape))] == [(shape[0],), (shape[0], 1), ()]


LAYERS = {
    "logsumexp": lambda x: mx.logsumexp(mx.tile(x, 20), axis=-1),
    "logsumexp of all": lambda x: mx.logsumexp(mx.tile(x, 20), keepdims=True),
    "rms_norm": lambda x: mx.fast.rms_norm(x, mx.full((16,), 0.5), 1e-5),
    "rope": lambda x: mx.fast.rope(x, 16, traditional=False, base=10000.0, scale=1.0, offset=3),
    "rope with arrays": lambda x: mx.fast.rope(
        x, 8, traditional=True, base=None, scale=1.0, offset=mx.array([3]), freqs=mx.arange(1, 5).astype(mx.float32)
    ),
}
TRANSFORMATIONS = {
    "plain": lambda f, x: f(x),
    "gradient": lambda f, x: mx.grad(lambda x: mx.sin(f(x)).sum())(x),
    "second": lambda f, x: mx.grad(lambda x: mx.sin(mx.grad(lambda x: (f(x) ** 3).sum())(x)).sum())(x),
    "forward": lambda f, x: mx.jvp(f, [x], [x * x])[1][0],
    "map": lambda f, x: mx.vmap(f)(mx.stack([x, x + 1])),
    "map of another axis": lambda f, x: mx.vmap(f, 1, 2)(mx.stack([x, x + 1], 1)),
    "compile": lambda f, x: mx.compile(f)(x),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformations_are_those_of_mlx(name, transformation):
    x = to_mlx(normal(np.random.default_rng(5), (2, 3, 5, 16), "float32"), "float32")
    results = []
    for wanted in (True, False):
        with mlx_mfa.hooks.hooked(wanted):
            before = mlx_mfa.hooks_status()["calls"][name.split()[0]]["mfa"]
            results.append(TRANSFORMATIONS[transformation](LAYERS[name], x))
            assert (mlx_mfa.hooks_status()["calls"][name.split()[0]]["mfa"] > before) == wanted
    ours, theirs = results
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-3, atol=1e-4)
