"""mlx-lm models through this package's attention, without touching the models.

mlx-lm's model files import ``scaled_dot_product_attention`` by name, so it lives in many modules at once. The patch
replaces the function object wherever it is bound and restores it the same way; model files imported later bind the
replacement by themselves. While this package's hooks are in force (``mlx_mfa.enable``), the models' activation
``swiglu`` is one operation of this package too.

    from mlx_mfa.integrations.mlx_lm import patch_mlx_lm, patched_mlx_lm
    patch_mlx_lm()               # from here on, until unpatch_mlx_lm()
    with patched_mlx_lm():       # or for a block
        ...
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from .decoder_layers import DecoderLayers, decoder_layers

NAME = "scaled_dot_product_attention"
PARAMETERS = ["queries", "keys", "values", "cache", "scale", "mask", "sinks"]


class _Patch:
    """The state of the patch."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.original: Callable[..., mx.array] | None = None
        self.replacement: Callable[..., mx.array] | None = None
        self.active = False
        self.dtypes: tuple[mx.Dtype, ...] = ()
        self.head_dims = range(0)
        self.swiglu: tuple[Callable[..., mx.array], Callable[..., mx.array]] | None = None  # mlx-lm's and ours
        self.layers: DecoderLayers | None = None
        self.routed = 0
        self.refusals: Counter[str] = Counter()


_patch = _Patch()


def refusal(queries: Any, keys: Any, values: Any, cache: Any, mask: Any) -> str | None:
    """Why a call of mlx-lm's attention function is left to mlx-lm, or None if this package computes it."""
    if hasattr(cache, "bits"):
        return "quantised cache"
    for array in (queries, keys, values):
        if not isinstance(array, mx.array) or array.ndim != 4:
            return "queries, keys and values are not 4-D arrays"
    if queries.dtype not in _patch.dtypes or keys.dtype != queries.dtype or values.dtype != queries.dtype:
        return "queries, keys and values are not of one supported dtype"
    if queries.shape[3] not in _patch.head_dims or values.shape[3] not in _patch.head_dims:
        return f"head dim over {_patch.head_dims[-1]}"
    if mx.default_device().type != mx.DeviceType.cpu:
        return "no kernel for this device"
    if isinstance(mask, mx.array):
        if mask.ndim > 4 or not (mask.dtype == mx.bool_ or mx.issubdtype(mask.dtype, mx.floating)):
            return "mask is neither boolean nor floating, or has more than 4 axes"
    elif isinstance(mask, str):
        if mask != "causal":
            return "unknown mask"
        if queries.shape[2] > keys.shape[2]:
            return "causal mask with more queries than keys"  # the two packages align the diagonal differently there
    elif mask is not None:
        return "unknown mask"
    return None


def _make_replacement(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    from mlx_mfa import flash_attention

    @functools.wraps(original)
    def scaled_dot_product_attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        # A module this patch could not find again keeps the replacement after unpatching: it must act as the original.
        if not _patch.active:
            return original(queries, keys, values, cache, scale, mask, sinks)
        reason = refusal(queries, keys, values, cache, mask)
        with _patch.lock:
            if reason is None:
                _patch.routed += 1
            else:
                _patch.refusals[reason] += 1
        if reason is not None:
            return original(queries, keys, values, cache, scale, mask, sinks)
        options: dict[str, Any] = {}
        if isinstance(mask, mx.array):
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            options["mask" if mask.dtype == mx.bool_ else "attn_bias"] = mask
        elif mask is not None:
            options["causal"] = True  # bottom-right aligned in both packages: a cached prefix is visible to every query
        return flash_attention(queries, keys, values, scale=scale, sinks=sinks, **options)

    return scaled_dot_product_attention


def _make_swiglu(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    from mlx_mfa import _ext, hooks

    def swiglu(gate: mx.array, x: mx.array) -> mx.array:
        if _patch.active and hooks.installed() and isinstance(gate, mx.array) and isinstance(x, mx.array):
            result = _ext.try_swiglu(gate, x)
            if result is not None:
                return result
        return original(gate, x)

    return swiglu


def _swiglu() -> Callable[..., mx.array] | None:
    """mlx-lm's activation as its models now see it; None in a version that has none."""
    try:
        from mlx_lm.models import activations
    except ImportError:
        return None
    return getattr(activations, "swiglu", None)


def _layers_are_ours() -> bool:
    """Whether llama's layers, run part by part, would run on this package's attention and activation."""
    names = sys.modules["mlx_lm.models.llama"].__dict__
    return (
        _patch.active
        and names[NAME] is _patch.replacement
        and _patch.swiglu is not None
        and names["swiglu"] is _patch.swiglu[1]
    )


def _count_layers(layers: int) -> None:
    with _patch.lock:
        _patch.routed += layers


def rebind(old: Any, new: Any, name: str = NAME) -> list[str]:
    """Replace the function ``old`` by ``new`` in the globals of every loaded module.

    Only under the name that mlx-lm gives it: a module that keeps the function under a name of its own, say to compare
    with, keeps it.

    Returns:
        The names of the modules that were changed.
    """
    changed = []
    for module_name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict) and names.get(name) is old:
            names[name] = new
            changed.append(module_name)
    return changed


def attention_function() -> Callable[..., mx.array]:
    """mlx-lm's attention function as its models now see it.

    Raises:
        ImportError: mlx-lm is not installed.
    """
    return _base_module().scaled_dot_product_attention


def _base_module() -> Any:
    try:
        import mlx_lm.models.base as base
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mlx_lm":
            raise
        raise ImportError("[patch_mlx_lm] mlx-lm is not installed; install it with: pip install mlx-lm") from None
    return base


def patch_mlx_lm(verbose: bool = True) -> bool:
    """Route mlx-lm's attention to :func:`mlx_mfa.flash_attention`, for the whole process. Idempotent.

    Covered: no mask, "causal", boolean and additive array masks, attention sinks, grouped heads, every cache that hands
    out plain arrays. Quantised caches and anything else unusual stay with mlx-lm's function; :func:`get_patch_stats`
    counts them by reason. A query whose boolean mask hides every key gets 0 (mlx-lm: the mean of the values).

    Args:
        verbose: Print one line that says what was patched.

    Returns:
        True if the patch is in force, False if this package has no kernel for this machine (nothing is changed then).

    Raises:
        ImportError: mlx-lm is not installed.
        RuntimeError: mlx-lm's attention function takes other arguments than this package knows.
    """
    import mlx_mfa

    base = _base_module()
    with _patch.lock:
        if _patch.active:
            return True
        if not mlx_mfa.is_mfa_available():
            if verbose:
                print("mlx-mfa: no kernel for this machine; mlx-lm is unchanged")
            return False
        original = base.scaled_dot_product_attention
        parameters = list(inspect.signature(original).parameters)
        if parameters != PARAMETERS:
            raise RuntimeError(
                f"[patch_mlx_lm] mlx-lm's scaled_dot_product_attention should take ({', '.join(PARAMETERS)});"
                f" this version takes ({', '.join(parameters)})"
            )
        _patch.original, _patch.replacement = original, _make_replacement(original)
        supported = mlx_mfa.get_supported_configs()
        _patch.dtypes, _patch.head_dims = supported["dtypes"], supported["head_dims"]
        _patch.routed = 0
        _patch.refusals.clear()
        changed = rebind(original, _patch.replacement)
        if (activation := _swiglu()) is not None:
            _patch.swiglu = (activation, _make_swiglu(activation))
            rebind(*_patch.swiglu, "swiglu")
        if (layers := decoder_layers(_layers_are_ours, _count_layers)) is not None:
            _patch.layers = layers
            layers.install()
        _patch.active = True
    if verbose:
        print(f"mlx-mfa: mlx-lm attention patched in {len(changed)} module{'s' if len(changed) != 1 else ''}")
    return True


def unpatch_mlx_lm() -> bool:
    """Give every module its original attention function back.

    Returns:
        True if the patch was in force.
    """
    with _patch.lock:
        if not _patch.active:
            return False
        _patch.active = False
        rebind(_patch.replacement, _patch.original)
        if _patch.swiglu is not None:
            rebind(*reversed(_patch.swiglu), "swiglu")
        if _patch.layers is not None:
            _patch.layers.remove()
            _patch.layers = None
        return True


def is_patched() -> bool:
    """Whether the patch is in force."""
    return _patch.active


def get_patch_stats() -> dict[str, Any]:
    """Calls of mlx-lm's attention function since the patch was last applied.

    Calls are counted where the graph is built: under ``mx.compile`` once for a compilation.

    Returns:
        ``forward_calls`` (all), ``mfa_calls`` (computed here), ``fallback_calls`` (left to mlx-lm), ``mfa_ratio``
        (0 to 1), and ``fallback_reasons`` (reason to count). ``steel_calls`` and ``steel_ratio`` are older names of
        ``mfa_calls`` and ``mfa_ratio``.
    """
    with _patch.lock:
        routed, refusals = _patch.routed, dict(_patch.refusals)
    fallback = sum(refusals.values())
    ratio = routed / (routed + fallback) if routed + fallback else 0.0
    return {
        "forward_calls": routed + fallback,
        "mfa_calls": routed,
        "fallback_calls": fallback,
        "mfa_ratio": ratio,
        "fallback_reasons": refusals,
        "steel_calls": routed,
        "steel_ratio": ratio,
    }


@contextlib.contextmanager
def patched_mlx_lm(verbose: bool = False) -> Iterator[bool]:
    """Patch for the duration of a ``with`` block; a patch that was already in force stays.

    Yields what :func:`patch_mlx_lm` returns.
    """
    was_patched = is_patched()
    active = patch_mlx_lm(verbose=verbose)
    try:
        yield active
    finally:
        if active and not was_patched:
            unpatch_mlx_lm()
