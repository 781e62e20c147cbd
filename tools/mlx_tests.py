"""Runs MLX's own Python tests twice, without and with this package's hooks, and prints the tests whose outcome differs.

Usage: mlx_tests.py FOLDER [MODULE ...], for example `PYTHONPATH=python .venv/bin/python tools/mlx_tests.py
mlx/python/tests`. FOLDER is `python/tests` of a checkout of MLX's sources, best of the release that this package is
built for. MODULEs are those of the hooked functions by default. Two cores take half an hour, nearly all of it MLX's.

Exit status: 0 if every test that passes without the hooks passes with them, but for KNOWN.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

MODULES = ("test_blas", "test_nn", "test_quantized", "test_fast", "test_reduce", "test_ops", "test_export_import")
# An exported model holds MLX's own operations (`mx.export_function` traces without the hooks); this test expects their
# bits from the model in the program.
KNOWN = {"test_export_import.TestExportImport.test_export_quantized_model"}

# Prints a JSON object of test to outcome. The device is the CPU: elsewhere the hooks pass every call on.
RUN = """
import json, os, sys, unittest
os.environ["DEVICE"] = "cpu"
sys.path.insert(0, ".")
import mlx.core as mx
mx.set_default_device(mx.cpu)
import mlx_mfa
assert mlx_mfa.hooks_status()["installed"] == (sys.argv[1] == "hooked")

class Result(unittest.TestResult):
    outcomes = {}
    def startTest(self, test):
        super().startTest(test)
        self.outcomes[test.id()] = "passed"
    def addSkip(self, test, reason):
        self.outcomes[test.id()] = "skipped"
    def addFailure(self, test, error):
        self.outcomes[test.id()] = "failed: " + str(error[1]).partition(chr(10))[0]
    addError = addFailure
    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addFailure(test, error)

unittest.defaultTestLoader.loadTestsFromNames(sys.argv[2:]).run(Result())
status = mlx_mfa.hooks_status()["calls"]
print(json.dumps({"outcomes": Result.outcomes, "calls": sum(n["mfa"] for n in status.values())}))
"""


def run(folder: Path, hooked: bool, module: str) -> dict[str, dict[str, str]]:
    """The outcomes of the tests of `module`, and how many calls of MLX's functions this package took."""
    environment = os.environ | {"MFA_DISABLE_AUTO_HOOKS": "0" if hooked else "1"}
    paths = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    done = subprocess.run(
        [sys.executable, "-c", RUN, "hooked" if hooked else "plain", module],
        cwd=folder, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"mlx_tests.py: {module} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> int:
    """Prints one line a module and one a difference; returns the exit status."""
    if not arguments or not Path(arguments[0], "mlx_tests.py").is_file():
        print(__doc__, file=sys.stderr)
        return 2
    worse = 0
    for module in arguments[1:] or MODULES:
        plain, hooked = (run(Path(arguments[0]), on, module) for on in (False, True))
        counts = [sum(o == "passed" for o in r["outcomes"].values()) for r in (plain, hooked)]
        print(
            f"{module}: of {len(plain['outcomes'])} tests pass without the hooks {counts[0]}, with them {counts[1]},"
            f" which take {hooked['calls']} calls",
            flush=True,
        )
        for test in sorted(plain["outcomes"] | hooked["outcomes"]):
            before, after = (r["outcomes"].get(test, "not run") for r in (plain, hooked))
            if before.partition(":")[0] != after.partition(":")[0]:
                print(f"  {test}{' (known)' if test in KNOWN else ''}\n    without: {before}\n    with:    {after}")
                worse += before == "passed" and test not in KNOWN
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
