"""Attention of other libraries behind one interface, for :mod:`mlx_mfa.bench`.

A peer is prepared for a case once (layouts, graphs and masks are built outside the timing) and gives a call without
arguments that leaves its answer in memory. Every peer gets the same numbers, already rounded to the case's dtype, and
the form of the problem that suits it best among those that mean the same.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

# A prepared peer: run once, and the answers [o] or [dq, dk, dv] of the last run as float32 [B, H, N, D] arrays.
Prepared = tuple[Callable[[], Any], Callable[[], list[np.ndarray]]]


class Unsupported(Exception):
    """The peer has no such operation; the message is the reason."""


@dataclass(frozen=True)
class Inputs:
    """One case's tensors, float32 values that the case's dtype holds exactly, and what the rows may see."""

    q: np.ndarray  # [B, Hq, Nq, D]
    k: np.ndarray  # [B, Hkv, Nk, D]
    v: np.ndarray
    d_o: np.ndarray | None  # the output's cotangent: gradients are wanted
    dtype: str
    scale: float
    causal: bool = False
    window: tuple[int, int] | None = None
    padding: np.ndarray | None = None  # bool [B, 1, 1, Nk], true = visible

    @property
    def is_decode(self) -> bool:
        return self.q.shape[2] == 1

    def visible(self) -> np.ndarray:
        """The rows' keys as one boolean mask that broadcasts to ``[B, Hq, Nq, Nk]``."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        at = np.arange(queries)[:, None] + max(0, keys - queries)
        key = np.arange(keys)[None, :]
        seen = np.ones((queries, keys), bool)
        if self.causal:
            seen &= key <= at
        if self.window is not None:
            left, right = self.window
            seen &= (left < 0) | (key >= at - left)
            seen &= (right < 0) | (key <= at + right)
        seen = seen[None, None]
        return seen if self.padding is None else seen & self.padding


def usable_cores() -> int:
    """The processors of this process's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _from_mlx(arrays: Any) -> list[np.ndarray]:
    arrays = arrays if isinstance(arrays, (list, tuple)) else [arrays]
    return [np.array(a.astype(mx.float32)) for a in arrays]


class _MlxPeer(abc.ABC):
    """What the two functions of MLX arrays share: lazy graphs, evaluated in each call."""

    name = ""

    @abc.abstractmethod
    def attend(self, inputs: Inputs) -> Callable[..., mx.array]:
        """The function of q, k and v; masks are ready-made arrays."""

    def prepare(self, inputs: Inputs) -> Prepared:
        dtype = getattr(mx, inputs.dtype)
        q, k, v = (mx.array(x).astype(dtype) for x in (inputs.q, inputs.k, inputs.v))
        attend = self.attend(inputs)
        mx.eval(q, k, v)
        last: list[Any] = [None]
        if inputs.d_o is None:

            def run() -> None:
                last[0] = attend(q, k, v)
                mx.eval(last[0])

        else:
            d_o = mx.array(inputs.d_o).astype(dtype)
            mx.eval(d_o)

            def run() -> None:
                _, last[0] = mx.vjp(attend, [q, k, v], [d_o])
                mx.eval(last[0])

        return run, lambda: _from_mlx(last[0])


class Ours(_MlxPeer):
    """``mlx_mfa.flash_attention``."""

    name = "mlx-mfa"

    def attend(self, inputs: Inputs) -> Callable[..., mx.array]:
        from . import flash_attention

        mask = None if inputs.padding is None else mx.array(inputs.padding)
        return lambda q, k, v: flash_attention(
            q, k, v, scale=inputs.scale, causal=inputs.causal, window_size=inputs.window, mask=mask
        )


class Mlx(_MlxPeer):
    """``mx.fast.scaled_dot_product_attention``."""

    name = "MLX"

    def attend(self, inputs: Inputs) -> Callable[..., mx.array]:
        mask: Any = None
        if inputs.window is not None or inputs.padding is not None:
            mask = mx.array(inputs.visible())
            mx.eval(mask)
        elif inputs.causal:
            mask = "causal"
        return lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=inputs.scale, mask=mask)


class Torch:
    """``torch.nn.functional.scaled_dot_product_attention`` on the CPU."""

    name = "PyTorch"

    def __init__(self, threads: int):
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        self.version = torch.__version__

    def prepare(self, inputs: Inputs) -> Prepared:
        torch = self.torch
        dtype = getattr(torch, inputs.dtype)
        q, k, v = (torch.from_numpy(x.copy()).to(dtype) for x in (inputs.q, inputs.k, inputs.v))
        options: dict[str, Any] = {"scale": inputs.scale}
        if inputs.window is not None or inputs.padding is not None:
            options["attn_mask"] = torch.from_numpy(inputs.visible())
        elif inputs.causal and not inputs.is_decode:
            if q.shape[2] != k.shape[2]:
                raise Unsupported("its causal rows are aligned at the top left")
            options["is_causal"] = True
        heads = q.shape[1]
        if heads != k.shape[1]:
            if inputs.is_decode:  # the heads of a group as query rows: the same sums, several times faster
                q = q.reshape(q.shape[0], k.shape[1], heads // k.shape[1], q.shape[3])
            else:
                options["enable_gqa"] = True
        attend = torch.nn.functional.scaled_dot_product_attention
        last: list[Any] = [None]
        if inputs.d_o is None:

            def run() -> None:
                with torch.no_grad():
                    last[0] = [attend(q, k, v, **options)]

        else:
            d_o = torch.from_numpy(inputs.d_o.copy()).to(dtype)
            for x in (q, k, v):
                x.requires_grad_(True)

            def run() -> None:
                last[0] = torch.autograd.grad(attend(q, k, v, **options), (q, k, v), d_o)

        def answers() -> list[np.ndarray]:
            out = [x.detach().to(torch.float32).numpy() for x in last[0]]
            return [out[0].reshape(inputs.q.shape), *out[1:]]

        return run, answers


class OnnxRuntime:
    """ONNX Runtime's fused attention: GroupQueryAttention where it is causal, else MultiHeadAttention.

    Models are built in memory. Caches of GroupQueryAttention are bound as input and output, so that nothing is copied.
    """

    name = "ONNX Runtime"

    def __init__(self, threads: int):
        import onnx
        import onnxruntime

        self.onnx, self.ort, self.threads = onnx, onnxruntime, threads
        onnxruntime.set_default_logger_severity(3)
        self.version = onnxruntime.__version__

    def prepare(self, inputs: Inputs) -> Prepared:
        if inputs.d_o is not None:
            raise Unsupported("no gradients")
        if inputs.dtype == "bfloat16":
            raise Unsupported("no bfloat16 on the CPU")
        use_groups = inputs.causal or inputs.is_decode
        if use_groups and inputs.padding is not None:
            raise Unsupported("no padding mask beside a causal one")
        if inputs.window is not None and (not inputs.causal or inputs.window[1] > 0):
            raise Unsupported("only causal windows")
        return self._group_query(inputs) if use_groups else self._multi_head(inputs)

    @staticmethod
    def _rows(x: np.ndarray, dtype: str) -> np.ndarray:
        batch, heads, length, dim = x.shape
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(batch, length, heads * dim)).astype(dtype)

    def _multi_head(self, inputs: Inputs) -> Prepared:
        feeds = {name: self._rows(getattr(inputs, name), inputs.dtype) for name in "qkv"}
        names = ["q", "k", "v"]
        if inputs.padding is not None:
            feeds["padding"] = inputs.padding[:, 0, 0, :].astype(np.int32)
            names += ["", "padding"]
        attributes = {"num_heads": inputs.q.shape[1], "scale": inputs.scale}
        return self._session("MultiHeadAttention", names, feeds, {}, attributes, inputs)

    def _group_query(self, inputs: Inputs) -> Prepared:
        keys, new = inputs.k.shape[2], inputs.q.shape[2]
        feeds = {"q": self._rows(inputs.q, inputs.dtype)}
        for name, cache in (("k", inputs.k), ("v", inputs.v)):
            feeds[name] = self._rows(cache[:, :, keys - new :], inputs.dtype)
        caches = {"past_k": inputs.k.astype(inputs.dtype), "past_v": inputs.v.astype(inputs.dtype)}
        feeds["last_key"] = np.full(inputs.k.shape[0], keys - 1, np.int32)
        feeds["total"] = np.array([keys], np.int32)
        # Its window counts the row's own key, ours does not.
        window = -1 if inputs.window is None else inputs.window[0] + 1
        heads = {"num_heads": inputs.q.shape[1], "kv_num_heads": inputs.k.shape[1]}
        names = ["q", "k", "v", "past_k", "past_v", "last_key", "total"]
        attributes = {**heads, "scale": inputs.scale, "local_window_size": window}
        return self._session("GroupQueryAttention", names, feeds, caches, attributes, inputs)

    def _session(
        self, op: str, names: list[str], feeds: dict, caches: dict, attributes: dict, inputs: Inputs
    ) -> Prepared:
        helper, ort = self.onnx.helper, self.ort
        batch, heads, length, dim = inputs.q.shape
        out = np.zeros((batch, length, heads * dim), inputs.dtype)
        outputs = {"o": out, **{name.replace("past", "present"): cache for name, cache in caches.items()}}

        def described(arrays: dict) -> list:
            kinds = {"float32": self.onnx.TensorProto.FLOAT, "float16": self.onnx.TensorProto.FLOAT16}
            kinds["int32"] = self.onnx.TensorProto.INT32
            return [helper.make_tensor_value_info(n, kinds[str(a.dtype)], a.shape) for n, a in arrays.items()]

        node = helper.make_node(op, names, list(outputs), domain="com.microsoft", **attributes)
        graph = helper.make_graph([node], "attention", described({**feeds, **caches}), described(outputs))
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        # Its threads may spin inside a run, but not on while the next library is measured.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        bound = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for n, a in {**feeds, **caches}.items()}
        bound["o"] = ort.OrtValue.ortvalue_from_numpy(out)
        for name in (*feeds, *caches):
            binding.bind_ortvalue_input(name, bound[name])
        for name in outputs:
            binding.bind_ortvalue_output(name, bound[name.replace("present", "past")])

        def answers() -> list[np.ndarray]:
            rows = bound["o"].numpy().astype(np.float32)
            return [rows.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)]

        return lambda: session.run_with_iobinding(binding), answers


def available_peers(threads: int, names: list[str] | None = None) -> tuple[list[Any], list[str]]:
    """Ours, MLX's and the installed optional peers; and a line for each one that is absent.

    Args:
        threads (int): Threads that the optional peers may use.
        names (list of str, optional): Which optional peers to try: ``"torch"``, ``"onnxruntime"``. Default: both.
    """
    peers: list[Any] = [Ours(), Mlx()]
    notes = []
    for key, peer in (("torch", Torch), ("onnxruntime", OnnxRuntime)):
        if names is not None and key not in names:
            continue
        try:
            peers.append(peer(threads))
        except (ImportError, OSError) as error:
            notes.append(f"{peer.name} is not measured: {str(error).splitlines()[0]}")
    return peers, notes
