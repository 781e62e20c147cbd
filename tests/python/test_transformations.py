"""MLX's function transformations: grad, vmap over every input and axis, compile, checkpoint, async_eval, jvp."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from problems import make_case, make_problem, mfa, needs_kernels, random_arrays

V = 3  # extent of a mapped axis


def qkv(seed, B=1, Hq=4, Hkv=2, Nq=9, Nk=20, D=16, dtype="float32"):
    return random_arrays(seed, (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, D), dtype=dtype)


def loss(q, k, v, **options):
    return mfa.flash_attention(q, k, v, causal=True, **options).square().sum()


# ---------------------------------------------------------------------------------------------- grad


def test_grad_of_one_argument_is_that_of_all_together():
    arrays = qkv(1)
    together = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    for n in range(3):
        assert mx.array_equal(mx.grad(loss, argnums=n)(*arrays), together[n])


def test_value_and_grad_gives_the_value_of_the_plain_call():
    arrays = qkv(2)
    value, _ = mx.value_and_grad(loss)(*arrays)
    assert value.item() == loss(*arrays).item()


def test_gradients_with_respect_to_a_shared_array_add_up():
    (x,) = random_arrays(3, (1, 2, 17, 16))
    shared = mx.grad(lambda x: loss(x, x, x))(x)
    apart = mx.grad(loss, argnums=(0, 1, 2))(x, x, x)
    assert mx.allclose(shared, sum(apart), rtol=1e-5, atol=1e-5)


def test_arrays_without_gradient_are_left_alone():
    q, k, v = qkv(4)
    stopped = mx.grad(lambda q: loss(q, mx.stop_gradient(k), mx.stop_gradient(v)))(q)
    assert mx.array_equal(stopped, mx.grad(loss)(q, k, v))
    lengths = mx.array([15])

    def with_lengths(q, lengths):
        return loss(q, k, v, kv_lengths=lengths)

    _, (of_q,) = mx.vjp(lambda q: with_lengths(q, lengths), [q], [mx.array(1.0)])
    assert np.isfinite(np.array(of_q)).all()


def test_gradients_pass_through_a_model():
    x, w = random_arrays(5, (2, 9, 32), (32, 96))

    def model(x, w):
        q, k, v = (part.reshape(2, 9, 4, 8).swapaxes(1, 2) for part in mx.split(x @ w, 3, axis=-1))
        return mfa.flash_attention(q, k, v).swapaxes(1, 2).reshape(2, 9, 32).square().sum()

    def reference(x, w):
        q, k, v = (part.reshape(2, 9, 4, 8).swapaxes(1, 2) for part in mx.split(x @ w, 3, axis=-1))
        return (
            (mx.softmax(q @ k.swapaxes(-1, -2) / 8**0.5, axis=-1) @ v).swapaxes(1, 2).reshape(2, 9, 32).square().sum()
        )

    for got, want in zip(mx.grad(model, argnums=(0, 1))(x, w), mx.grad(reference, argnums=(0, 1))(x, w)):
        assert mx.allclose(got, want, rtol=1e-4, atol=1e-4 * mx.abs(want).max().item())


# ---------------------------------------------------------------------------------------------- vmap


def stacked(array, axis):
    """V different arrays like ``array`` stacked along ``axis``."""
    factors = [1.0, 0.5, -0.25]
    return mx.stack([array * f if mx.issubdtype(array.dtype, mx.floating) else array for f in factors], axis=axis)


def assert_vmap_equals_loop(function, arrays, axes, out_axes=0):
    """``vmap`` over the given axes against a Python loop; None: not mapped."""
    mapped = mx.vmap(function, in_axes=tuple(axes), out_axes=out_axes)(*arrays)
    entries = [
        function(*(a if axis is None else mx.take(a, i, axis) for a, axis in zip(arrays, axes))) for i in range(V)
    ]
    single = isinstance(mapped, mx.array)
    mapped = [mapped] if single else mapped
    for n, got in enumerate(mapped):
        want = mx.stack([e if single else e[n] for e in entries], axis=out_axes)
        assert got.shape == want.shape
        scale = max(1.0, mx.abs(mx.where(mx.isinf(want), 0, want)).max().item())
        assert mx.allclose(got, want, rtol=0, atol=2e-6 * scale, equal_nan=True)


@pytest.mark.parametrize(
    "axes", [a for a in itertools.product((None, 0, 2), repeat=3) if any(x is not None for x in a)]
)
def test_vmap_over_any_of_q_k_v(axes):
    arrays = [a if axis is None else stacked(a, axis) for a, axis in zip(qkv(6, B=2), axes)]
    assert_vmap_equals_loop(lambda q, k, v: mfa.flash_attention(q, k, v, causal=True, return_lse=True), arrays, axes)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4, -1])
def test_vmap_over_every_axis(axis):
    arrays = [stacked(a, axis) for a in qkv(7)]
    assert_vmap_equals_loop(mfa.flash_attention, arrays, (axis,) * 3)


@pytest.mark.parametrize("out_axes", [1, 4])
def test_vmap_with_another_output_axis(out_axes):
    arrays = [stacked(a, 0) for a in qkv(8)]
    assert_vmap_equals_loop(mfa.flash_attention, arrays, (0, 0, 0), out_axes)


MODIFIERS = {
    "attn_bias": lambda: random_arrays(9, (1, 4, 1, 20))[0],
    "full attn_bias": lambda: random_arrays(10, (2, 4, 9, 20))[0],
    "mask": lambda: mx.random.uniform(shape=(2, 1, 1, 20)) < 0.7,
    "sinks": lambda: random_arrays(11, (4,))[0],
    "alibi_slopes": lambda: mx.array([0.5, 0.25, 0.125, 0.0]),
    "kv_lengths": lambda: mx.array([20, 7]),
}


@pytest.mark.parametrize("others_mapped", [False, True])
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_vmap_over_each_modifier(modifier, others_mapped):
    mx.random.seed(1)
    name = modifier.removeprefix("full ")
    value = MODIFIERS[modifier]()
    arrays = [*qkv(12, B=2), stacked(value, 0)]
    if others_mapped:
        arrays = [stacked(a, 0) for a in arrays[:3]] + arrays[3:]

    def function(q, k, v, value):
        return mfa.flash_attention(q, k, v, return_lse=True, **{name: value})

    axis = 0 if others_mapped else None
    assert_vmap_equals_loop(function, arrays, (axis, axis, axis, 0))
    if others_mapped:
        assert_vmap_equals_loop(function, [*arrays[:3], value], (0, 0, 0, None))


def test_vmap_over_several_modifiers_of_different_kind():
    arrays = [*qkv(13, B=2), random_arrays(14, (V, 4))[0], random_arrays(15, (2, 1, V, 9, 20))[0], mx.array([20, 7])]

    def function(q, k, v, sinks, bias, lengths):
        return mfa.flash_attention(q, k, v, sinks=sinks, attn_bias=bias, kv_lengths=lengths, return_lse=True)

    assert_vmap_equals_loop(function, arrays, (None, None, None, 0, 2, None))
    mapped_lengths = mx.array([[20, 7], [0, 3], [11, 20]])
    assert_vmap_equals_loop(function, [*arrays[:5], mapped_lengths], (None, None, None, 0, 2, 0))


def test_vmap_with_dropout_repeats_the_seed_for_each_entry():
    arrays = [stacked(a, 0) for a in qkv(16, B=2)]

    def function(q, k, v):
        return mfa.flash_attention(q, k, v, dropout_p=0.5, dropout_seed=3)

    assert_vmap_equals_loop(function, arrays, (0, 0, 0))


def test_nested_vmap():
    arrays = [mx.stack([stacked(a, 0)] * 2) * mx.array([1.0, 0.5]).reshape(2, 1, 1, 1, 1, 1) for a in qkv(17)]
    nested = mx.vmap(mx.vmap(mfa.flash_attention))(*arrays)
    for i, j in itertools.product(range(2), range(V)):
        alone = mfa.flash_attention(*(a[i, j] for a in arrays))
        assert mx.allclose(nested[i, j], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (2, 1, None)])
def test_vmap_of_grad(axes):
    arrays = [a if axis is None else stacked(a, axis) for a, axis in zip(qkv(18), axes)]
    assert_vmap_equals_loop(mx.grad(loss, argnums=(0, 1, 2)), arrays, axes)


@pytest.mark.parametrize("name", ["attn_bias", "full attn_bias", "sinks", "alibi_slopes"])
@pytest.mark.parametrize("mapped", ["modifier", "queries", "both"])
def test_vmap_of_the_gradient_of_each_modifier(name, mapped):
    value = MODIFIERS[name]()
    q, k, v = qkv(19, B=2)
    axes = (None if mapped == "modifier" else 0, None if mapped == "queries" else 0)
    arrays = [q if axes[0] is None else stacked(q, 0), value if axes[1] is None else stacked(value, 0)]

    def objective(q, value):
        return loss(q, k, v, **{name.removeprefix("full "): value})

    assert_vmap_equals_loop(mx.grad(objective, argnums=(0, 1)), arrays, axes)


def test_grad_of_vmap():
    arrays = [stacked(a, 0) for a in qkv(20)]

    def total(q, k, v):
        return mx.vmap(loss)(q, k, v).sum()

    mapped = mx.grad(total, argnums=(0, 1, 2))(*arrays)
    for i in range(V):
        for got, want in zip(mapped, mx.grad(loss, argnums=(0, 1, 2))(*(a[i] for a in arrays))):
            assert mx.allclose(got[i], want, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- compile, checkpoint


def test_compile_changes_no_bit():
    arrays = qkv(21)

    def function(q, k, v):
        return mfa.flash_attention(q, k, v, causal=True, softcap=2.0, window_size=(8, 0), return_lse=True)

    compiled = mx.compile(function)
    for _ in range(2):
        for got, want in zip(compiled(*arrays), function(*arrays)):
            assert mx.array_equal(got, want)


def test_compile_of_value_and_grad():
    arrays = qkv(22)
    function = mx.value_and_grad(loss, argnums=(0, 1, 2))
    value, gradients = function(*arrays)
    compiled_value, compiled_gradients = mx.compile(function)(*arrays)
    assert mx.allclose(value, compiled_value)
    for got, want in zip(compiled_gradients, gradients):
        assert mx.allclose(got, want, rtol=1e-6, atol=1e-6)


def test_compiled_function_merges_equal_calls_and_keeps_different_ones():
    q, k, v = qkv(23)

    def function(q, k, v):
        return (
            mfa.flash_attention(q, k, v, scale=0.3),
            mfa.flash_attention(q, k, v, scale=0.3),
            mfa.flash_attention(q, k, v, scale=0.4),
            mfa.flash_attention(q, k, v, scale=0.3, causal=True),
        )

    for got, want in zip(mx.compile(function)(q, k, v), function(q, k, v)):
        assert mx.array_equal(got, want)


def test_compiled_function_takes_other_shapes_and_lengths():
    compiled = mx.compile(lambda q, k, v, n: mfa.flash_attention(q, k, v, kv_lengths=n))
    for seed, (Nq, Nk, n) in enumerate([(9, 20, 11), (9, 20, 3), (1, 33, 33)]):
        q, k, v = qkv(seed, Nq=Nq, Nk=Nk)
        lengths = mx.array([n])
        assert mx.array_equal(compiled(q, k, v, lengths), mfa.flash_attention(q, k, v, kv_lengths=lengths))


def test_checkpoint_gives_the_same_gradients():
    arrays = qkv(24)
    expected = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    for got, want in zip(mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2))(*arrays), expected):
        assert mx.array_equal(got, want)


# ---------------------------------------------------------------------------------------------- laziness


def test_nothing_runs_before_the_result_is_needed():
    q, k, v = qkv(25, Nq=256, Nk=256, Hq=8, D=64)
    mx.eval(q, k, v)
    mx.synchronize()
    before = mx.get_active_memory()
    out = mfa.flash_attention(q, k, v)
    assert mx.get_active_memory() == before
    mx.eval(out)
    assert mx.get_active_memory() > before


def test_async_eval():
    arrays = qkv(26, Nq=64, Nk=64)
    outs = [mfa.flash_attention(*arrays, scale=0.1 * n) for n in range(1, 6)]
    mx.async_eval(*outs)
    for n, out in enumerate(outs, 1):
        assert mx.array_equal(out, mfa.flash_attention(*arrays, scale=0.1 * n))


def test_chains_of_calls_whose_inputs_are_lazy():
    (x,) = random_arrays(27, (1, 4, 33, 16))
    lazy, eager = x, x
    for _ in range(6):
        lazy = mfa.flash_attention(lazy, lazy * 2, lazy + 1)
        eager = mfa.flash_attention(eager, eager * 2, eager + 1)
        mx.eval(eager)
    assert mx.array_equal(lazy, eager)


def test_inputs_that_die_before_evaluation():
    def build():
        q, k, v = (a * 2 for a in qkv(28, Nq=65, Nk=129))
        return mfa.flash_attention(q, k, v)

    assert mx.array_equal(build(), build())


# ---------------------------------------------------------------------------------------------- what is not there


@needs_kernels
def test_forward_mode_derivative_is_refused_clearly():
    q, k, v = qkv(29)
    with pytest.raises(NotImplementedError, match=r"\[flash_attention\].*jvp"):
        mx.jvp(lambda q: mfa.flash_attention(q, k, v), [q], [mx.ones_like(q)])


@needs_kernels
def test_second_derivative_is_refused_clearly():
    q, k, v = qkv(30)

    def first(q):
        return mx.grad(loss)(q, k, v).sum()

    with pytest.raises(NotImplementedError, match=r"\[flash_attention\].*second derivative"):
        mx.eval(mx.grad(first)(q))


def test_composed_route_has_forward_mode_and_second_derivatives():
    q, k, v = qkv(31, Nq=3, Nk=5, D=4)

    def function(q):
        return mfa.flash_attention(q, k, v, backend="composed")

    (direction,) = random_arrays(32, q.shape)
    _, (tangent,) = mx.jvp(function, [q], [direction])
    step = 1e-2
    expected = (function(q + step * direction) - function(q - step * direction)) / (2 * step)
    assert mx.allclose(tangent, expected, rtol=0, atol=1e-3)
    hessian_row = mx.grad(lambda q: (mx.grad(lambda q: function(q).square().sum())(q) * direction).sum())(q)
    assert np.isfinite(np.array(hessian_row)).all()


def test_cotangents_of_any_layout_are_taken():
    p = make_problem(33, B=2, Hq=4, Hkv=2, Nq=33, Nk=20, D=16)
    case = make_case(p)

    def function(q, k, v):
        return mfa.flash_attention(q, k, v)

    primals = [case.arrays[n] for n in "qkv"]
    _, expected = mx.vjp(function, primals, [case.d_o_array])
    views = [
        case.d_o_array.transpose(0, 2, 1, 3) + 0,
        case.d_o_array.swapaxes(2, 3) + 0,
    ]
    mx.eval(views)
    for view in (views[0].transpose(0, 2, 1, 3), views[1].swapaxes(2, 3)):
        for got, want in zip(mx.vjp(function, primals, [view])[1], expected):
            assert mx.array_equal(got, want)
    ones = mx.vjp(function, primals, [mx.broadcast_to(mx.array(1.0), case.d_o_array.shape)])[1]
    for got, want in zip(ones, mx.vjp(function, primals, [mx.ones(case.d_o_array.shape)])[1]):
        assert mx.array_equal(got, want)
