"""The hooks: MLX's functions give the same answers and errors with them as without, and come back as they were."""

import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_mfa
import numpy as np
import pytest
from linear_problems import needs_kernels
from problems import cpu_kernels_only, to_numpy

pytestmark = [needs_kernels, cpu_kernels_only]

NAMES = ("matmul", "addmm", "quantized_matmul", "gather_mm", "gather_qmm")
SMALL = ("mx.fast.rms_norm", "mx.fast.rope", "mx.logsumexp", "mx.argmax")


@pytest.fixture
def hooks():
    """The hooks are in force, and afterwards as they were before."""
    changed = mlx_mfa.enable()
    yield
    (mlx_mfa.disable if changed else mlx_mfa.enable)()


@pytest.fixture
def without_hooks(hooks):
    mlx_mfa.disable()
    yield
    mlx_mfa.enable()


def calls(name):
    return mlx_mfa.hooks_status()["calls"][name]


def run(code, **environment):
    """The standard output of a fresh Python that has run ``code``."""
    path = os.pathsep.join(sys.path)
    env = {k: v for k, v in os.environ.items() if k != "MFA_DISABLE_AUTO_HOOKS"} | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


def test_importing_the_package_installs_them():
    code = (
        "import mlx.core as mx; a = mx.matmul; import mlx_mfa; print(mx.matmul is a, mlx_mfa.hooks_status()['hooks'])"
    )
    text = run(code)
    assert text.startswith("False")
    for name in (*(f"mx.{name}" for name in NAMES), "mx.array.__matmul__", "mx.array.__imatmul__", *SMALL):
        assert f"'{name}'" in text


def test_the_environment_keeps_them_out():
    code = (
        "import mlx.core as mx; a = mx.matmul; import mlx_mfa; s = mlx_mfa.hooks_status();"
        "print(mx.matmul is a, s['installed'], s['auto_hooks_disabled_env'], mlx_mfa.enable(), mx.matmul is a)"
    )
    assert run(code, MFA_DISABLE_AUTO_HOOKS="1").split() == ["True", "False", "True", "True", "False"]


def test_disabling_restores_the_very_objects():
    code = (
        "import mlx.core as mx; names = ['matmul', 'addmm', 'quantized_matmul', 'gather_mm', 'gather_qmm'];"
        "small = lambda: [mx.fast.rms_norm, mx.fast.rope, mx.logsumexp, mx.argmax];"
        "now = lambda: [getattr(mx, n) for n in names] + [mx.array.__matmul__] + small();"
        "before = now(); import mlx_mfa;"
        "print(mlx_mfa.disable(), mlx_mfa.disable());"
        "print(all(a is b for a, b in zip(before, now())), mlx_mfa.enable(), mlx_mfa.enable())"
    )
    assert run(code).split() == ["True", "False", "True", "True", "False"]


def test_a_function_that_another_library_put_over_a_hook_stays():
    code = """
import mlx.core as mx, mlx_mfa
ours, stock, seen = mx.matmul, mx.matmul.__wrapped__, []
def theirs(*args):
    seen.append(args)
    return ours(*args)
mx.matmul = theirs
def routed():
    before = mlx_mfa.hooks_status()["calls"]["matmul"]["mfa"]
    mx.eval(mx.matmul(mx.ones((2, 64)), mx.ones((64, 3))))
    return mlx_mfa.hooks_status()["calls"]["matmul"]["mfa"] - before
print(routed(), mx.matmul is theirs)
print(mlx_mfa.disable(), mx.matmul is theirs, routed(), mlx_mfa.hooks_status()["hooks"])
print(mlx_mfa.enable(), mx.matmul is theirs, routed(), len(seen))
mx.matmul = ours  # they give back what they found
print(mlx_mfa.disable(), mx.matmul is stock, routed())
mlx_mfa.enable()
mx.matmul = theirs
mlx_mfa.disable()
mx.matmul = stock  # they know better
print(mlx_mfa.enable(), mx.matmul is stock, routed(), mlx_mfa.disable(), mx.matmul is stock)
"""
    assert run(code).splitlines() == [
        "1 True", "True True 0 []", "True True 1 3", "True True 0", "True False 1 True True",
    ]  # fmt: skip


def test_multiplying_in_place_changes_the_array_that_others_hold(hooks):
    for x, w, ours in [(a(2, 64), 2 * a(64, 3), True), (a(2, 4), 2 * a(4, 4), False), (a(64), a(64), False)]:
        same, expected = x, x @ w
        before = calls("matmul")
        x @= w
        after = calls("matmul")
        assert (after["mfa"] - before["mfa"], after["mlx"] - before["mlx"]) == ((1, 0) if ours else (0, 1))
        assert same is x
        assert mx.array_equal(same, expected).item()
    x = a(2, 3)
    with pytest.raises(ValueError, match="matmul"):
        x @= a(2, 3)
    with pytest.raises(TypeError):
        x @= 2


def test_layers_run_on_them(hooks):
    x = mx.random.normal((2, 3, 64))
    layers = {"addmm": nn.Linear(64, 32), "matmul": nn.Linear(64, 32, bias=False)}
    layers["quantized_matmul"] = nn.QuantizedLinear(64, 32)
    for name, layer in layers.items():
        before = calls(name)["mfa"]
        ours = layer(x)
        assert calls(name)["mfa"] == before + 1
        mlx_mfa.disable()
        theirs = layer(x)
        mlx_mfa.enable()
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-4, atol=1e-4)


def test_a_layer_trains_alike(hooks):
    x, layer = mx.random.normal((8, 64)), nn.Linear(64, 16)
    step = nn.value_and_grad(layer, lambda x: mx.square(layer(x)).sum())
    ours = step(x)
    mlx_mfa.disable()
    theirs = step(x)
    mlx_mfa.enable()
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(to_numpy(ours[1][name]), to_numpy(theirs[1][name]), rtol=1e-4, atol=1e-4)


def quantised(shape=(5, 64, 128), dtype=mx.float32):
    return mx.quantize(mx.random.normal(shape).astype(dtype), 64, 4)


def integer_scales(shape):
    return [x.astype(dtype) for x, dtype in zip(quantised(shape), (mx.uint32, mx.int32, mx.int32))]


def a(*shape):
    return mx.ones(shape)


# Calls of MLX's functions in every way of passing arguments: ours where it says so.
CALLS = {
    "matmul": (lambda: mx.matmul(a(2, 64), a(64, 3)), "matmul", True),
    "operator": (lambda: a(2, 64) @ a(64, 3), "matmul", True),
    "stream": (lambda: mx.matmul(a(2, 64), a(64, 3), stream=mx.cpu), "matmul", True),
    "promotion": (lambda: mx.matmul(a(2, 64).astype(mx.float16), a(64, 3).astype(mx.bfloat16)), "matmul", True),
    "vectors": (lambda: mx.matmul(a(64), a(64)), "matmul", False),
    "tiny": (lambda: mx.matmul(a(100, 8, 4), a(100, 4, 8)), "matmul", False),
    "not so tiny": (lambda: mx.matmul(a(100, 8, 4), a(100, 4, 9)), "matmul", True),
    "complex": (lambda: mx.matmul(a(2, 64).astype(mx.complex64), a(64, 3)), "matmul", False),
    "addmm": (lambda: mx.addmm(a(3), a(2, 64), a(64, 3)), "addmm", True),
    "factors": (lambda: mx.addmm(a(2, 1), a(2, 64), a(64, 3), 2.0, beta=0.5), "addmm", True),
    "quantised": (lambda: mx.quantized_matmul(a(2, 128), *quantised((64, 128))), "quantized_matmul", True),
    "quantised by name": (
        lambda: mx.quantized_matmul(
            a(2, 64), *quantised((64, 128))[:1], **dict(zip(("scales", "biases"), quantised((64, 128))[1:])),
            transpose=False, group_size=None, bits=4, mode="affine", stream=mx.cpu),
        "quantized_matmul", True,
    ),
    "another mode": (
        lambda: mx.quantized_matmul(a(2, 128), *mx.quantize(a(64, 128), mode="mxfp4"), mode="mxfp4"),
        "quantized_matmul", False,
    ),
    "quantised vector": (lambda: mx.quantized_matmul(a(128), *quantised((64, 128))), "quantized_matmul", True),
    "a batch for one matrix of codes": (
        lambda: mx.quantized_matmul(a(2, 5, 3, 128), *quantised()), "quantized_matmul", True,
    ),
    "rows for a batch of codes": (lambda: mx.quantized_matmul(a(3, 128), *quantised()), "quantized_matmul", False),
    "rows for one of a batch": (
        lambda: mx.quantized_matmul(a(3, 128), *quantised((1, 64, 128))), "quantized_matmul", False,
    ),
    "vector for a batch of codes": (lambda: mx.quantized_matmul(a(128), *quantised()), "quantized_matmul", False),
    "batch for more of codes": (
        lambda: mx.quantized_matmul(a(3, 1, 128), *quantised((2, 3, 64, 128))), "quantized_matmul", False,
    ),
    "gather of rows without indices": (lambda: mx.gather_qmm(a(2, 128), *quantised()), "gather_qmm", False),
    "gather of rows": (
        lambda: mx.gather_qmm(a(2, 128), *quantised(), rhs_indices=mx.array([0, 4])), "gather_qmm", True,
    ),
    "one of scales and biases is of integers": (
        lambda: mx.quantized_matmul(a(2, 128), *quantised((64, 128))[:2], mx.ones((64, 2), mx.int32)),
        "quantized_matmul", True,
    ),
    "gather": (lambda: mx.gather_mm(a(4, 1, 64), a(5, 64, 3), rhs_indices=mx.array([0, 4, 4, 1])), "gather_mm", True),
    "sorted gather": (
        lambda: mx.gather_mm(a(4, 1, 64), a(5, 64, 3), None, mx.array([0, 1, 1, 4]), sorted_indices=True),
        "gather_mm", True,
    ),
    "quantised gather": (
        lambda: mx.gather_qmm(a(4, 1, 128), *quantised(), rhs_indices=mx.array([0, 1, 1, 4]), sorted_indices=True),
        "gather_qmm", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_answer_as_without_the_hooks(name, hooks):
    call, function, ours = CALLS[name]
    before = calls(function)
    mx.random.seed(1)
    got = call()
    after = calls(function)
    assert (after["mfa"] - before["mfa"], after["mlx"] - before["mlx"]) == ((1, 0) if ours else (0, 1))
    mlx_mfa.disable()
    mx.random.seed(1)
    expected = call()
    mlx_mfa.enable()
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-4, atol=1e-4)


# Wrong calls, each of which MLX itself reports.
MISTAKES = {
    "shapes": lambda: mx.matmul(a(2, 3), a(2, 3)),
    "no axes": lambda: mx.matmul(a(2, 3), mx.array(1.0)),
    "integers": lambda: mx.matmul(mx.ones((2, 2), mx.int32), mx.ones((2, 2), mx.int32)),
    "not an array": lambda: mx.matmul([1.0], a(2, 3)),
    "a number": lambda: a(2, 3) @ 2,
    "one argument": lambda: mx.matmul(a(2, 3)),
    "an unknown argument": lambda: mx.matmul(a(2, 3), a(3, 2), axis=1),
    "addend": lambda: mx.addmm(a(7), a(2, 3), a(3, 4)),
    "addend that is a number": lambda: mx.addmm(1.0, a(2, 3), a(3, 4)),
    "no biases": lambda: mx.quantized_matmul(a(2, 128), *quantised((64, 128))[:2]),
    "scales": lambda: mx.quantized_matmul(a(2, 128), *quantised((64, 128)), bits=3),
    "codes": lambda: mx.quantized_matmul(a(2, 128), a(64, 16), a(64, 2), a(64, 2)),
    "scales of integers": lambda: mx.quantized_matmul(a(2, 128), *integer_scales((64, 128))),
    "gather with scales of integers": lambda: mx.gather_qmm(a(5, 2, 128), *integer_scales((5, 64, 128))),
    "mode": lambda: mx.quantized_matmul(a(2, 128), *quantised((64, 128)), mode="other"),
    "norm": lambda: mx.fast.rms_norm(a(2, 3), a(4), 1e-5),
    "norm without epsilon": lambda: mx.fast.rms_norm(a(2, 3), None),
    "rope": lambda: mx.fast.rope(a(2, 3), 2, traditional=False, base=10.0, scale=1.0, offset=0),
    "rope without base": lambda: mx.fast.rope(a(1, 2, 4), 4, traditional=False, base=None, scale=1.0, offset=0),
    "axis": lambda: mx.argmax(a(2, 300), axis=2),
    "reduction of nothing": lambda: mx.argmax(),
    "axes": lambda: mx.argmax(a(2, 300), axis=[0, 1]),
    "indices": lambda: mx.gather_mm(a(4, 2, 3), a(5, 3, 6), rhs_indices=mx.array([1.0, 1, 4, 4])),
    "many indices": lambda: mx.gather_mm(a(4, 2, 3), a(5, 3, 6), mx.array([1]), mx.array([1]), mx.array([1])),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors_are_those_of_mlx(name, hooks):
    def error():
        with pytest.raises((ValueError, TypeError, IndexError)) as caught:
            MISTAKES[name]()
        return caught.type, str(caught.value)

    got = error()
    mlx_mfa.disable()
    expected = error()
    mlx_mfa.enable()
    assert got == expected


def test_compiled_functions_and_transformations_see_them(hooks):
    x, w = mx.random.normal((3, 64)), mx.random.normal((64, 5))
    before = calls("matmul")["mfa"]
    compiled = mx.compile(lambda x: x @ w)
    for _ in range(3):
        result = compiled(x)
    assert calls("matmul")["mfa"] == before + 1
    assert mx.array_equal(result, mlx_mfa.matmul(x, w)).item()
    np.testing.assert_allclose(to_numpy(mx.vmap(lambda r: r @ w)(x)), to_numpy(result), rtol=1e-5, atol=1e-5)


def test_diagnostics_has_the_status(without_hooks):
    found = mlx_mfa.diagnostics()
    assert found["auto_hooks"] == mlx_mfa.hooks_status()
    assert not found["auto_hooks"]["installed"]
    assert set(found["linear_calls"]) == {"matmul", "quantized_matmul", "gather_mm", "gather_qmm"}


def test_a_function_of_products_can_be_exported_and_the_hooks_stay_in_force(hooks, tmp_path):
    x, w = mx.random.normal((6, 64)), mx.random.normal((32, 64))
    codes = mx.quantize(w, 32, 4)

    def layers(x):
        return x @ w.T + mx.quantized_matmul(x, *codes, group_size=32, bits=4)

    path = str(tmp_path / "layers.mlxfn")
    mx.export_function(path, layers, x)
    assert mlx_mfa.hooks_status()["installed"]
    np.testing.assert_allclose(to_numpy(mx.import_function(path)(x)[0]), to_numpy(layers(x)), rtol=1e-4, atol=1e-4)
