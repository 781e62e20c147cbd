"""What runs attention on this machine, what it supports, and how often each route was taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from . import _ext
from ._version import __version__
from .attention import flash_attention
from .hooks import DISABLED_BY, hooks_status

_ENVIRONMENT = ("MFA_CPU_ISA", "MFA_NUM_THREADS", "MFA_PACKED_WEIGHTS_MB", DISABLED_BY)
_KERNELS = 3  # tiled forward, decode forward, backward


def is_mfa_available() -> bool:
    """Whether this library has kernels for MLX's default device.

    Returns:
        bool: If False, attention runs as MLX operations; ``diagnostics()`` says why, under ``"cpu"`` or ``"gpu"``.
    """
    return (_ext.gpu_info() if mx.default_device() == mx.gpu else _ext.cpu_info())["available"]


def get_device_info() -> dict[str, Any]:
    """The device that MLX uses by default, and what the kernels use of the processor.

    Returns:
        dict: ``device_name`` and ``architecture`` (str), ``backend`` (``"cpu"`` or ``"gpu"``), ``extension_available``
        (bool), ``isa`` (str, the instruction set in use), ``isas`` (list of str, all that can run here, best first),
        ``native_bf16`` (bool), ``threads`` (int), and, for programs written for Apple GPUs, ``chip_name``,
        ``gpu_family_gen`` and ``gpu_cores`` (None where there is none), ``is_m3_plus`` and ``is_m5_plus`` (bool).
    """
    device = mx.default_device()
    cpu = _ext.cpu_info()
    described = mx.device_info()
    return {
        "device_name": described.get("device_name"),
        "architecture": described.get("architecture"),
        "backend": "gpu" if device == mx.gpu else "cpu",
        "chip_name": described.get("device_name"),
        "gpu_family_gen": None,
        "gpu_cores": None,
        "is_m3_plus": False,
        "is_m5_plus": False,
        "extension_available": True,
        "isa": cpu["isa"],
        "isas": cpu["isas"],
        "native_bf16": cpu["native_bf16"],
        "threads": cpu["threads"],
    }


def get_supported_configs() -> dict[str, Any]:
    """What this package can do on MLX's default device.

    Returns:
        dict: ``head_dims`` (range of int, of ``D`` and of ``Dv``, which may differ), ``dtypes`` (tuple of Dtype),
        ``extension_available`` (bool), ``features`` (dict of name to bool) and ``kernel_types`` (int, the kernels that
        can run here: forward for long and for few queries, and backward, on a CPU for each instruction set).
    """
    on_gpu = mx.default_device() == mx.gpu
    sets = int(_ext.gpu_info()["available"]) if on_gpu else len(_ext.cpu_info()["isas"])
    available = (
        "causal", "gqa", "sliding_window", "softcap", "alibi", "attn_bias", "mask", "sinks", "kv_lengths", "dropout",
        "return_lse", "return_attn_weights", "backend_select", "native_backward", "warmup_kernels", "bfloat16",
        "float16", "float32", "d512", "block_sparse", "sparse_backward", "packed_api", "flash_decode",
    )  # fmt: skip
    on_cpu_streams = ("rope", "paged_kv", "varlen", "kvcache_rope_append")
    absent = ("sage_attention", "sage_attention_kvcache", "sage_inference_context", "m3_routing", "m5_stub")
    return {
        "head_dims": range(_ext.min_head_dim, _ext.max_head_dim + 1),
        "dtypes": (mx.float32, mx.float16, mx.bfloat16),
        "extension_available": True,
        "features": dict.fromkeys(available, True)
        | dict.fromkeys(on_cpu_streams, not on_gpu)
        | dict.fromkeys(absent, False),
        "kernel_types": _KERNELS * sets,
    }


def warmup_kernels(
    head_dims: Sequence[int] = (64, 128, 256),
    dtypes: Sequence[mx.Dtype] = (mx.float16, mx.bfloat16),
    causal: bool = True,
) -> None:
    """Run small calls, forward and backward, so that the first real one finds threads started and code loaded.

    Args:
        head_dims (sequence of int): Head dimensions to run. Default ``(64, 128, 256)``.
        dtypes (sequence of Dtype): Dtypes to run. Default float16 and bfloat16.
        causal (bool): Run causal attention. Default True.

    Raises:
        ValueError: If a head dimension or dtype is not supported.
    """
    supported = get_supported_configs()
    for D in head_dims:
        if not hasattr(D, "__index__") or D not in supported["head_dims"]:
            raise ValueError(f"[warmup_kernels] every head dimension must be an integer from 1 to 576; got {D!r}")
    for dtype in dtypes:
        if dtype not in supported["dtypes"]:
            raise ValueError(f"[warmup_kernels] dtypes must be of float32, float16 and bfloat16; got {dtype!r}")

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.sum(cast(mx.array, flash_attention(q, k, v, causal=causal)))

    step = mx.value_and_grad(loss, argnums=(0, 1, 2))
    for dtype in dtypes:
        for D in head_dims:
            x = mx.zeros((1, 2, 32, D), dtype)
            mx.eval(step(x, x, x))


def diagnostics() -> dict[str, Any]:
    """Versions, machine, settings and counters, for bug reports and for seeing that no slow route is taken unawares.

    Returns:
        dict: ``version`` and ``mlx_version`` (str), ``platform`` (dict, as the package for Apple GPUs has it), ``cpu``
        (dict of ``available``, ``reason``, ``isa``, ``isas``, ``native_bf16``, ``threads``), ``gpu`` (dict of
        ``available`` and ``reason``), ``calls`` (dict of route to the number of attention calls built so far in the
        process), ``linear_calls`` (dict of kind to the number of matrix products built for this package's kernels),
        ``packed_weights`` (dict of ``arrays``, ``bytes`` and ``limit_bytes``, the packed copies of constant weights),
        ``auto_hooks`` (as :func:`mlx_mfa.hooks_status`) and ``active_env_vars`` (dict).
    """
    return {
        "version": __version__,
        "mlx_version": mx.__version__,  # type: ignore[attr-defined]
        "platform": {"is_m3_plus": False, "has_nax": False},
        "cpu": _ext.cpu_info(),
        "gpu": _ext.gpu_info(),
        "calls": _ext.counters(),
        "linear_calls": _ext.linear_counters(),
        "packed_weights": _ext.packed_weights(),
        "auto_hooks": hooks_status(),
        "active_env_vars": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
