"""Layers of mlx-lm's llama models as few operations, where a few tokens meet a cache with room for them.

A token of such a model is some thirty operations a layer, each of which costs more to build and to hand to MLX's thread
than to compute. Layers whose parts are all of the kinds named here, and whose code is that of a version of mlx-lm that
this module knows, are one operation for several of them, with the same bits. In a model with another layer, and where a
layer is called by itself, each that qualifies is one operation; anything else runs part by part as before.

What a token needs to know of the layers is read once and kept with a snapshot of the modules that it was read from. A
token compares that with the modules as they are, which takes a tenth of the time of reading them again.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mfa import _ext, hooks

# Of the code of LlamaModel, TransformerBlock, Attention and MLP that the operation computes.
_KNOWN_CODE = frozenset({"82dfd8852fd99d48"})


def fingerprint(llama: Any) -> str:
    """What identifies the code of a model in mlx-lm's module ``llama``, whatever its comments and line breaks."""
    classes = (llama.LlamaModel, llama.TransformerBlock, llama.Attention, llama.MLP)
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


@dataclass(frozen=True)
class _Prepared:
    """Layers as the operation takes them, as long as their modules are as they were."""

    owner: weakref.ref[Any]
    layers: list[int]  # their identities: the layers themselves may be what owns this
    snapshot: _ext.Snapshot
    stack: _ext.DecoderStack

    def is_of(self, owner: Any, layers: list[Any]) -> bool:
        return self.owner() is owner and self.layers == list(map(id, layers)) and self.snapshot.holds()


class DecoderLayers:
    """The replacements of one version of ``llama.LlamaModel.__call__`` and ``TransformerBlock.__call__``.

    Args:
        llama: mlx-lm's module.
        in_force: Whether attention and the activation of the model's module are this package's.
        count: Called with the number of layers that become an operation.
    """

    def __init__(self, llama: Any, in_force: Callable[[], bool], count: Callable[[int], None]) -> None:
        from mlx_lm.models.cache import KVCache
        from mlx_lm.models.rope_utils import Llama3RoPE

        self._block = llama.TransformerBlock
        self._cache_kind, self._llama3_rope = KVCache, Llama3RoPE
        self._in_force, self._count = in_force, count
        self._prepared: dict[int, _Prepared] = {}  # by the identity of the model or layer
        layer_code, model_code = llama.TransformerBlock.__call__, llama.LlamaModel.__call__

        def layer_call(
            layer: Any, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
        ) -> mx.array:
            if cache is not None:
                result = self._as_operations(layer, [layer], x, mask, [cache])
                if result is not None:
                    return result
            return layer_code(layer, x, mask, cache)

        def model_call(
            model: Any, inputs: mx.array, cache: list[Any] | None = None, input_embeddings: mx.array | None = None
        ) -> mx.array:
            if cache is not None and model.swa_idx is None and self._block.__call__ is layer_call:
                if input_embeddings is None:
                    input_embeddings = model.embed_tokens(inputs)
                mask = llama.create_attention_mask(input_embeddings, cache[model.fa_idx])
                result = self._as_operations(model, model.layers, input_embeddings, mask, cache)
                if result is not None:
                    return model.norm(result)
            if cache is None:  # as in training, which should find the weights its own
                self._prepared.pop(id(model), None)
            return model_code(model, inputs, cache, input_embeddings)

        # Classes, their own code and ours; parts that are computed without being called.
        self._replaced = [(llama.TransformerBlock, layer_code, layer_call), (llama.LlamaModel, model_code, model_call)]
        self._parts = [(c, c.__call__) for c in (llama.Attention, llama.MLP)]

    def install(self) -> None:
        """Put the replacements in force."""
        for kind, _, replacement in self._replaced:
            kind.__call__ = replacement

    def remove(self) -> None:
        """Give the classes their own functions back, unless someone else has replaced them since."""
        for kind, original, replacement in self._replaced:
            if kind.__call__ is replacement:
                kind.__call__ = original
        self._prepared.clear()

    def _as_operations(
        self, owner: Any, layers: list[Any], x: mx.array, mask: Any, caches: list[Any]
    ) -> mx.array | None:
        """The last layer's output, caches updated; None if they must run one by one, nothing being changed then."""
        if not hooks.installed() or not self._in_force() or len(layers) != len(caches):
            return None
        if mask is not None and not (isinstance(mask, str) and mask == "causal"):
            return None
        if any(c.__call__ is not code for c, code in self._parts):
            return None
        if any(type(c) is not self._cache_kind or c.keys is None for c in caches):
            return None
        stack = self._stack(owner, layers)
        if stack is None:
            return None
        try:
            contents = [(c.keys, c.values, c.offset) for c in caches]
            outputs = _ext.try_decoder_layers(x, stack, contents, mask is not None)
        except TypeError:  # another kind of contents
            return None
        if outputs is None:
            return None
        result, contents = outputs
        tokens = x.shape[1]
        for cache, (keys, values) in zip(caches, contents, strict=True):
            cache.keys, cache.values = keys, values
            cache.offset += tokens
        self._count(len(layers))
        return result

    def _stack(self, owner: Any, layers: list[Any]) -> _ext.DecoderStack | None:
        """The layers as they are now; None if one is of another kind."""
        key = id(owner)
        prepared = self._prepared.get(key)
        if prepared is not None and prepared.is_of(owner, layers):
            return prepared.stack
        self._prepared.pop(key, None)
        try:
            modules = [module for layer in layers for module in self._modules(layer)]
            stack = _ext.prepare_decoder([self._describe(layer) for layer in layers])
        except (AttributeError, LookupError, TypeError):  # another kind of layer
            return None
        if stack is not None:
            gone = weakref.ref(owner, lambda _owner: self._prepared.pop(key, None))
            self._prepared[key] = _Prepared(gone, list(map(id, layers)), _ext.Snapshot(modules), stack)
        return stack

    def _modules(self, layer: Any) -> list[Any]:
        """The layer and its parts, each after the one that holds it; raises LookupError for a layer of another kind."""
        if type(layer) is not self._block:
            raise LookupError
        attention, mlp = layer["self_attn"], layer["mlp"]
        norms = [layer["input_layernorm"], layer["post_attention_layernorm"]]
        parts = [attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj", "rope")]
        return [layer, attention, mlp, *norms, *parts, *(mlp[name] for name in ("gate_proj", "up_proj", "down_proj"))]

    def _describe(self, layer: Any) -> tuple[Any, ...]:
        """What ``_ext.prepare_decoder`` takes of a layer; raises LookupError for one of another kind."""
        _, attention, _, *norms, q, k, v, o, rope, gate, up, down = self._modules(layer)
        return (
            (attention.n_heads, attention.n_kv_heads, attention.head_dim),
            attention.scale,
            [_norm(norm) for norm in norms],
            self._rotation(rope),
            [_projection(projection) for projection in (q, k, v, o, gate, up, down)],
        )

    def _rotation(self, rope: Any) -> tuple[int, bool, float | None, float, mx.array | None]:
        if type(rope) is nn.RoPE:
            return rope.dims, rope.traditional, rope.base, rope.scale, None
        if type(rope) is self._llama3_rope:
            return rope.dims, rope.traditional, None, 1.0, rope._freqs
        raise LookupError


def decoder_layers(in_force: Callable[[], bool], count: Callable[[int], None]) -> DecoderLayers | None:
    """For the mlx-lm that is installed; None if its layers are not those that this module knows."""
    try:
        from mlx_lm.models import llama

        known = fingerprint(llama) in _KNOWN_CODE
    except (ImportError, AttributeError, OSError, TypeError, SyntaxError):
        return None
    return DecoderLayers(llama, in_force, count) if known else None
