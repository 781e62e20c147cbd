"""Several streams and Python threads at once, and processes that fork."""

import concurrent.futures
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from problems import mfa, random_arrays

DEVICE = mx.default_device()


def gradients_and_output(q, k, v, stream=None):
    def loss(q, k, v):
        return mfa.flash_attention(q, k, v, causal=True, stream=stream).square().sum()

    return [mfa.flash_attention(q, k, v, causal=True, stream=stream), *mx.grad(loss, argnums=(0, 1, 2))(q, k, v)]


def test_several_streams_give_the_same_bits():
    arrays = random_arrays(1, *[(1, 4, 200, 32)] * 3)
    mx.eval(arrays)
    expected = gradients_and_output(*arrays)
    streams = [mx.new_stream(DEVICE) for _ in range(4)]
    results = [gradients_and_output(*arrays, stream=s) for s in streams]
    mx.eval(results)
    for result in results:
        for got, want in zip(result, expected):
            assert mx.array_equal(got, want)


def test_stream_argument_takes_devices_and_streams():
    arrays = random_arrays(2, *[(1, 2, 9, 16)] * 3)
    expected = mfa.flash_attention(*arrays)
    for stream in (None, DEVICE.type, DEVICE, mx.default_stream(DEVICE)):
        assert mx.array_equal(mfa.flash_attention(*arrays, stream=stream), expected)
    with mx.stream(mx.new_stream(DEVICE)):
        assert mx.array_equal(mfa.flash_attention(*arrays), expected)


def test_results_flow_between_streams():
    q, k, v = random_arrays(3, *[(1, 2, 130, 16)] * 3)
    a, b = mx.new_stream(DEVICE), mx.new_stream(DEVICE)
    first = mfa.flash_attention(q, k, v, stream=a)
    second = mfa.flash_attention(first, k, v, stream=b)
    plain = mfa.flash_attention(mfa.flash_attention(q, k, v), k, v)
    assert mx.array_equal(second, plain)


def test_many_threads_at_once_give_the_same_bits():
    data = [np.random.default_rng(n).standard_normal((1, 4, 130, 32)).astype(np.float32) for n in range(3)]
    expected = [np.array(x) for x in gradients_and_output(*(mx.array(x) for x in data))]
    barrier = threading.Barrier(6)

    def work(_):
        stream = mx.new_stream(DEVICE)
        with mx.stream(stream):
            arrays = [mx.array(x) for x in data]
            barrier.wait()
            results = []
            for _ in range(5):
                outputs = gradients_and_output(*arrays, stream=stream)
                mx.eval(outputs)
                results.append([np.array(x) for x in outputs])
        return results

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for results in pool.map(work, range(6)):
            for outputs in results:
                for got, want in zip(outputs, expected):
                    assert np.array_equal(got, want)


def test_errors_in_threads_are_raised_there():
    q = mx.zeros((1, 1, 2, 4))

    def work():
        with pytest.raises(ValueError, match="flash_attention"):
            mfa.flash_attention(q, q[:, :, :, :3], q)
        return True

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert all(f.result() for f in [pool.submit(work) for _ in range(4)])


SPAWN = """
import multiprocessing as mp
import numpy as np

def child(queue):
    import mlx.core as mx
    import mlx_mfa as mfa
    x = mx.ones((1, 2, 70, 16))
    queue.put(float(mfa.flash_attention(x, x, x).sum()))

if __name__ == "__main__":
    context = mp.get_context("{method}")
    queue = context.Queue()
    workers = [context.Process(target=child, args=(queue,)) for _ in range(2)]
    for w in workers: w.start()
    print([queue.get(timeout=60) for _ in workers])
    for w in workers: w.join()
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_worker_processes_started_before_mlx_runs_here(method, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(SPAWN.replace("{method}", method))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[2240.0, 2240.0]"
