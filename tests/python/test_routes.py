"""The composed route and the kernels compute the same function, for every modifier and all together."""

import itertools

import numpy as np
import pytest
from problems import DTYPES, check, make_case, make_problem, mfa, needs_kernels, routes

MODIFIERS = {
    "scale": {"scale": 0.25},
    "causal": {"causal": True},
    "window": {"window": (12, 3)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": np.array([0.5, 0.25, 0.125, -0.0625])},
    "bias": {"bias": np.linspace(-2, 2, 2 * 40).astype(np.float32).reshape(2, 1, 1, 40)},
    "mask": {"mask": np.random.default_rng(0).random((1, 4, 20, 40)) < 0.7},
    "sinks": {"sinks": np.array([0.5, -0.5, 2.0, 0.0])},
    "kv_lengths": {"kv_lengths": np.array([31, 0])},
    "dropout": {"dropout_p": 0.25, "dropout_seed": 11},
}


def problem(seed, *names, dtype="float32"):
    options = {}
    for name in names:
        options |= MODIFIERS[name]
    return make_problem(seed, B=2, Hq=4, Hkv=2, Nq=20, Nk=40, D=24, Dv=16, dtype=dtype, **options)


@routes
@pytest.mark.parametrize("name", MODIFIERS)
def test_each_modifier_on_every_route(name, route):
    check(problem(1, name), backend=route)


@pytest.mark.parametrize("route", [pytest.param("mfa", marks=needs_kernels), "composed"])
@pytest.mark.parametrize("pair", list(itertools.combinations(MODIFIERS, 2)), ids="+".join)
def test_every_pair_of_modifiers_on_both_own_routes(pair, route):
    check(problem(2, *pair), backend=route)


@routes
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_modifiers_together_on_every_route(dtype, route):
    check(problem(3, *MODIFIERS, dtype=dtype), backend=route)


@needs_kernels
@pytest.mark.parametrize("layout", ["bnhd", "gap", "stepped", "reversed", "packed", "column"])
def test_every_layout_with_all_modifiers(layout):
    check(problem(4, *MODIFIERS), layout=layout)


def test_explain_names_the_route_that_runs():
    p = problem(5)
    arrays = make_case(p).arrays
    names = {r: mfa.explain(arrays["q"], arrays["k"], arrays["v"], backend=r)["route"] for r in ("sdpa", "composed")}
    assert names == {"sdpa": "mlx_sdpa", "composed": "composed"}
