"""Attention through the Python API beside MLX, PyTorch and ONNX Runtime: ``mlx-mfa bench`` with a default JSON path.

Usage: python benchmarks/attention_mlx.py [--quick] [--filter REGEX] [--threads N] [--json PATH] ...
"""

import sys

from mlx_mfa import bench

if __name__ == "__main__":
    sys.exit(bench.main(["--json", "build/bench/attention_mlx.json", *sys.argv[1:]]))
