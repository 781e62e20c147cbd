#!/usr/bin/env bash
# On a GPU machine with nvcc: compiles the CUDA part of the sources in SOURCE into LIB/libmfa_cuda.so, all kernels at once.
# usage: build.sh SOURCE LIB    MLX_SITE: the folder that holds the package of MLX's CUDA build
set -euo pipefail
source=$1 lib=$2 cuda=${CUDA_HOME:-/usr/local/cuda}
out=$source/build/gpu
mkdir -p "$out" "$lib"
version=$(sed -n 's/^set(MFA_MLX_VERSION \([0-9.]*\)).*/\1/p' "$source/CMakeLists.txt")
compile() {
  name=$(basename "$1" .cu)
  [ -e "$3/$name.fatbin" ] && return
  targets=(-gencode=arch=compute_80,code=compute_80 -gencode=arch=compute_80,code=sm_90)
  [[ $name == hopper_* ]] && targets=(-gencode=arch=compute_90a,code=sm_90a)
  nvcc -std=c++20 -O3 -split-compile 4 --fatbin "${targets[@]}" -lineinfo --expt-relaxed-constexpr -Xptxas -warn-spills -I "$2/src" \
    -o "$3/$name.fatbin" "$1"
}
export -f compile
printf '%s\0' "$source"/src/backend/cuda/device/hopper_*.cu "$source"/src/backend/cuda/device/[!h]*.cu |
  xargs -0 -P "$(nproc)" -I{} bash -c 'compile "$@"' _ {} "$source" "$out"
includes=(-I"$source/src" -I"$source/include" -isystem "$source/src/backend/cuda/mlx_shim" -isystem "$MLX_SITE/mlx/include"
  -isystem "$cuda/include")
g++ -std=c++20 -O2 -fPIC -shared -fvisibility=hidden -ffp-contract=off "${includes[@]}" -DMFA_MLX_VERSION="\"$version\"" \
  -DMFA_CUDA_KERNELS="\"$out\"" "$source"/src/backend/cuda/*.cpp -o "$lib/libmfa_cuda.so" "$MLX_SITE/mlx/lib/libmlx.so" \
  -L"$cuda/lib64/stubs" -lcuda -Wl,--allow-shlib-undefined
