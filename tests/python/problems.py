"""problems.py: attention problems for the tests: golden ones, random ones, and MLX arrays of any memory layout."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np
import oracle
import pytest

DTYPES = ("float32", "float16", "bfloat16")

ON_GPU = mx.default_device() == mx.gpu
OWN_ROUTE = "mfa_cuda" if ON_GPU else "mfa_cpu"
needs_kernels = pytest.mark.skipif(not mfa.is_mfa_available(), reason="no kernel for this processor")
routes = pytest.mark.parametrize("route", [pytest.param("mfa", marks=needs_kernels), "auto", "sdpa", "composed"])
# What is promised of the CPU kernels alone: on GPUs a row's bits depend on the kernel that its call gets.
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
cpu_kernels_only = pytest.mark.skipif(ON_GPU, reason="a promise of the CPU kernels")
# With these no kernel takes scratch memory for its inputs: some GPUs' split float32 into parts, but for a softcap.
READ_IN_PLACE = {"softcap": 30.0} if ON_GPU else {}
GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"


def golden(name):
    """The golden file ``name``, parsed."""
    return json.loads((GOLDEN / name).read_text())


def golden_problem(case):
    """``(problem, d_o, dlse)`` of a case of attention.json."""
    options = case["options"]
    arrays = {name: np.array(case[name], np.float64) for name in ("q", "k", "v")}

    def optional(name):
        return np.array(options[name], np.float64) if name in options else None

    p = oracle.Problem(
        **arrays,
        scale=options.get("scale"),
        causal=options.get("causal", False),
        window=tuple(options["window"]) if "window" in options else None,
        softcap=options.get("softcap", 0.0),
        alibi=optional("alibi"),
        bias=optional("bias"),
        sinks=optional("sink"),
        dropout_p=options.get("dropout", 0.0),
        dropout_seed=options.get("seed", 0),
        dropout_offset=options.get("offset", 0),
        q_offset=options.get("q_offset", case["Nk"] - case["Nq"]),
    )
    return p, np.array(case["dO"], np.float64), optional("dlse")


def to_numpy(x):
    """The array as numpy float32, or as it is when its dtype is not a floating one."""
    return np.array(x.astype(mx.float32)) if mx.issubdtype(x.dtype, mx.floating) else np.array(x)


def dtype_name(x):
    """The name of the dtype of an MLX array, as the oracle spells it."""
    return str(x.dtype).removeprefix("mlx.core.")


def normal(rng, shape, dtype):
    """Standard normal values that are exact in ``dtype``, as float64."""
    return oracle.round_to(rng.standard_normal(shape), dtype).astype(np.float64)


def to_mlx(x, dtype):
    """``x`` as a dense MLX array of ``dtype`` (a name)."""
    return mx.array(np.ascontiguousarray(x, dtype=np.float32)).astype(getattr(mx, dtype))


def random_arrays(seed, *shapes, dtype="float32"):
    """Standard normal MLX arrays of the given shapes."""
    rng = np.random.default_rng(seed)
    return [to_mlx(normal(rng, shape, dtype), dtype) for shape in shapes]


# ---------------------------------------------------------------------------------------------- memory layouts

LAYOUTS = ("dense", "bnhd", "gap", "stepped", "reversed", "packed", "column")


def strided(x, dtype, layout):
    """``x`` ``[B, H, N, D]`` as a view of ``layout`` into a larger buffer whose other elements are NaN."""
    B, H, N, D = x.shape
    if layout == "dense":
        view = to_mlx(x, dtype)
    elif layout == "bnhd":
        view = to_mlx(x.transpose(0, 2, 1, 3), dtype).transpose(0, 2, 1, 3)
    elif layout == "reversed":
        view = to_mlx(x[:, :, ::-1], dtype)[:, :, ::-1]
    elif layout == "column":
        view = to_mlx(x.swapaxes(2, 3), dtype).swapaxes(2, 3)
    elif layout == "gap":
        parent = np.full((B + 1, H + 1, N + 3, D + 5), np.nan)
        parent[1:, :H, 2 : 2 + N, 3 : 3 + D] = x
        view = to_mlx(parent, dtype)[1:, :H, 2 : 2 + N, 3 : 3 + D]
    elif layout == "stepped":
        parent = np.full((B, 2 * H, 3 * N, D), np.nan)
        parent[:, ::2, ::3] = x
        view = to_mlx(parent, dtype)[:, ::2, ::3]
    elif layout == "packed":
        parent = np.full((B, N, 3, H, D), np.nan)
        parent[:, :, 1] = x.transpose(0, 2, 1, 3)
        view = to_mlx(parent, dtype)[:, :, 1].transpose(0, 2, 1, 3)
    else:
        raise ValueError(layout)
    mx.eval(view)
    return view


# ---------------------------------------------------------------------------------------------- cases

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks", "alibi")


@dataclasses.dataclass
class Case:
    """A problem with its MLX arrays (keys: the fields of Problem) and cotangents; ``d_o_array`` is the MLX one."""

    problem: oracle.Problem
    arrays: dict
    d_o: np.ndarray
    dlse: np.ndarray
    d_o_array: mx.array
    label: str = ""


def keywords(p, arrays):
    """The arguments of ``flash_attention`` beside q, k, v."""
    return {
        "scale": p.scale,
        "causal": p.causal,
        "softcap": p.softcap,
        "window_size": p.window,
        "dropout_p": p.dropout_p,
        "dropout_seed": p.dropout_seed if p.dropout_p > 0 else None,
        "alibi_slopes": arrays.get("alibi"),
        "attn_bias": arrays.get("bias"),
        "mask": arrays.get("mask"),
        "sinks": arrays.get("sinks"),
        "kv_lengths": arrays.get("kv_lengths"),
    }


def arrays_of(p):
    """Dense MLX arrays of every array of ``p``: the modifiers in float32."""
    arrays = {name: to_mlx(getattr(p, name), p.dtype) for name in ("q", "k", "v")}
    for name in ("bias", "sinks", "alibi"):
        if getattr(p, name) is not None:
            arrays[name] = to_mlx(getattr(p, name), "float32")
    if p.mask is not None:
        arrays["mask"] = mx.array(p.mask)
    if p.kv_lengths is not None:
        arrays["kv_lengths"] = mx.array(np.asarray(p.kv_lengths, np.int32))
    return arrays


def attention(p, arrays, **extra):
    """``flash_attention`` of a problem."""
    return mfa.flash_attention(arrays["q"], arrays["k"], arrays["v"], **(keywords(p, arrays) | extra))


def forward_and_gradients(p, arrays, d_o, dlse, wanted=None, **extra):
    """``{name: array}`` of o, lse (log2) and the gradient of every differentiable array, as MLX arrays.

    ``dlse`` is the cotangent of the natural lse; the API's lse is in units of log 2.
    """
    names = [n for n in DIFFERENTIABLE if n in arrays and (wanted is None or n in wanted)]

    def function(*values):
        return attention(p, arrays | dict(zip(names, values)), return_lse=True, **extra)

    cotangents = [d_o, mx.array(np.asarray(dlse * oracle.LN2, np.float32))]
    outputs, gradients = mx.vjp(function, [arrays[n] for n in names], cotangents)
    results = {"o": outputs[0], "lse": outputs[1]} | dict(zip(names, gradients))
    mx.eval(results)
    return results


def check_case(case, seed=0, **extra):
    """Compares outputs and gradients of a case with the oracle by the error rule."""
    p = case.problem
    rule = oracle.ErrorRule(p, case.d_o, case.dlse, seed)
    results = forward_and_gradients(p, case.arrays, case.d_o_array, case.dlse, **extra)
    for name, result in results.items():
        if name == "lse":
            oracle.assert_lse(np.array(result) * oracle.LN2, rule.answer.lse, case.label)
            continue
        expected_dtype = case.arrays["q" if name == "o" else name].dtype
        assert result.dtype == expected_dtype, f"{name}: dtype {result.dtype} {case.label}"
        rule.check(name, to_numpy(result), dtype_name(result), case.label)
    return results


def make_case(p, seed=0, layout="dense"):
    """A case of ``p`` with random cotangents; q, k, v have the given memory layout."""
    rng = np.random.default_rng([seed, 77])
    B, Hq, _, Nq, _, _, Dv = p.shape
    d_o = normal(rng, (B, Hq, Nq, Dv), p.dtype)
    dlse = normal(rng, (B, Hq, Nq), "float32")
    arrays = arrays_of(p)
    if layout != "dense":
        arrays |= {name: strided(getattr(p, name), p.dtype, layout) for name in ("q", "k", "v")}
    return Case(p, arrays, d_o, dlse, to_mlx(d_o, p.dtype))


def make_problem(seed, B=1, Hq=2, Hkv=None, Nq=33, Nk=None, D=32, Dv=None, dtype="float32", **options):
    """A problem with standard normal q, k, v."""
    rng = np.random.default_rng(seed)
    Hkv, Nk, Dv = Hkv or Hq, Nq if Nk is None else Nk, Dv or D
    shapes = {"q": (B, Hq, Nq, D), "k": (B, Hkv, Nk, D), "v": (B, Hkv, Nk, Dv)}
    return oracle.Problem(**{n: normal(rng, s, dtype) for n, s in shapes.items()}, dtype=dtype, **options)


def check(p, seed=0, layout="dense", **extra):
    """Makes a case of ``p`` and compares it with the oracle."""
    return check_case(make_case(p, seed, layout), seed, **extra)


# ---------------------------------------------------------------------------------------------- random cases

_COMMON_D = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 32, 33, 40, 48, 64, 65, 72, 80, 96, 100, 112, 128)
_LARGE_D = (129, 160, 192, 255, 256, 257, 320, 384, 512, 575, 576)
_LENGTHS = (1, 7, 8, 9, 31, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 512, 513, 700)


def _head_dim(rng):
    draw = rng.random()
    if draw < 0.35:
        return int(rng.choice((32, 64, 64, 128)))
    if draw < 0.85:
        return int(rng.choice(_COMMON_D))
    return int(rng.choice(_LARGE_D)) if draw < 0.95 else int(rng.integers(1, 577))


def _sizes(rng):
    """B, Hq, Hkv, Nq, Nk, D, Dv with a bounded amount of work."""
    scores = rng.choice((2e4, 6e4, 2e5, 8e5), p=(0.4, 0.35, 0.2, 0.05))
    while True:
        D = _head_dim(rng)
        Dv = D if rng.random() < 0.6 else _head_dim(rng)
        Nq, Nk = int(rng.choice(_LENGTHS)), int(rng.choice(_LENGTHS))
        B, Hkv, G = int(rng.integers(1, 4)), int(rng.choice((1, 2, 3))), int(rng.choice((1, 1, 2, 3, 4, 8)))
        work = B * Hkv * G * Nq * Nk
        if work <= scores and work * (D + Dv) <= 4e7:
            return B, Hkv * G, Hkv, Nq, Nk, D, Dv


def _chance(rng, probability):
    return rng.random() < probability


def _broadcast_shape(rng, full):
    return tuple(n if _chance(rng, 0.5) else 1 for n in full)


def random_case(rng, sizes=_sizes, without=()):
    """A case with random sizes, dtype, modifiers and memory layouts.

    ``sizes`` draws ``(B, Hq, Hkv, Nq, Nk, D, Dv)``; the fields of Problem in ``without`` stay at their defaults.
    """
    B, Hq, Hkv, Nq, Nk, D, Dv = sizes(rng)
    dtype = str(rng.choice(DTYPES))
    full = (B, Hq, Nq, Nk)
    shapes = {"q": (B, Hq, Nq, D), "k": (B, Hkv, Nk, D), "v": (B, Hkv, Nk, Dv)}
    options, arrays, layouts = {}, {}, {}

    if _chance(rng, 0.3):
        options["scale"] = float(np.float32(rng.choice((0.05, 0.5, -0.3)) if D > 4 else 1.0))
    options["causal"] = _chance(rng, 0.45)
    if _chance(rng, 0.3):
        options["window"] = tuple(int(w) for w in rng.choice((-1, 0, 1, 5, 63, 64, 130), size=2))
    if _chance(rng, 0.25):
        options["softcap"] = float(rng.choice((0.5, 2.0, 15.0)))
    if _chance(rng, 0.25):
        slopes = rng.choice((0.5, 0.125, 0.0078125, -0.03125), size=Hq)
        options["alibi"] = slopes
        arrays["alibi"] = to_mlx(slopes, "float32")
    if _chance(rng, 0.35):
        bias_dtype = dtype if _chance(rng, 0.5) else "float32"
        bias = normal(rng, _broadcast_shape(rng, full), bias_dtype)
        if _chance(rng, 0.4):
            bias[rng.random(bias.shape) < rng.choice((0.1, 0.5, 0.95))] = -np.inf
        options["bias"] = bias
        arrays["bias"] = to_mlx(bias, bias_dtype)
    if _chance(rng, 0.3):
        mask = rng.random(_broadcast_shape(rng, full)) < rng.choice((0.1, 0.6, 0.97))
        options["mask"] = mask
        arrays["mask"] = mx.array(mask)
    if _chance(rng, 0.3):
        sinks_dtype = dtype if _chance(rng, 0.3) else "float32"
        options["sinks"] = normal(rng, (Hq,), sinks_dtype)
        arrays["sinks"] = to_mlx(options["sinks"], sinks_dtype)
    if _chance(rng, 0.3):
        lengths = rng.choice((0, 1, Nk // 2, Nk - 1, Nk, Nk, int(rng.integers(0, Nk + 1))), size=B).clip(0, Nk)
        options["kv_lengths"] = lengths
        arrays["kv_lengths"] = mx.array(lengths.astype(np.int32))
    if _chance(rng, 0.2):
        options["dropout_p"] = float(rng.choice((0.1, 0.5, 0.9)))
        options["dropout_seed"] = int(rng.integers(0, 2**63))

    options = {n: o for n, o in options.items() if n.removesuffix("_seed").removesuffix("_p") not in without}
    arrays = {n: a for n, a in arrays.items() if n not in without}

    values = {}
    for name, shape in shapes.items():
        layout = str(rng.choice(LAYOUTS)) if _chance(rng, 0.6) else "dense"
        if _chance(rng, 0.1):  # the same values for every batch entry or head
            layout = "broadcast"
            shared = (1, shape[1]) if _chance(rng, 0.5) else (shape[0], 1)
            small = normal(rng, shared + shape[2:], dtype)
            values[name] = np.broadcast_to(small, shape)
            arrays[name] = mx.broadcast_to(to_mlx(small, dtype), shape)
        else:
            values[name] = normal(rng, shape, dtype)
            stored = values[name]
            if name != "q" and "kv_lengths" in options:  # what lies behind the end must not matter
                stored = stored.copy()
                for b, length in enumerate(options["kv_lengths"]):
                    stored[b, :, length:] = np.nan
            arrays[name] = strided(stored, dtype, layout)
        layouts[name] = layout
    d_o, dlse = normal(rng, (B, Hq, Nq, Dv), dtype), normal(rng, (B, Hq, Nq), "float32")
    d_o_array = strided(d_o, dtype, str(rng.choice(("dense", "bnhd", "gap", "column"))))
    mx.eval(arrays, d_o_array)

    p = oracle.Problem(**values, dtype=dtype, **options)
    shown = {n: (v.shape if n in ("bias", "mask", "sinks", "alibi") else v) for n, v in options.items()}
    label = f"{dtype} B{B} Hq{Hq} Hkv{Hkv} Nq{Nq} Nk{Nk} D{D} Dv{Dv} {shown} {layouts}"
    return Case(p, arrays, d_o, dlse, d_o_array, label)
