"""Products with quantised weights, and of picked matrices: the float64 oracle, gradients, vmap, bad input."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from linear_problems import BITS, DTYPES, GROUPS, assert_product, mfa, needs_kernels, normal, on_cpu, quantise, view
from problems import to_mlx, to_numpy
from test_explain import in_new_process

pytestmark = on_cpu


def rounded(w, dtype):
    """The weights as a plain program has them: in the dtype of x."""
    return oracle.round_to(w, dtype).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("transpose", [True, False])
def test_every_format_keeps_the_error_rule(dtype, bits, group_size, transpose):
    packed, scales, biases, w = quantise(1, (96, 384), group_size, bits, dtype)
    w = w.T if transpose else w
    for rows in (1, 2, 33):
        x = normal(np.random.default_rng(100 + rows), (rows, w.shape[0]), dtype)
        got = mfa.quantized_matmul(to_mlx(x, dtype), packed, scales, biases, transpose, group_size, bits)
        assert_product(got, x, w, w_plain=rounded(w, dtype), context=f"{rows} rows")


def test_random_products_keep_the_error_rule(seed):
    rng = np.random.default_rng(seed)
    for case in range(300):
        dtype, bits, group_size = str(rng.choice(DTYPES)), int(rng.choice(BITS)), int(rng.choice(GROUPS))
        transpose = bool(rng.integers(2))
        shape = (int(rng.integers(1, 90)), group_size * int(rng.integers(1, 6)))
        packed, scales, biases, w = quantise(seed + case, shape, group_size, bits, dtype)
        w = w.T if transpose else w
        batch = [(), (2,), (3, 1)][rng.integers(3)]
        x = normal(rng, (*batch, int(rng.integers(0, 40)), w.shape[0]), dtype)
        layout = str(rng.choice(["dense", "gap", "stepped", "transposed"]))
        got = mfa.quantized_matmul(view(x, dtype, layout), packed, scales, biases, transpose, group_size, bits)
        context = f"case {case} of seed {seed}: {dtype} {bits} bits, groups of {group_size}, {x.shape} {layout}"
        assert_product(got, x, w, w_plain=rounded(w, dtype), context=context)


@pytest.mark.parametrize("transpose", [True, False])
def test_batches_of_weights_broadcast(transpose):
    packed, scales, biases, w = quantise(2, (3, 64, 128), 64, 4, "float32")
    w = w.swapaxes(-1, -2) if transpose else w
    for batch in ((3,), (2, 1), (2, 3), ()):
        x = normal(np.random.default_rng(3), (*batch, 5, w.shape[-2]), "float32")
        got = mfa.quantized_matmul(to_mlx(x, "float32"), packed, scales, biases, transpose)
        assert_product(got, x, w)


def test_a_vector_by_quantised_weights():
    packed, scales, biases, w = quantise(3, (64, 128), 64, 4, "float32")
    x = normal(np.random.default_rng(4), (128,), "float32")
    got = mfa.quantized_matmul(to_mlx(x, "float32"), packed, scales, biases)
    assert got.shape == (64,)
    assert_product(got[None], x[None], w.T)


def test_strided_weights():
    packed, scales, biases, w = quantise(4, (64, 256), 64, 4, "float32")
    x = normal(np.random.default_rng(5), (3, 256), "float32")
    got = mfa.quantized_matmul(to_mlx(x, "float32"), packed[::2], scales[::2], biases[::2])
    assert_product(got, x, w.T[:, ::2])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("transpose", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(dtype, bits, transpose):
    packed, scales, biases, _ = quantise(5, (320, 576), 64, bits, dtype)
    x = to_mlx(normal(np.random.default_rng(6), (64, 576 if transpose else 320), dtype), dtype)
    together = mfa.quantized_matmul(x, packed, scales, biases, transpose, 64, bits)
    for rows in range(1, 64):
        parts = [
            mfa.quantized_matmul(x[r : r + rows], packed, scales, biases, transpose, 64, bits)
            for r in range(0, 64, rows)
        ]
        assert mx.array_equal(mx.concatenate(parts), together).item(), rows


def test_gradients_are_those_of_mlx():
    packed, scales, biases, _ = quantise(7, (64, 128), 64, 4, "float32")
    x = to_mlx(normal(np.random.default_rng(8), (3, 128), "float32"), "float32")

    def gradients(product):
        return mx.grad(lambda x, s, b: mx.sin(product(x, packed, s, b)).sum(), (0, 1, 2))(x, scales, biases)

    for ours, theirs in zip(gradients(mfa.quantized_matmul), gradients(mx.quantized_matmul)):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-4, atol=1e-4)


def test_vmap_and_compile():
    packed, scales, biases, w = quantise(9, (4, 64, 128), 64, 4, "float32")
    x = normal(np.random.default_rng(10), (4, 3, 128), "float32")
    over_x = mx.vmap(lambda x: mfa.quantized_matmul(x, packed[0], scales[0], biases[0]))
    assert_product(over_x(to_mlx(x, "float32")), x, w[0].T)
    over_all = mx.vmap(mfa.quantized_matmul)
    assert_product(over_all(to_mlx(x, "float32"), packed, scales, biases), x, w.swapaxes(-1, -2))
    over_w = mx.vmap(mfa.quantized_matmul, (None, 0, 0, 0))
    assert_product(over_w(to_mlx(x[0], "float32"), packed, scales, biases), x[0], w.swapaxes(-1, -2))
    compiled = mx.compile(lambda x: mfa.quantized_matmul(x, packed[0], scales[0], biases[0]))
    assert_product(compiled(to_mlx(x, "float32")), x, w[0].T)


# ---------------------------------------------------------------------------------------------- picked matrices

LHS = np.array([[0, 1, 3], [3, 2, 1]])
RHS = np.array([[4, 0, 4], [1, 1, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("index_dtype", ["uint32", "int32", "int64", "uint8"])
def test_picked_matrices(dtype, rows, index_dtype):
    rng = np.random.default_rng(11)
    x, w = normal(rng, (4, rows, 70), dtype), normal(rng, (5, 70, 40), dtype)
    lhs, rhs = (mx.array(i).astype(getattr(mx, index_dtype)) for i in (LHS, RHS))
    assert_product(mfa.gather_mm(to_mlx(x, dtype), to_mlx(w, dtype), lhs, rhs), x[LHS], w[RHS])
    transposed = view(w, dtype, "transposed")
    assert_product(mfa.gather_mm(to_mlx(x, dtype), transposed, None, mx.array([1, 1, 0, 4])), x, w[[1, 1, 0, 4]])
    assert_product(mfa.gather_mm(to_mlx(x[:1], dtype), transposed, None, None), x[:1], w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [True, False])
def test_picked_quantised_matrices(dtype, transpose):
    packed, scales, biases, w = quantise(12, (5, 64, 128), 64, 4, dtype)
    w = w.swapaxes(-1, -2) if transpose else w
    x = normal(np.random.default_rng(13), (4, 2, w.shape[-2]), dtype)
    got = mfa.gather_qmm(to_mlx(x, dtype), packed, scales, biases, mx.array(LHS), mx.array(RHS), transpose)
    assert_product(got, x[LHS], w[RHS], w_plain=rounded(w, dtype)[RHS])


@needs_kernels
def test_picked_rows_have_the_bits_of_a_plain_product():
    rng = np.random.default_rng(14)
    x, w = (to_mlx(normal(rng, s, "bfloat16"), "bfloat16") for s in ((40, 1, 96), (3, 96, 50)))
    experts = mx.array(rng.integers(0, 3, 40))
    got = mfa.gather_mm(x, w, None, experts)
    for i in range(40):
        assert mx.array_equal(got[i], mfa.matmul(x[i], w[experts[i].item()])).item()


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_picked_quantised_rows_have_the_bits_of_a_plain_product(bits):
    rng = np.random.default_rng(17)
    packed, scales, biases, _ = quantise(18, (3, 50, 192), 64, bits, "bfloat16")
    x = normal(rng, (40, 1, 192), "bfloat16")
    x[::3, :, ::50] *= 1000  # outliers
    x = to_mlx(x, "bfloat16")
    experts = mx.array(rng.integers(0, 3, 40))
    got = mfa.gather_qmm(x, packed, scales, biases, None, experts, True, 64, bits)
    for i in range(40):
        e = experts[i].item()
        assert mx.array_equal(
            got[i], mfa.quantized_matmul(x[i], packed[e], scales[e], biases[e], True, 64, bits)
        ).item()


def test_gradients_of_picked_matrices_add_up():
    rng = np.random.default_rng(15)
    x, w = (to_mlx(normal(rng, s, "float32"), "float32") for s in ((4, 2, 16), (5, 16, 8)))
    packed, scales, biases, _ = quantise(16, (5, 16, 64), 64, 4, "float32")
    lhs, rhs = mx.array(LHS), mx.array(RHS)

    def dense(gather):
        return mx.grad(lambda x, w: mx.sin(gather(x, w, lhs, rhs)).sum(), (0, 1))(x, w)

    def quantised(gather):
        return [mx.grad(lambda x: mx.sin(gather(x, packed, scales, biases, lhs, rhs, False)).sum())(x)]

    for gradients, ours, theirs in ((dense, mfa.gather_mm, mx.gather_mm), (quantised, mfa.gather_qmm, mx.gather_qmm)):
        for a, b in zip(gradients(ours), gradients(theirs)):
            np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-4)


def pick(name, indices):
    x = mx.ones((2, 1, 64))
    if name == "gather_mm":
        return mfa.gather_mm(x, mx.ones((5, 64, 3)), None, indices)
    return mfa.gather_qmm(x, *mx.quantize(mx.ones((5, 32, 64)), 64, 4), None, indices)


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
# Outside of [0, 5) as they are; cut to 32 bits some would be inside.
OUTSIDE = [5, -1, 127, 2**31, 2**32 + 1, -(2**32), 2**63 - 1, 2**63, 2**64 - 1]
OUTSIDE = [(dtype, i) for dtype in INTEGERS for i in OUTSIDE if np.iinfo(dtype).min <= i <= np.iinfo(dtype).max]
LAYOUTS = {
    "dense": lambda a: a,
    "strided": lambda a: mx.stack([a, mx.zeros_like(a)], axis=1)[:, 0],
    "reversed": lambda a: a[::-1],
    "repeated": lambda a: mx.broadcast_to(a[1], (2,)),
}


@needs_kernels
@pytest.mark.parametrize(("dtype", "index"), OUTSIDE)
@pytest.mark.parametrize("name", ["gather_mm", "gather_qmm"])
def test_an_index_outside_is_refused_when_its_value_is_known(name, dtype, index):
    message = rf"^\[{name}\] rhs_indices must be in \[0, 5\); got {index}$"
    given = mx.array(np.array([0, index], dtype))
    for layout in LAYOUTS.values():
        indices = layout(given)
        mx.eval(indices)
        with pytest.raises(ValueError, match=message):
            pick(name, indices)


# Few: MLX's scheduler never forgets a task that failed, and waits for ever at the hundredth of a process.
@needs_kernels
@pytest.mark.parametrize(("dtype", "index"), [(np.int32, -1), (np.int64, 2**32 + 1), (np.uint64, 2**63)])
@pytest.mark.parametrize("name", ["gather_mm", "gather_qmm"])
def test_an_index_outside_is_an_error_where_its_value_is_computed(name, dtype, index):
    product = pick(name, mx.array(np.array([0, index - 1], dtype)) + mx.array(1, mx.array(np.zeros(1, dtype)).dtype))
    with pytest.raises((ValueError, RuntimeError), match=rf"^\[{name}\] rhs_indices must be in \[0, 5\); got {index}$"):
        mx.eval(product)


@needs_kernels
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_of_every_integer_dtype_pick_alike(dtype, layout):
    rng = np.random.default_rng(3)
    x, w = (to_mlx(normal(rng, shape, "float32"), "float32") for shape in [(3, 2, 64), (4, 64, 5)])
    packed, scales, biases = mx.quantize(mx.swapaxes(w, 1, 2), 64, 4)
    lhs, rhs = (LAYOUTS[layout](mx.array(np.array(i, dtype))) for i in ([2, 1], [3, 0]))
    x_of, w_of = (LAYOUTS[layout](mx.array(i)).tolist() for i in ([2, 1], [3, 0]))

    def dense(x, w):
        return mx.stack([x[i] @ w[j] for i, j in zip(x_of, w_of)])

    np.testing.assert_allclose(to_numpy(mfa.gather_mm(x, w, lhs, rhs)), to_numpy(dense(x, w)), rtol=1e-4, atol=1e-4)
    expanded = mx.swapaxes(mx.dequantize(packed, scales, biases, 64, 4), 1, 2)
    got = mfa.gather_qmm(x, packed, scales, biases, lhs, rhs)
    np.testing.assert_allclose(to_numpy(got), to_numpy(dense(x, expanded)), rtol=1e-4, atol=1e-4)
    gradients = mx.grad(lambda x, w: mx.sin(mfa.gather_mm(x, w, lhs, rhs)).sum(), (0, 1))(x, w)
    expected = mx.grad(lambda x, w: mx.sin(dense(x, w)).sum(), (0, 1))(x, w)
    for a, b in zip(gradients, expected):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-4)


# In a process of its own: MLX keeps the error with the stream and may tell it again.
LATE_ERROR = """
import mlx.core as mx, mlx_mfa
mx.set_default_device(mx.cpu)
x, indices = mx.ones((2, 1, 64)), mx.array([0, 4]) + 1
if "{name}" == "gather_mm":
    product = mlx_mfa.gather_mm(x, mx.ones((5, 64, 3)), None, indices)
else:
    product = mlx_mfa.gather_qmm(x, *mx.quantize(mx.ones((5, 32, 64)), 64, 4), None, indices)
try:
    mx.async_eval(product)
    mx.eval(mx.ones((3,)) + 1)
except RuntimeError as error:
    print(error)
print(product.tolist())
"""


@needs_kernels
@pytest.mark.parametrize("name", ["gather_mm", "gather_qmm"])
def test_what_an_error_left_uncomputed_is_nan(name):
    run = in_new_process(LATE_ERROR.format(name=name))
    assert run.returncode == 0, run.stderr
    message, values = run.stdout.splitlines()
    assert message == f"[{name}] rhs_indices must be in [0, 5); got 5"
    assert set(values) == set("[nan, ]")


@needs_kernels
def test_indices_and_codes_have_no_gradient():
    x, w, indices = mx.ones((2, 1, 8)), mx.ones((3, 8, 64)), mx.array([0, 1])
    with pytest.raises(ValueError, match=r"^\[gather_mm\] .*stop_gradient"):
        mx.vjp(lambda i: mfa.gather_mm(x, w, None, i), [indices], [mx.ones((2, 1, 64))])
    packed, scales, biases = mx.quantize(w, 64, 4)
    with pytest.raises(RuntimeError, match=r"^\[gather_qmm\] no gradient"):
        mx.vjp(lambda p: mfa.gather_qmm(x, p, scales, biases, None, indices, False), [packed], [mx.ones((2, 1, 64))])
    with pytest.raises(RuntimeError, match=r"^\[quantized_matmul\] no gradient"):
        mx.vjp(lambda p: mfa.quantized_matmul(x[0], p, scales[0], biases[0], False), [packed[0]], [mx.ones((1, 64))])


def mistake(**changed):
    given = {"x": mx.ones((2, 128)), "w": mx.zeros((64, 16), mx.uint32), "scales": mx.ones((64, 2))}
    given |= {"biases": mx.ones((64, 2))} | changed
    return lambda: mfa.quantized_matmul(**given)


MISTAKES = {
    "bits": (mistake(bits=7), r"^\[quantized_matmul\] bits must be 2, 3, 4, 5, 6 or 8; got 7"),
    "group size": (mistake(group_size=16), "group_size must be 32, 64 or 128; got 16"),
    "codes": (mistake(w=mx.zeros((64, 16), mx.int32)), "w must be uint32; got int32"),
    "vector of codes": (mistake(w=mx.zeros((16,), mx.uint32)), "w must have at least two axes"),
    "scales": (mistake(scales=mx.ones((64, 3)), biases=mx.ones((64, 3))), r"scales must have shape \(64,2\)"),
    "biases": (mistake(biases=mx.ones((64, 1))), "scales and biases must have one shape"),
    "dtype of scales": (
        mistake(scales=mx.ones((64, 2), mx.int32), biases=mx.ones((64, 2), mx.int8)),
        r"^\[quantized_matmul\] scales and biases must have a floating dtype; got int32 and int8",
    ),
    "odd row": (mistake(w=mx.zeros((64, 15), mx.uint32)), "whole groups of 64"),
    "other K": (mistake(x=mx.ones((2, 100))), "the last axis of x must be 128"),
    "other K, not transposed": (mistake(transpose=False), "the last axis of x must be 64"),
    "dtype": (mistake(x=mx.ones((2, 128), mx.complex64)), "must promote to .*complex64"),
    "gather of vectors": (lambda: mfa.gather_mm(mx.ones((3,)), mx.ones((3, 4))), r"^\[gather_mm\] x and w must have"),
    "gather of other K": (lambda: mfa.gather_mm(mx.ones((2, 3)), mx.ones((4, 5))), r"^\[gather_mm\] .*agree in K"),
    "floating indices": (
        lambda: mfa.gather_mm(mx.ones((2, 1, 3)), mx.ones((2, 3, 4)), None, mx.array([0.0, 1.0])),
        "rhs_indices must have an integer dtype; got float32",
    ),
    "indices": (
        lambda: mfa.gather_mm(mx.ones((2, 1, 3)), mx.ones((2, 3, 4)), mx.array([0, 1]), mx.array([0, 1, 0])),
        r"lhs_indices and rhs_indices must broadcast; got shapes \(2\) and \(3\)",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_reported(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()
