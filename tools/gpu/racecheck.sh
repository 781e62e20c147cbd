#!/usr/bin/env bash
# On a GPU machine with nvcc: compiles the Hopper kernels so that compute-sanitizer can follow their barriers, and the
# programs of tests/cuda; runs small problems through each under memcheck and racecheck.
# usage: racecheck.sh OUT [forward forward_f32 backward separate ...]    logs go to OUT; fails if a tool reports anything
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:?usage: racecheck.sh OUT [NAME ...]}
shift
[ $# -gt 0 ] || set -- forward forward_f32 backward separate
build=$(mktemp -d)
mkdir -p "$out"
flags=(-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -lineinfo --expt-relaxed-constexpr -I "$root/src" -I "$root/tests/cuda")
for source in "$root"/src/backend/cuda/device/hopper_*.cu; do
  nvcc "${flags[@]}" -split-compile 4 -DMFA_EACH_LANE_ARRIVES --fatbin -o "$build/$(basename "$source" .cu)" "$source" &
done
for source in "$root"/tests/cuda/*.cu; do
  nvcc "${flags[@]}" -o "$build/$(basename "$source" .cu).run" "$source" -lcuda &
done
wait
status=0
check() {  # NAME PROGRAM ARGUMENTS...
  local name=$1 tool
  shift
  for tool in memcheck racecheck; do
    (cd "$build" && compute-sanitizer --tool $tool --kernel-name kns=hopper_ --error-exitcode 1 --print-limit 20 "$@") \
      >"$out/$tool.$name.log" 2>&1 || status=1
    echo "$tool $name: $(tail -n 1 "$out/$tool.$name.log")"
  done
}
backward=(./hopper_backward.run hopper_backward hopper_backward_modified hopper_backward_fused quick)
for name in "$@"; do
  case $name in
    forward) check forward ./hopper_forward.run hopper_forward hopper_forward_wide quick modified ;;
    forward_f32) check forward_f32 ./hopper_forward_f32.run hopper_forward_split quick modified ;;
    backward) check backward "${backward[@]}" modified ;;
    separate) SEPARATE=1 check separate "${backward[@]}" 64 128 ;;
    *) echo "racecheck.sh: no kernels named $name" >&2; status=1 ;;
  esac
done
rm -rf "$build"
exit $status
