#!/usr/bin/env bash
# Packs what a GPU machine without network needs to run the GPU tests and benchmarks: the built package, its tests and
# Python packages that such a machine may lack.
# usage: bundle.sh FOLDER    after `make build MLX=cuda13`. PYTHON_TAG: of the GPU machine's Python (312).
# There: unpack MLX's CUDA build onto PYTHONPATH, then `bash FOLDER/run.sh OUT` (see suite.sh).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:?usage: bundle.sh FOLDER}
tag=${PYTHON_TAG:-312}
[ -e "$root/python/mlx_mfa/lib/libmfa_cuda.so" ] || { echo "bundle.sh: no CUDA part in python/mlx_mfa/lib" >&2; exit 1; }

mkdir -p "$out/wheels"
cp "$root/tools/gpu/suite.sh" "$out/run.sh"
tar -C "$root" --exclude=__pycache__ --exclude='*.gguf' -cJf "$out/tree.tar.xz" python/mlx_mfa tests/python tests/golden benchmarks tools/gpu
for name in nanobind-backend==1.0.0; do
  compgen -G "$out/wheels/${name%%=*}*" >/dev/null || compgen -G "$out/wheels/$(tr - _ <<<"${name%%=*}")*" >/dev/null || \
    python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$tag" \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$out/wheels" "$name"
done
du -sh "$out"
