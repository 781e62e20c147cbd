"""entry_points.py: entry points other than flash_attention against the oracle, which knows them as dense problems."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np
import oracle
from problems import dtype_name, to_numpy

CASES = int(os.environ.get("MFA_TEST_ENTRY_CASES", "300"))
BLOCK = 50
BLOCKS = range(-(-CASES // BLOCK))


def run_block(block, seed, check):
    """Calls ``check(rng, index)`` for each case of a block; raises with all that failed and how to repeat them."""
    failures = []
    for index in range(min(BLOCK, CASES - block * BLOCK)):
        try:
            check(np.random.default_rng([seed, block, index]), index)
        except (AssertionError, RuntimeError, ValueError) as error:
            failures.append(f"block {block} case {index}: {error}"[:1500])
    assert not failures, f"MFA_TEST_SEED={seed}: {len(failures)} failures\n" + "\n".join(failures[:10])


def check_entry(case, inputs, call, parts=None, seed=0, pack=None, unpack=None, rule=None):
    """Compares outputs and gradients of an entry point with the oracle's answer to ``case.problem``.

    ``call(inputs)`` returns ``(o, lse)``, lse of base 2. The gradient of every floating array of ``inputs`` is checked:
    ``parts[name](gradient)`` gives what it holds of the gradients of the problem's arrays, as ``{name: array}`` or
    ``{name: (array, part, terms)}`` for :meth:`oracle.ErrorRule.check`; without an entry it is that of the problem's
    array of the same name.
    ``unpack`` brings o and lse into the problem's shape, ``pack`` dlse into that of the call; ``rule`` is another error
    rule than that of ``case.problem``.
    """
    names = [n for n, x in inputs.items() if mx.issubdtype(x.dtype, mx.floating)]

    def function(*values):
        return call(inputs | dict(zip(names, values)))

    dlse = case.dlse * oracle.LN2
    if pack is not None:
        dlse = pack(dlse)
    cotangents = [case.d_o_array, mx.array(np.asarray(dlse, np.float32))]
    (o, lse), gradients = mx.vjp(function, [inputs[n] for n in names], cotangents)
    mx.eval(o, lse, gradients)

    rule = rule or oracle.ErrorRule(case.problem, case.d_o, case.dlse, seed)
    unpack = unpack or (lambda x: x)
    expected = rule.answer.lse if pack is None else pack(rule.answer.lse)
    oracle.assert_lse(np.array(lse) * oracle.LN2, expected, case.label)
    assert dtype_name(o) == case.problem.dtype
    rule.check("o", unpack(to_numpy(o)), dtype_name(o), case.label)
    for name, gradient in zip(names, gradients):
        assert gradient.dtype == inputs[name].dtype, f"{name}: dtype {gradient.dtype} {case.label}"
        assert gradient.shape == inputs[name].shape, f"{name}: shape {gradient.shape} {case.label}"
        split = (parts or {}).get(name, lambda g, name=name: {name: g})
        for result, values in split(to_numpy(gradient)).items():
            values, *rest = values if isinstance(values, tuple) else (values,)
            rule.check(result, values, dtype_name(gradient), case.label, *rest)
