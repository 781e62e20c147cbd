"""Puts this package's matrix products and small layers in the place of MLX's, so that models need no change.

Replaced are ``mx.matmul``, ``mx.addmm``, ``mx.quantized_matmul``, ``mx.gather_mm``, ``mx.gather_qmm``, the operators
``@`` and ``@=`` of arrays, ``mx.fast.rms_norm`` and ``mx.fast.rope`` (on the CPU MLX evaluates the latter two as 13
and 30 small operations, which take longer than the products of a token), and ``mx.logsumexp`` and ``mx.argmax``, with
which a token is sampled; ``nn.Linear``, ``nn.QuantizedLinear``, ``nn.RMSNorm``, ``nn.RoPE`` and mlx-lm call these. A
call that this package's kernels do not cover, or that MLX does faster, goes on to MLX's own function with its
arguments as they came: so do all calls on a GPU stream, and all that are wrong, whose errors are therefore MLX's.
``mx.einsum``, ``mx.tensordot``, ``mx.inner`` and convolutions stay MLX's. ``mx.export_function`` sees MLX's own
functions, and ``mx.clear_cache`` first lets go of the packed copies of weights that are gone.

Importing ``mlx_mfa`` installs the hooks where the CPU is MLX's default device, unless ``MFA_DISABLE_AUTO_HOOKS=1``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from . import _ext

DISABLED_BY = "MFA_DISABLE_AUTO_HOOKS"
_DEFAULTS = {"group_size": 64, "bits": 4}  # of MLX's mode "affine"


def _positional(
    name: str, ours: Callable[..., mx.array | None], least: int, most: int, hints: frozenset[str] = frozenset()
) -> Callable[[Callable[..., mx.array]], Callable[..., mx.array]]:
    """A hook for a function of ``least`` to ``most`` positional arguments that ``ours`` takes likewise.

    Keywords in ``hints`` do not matter to ``ours``.
    """

    def hook(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> mx.array:
            if _state.active and least <= len(args) <= most:
                options = {k: v for k, v in kwargs.items() if k not in hints} if hints else kwargs
                try:
                    result = ours(*args, **options)
                except TypeError:  # not arrays, or unknown arguments
                    result = None
                if result is not None:
                    _state.routed[name] += 1
                    return result
            _state.passed[name] += 1
            return original(*args, **kwargs)

        return replacement

    return hook


def _operator(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    ours = _ext.try_matmul

    @functools.wraps(original)
    def __matmul__(self: mx.array, other: Any) -> mx.array:
        if _state.active and isinstance(other, mx.array):
            result = ours(self, other)
            if result is not None:
                _state.routed["matmul"] += 1
                return result
        _state.passed["matmul"] += 1
        return original(self, other)

    return __matmul__


def _in_place_operator(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(original)
    def __imatmul__(self: mx.array, other: Any) -> mx.array:
        if _state.active and isinstance(other, mx.array) and _ext.try_imatmul(self, other):
            _state.routed["matmul"] += 1
            return self
        _state.passed["matmul"] += 1
        return original(self, other)

    return __imatmul__


def _affine(options: dict[str, Any]) -> bool:
    """Whether the quantisation is one that this package computes; fills in MLX's defaults."""
    if options.pop("mode", "affine") != "affine" or options.pop("global_scale", None) is not None:
        return False
    for name, value in _DEFAULTS.items():
        if options.get(name) is None:
            options[name] = value
    return True


def _quantized(
    name: str, parameters: tuple[str, ...], ours: Callable[..., mx.array | None]
) -> Callable[[Callable[..., mx.array]], Callable[..., mx.array]]:
    def hook(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> mx.array:
            result = None
            if _state.active and 2 <= len(args) <= len(parameters):
                options = dict(zip(parameters, args))
                if options.keys().isdisjoint(kwargs):
                    options.update(kwargs)
                    options.pop("sorted_indices", None)  # a hint
                    if options.setdefault("biases") is not None and _affine(options):
                        try:
                            result = ours(**options)
                        except TypeError:
                            result = None
            if result is not None:
                _state.routed[name] += 1
                return result
            _state.passed[name] += 1
            return original(*args, **kwargs)

        return replacement

    return hook


def _unhooked(original: Callable[..., Any]) -> Callable[..., Any]:
    """MLX writes only its own operations to a file: what is exported is built of these."""

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        with hooked(False):
            return original(*args, **kwargs)

    return replacement


def _clear_cache(original: Callable[[], None]) -> Callable[[], None]:
    """A packed copy keeps its weights, and is dropped once it is noticed that nothing else does."""

    @functools.wraps(original)
    def replacement() -> None:
        _ext.packed_weights()
        original()

    return replacement


_AFFINE = ("transpose", "group_size", "bits", "mode")
_HOOKS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (mx, "matmul", _positional("matmul", _ext.try_matmul, 2, 2)),
    (mx, "addmm", _positional("addmm", _ext.try_addmm, 3, 5)),
    (
        mx,
        "quantized_matmul",
        _quantized("quantized_matmul", ("x", "w", "scales", "biases", *_AFFINE), _ext.try_quantized_matmul),
    ),
    (mx, "gather_mm", _positional("gather_mm", _ext.try_gather_mm, 2, 4, frozenset({"sorted_indices"}))),
    (
        mx,
        "gather_qmm",
        _quantized(
            "gather_qmm",
            ("x", "w", "scales", "biases", "lhs_indices", "rhs_indices", *_AFFINE, "global_scale"),
            _ext.try_gather_qmm,
        ),
    ),
    (mx.array, "__matmul__", _operator),
    (mx.array, "__imatmul__", _in_place_operator),
    (mx.fast, "rms_norm", _positional("rms_norm", _ext.try_rms_norm, 1, 3)),
    (mx.fast, "rope", _positional("rope", _ext.try_rope, 1, 2)),
    (mx, "logsumexp", _positional("logsumexp", _ext.try_logsumexp, 1, 3)),
    (mx, "argmax", _positional("argmax", _ext.try_argmax, 1, 3)),
    (mx, "export_function", _unhooked),
    (mx, "clear_cache", _clear_cache),
)
_NAMES = ("matmul", "addmm", "quantized_matmul", "gather_mm", "gather_qmm", "rms_norm", "rope", "logsumexp", "argmax")
_OWNERS = {id(mx): "mx", id(mx.fast): "mx.fast", id(mx.array): "mx.array"}


class _State:
    """What is installed, and the calls since the process started. Counts of threads that race may miss a few."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active = False  # else replacements pass every call on
        self.replaced: dict[tuple[int, str], tuple[Any, str, Any, Any]] = {}  # owner, name, original, replacement
        self.routed = dict.fromkeys(_NAMES, 0)
        self.passed = dict.fromkeys(_NAMES, 0)


_state = _State()


def enable() -> bool:
    """Put this package's matrix products and small layers in the place of MLX's, for the whole process.

    Returns:
        bool: True if this changed something; False if the hooks were installed already, or if there is no kernel for
        this machine's processor.

    Raises:
        ValueError: If an environment variable of this package is wrong.
    """
    with _state.lock:
        if _state.active:
            return False
        if error := environment_error():
            raise ValueError(error)
        if not _ext.cpu_info()["available"]:
            return False
        for owner, name, make in _HOOKS:
            current = getattr(owner, name)
            known = _state.replaced.get((id(owner), name))
            if known is None or current is known[2]:
                replacement = make(current)
                setattr(owner, name, replacement)
                _state.replaced[id(owner), name] = (owner, name, current, replacement)
        _state.active = True
        return True


def disable() -> bool:
    """Give MLX its own functions back: the very objects that were there.

    Where another library has since put a function of its own over one of these hooks, that stays, and the hook below it
    passes every call on.

    Returns:
        bool: True if this changed something.
    """
    with _state.lock:
        if not _state.active:
            return False
        _state.active = False
        for key, (owner, name, original, replacement) in list(_state.replaced.items()):
            if getattr(owner, name) is replacement:
                setattr(owner, name, original)
                del _state.replaced[key]
        return True


def installed() -> bool:
    """Whether the hooks are in force."""
    return _state.active


@contextlib.contextmanager
def hooked(wanted: bool) -> Iterator[None]:
    """Have the hooks in force, or not, for the duration of a ``with`` block."""
    with _state.lock:
        was = _state.active
    (enable if wanted else disable)()
    try:
        yield
    finally:
        (enable if was else disable)()


def hooks_status() -> dict[str, Any]:
    """Whether MLX's functions are replaced, and how often calls went which way.

    Calls are counted where the graph is built: under ``mx.compile`` once for a compilation.

    Returns:
        dict: ``installed`` (bool), ``hooks`` (list of str, what is replaced), ``calls`` (dict of function to a dict of
        ``mfa`` and ``mlx``, the calls that this package took and those it passed on), ``auto_hooks_disabled_env``
        (bool), and, for programs written for Apple GPUs, ``log`` (list) and ``m5_plus`` (bool).
    """
    with _state.lock:
        active = _state.active
        replaced = [f"{_OWNERS[id(owner)]}.{name}" for owner, name, *_ in _state.replaced.values()] if active else []
    return {
        "installed": active,
        "hooks": replaced,
        "calls": {name: {"mfa": _state.routed[name], "mlx": _state.passed[name]} for name in _NAMES},
        "auto_hooks_disabled_env": _disabled_by_environment(),
        "log": [],
        "m5_plus": False,
    }


def _disabled_by_environment() -> bool:
    return os.environ.get(DISABLED_BY, "") not in ("", "0")


def environment_error() -> str | None:
    """What is wrong with an environment variable of this package: a call that needs the CPU's kernels raises it."""
    reason = _ext.cpu_info()["reason"]
    return reason if reason.startswith("[MFA_") else None


def enable_by_default() -> None:
    """Install the hooks when the package is imported, where they can matter. Importing never fails for a wrong variable
    of the environment: it warns, as products then stay MLX's."""
    if _disabled_by_environment() or mx.default_device().type != mx.DeviceType.cpu:
        return
    if error := environment_error():
        warnings.warn(f"{error}; mlx_mfa's CPU kernels and hooks are not available", RuntimeWarning, stacklevel=3)
    else:
        enable()
