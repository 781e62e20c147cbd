#!/usr/bin/env bash
# mlx_cuda.sh PYTHON FOLDER: unpacks MLX's CUDA wheel into FOLDER, to build against: its headers and libmlx.so, without
# the NVIDIA libraries that running it needs. Does nothing where nvcc is missing: the CUDA part is then left out.
set -euo pipefail
python=$1 folder=$2
version=$(sed -n 's/^set(MFA_MLX_VERSION \([0-9.]*\)).*/\1/p' "$(dirname "$0")/../CMakeLists.txt")
if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then exit 0; fi
[ -e "$folder/mlx/.version-$version" ] && exit 0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$python" -m pip download -q --no-deps --only-binary=:all: --platform manylinux_2_35_x86_64 -d "$wheels" \
  "mlx-cuda-13==$version"
rm -rf "$folder"
mkdir -p "$folder"
"$python" -m zipfile -e "$wheels"/mlx_cuda_13-*.whl "$folder"
touch "$folder/mlx/.version-$version"
