"""Dense matrix products: the float64 oracle, layouts, broadcasting, gradients, transformations, bad input."""

import mlx.core as mx
import numpy as np
import pytest
from linear_problems import DTYPES, LAYOUTS, assert_product, mfa, needs_kernels, normal, on_cpu, view
from problems import to_mlx, to_numpy

pytestmark = on_cpu

SHAPES = {  # x, w
    "matrices": ((5, 7), (7, 9)),
    "one row": ((1, 300), (300, 130)),
    "two rows": ((2, 300), (300, 130)),
    "tall": ((200, 33), (33, 25)),
    "shared weights": ((2, 3, 5, 7), (7, 9)),
    "batch of weights": ((5, 7), (4, 7, 9)),
    "batches": ((4, 5, 7), (4, 7, 9)),
    "broadcast batches": ((3, 1, 2, 7), (4, 7, 5)),
    "broadcast over weights": ((3, 2, 7), (3, 1, 7, 5)),
    "one of all": ((1, 1), (1, 1)),
    "no rows": ((0, 7), (7, 9)),
    "no columns": ((5, 7), (7, 0)),
    "no terms": ((5, 0), (0, 9)),
    "no matrices": ((0, 5, 7), (7, 9)),
    "vector by matrix": ((7,), (7, 9)),
    "matrix by vector": ((5, 7), (7,)),
    "vectors": ((7,), (7,)),
    "vector by batch": ((7,), (4, 7, 9)),
}


def operands(seed, x_shape, w_shape, dtype):
    rng = np.random.default_rng(seed)
    return normal(rng, x_shape, dtype), normal(rng, w_shape, dtype)


def assert_like_numpy(got, x, w, **options):
    """Checks a product whose operands may be vectors."""
    x2, w2 = x if x.ndim > 1 else x[None], w if w.ndim > 1 else w[:, None]
    assert got.shape == np.matmul(x, w).shape
    assert_product(got.reshape(np.matmul(x2, w2).shape), x2, w2, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_products_of_every_kind_of_shape_keep_the_error_rule(name, dtype):
    x, w = operands(1, *SHAPES[name], dtype)
    assert_like_numpy(mfa.matmul(to_mlx(x, dtype), to_mlx(w, dtype)), x, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("w_layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_strided_operands_are_read_as_they_are(dtype, x_layout, w_layout, rows):
    x, w = operands(2, (2, rows, 70), (2, 70, 45), dtype)
    assert_product(mfa.matmul(view(x, dtype, x_layout), view(w, dtype, w_layout)), x, w)


def test_random_products_keep_the_error_rule(seed):
    rng = np.random.default_rng(seed)
    for case in range(1000):
        dtype = str(rng.choice(DTYPES))
        M, N, K = (int(rng.integers(0, 1 + rng.choice([4, 40, 200]))) for _ in range(3))
        batch = [(), (), (2,), (2, 3), (1, 3), (3,)]
        x_shape = (*batch[rng.integers(len(batch))], M, K)
        w_shape = (*[(), (), (2, 1), (3,)][rng.integers(4)], K, N)
        try:
            np.broadcast_shapes(x_shape[:-2], w_shape[:-2])
        except ValueError:
            w_shape = w_shape[-2:]
        x, w = operands(seed + case, x_shape, w_shape, dtype)
        x_layout, w_layout = rng.choice(LAYOUTS, 2)
        context = f"case {case} of seed {seed}: {dtype} {x_shape} {x_layout} {w_shape} {w_layout}"
        assert_product(mfa.matmul(view(x, dtype, x_layout), view(w, dtype, w_layout)), x, w, context=context)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c_shape", [(), (9,), (1, 9), (5, 1), (5, 9), (3, 1, 9), (3, 5, 9), (1, 1, 1)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, -2.0), (-1.25, 0.0)])
def test_the_added_term_broadcasts(dtype, c_shape, alpha, beta):
    x, w = operands(3, (3, 5, 7), (7, 9), dtype)
    c = normal(np.random.default_rng(4), c_shape, dtype)
    got = mfa.addmm(to_mlx(c, dtype), to_mlx(x, dtype), to_mlx(w, dtype), alpha, beta)
    assert_product(got, x, w, add=beta * c, alpha=alpha)


@pytest.mark.parametrize(("x_shape", "w_shape", "c_shape"), [
    ((7,), (7, 9), (9,)), ((5, 7), (7,), (5,)), ((7,), (7,), ()), ((7,), (4, 7, 9), (4, 9)), ((4, 5, 7), (7,), (4, 5)),
    ((7,), (4, 7, 9), (4, 1)),
])  # fmt: skip
def test_the_added_term_of_vectors(x_shape, w_shape, c_shape):
    x, w = operands(5, x_shape, w_shape, "float32")
    c = np.asarray(normal(np.random.default_rng(6), c_shape, "float32"))
    got = mfa.addmm(*(mx.array(a.astype(np.float32)) for a in (c, x, w)))
    np.testing.assert_allclose(to_numpy(got), x @ w + c, rtol=1e-5, atol=1e-5)


def test_a_factor_of_zero_hides_the_added_term():
    x, w = operands(7, (3, 4), (4, 5), "float32")
    got = mfa.addmm(mx.full((5,), float("nan")), to_mlx(x, "float32"), to_mlx(w, "float32"), beta=0.0)
    assert_product(got, x, w)


@pytest.mark.parametrize("other", ["float16", "bfloat16", "int32", "bool_"])
def test_dtypes_promote_as_in_mlx(other):
    x, w = mx.ones((2, 3), getattr(mx, other)), mx.ones((3, 4))
    assert mfa.matmul(x, w).dtype == mx.matmul(x, w).dtype == mx.float32
    assert mfa.matmul(mx.ones((2, 3), mx.float16), mx.ones((3, 4), mx.bfloat16)).dtype == mx.float32


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(dtype, transposed):
    x, w = operands(8, (64, 600), (600, 200), dtype)
    x, w = to_mlx(x, dtype), view(w, dtype, "transposed" if transposed else "dense")
    together = mfa.matmul(x, w)
    for rows in range(1, 64):
        parts = [mfa.matmul(x[r : r + rows], w) for r in range(0, 64, rows)]
        assert mx.array_equal(mx.concatenate(parts), together).item(), rows


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_nan_and_infinity_come_out_as_in_mlx(special, rows):
    x, w = operands(9, (rows, 40), (40, 30), "float32")
    x[rows // 2, 7] = special
    w[3, 5], w[7, 9] = -special, 0.0
    x, w = to_mlx(x, "float32"), to_mlx(w, "float32")
    np.testing.assert_allclose(to_numpy(mfa.matmul(x, w)), to_numpy(mx.matmul(x, w)), rtol=1e-4, atol=1e-4)


GRADIENTS = {
    "matrices": ((5, 7), (7, 9), (9,)),
    "shared weights": ((2, 3, 5, 7), (7, 9), (5, 9)),
    "batches": ((4, 5, 7), (4, 7, 9), (4, 1, 9)),
    "broadcast batches": ((3, 1, 2, 7), (4, 7, 5), (2, 1)),
    "one row": ((1, 7), (7, 9), (1, 9)),
    "vector": ((7,), (7, 9), (9,)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_mlx(name):
    x, w, c = (to_mlx(normal(np.random.default_rng(i), s, "float32"), "float32") for i, s in enumerate(GRADIENTS[name]))

    def loss(addmm):
        return lambda c, x, w: mx.sin(addmm(c, x, w, 0.5, 2.0)).sum()

    ours, theirs = (mx.grad(loss(f), (0, 1, 2))(c, x, w) for f in (mfa.addmm, mx.addmm))
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_16_bits(dtype):
    x, w = operands(10, (3, 40, 70), (70, 30), dtype)
    d_out = normal(np.random.default_rng(11), (3, 40, 30), dtype)
    dx, dw = mx.vjp(mfa.matmul, [to_mlx(x, dtype), to_mlx(w, dtype)], [to_mlx(d_out, dtype)])[1]
    assert_product(dx, d_out, w.T)
    assert_product(dw, x.reshape(-1, 70).T, d_out.reshape(-1, 30))


def test_gradients_differ_against_finite_differences():
    x, w = operands(12, (3, 4), (4, 5), "float32")
    mx_w = to_mlx(w, "float32")

    def loss(x):
        return float(mx.sin(mfa.matmul(to_mlx(x, "float32"), mx_w)).sum().item())

    gradient = to_numpy(mx.grad(lambda x: mx.sin(mfa.matmul(x, mx_w)).sum())(to_mlx(x, "float32")))
    for i in range(3):
        for k in range(4):
            step = np.zeros_like(x)
            step[i, k] = 1e-2
            assert gradient[i, k] == pytest.approx((loss(x + step) - loss(x - step)) / 2e-2, abs=5e-3)


def test_second_and_forward_mode_derivatives():
    x, w = (to_mlx(a, "float32") for a in operands(13, (3, 4), (4, 5), "float32"))

    def second(matmul):
        return mx.grad(lambda x: mx.grad(lambda x: (matmul(x, w) ** 3).sum())(x).sum())(x)

    def forward(matmul):
        return mx.jvp(matmul, [x, w], [x * 2, w * 3])[1][0]

    for derivative in (second, forward):
        np.testing.assert_allclose(to_numpy(derivative(mfa.matmul)), to_numpy(derivative(mx.matmul)), rtol=1e-4)


@pytest.mark.parametrize(("x_shape", "w_shape", "axes"), [
    ((6, 5, 7), (7, 9), (0, None)), ((5, 6, 7), (7, 9), (1, None)), ((5, 7), (7, 6, 9), (None, 1)),
    ((6, 5, 7), (7, 9, 6), (0, 2)), ((6, 2, 5, 7), (7, 9), (0, None)), ((2, 5, 7), (6, 7, 9), (None, 0)),
])  # fmt: skip
def test_vmap_is_that_of_mlx(x_shape, w_shape, axes):
    x, w = (to_mlx(a, "float32") for a in operands(14, x_shape, w_shape, "float32"))
    ours, theirs = (mx.vmap(f, axes)(x, w) for f in (mfa.matmul, mx.matmul))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-4, atol=1e-5)


def test_compiled_functions_and_shapeless_ones():
    x, w = (to_mlx(a, "float32") for a in operands(15, (5, 7), (7, 9), "float32"))
    assert mx.array_equal(mx.compile(mfa.matmul)(x, w), mfa.matmul(x, w)).item()
    shapeless = mx.compile(lambda x, w: mfa.matmul(x, w) + 1, shapeless=True)
    for rows in (5, 3, 1):
        assert mx.array_equal(shapeless(x[:rows], w), mfa.matmul(x[:rows], w) + 1).item()


def test_a_stream_can_be_named():
    stream = mx.new_stream(mx.cpu)
    x, w = (to_mlx(a, "float32") for a in operands(16, (5, 7), (7, 9), "float32"))
    assert mx.array_equal(mfa.matmul(x, w, stream=stream), mfa.matmul(x, w)).item()


MISTAKES = {
    "no axes": (lambda: mfa.matmul(mx.array(1.0), mx.ones((3, 4))), r"^\[matmul\] x and w must have at least one axis"),
    "vectors of other K": (lambda: mfa.matmul(mx.ones((7,)), mx.ones((3,))), r"agree in K; got shapes \(7\) and \(3\)"),
    "other K": (lambda: mfa.matmul(mx.ones((2, 3)), mx.ones((4, 5))), r"^\[matmul\] .*agree in K; got shapes \(2,3\)"),
    "batches": (lambda: mfa.matmul(mx.ones((2, 3, 4)), mx.ones((5, 4, 3))), r"^\[matmul\] the leading axes"),
    "integers": (lambda: mfa.matmul(mx.ones((2, 3), mx.int32), mx.ones((3, 4), mx.int32)), "promote to .*int32"),
    "complex": (lambda: mfa.matmul(mx.ones((2, 3), mx.complex64), mx.ones((3, 4))), "promote to .*complex64"),
    "addend": (
        lambda: mfa.addmm(mx.ones((7,)), mx.ones((2, 3)), mx.ones((3, 4))),
        r"^\[addmm\] c must broadcast to the result's shape \(2,4\); got \(7\)",
    ),
    "wide addend": (lambda: mfa.addmm(mx.ones((5, 2, 4)), mx.ones((2, 3)), mx.ones((3, 4))), r"^\[addmm\] c must"),
}


@needs_kernels
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_reported(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()
