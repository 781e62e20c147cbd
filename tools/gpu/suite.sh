#!/usr/bin/env bash
# On the GPU machine: runs the Python tests and the benchmark on the GPU and leaves JSON in OUT.
# usage: run.sh OUT [tests|bench|sanitize ...]    default: tests bench
#   MFA_TEST_CASES: random problems (2000). TESTS: arguments of pytest. BENCH: arguments of the benchmark. WORKERS (14).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: run.sh OUT [tests|bench|sanitize ...]}
shift
[ $# -gt 0 ] || set -- tests bench
tree=${MFA_TREE:-/tmp/mfa_tree}
mkdir -p "$out" "$tree"
tar -C "$tree" -xJf "$here/tree.tar.xz"
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$tree/site" "$here"/wheels/*.whl
export PYTHONPATH=$tree/python:$tree/site:${PYTHONPATH:-}
cd "$tree/tests/python" || exit 1
python3 -c 'import mlx.core as mx, mlx_mfa as m; print(mx.default_device(), m.diagnostics()["gpu"])'

# Those that need an installed command, a model or mlx-lm have nothing to do with the GPU.
others=(cli demo_compare demo_convert demo_gguf import_errors integrations_mlx_lm)
status=0
for part in "$@"; do
  case $part in
    tests)
      ignored=()
      for name in "${others[@]}"; do ignored+=("--ignore=test_$name.py"); done
      # Each worker has its own CUDA context; the float64 oracle keeps the processors busy.
      OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python3 -m pytest -q -n "${WORKERS:-14}" -p no:cacheprovider \
        --junitxml="$out/tests.xml" ${TESTS:-${ignored[@]}} 2>&1 | tail -n "${TAIL:-60}"
      [ "${PIPESTATUS[0]}" = 0 ] || status=1
      python3 - "$out/tests.xml" "$out/tests.json" <<'P'
import json, sys, xml.etree.ElementTree as tree
cases = list(tree.parse(sys.argv[1]).getroot().iter("testcase"))
names = {kind: [f"{c.get('classname')}::{c.get('name')}" for c in cases if any(c.find(k) is not None for k in kinds)]
         for kind, kinds in (("failed", ("failure", "error")), ("skipped", ("skipped",)))}
json.dump({"cases": len(cases), "seconds": sum(float(c.get("time")) for c in cases), **names}, open(sys.argv[2], "w"), indent=1)
P
      ;;
    bench) python3 "$tree/benchmarks/attention_cuda.py" --json "$out/attention_cuda.json" ${BENCH:-} || status=1 ;;
    sanitize)
      for tool in memcheck racecheck; do
        only=()
        [ $tool = racecheck ] && only=(--kernel-name kns=_bf16 --kernel-name kns=_f16 --kernel-name kns=_f32)
        compute-sanitizer --tool $tool "${only[@]}" --error-exitcode 1 --print-limit 5 \
          python3 "$tree/tools/gpu/small_problems.py" >"$out/$tool.log" 2>&1 || status=1
        echo "compute-sanitizer $tool: $(tail -n 1 "$out/$tool.log")"
      done
      ;;
  esac
done
exit $status
