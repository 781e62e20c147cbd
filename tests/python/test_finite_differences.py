"""Gradients against central differences of the function itself, without the oracle."""

import mlx.core as mx
import numpy as np
import pytest
from problems import arrays_of, attention, make_problem, routes

OPTIONS = {
    "plain": {},
    "causal with window": {"causal": True, "window": (3, -1)},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": np.linspace(-1, 1, 4 * 7).reshape(1, 4, 1, 7)},
    "alibi": {"alibi": np.array([0.5, 0.25, 0.125, -0.25])},
    "sinks": {"sinks": np.array([0.5, -0.5, 1.0, 0.0])},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 8},
    "lengths": {"kv_lengths": np.array([3, 7])},
}


@routes
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_the_slopes_of_the_function(name, route):
    p = make_problem(1, B=2, Hq=4, Hkv=2, Nq=5, Nk=7, D=4, **OPTIONS[name])
    arrays = arrays_of(p)
    names = [n for n in ("q", "k", "v", "bias", "alibi", "sinks") if n in arrays]
    rng = np.random.default_rng(2)
    d_o, dlse = (mx.array(rng.standard_normal(s).astype(np.float32)) for s in ((2, 4, 5, 4), (2, 4, 5)))

    def objective(*values):
        out, lse = attention(p, arrays | dict(zip(names, values)), return_lse=True, backend=route)
        return (out * d_o).sum() + (lse * dlse).sum()

    values = [arrays[n] for n in names]
    gradients = mx.grad(objective, argnums=tuple(range(len(names))))(*values)
    step = 2e-2
    for n, (value, gradient) in enumerate(zip(values, gradients)):
        for _ in range(4):  # random directions; central differences of float32 are good to about step^2
            direction = mx.array(rng.standard_normal(value.shape).astype(np.float32))
            direction = direction / mx.sqrt(direction.square().sum())
            above = objective(*values[:n], value + step * direction, *values[n + 1 :])
            below = objective(*values[:n], value - step * direction, *values[n + 1 :])
            slope = ((above - below) / (2 * step)).item()
            expected = (gradient * direction).sum().item()
            assert abs(slope - expected) < 2e-3 * max(1.0, abs(expected)), names[n]
