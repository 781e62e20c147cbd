"""Dense attention on MLX arrays. Arguments are adapted here; the C++ library checks them and decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal

import mlx.core as mx

from . import _ext
from ._options import LOG2_E, Stream, integers, make_options, optional_integers, window
from ._options import seed as make_seed
from ._type_errors import clear_type_errors, recover

Backend = Literal["auto", "mfa", "sdpa", "composed"]


def flash_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    return_attn_weights: bool = False,
    window_size: Sequence[int] | None = None,
    return_lse: bool = False,
    stream: Stream = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    *,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_seed: int | mx.array | None = None,
) -> mx.array | tuple[mx.array, ...]:
    """Softmax attention, ``softmax(scale * q @ k.T) @ v``, without storing the scores (arXiv:2205.14135).

    With ``pos(i) = i + max(0, Nk - Nq)``, ``Nk`` being ``kv_lengths[b]`` where lengths are given, the score of query
    ``i`` and key ``j`` is ``softcap(scale * q_i . k_j) + alibi_slopes[h] * (j - pos(i)) + attn_bias`` if ``j`` is
    visible to ``i``, else -inf. All options combine. A query that sees no key gives 0 and no gradient.

    Lazy and differentiable in ``q``, ``k``, ``v``, ``attn_bias``, ``sinks``, ``alibi_slopes``, through the output and
    through the log-sum-exp; works under ``mx.vmap``, ``mx.compile`` and ``mx.checkpoint``. Arrays with a dense last
    axis are read in place, whatever their other strides. Sums are float32.

    Args:
        q (array): ``[B, Hq, Nq, D]``, float32, float16 or bfloat16. ``D`` is 1 to 576; lengths may be 0.
        k (array): ``[B, Hkv, Nk, D]``; cast to the dtype of ``q`` from another floating one. ``Hq`` is a multiple of
            ``Hkv``; query head h reads KV head ``h // (Hq // Hkv)``.
        v (array): ``[B, Hkv, Nk, Dv]``; cast likewise. ``Dv`` is 1 to 576.
        scale (float, optional): Default ``D ** -0.5``.
        causal (bool): Query i sees keys ``j <= pos(i)``. Default False.
        softcap (float): Replaces scaled products by ``softcap * tanh(. / softcap)``; 0 is off. Default 0.
        alibi_slopes (array, optional): ``[Hq]``, used in float32.
        dropout_p (float): Probability, in [0, 1], of dropping a softmax weight; the others are divided by
            ``1 - dropout_p``. Default 0.
        return_attn_weights (bool): Also return the softmax weights before dropout: the one option that takes
            O(Nq Nk) memory. Default False.
        window_size (tuple of int, optional): ``(left, right)``: query i sees keys
            ``pos(i) - left <= j <= pos(i) + right``; -1 leaves a side open.
        return_lse (bool): Also return the **base-2** logarithm of each row's sum of exponentials,
            ``log2(sum_j exp(score_j))`` (with the sink's term, if any): the natural one divided by ``ln 2``.
            Default False.
        stream (Stream or Device, optional): Where it runs. Default: MLX's default stream.
        attn_bias (array, optional): Floating, broadcastable to ``[B, Hq, Nq, Nk]``, never expanded; added to the
            scores. Entries of -inf hide a key, as ``mask`` does.
        backend (str): ``"auto"``: the first that covers the problem of this library's kernels, MLX's op and the
            composed graph. ``"mfa"``: the kernels, or an error that says why not. ``"sdpa"``: MLX's op where it means
            exactly the same, else composed. ``"composed"``: MLX operations that store the scores. Default ``"auto"``.
        mask (array, optional): bool, broadcastable to ``[B, Hq, Nq, Nk]``, never expanded; True is visible.
        sinks (array, optional): ``[Hq]``, used in float32: one more logit for each head, with no value.
        kv_lengths (array or sequence of int, optional): ``[B]``: batch entry b has the first ``kv_lengths[b]`` keys.
            Values of an array that is not yet evaluated are clamped to [0, Nk].
        dropout_seed (int or array, optional): A number in [0, 2**64) or uint32 ``[2]`` (low word, high word): the same
            mask for the same seed on every backend (Philox4x32-10). Default: drawn from MLX's global random state, so
            that ``mx.random.seed`` repeats it. Not used if ``dropout_p`` is 0.

    Returns:
        array or tuple: ``out``, ``[B, Hq, Nq, Dv]`` in the dtype of ``q``. With ``return_lse`` and
        ``return_attn_weights``, a tuple ``(out, lse)``, ``(out, weights)`` or ``(out, lse, weights)``, where ``lse`` is
        float32 ``[B, Hq, Nq]`` and ``weights`` float32 ``[B, Hq, Nq, Nk]``.

    Raises:
        ValueError: If shapes, dtypes or options are not as said here; the message says what was received. Raised before
            anything is allocated.
        RuntimeError: If ``backend="mfa"`` cannot run the problem; the message says why.
        TypeError: If an argument is of another type than said here.
    """
    try:
        left, right = (-1, -1) if window_size is None else window(window_size, "flash_attention")
        if kv_lengths is not None:
            kv_lengths = integers("flash_attention", "kv_lengths", kv_lengths)
        seed = None
        if dropout_p or dropout_seed is not None:
            seed = make_seed(dropout_p, dropout_seed, stream, "flash_attention")
        if not (return_lse or return_attn_weights):
            return _ext.attention(
                q, k, v, scale, causal, softcap, alibi_slopes, dropout_p, left, right, attn_bias, backend, mask, sinks,
                kv_lengths, seed, stream,
            )  # fmt: skip
        out, lse, weights = _ext.attention_with_lse(
            q, k, v, scale, causal, softcap, alibi_slopes, dropout_p, left, right, attn_bias, backend, mask, sinks,
            kv_lengths, seed, stream, return_attn_weights,
        )  # fmt: skip
        if not return_lse:
            return out, weights
        lse = mx.multiply(lse, LOG2_E, stream=stream)
        return (out, lse, weights) if return_attn_weights else (out, lse)
    except TypeError:  # as clear_type_errors has it, without the microsecond of a call between
        given = locals()
        return recover(flash_attention, (), {name: given[name] for name in signature(flash_attention).parameters})


def attend(
    function: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    return_lse: bool = False,
    return_attn_weights: bool = False,
    stream: Stream = None,
    **options: Any,
) -> mx.array | tuple[mx.array, ...]:
    """:func:`flash_attention` for ``function``, an entry point that takes its arguments in another form."""
    out, lse, weights = _ext.attention_with_options(
        q, k, v, make_options(function, stream=stream, **options), return_lse, return_attn_weights, stream
    )
    results = [out]
    if return_lse:
        results.append(mx.multiply(lse, LOG2_E, stream=stream))
    if return_attn_weights:
        results.append(weights)
    return tuple(results) if len(results) > 1 else out


@clear_type_errors
def merge_attention_states(
    o_a: mx.array,
    lse_a: mx.array,
    o_b: mx.array,
    lse_b: mx.array,
    *,
    base: Literal["2", "e"] = "2",
    stream: Stream = None,
) -> tuple[mx.array, mx.array]:
    """The attention over the union of two disjoint sets of keys from the attention over each (arXiv:1805.02867).

    Differentiable, with finite gradients. A part whose ``lse`` is -inf is empty and its ``o`` is not read.

    Args:
        o_a, o_b (array): ``[..., Dv]``, of one floating dtype: outputs of ``flash_attention``.
        lse_a, lse_b (array): ``[...]``: their log-sum-exps.
        base (str): Of the logarithms given and returned: ``"2"``, as ``flash_attention(..., return_lse=True)``
            returns them, or ``"e"``. Default ``"2"``.
        stream (Stream or Device, optional): Where it runs. Default: MLX's default stream.

    Returns:
        tuple: ``(o, lse)``, in the dtype of ``o_a`` and float32. Two empty parts give 0 and -inf.

    Raises:
        ValueError: If shapes or dtypes disagree or ``base`` is unknown; the message says what was received.
    """
    if base not in ("2", "e"):
        raise ValueError(f'[merge_attention_states] base must be "2" or "e"; got {base!r}')
    return _ext.merge_attention_states(o_a, lse_a, o_b, lse_b, base == "2", stream)


@clear_type_errors
def explain(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    alibi_slopes: mx.array | None = None,
    dropout_p: float = 0.0,
    return_attn_weights: bool = False,
    window_size: Sequence[int] | None = None,
    return_lse: bool = False,
    stream: Stream = None,
    attn_bias: mx.array | None = None,
    backend: Backend = "auto",
    *,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    kv_lengths: mx.array | Sequence[int] | None = None,
    dropout_seed: int | mx.array | None = None,
) -> dict[str, Any]:
    """Which implementation ``flash_attention`` uses for these arguments, and why. Runs nothing.

    Args:
        All as :func:`flash_attention`.

    Returns:
        dict: ``function`` (the entry point), ``route`` (``"mfa_cpu"``, ``"mfa_cuda"``, ``"mlx_sdpa"`` or
        ``"composed"``), ``kernel`` (str), ``isa`` (instruction set of a CPU kernel, else ``""``), ``tiles`` (query rows
        of a task, keys of a block), ``splits`` (tasks along the keys), ``tasks``, ``threads``, ``native_bf16`` (bool),
        and ``refusals``: for each route tried before, in order, a dict of ``route`` and ``reason``.

    Raises:
        ValueError, RuntimeError, TypeError: As :func:`flash_attention`.
    """
    left, right = (-1, -1) if window_size is None else window(window_size, "flash_attention")
    kv_lengths = optional_integers("flash_attention", "kv_lengths", kv_lengths)
    # A drawn seed would move the random state, and its value decides nothing.
    seed = 0 if dropout_seed is None else make_seed(dropout_p, dropout_seed, stream, "flash_attention")
    return _ext.explain(
        q, k, v, scale, causal, softcap, alibi_slopes, dropout_p, left, right, attn_bias, backend, mask, sinks,
        kv_lengths, seed, stream, return_attn_weights, return_lse,
    )  # fmt: skip


def explain_calls(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """Which implementation runs each attention call that ``function(*args, **kwargs)`` builds, and why.

    For every entry point, and for whole models: ``explain_calls(flash_attention_sparse, q, k, v, mask)``. The function
    is called; attention is lazy, so what it builds does not run unless the function evaluates it. An entry point of
    several parts, as ``flash_attention_cascade``, makes several calls.

    Args:
        function (callable): What builds attention.
        *args, **kwargs: Its arguments.

    Returns:
        list of dict: In the order of the calls, each as :func:`explain` describes it.

    Raises:
        Exception: What ``function`` raises.
    """
    return _ext.explain_calls(lambda: function(*args, **kwargs))
