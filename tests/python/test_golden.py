"""The golden cases through the public function, on every route."""

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import arrays_of, forward_and_gradients, golden, golden_problem, mfa, routes, to_mlx, to_numpy

# Acceptance numbers of the golden file, absolute, for float32.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 3e-5

# Dropout with another counter than 0 has no public name: those cases check the oracle only.
CASES = [c for c in golden("attention.json")["cases"] if "dropout" not in c["options"]]


@routes
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_case(case, route):
    p, d_o, dlse = golden_problem(case)
    if p.q_offset != max(0, case["Nk"] - case["Nq"]):  # another alignment than ours: said by a mask instead
        p.mask, p.causal, p.window = oracle.visible(p), False, None
    dlse = np.zeros(d_o.shape[:3]) if dlse is None else dlse
    results = forward_and_gradients(p, arrays_of(p), to_mlx(d_o, "float32"), dlse, backend=route)
    expected = {n: case[key] for n, key in (("o", "O"), ("q", "dq"), ("k", "dk"), ("v", "dv"))}
    expected |= {n: case[key] for n, key in (("bias", "dbias"), ("sinks", "dsink")) if key in case}
    for name, values in expected.items():
        tolerance = OUTPUT_TOLERANCE if name == "o" else GRADIENT_TOLERANCE
        assert oracle.max_error(to_numpy(results[name]), np.array(values, np.float64)) <= tolerance, name
    lse = np.array(case["lse"], np.float64)
    assert oracle.max_error(np.array(results["lse"]) * oracle.LN2, lse) <= OUTPUT_TOLERANCE
    zero_rows = np.isneginf(lse)
    assert (to_numpy(results["o"])[zero_rows] == 0).all()


def test_golden_merge_of_three_parts():
    data = golden("attention.json")["merge"]
    o, lse = None, None
    for part_o, part_lse in zip(data["part_O"], data["part_lse"]):
        part = mx.array(np.array(part_o, np.float32)), mx.array(np.array(part_lse, np.float32))
        o, lse = part if o is None else mfa.merge_attention_states(o, lse, *part, base="e")
    assert oracle.max_error(np.array(o), np.array(data["O"])) <= OUTPUT_TOLERANCE
    assert oracle.max_error(np.array(lse), np.array(data["lse"])) <= OUTPUT_TOLERANCE
