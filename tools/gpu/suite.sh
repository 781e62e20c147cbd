#!/usr/bin/env bash
# On the GPU machine: runs the Python tests and the benchmark on the GPU and leaves JSON in OUT.
# usage: run.sh OUT [tests|bench|sanitize ...]    default: tests bench. MFA_TEST_CASES: random problems (2000).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: run.sh OUT [tests|bench|sanitize ...]}
shift
tree=${MFA_TREE:-/tmp/mfa_tree}
mkdir -p "$out" "$tree"
tar -C "$tree" -xJf "$here/tree.tar.xz"
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$tree/site" "$here"/wheels/*.whl
export PYTHONPATH=$tree/python:$tree/site:${PYTHONPATH:-}
cd "$tree/tests/python" || exit 1
python3 -c 'import mlx.core as mx, mlx_mfa as m; print(mx.default_device(), m.diagnostics()["gpu"])'

for part in "${@:-tests}"; do
  case $part in
    tests)
      # Each worker has its own CUDA context; the float64 oracle keeps the processors busy.
      OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python3 -m pytest -q -n "${WORKERS:-14}" -p no:cacheprovider \
        --junitxml="$out/tests.xml" ${TESTS:---ignore=test_cli.py --ignore=test_integrations_mlx_lm.py} 2>&1 | tail -n "${TAIL:-60}"
      ;;
    bench) python3 "$tree/benchmarks/attention_cuda.py" --json "$out/attention_cuda.json" ${BENCH:-} ;;
    sanitize)
      for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 --print-limit 5 python3 "$tree/tools/gpu/small_problems.py" \
          >"$out/$tool.log" 2>&1
        echo "compute-sanitizer $tool: exit $?, $(tail -n 1 "$out/$tool.log")"
      done
      ;;
  esac
done
