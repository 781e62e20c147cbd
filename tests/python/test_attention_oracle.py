"""Random problems against the float64 oracle: any dtype, sizes, modifiers and memory layout, with every gradient.

MFA_TEST_SEED sets the seed, MFA_TEST_CASES the number of cases. A failure names its block and case: it repeats with
the same seed.
"""

import os

import numpy as np
import pytest
from problems import check_case, random_case

CASES = int(os.environ.get("MFA_TEST_CASES", "2000"))
BLOCK = 50


@pytest.mark.parametrize("block", range(-(-CASES // BLOCK)))
def test_random_problems_are_within_the_error_rule(block, seed):
    failures = []
    for index in range(min(BLOCK, CASES - block * BLOCK)):
        case = random_case(np.random.default_rng([seed, block, index]))
        try:
            check_case(case, seed=index)
        except (AssertionError, RuntimeError, ValueError) as error:
            failures.append(f"block {block} case {index}: {error}"[:1500])
    assert not failures, f"seed {seed}: {len(failures)} failures\n" + "\n".join(failures[:10])
