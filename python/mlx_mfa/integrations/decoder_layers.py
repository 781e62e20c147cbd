"""Layers of mlx-lm's llama models as one operation each, where a few tokens meet a cache with room for them.

A token of such a model is some thirty operations a layer, each of which costs more to build and to hand to MLX's thread
than to compute. A layer whose parts are all of the kinds named here, and whose code is that of a version of mlx-lm that
this module knows, is one operation with the same bits; any other runs part by part as before.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mfa import _ext, hooks

# Of the code of TransformerBlock, Attention and MLP that the operation computes.
_KNOWN_CODE = frozenset({"ec8fa0088a207462"})


def fingerprint(llama: Any) -> str:
    """What identifies the code of a layer in mlx-lm's module ``llama``, whatever its comments and line breaks."""
    classes = (llama.TransformerBlock, llama.Attention, llama.MLP)
    sources = (textwrap.dedent(inspect.getsource(c.__call__)) for c in classes)
    return hashlib.sha256("\n".join(ast.unparse(ast.parse(s)) for s in sources).encode()).hexdigest()[:16]


def _projection(module: Any) -> tuple[list[mx.array], int, int]:
    """The weights of a linear layer without bias; raises LookupError for anything else."""
    kind = type(module)
    if "bias" not in module:
        if kind is nn.Linear:
            return [module["weight"]], 0, 0
        if kind is nn.QuantizedLinear and module.mode == "affine":
            return [module["weight"], module["scales"], module["biases"]], module.bits, module.group_size
    raise LookupError


def _norm(module: Any) -> tuple[mx.array, float]:
    if type(module) is not nn.RMSNorm:
        raise LookupError
    return module["weight"], module.eps


class DecoderLayers:
    """The replacement of one version of ``llama.TransformerBlock.__call__``, while installed.

    Args:
        llama: mlx-lm's module.
        in_force: Whether attention and the activation of the model's module are this package's.
        count: Called for each layer that becomes one operation.
    """

    def __init__(self, llama: Any, in_force: Callable[[], bool], count: Callable[[], None]) -> None:
        from mlx_lm.models.cache import KVCache
        from mlx_lm.models.rope_utils import Llama3RoPE

        self._block = llama.TransformerBlock
        self._parts = [(c, c.__call__) for c in (llama.Attention, llama.MLP)]
        self._cache_kind, self._llama3_rope = KVCache, Llama3RoPE
        self._in_force, self._count = in_force, count
        self._original = original = llama.TransformerBlock.__call__

        def __call__(layer: Any, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
            if type(cache) is KVCache:
                result = self._one_operation(layer, x, mask, cache)
                if result is not None:
                    return result
            return original(layer, x, mask, cache)

        self._replacement = __call__

    def install(self) -> None:
        """Put the replacement in force."""
        self._block.__call__ = self._replacement

    def remove(self) -> None:
        """Give the class its own function back, unless someone else has replaced it since."""
        if self._block.__call__ is self._replacement:
            self._block.__call__ = self._original

    def _one_operation(self, layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
        """The layer's output, its cache updated; None if it must run part by part, nothing being changed then."""
        keys, offset = cache.keys, cache.offset
        if keys is None or not hooks.installed() or not self._in_force():
            return None
        if mask is not None and not (isinstance(mask, str) and mask == "causal"):
            return None
        if any(c.__call__ is not code for c, code in self._parts):
            return None
        try:
            attention, mlp = layer["self_attn"], layer["mlp"]
            outputs = _ext.try_decoder_layer(
                x,
                keys,
                cache.values,
                (attention.n_heads, attention.n_kv_heads, attention.head_dim),
                offset,
                mask is not None,
                attention.scale,
                (_norm(layer["input_layernorm"]), _norm(layer["post_attention_layernorm"])),
                self._rotation(attention["rope"]),
                [
                    *(_projection(attention[name]) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
                    *(_projection(mlp[name]) for name in ("gate_proj", "up_proj", "down_proj")),
                ],
            )
        except (AttributeError, LookupError, TypeError):  # another kind of layer
            return None
        if outputs is None:
            return None
        out, cache.keys, cache.values = outputs
        cache.offset = offset + x.shape[1]
        self._count()
        return out

    def _rotation(self, rope: Any) -> tuple[int, bool, float | None, float, mx.array | None]:
        if type(rope) is nn.RoPE:
            return rope.dims, rope.traditional, rope.base, rope.scale, None
        if type(rope) is self._llama3_rope:
            return rope.dims, rope.traditional, None, 1.0, rope._freqs
        raise LookupError


def decoder_layers(in_force: Callable[[], bool], count: Callable[[], None]) -> DecoderLayers | None:
    """For the mlx-lm that is installed; None if its layers are not those that this module knows."""
    try:
        from mlx_lm.models import llama

        known = fingerprint(llama) in _KNOWN_CODE
    except (ImportError, AttributeError, OSError, TypeError, SyntaxError):
        return None
    return DecoderLayers(llama, in_force, count) if known else None
