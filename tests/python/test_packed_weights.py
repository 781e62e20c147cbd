"""Packed copies of constant weights: the same bits, never out of date, bounded, gone with the array."""

import concurrent.futures
import gc
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from linear_problems import DTYPES, mfa, needs_kernels, normal, on_cpu
from mlx_mfa.hooks import hooked
from problems import cpu_kernels_only, to_mlx, to_numpy

pytestmark = [on_cpu, needs_kernels]

LIMIT = 64 << 20
USES = 8  # products until weights are packed


@pytest.fixture(autouse=True)
def no_copies_at_first():
    before = mfa.set_packed_weights_limit(0)
    mfa.set_packed_weights_limit(LIMIT)
    yield
    mfa.set_packed_weights_limit(0)
    mfa.set_packed_weights_limit(before)


def held():
    gc.collect()
    return mfa.diagnostics()["packed_weights"]


def weights(seed, shape=(300, 600), dtype="float32"):
    w = to_mlx(normal(np.random.default_rng(seed), shape, dtype), dtype)
    mx.eval(w)
    return w


def rows(seed, count, K, dtype="float32"):
    x = to_mlx(normal(np.random.default_rng(seed), (count, K), dtype), dtype)
    mx.eval(x)
    return x


def product(x, w):
    out = mfa.matmul(x, w)
    mx.eval(out)
    return out


def without_copies(x, w):
    before = mfa.set_packed_weights_limit(0)
    out = product(x, w)
    mfa.set_packed_weights_limit(before)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("K", [300, 1097])
def test_results_have_the_same_bits_with_and_without_a_copy(dtype, transposed, K):
    w = weights(1, (201, K) if transposed else (K, 201), dtype)
    inputs = [rows(2, count, K, dtype) for count in (5, 8, 33, 64, 130)]
    view = w.T if transposed else w
    expected = [without_copies(x, view) for x in inputs]
    for _ in range(USES + 1):
        for x, want in zip(inputs, expected):
            assert mx.array_equal(product(x, w.T if transposed else w), want).item()
    assert held()["arrays"] == 1


def test_a_copy_is_made_when_weights_are_read_again_and_goes_with_the_array():
    w, x = weights(3, (576, 600)), rows(4, 8, 600)  # whole panels of any width
    for _ in range(USES - 1):
        product(x, w.T)
    assert held() == {"arrays": 0, "bytes": 0, "limit_bytes": LIMIT}
    product(x, w.T)
    now = held()
    assert now["arrays"] == 1
    assert w.nbytes <= now["bytes"] <= 1.1 * w.nbytes
    before = mx.get_active_memory()
    nbytes = w.nbytes
    del w
    assert held()["bytes"] == 0
    assert mx.get_active_memory() <= before - nbytes


def test_copies_of_arrays_that_are_gone_are_dropped_by_later_products():
    w, x = weights(5), rows(6, 8, 600)
    for _ in range(USES):
        product(x, w.T)
    assert held()["arrays"] == 1
    before = mx.get_active_memory()
    nbytes = w.nbytes
    del w
    gc.collect()
    other = weights(7, (40, 600))
    for _ in range(70):
        product(x[:1], other.T)
    assert mx.get_active_memory() <= before - nbytes + other.nbytes + x.nbytes


@cpu_kernels_only
def test_clearing_mlx_cache_lets_go_of_weights_that_are_gone():
    w, x = weights(7), rows(8, 8, 600)
    for _ in range(USES):
        product(x, w.T)
    assert held()["arrays"] == 1
    before, nbytes = mx.get_active_memory(), w.nbytes
    del w
    gc.collect()
    with hooked(True):
        mx.clear_cache()
    assert mx.get_active_memory() <= before - nbytes


def test_few_rows_and_small_weights_make_no_copies():
    w, small = weights(8), weights(9, (20, 30))
    for _ in range(USES + 1):
        product(rows(10, 4, 600), w.T)
        product(rows(11, 64, 30), small.T)
    assert held()["arrays"] == 0


def test_assignment_is_seen_at_once():
    w, x = weights(12), rows(13, 16, 600)
    for step in range(4):
        for _ in range(USES + 1):  # the other array is read once: it has no copy
            assert mx.array_equal(product(x, w.T), product(x, mx.array(to_numpy(w)).T)).item()
        assert held()["arrays"] == 1
        w[step, 7] = 100.0 + step
        if step == 2:
            w[...] = weights(99)


def test_another_array_in_the_same_memory_is_another_array():
    x = rows(14, 16, 600)
    for seed in range(40):
        w = weights(seed)
        for _ in range(1 + seed % (USES + 2)):
            got = product(x, w.T)
        np.testing.assert_allclose(to_numpy(got), to_numpy(x) @ to_numpy(w).T, rtol=1e-3, atol=1e-3)
        del w


def test_views_of_one_buffer_have_copies_of_their_own_and_go_together():
    fused, x = weights(15, (600, 600)), rows(16, 16, 600)
    views = [lambda w: w[:200].T, lambda w: w[200:].T, lambda w: w, lambda w: w.T]
    expected = [without_copies(x, view(fused)) for view in views]
    for _ in range(USES + 1):
        for view, want in zip(views, expected):
            assert mx.array_equal(product(x, view(fused)), want).item()
    assert held()["arrays"] == 4
    del fused
    assert held()["arrays"] == 0


def train(model, optimizer, steps, x):
    def loss(model):
        return (model(x) ** 2).mean()

    step = nn.value_and_grad(model, loss)
    arrays, memory = [], []
    for _ in range(steps):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        del gradients
        mx.eval(value, model.parameters(), optimizer.state)
        arrays.append(mfa.diagnostics()["packed_weights"]["arrays"])
        memory.append(mx.get_active_memory())
    return arrays, memory


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_weights_in_training_are_not_packed_and_leave_nothing_behind(optimizer, dtype):
    model = nn.Sequential(nn.Linear(600, 300), nn.Linear(300, 200))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    limit = mx.set_cache_limit(0)  # a cached buffer may be larger than what it is used for, and count as such
    try:
        arrays, memory = train(model, optimizer(learning_rate=1e-2), USES + 4, rows(17, 64, 600).astype(dtype))
    finally:
        mx.set_cache_limit(limit)
    assert arrays == [0] * (USES + 4)
    assert memory[-1] <= memory[2]


def test_weights_that_training_stops_changing_are_packed_and_those_it_changes_again_let_go():
    model = nn.Linear(600, 300)
    mx.eval(model.parameters())
    x = rows(18, 64, 600)
    with hooked(True):
        for _ in range(USES + 1):
            mx.eval(model(x))
        assert held()["arrays"] == 1
        train(model, optim.SGD(learning_rate=1e-2), 2, x)
        assert held()["arrays"] == 0
    expected = to_numpy(x) @ to_numpy(model.weight).T + to_numpy(model.bias)
    np.testing.assert_allclose(to_numpy(model(x)), expected, rtol=1e-3, atol=1e-3)


def test_compiled_functions_share_the_copies():
    w, x = weights(19), rows(20, 16, 600)
    compiled = mx.compile(lambda x, w: mfa.matmul(x, w.T) + 1)
    expected = without_copies(x, w.T) + 1
    for _ in range(USES + 1):
        assert mx.array_equal(compiled(x, w), expected).item()
        assert mx.array_equal(product(x, w.T) + 1, expected).item()
    assert held()["arrays"] == 1


def test_streams_and_threads_share_the_copies():
    w, x = weights(21), rows(22, 16, 600)
    expected = without_copies(x, w.T)

    def work(_):
        stream = mx.new_stream(mx.cpu)
        return all(mx.array_equal(mfa.matmul(x, w.T, stream=stream), expected).item() for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert held()["arrays"] == 1


def test_the_limit_holds_and_keeps_what_is_in_use():
    x = rows(23, 16, 600)
    first, second = weights(24), weights(25)
    mfa.set_packed_weights_limit(int(1.5 * first.nbytes))
    for _ in range(USES + 2):  # in turn: the first one stays
        product(x, first.T)
        product(x, second.T)
    assert held()["arrays"] == 1
    for _ in range(USES + 1):  # the first is no longer used
        product(x, second.T)
    now = held()
    assert now["arrays"] == 1
    assert now["bytes"] <= now["limit_bytes"]
    assert mx.array_equal(product(x, second.T), without_copies(x, second.T)).item()
    assert mfa.set_packed_weights_limit(0) == int(1.5 * first.nbytes)
    assert held()["arrays"] == 0


def test_a_limit_is_a_number_of_bytes():
    with pytest.raises(TypeError):
        mfa.set_packed_weights_limit(-1)
    with pytest.raises(TypeError):
        mfa.set_packed_weights_limit("1 GB")


PROGRAM = """
import os, sys
import mlx.core as mx, mlx_mfa as mfa
mx.set_default_device(mx.cpu)
w, x = mx.ones((300, 600)), mx.ones((8, 600))
for _ in range(9): mx.eval(mfa.matmul(x, w.T))
print(mfa.diagnostics()["packed_weights"]["limit_bytes"], mfa.diagnostics()["packed_weights"]["arrays"], flush=True)
if os.fork() == 0:
    print(mfa.diagnostics()["packed_weights"]["arrays"], flush=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(("value", "limit", "arrays"), [
    (None, 512 << 20, 1), ("0", 0, 0), ("3", 3 << 20, 1),
])  # fmt: skip
def test_the_environment_sets_the_limit_and_forks_and_exits_are_clean(value, limit, arrays):
    environment = {name: text for name, text in os.environ.items() if name != "MFA_PACKED_WEIGHTS_MB"}
    if value is not None:
        environment["MFA_PACKED_WEIGHTS_MB"] = value
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(limit), str(arrays), "0"]
