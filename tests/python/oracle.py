"""oracle.py: what attention must compute, in vectorised numpy, and how far an implementation may be from it.

``exact`` evaluates the formulas of ``src/attention/problem.h`` and their derivatives in float64. ``unfused`` evaluates
the same formulas in float32 with probabilities, score gradients and results rounded to the dtype under test. An
implementation is right when it is at most twice as far from exact as that, plus the rounding of its own result
(``ErrorRule``).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

LN2 = math.log(2.0)


# ---------------------------------------------------------------------------------------------- rounding


def round_to_bfloat16(x):
    """``x`` as float32 rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def round_to(x, dtype):
    """``x`` rounded to ``dtype`` ("float32", "float16" or "bfloat16"), as float32."""
    if dtype == "bfloat16":
        return round_to_bfloat16(x)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(np.float16).astype(np.float32)
    return np.asarray(x).astype(np.float32)


_MANTISSA_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}
_MIN_EXPONENT = {"float32": -126, "float16": -14, "bfloat16": -126}


def half_ulp(magnitude, dtype):
    """Half the distance between neighbouring numbers of ``dtype`` around ``magnitude``."""
    if magnitude == 0 or not math.isfinite(magnitude):
        return 0.0
    exponent = max(math.frexp(magnitude)[1] - 1, _MIN_EXPONENT[dtype])
    return 0.5 * math.ldexp(1.0, exponent - _MANTISSA_BITS[dtype])


# ---------------------------------------------------------------------------------------------- dropout


def philox4x32(counter, key, rounds=10):
    """The four 32-bit words of Philox4x32 for broadcastable counter words and a 64-bit key.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) & low for c in counter)
    k0, k1 = int(key) & 0xFFFFFFFF, (int(key) >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & low
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_keep(p, seed, B, Hq, Nq, Nk, offset=0):
    """Which entries dropout keeps, ``[B, Hq, Nq, Nk]``: one Philox block serves four keys of a row."""
    threshold = np.uint64(math.floor(float(np.float32(p)) * 4294967296.0))
    words = philox4x32(
        (
            np.arange((Nk + 3) // 4)[None, None, :],
            np.arange(Nq)[None, :, None],
            np.arange(B * Hq)[:, None, None],
            np.uint64(offset),
        ),
        seed,
    )
    shape = (B * Hq, Nq, (Nk + 3) // 4)
    words = np.stack([np.broadcast_to(w, shape) for w in words], axis=-1)
    return (words >= threshold).reshape(B, Hq, Nq, -1)[..., :Nk]


# ---------------------------------------------------------------------------------------------- attention


@dataclasses.dataclass
class Problem:
    """One attention computation; arrays hold values that are exact in their dtype.

    q ``[B, Hq, Nq, D]``, k ``[B, Hkv, Nk, D]``, v ``[B, Hkv, Nk, Dv]``; bias and mask broadcast to
    ``[B, Hq, Nq, Nk]``; alibi and sinks ``[Hq]``; kv_lengths ``[B]``. ``q_offset`` (one, or ``[B]``) replaces
    ``max(0, Nk_b - Nq)``.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dtype: str = "float32"
    scale: float | None = None
    causal: bool = False
    window: tuple | None = None
    softcap: float = 0.0
    alibi: np.ndarray | None = None
    bias: np.ndarray | None = None
    mask: np.ndarray | None = None
    sinks: np.ndarray | None = None
    kv_lengths: np.ndarray | None = None
    dropout_p: float = 0.0
    dropout_seed: int = 0
    dropout_offset: int = 0
    q_offset: int | np.ndarray | None = None
    distance: np.ndarray | None = None  # replaces j - pos(i) of ALiBi; broadcasts to [B, 1, Nq, Nk]

    @property
    def shape(self):
        """``(B, Hq, Hkv, Nq, Nk, D, Dv)``."""
        (B, Hq, Nq, D), (_, Hkv, Nk, _) = self.q.shape, self.k.shape
        return B, Hq, Hkv, Nq, Nk, D, self.v.shape[-1]


@dataclasses.dataclass
class Answer:
    """Results of a problem; the gradients are None unless cotangents were given.

    lse is natural. ``terms`` holds the summands of the reduced gradients, for the error rule: entry ``name`` is
    ``[B, Hq, Nq, Nk or 1]`` and sums to the gradient.
    """

    o: np.ndarray
    lse: np.ndarray
    probs: np.ndarray
    q: np.ndarray | None = None
    k: np.ndarray | None = None
    v: np.ndarray | None = None
    bias: np.ndarray | None = None
    sinks: np.ndarray | None = None
    alibi: np.ndarray | None = None
    terms: dict = dataclasses.field(default_factory=dict)


def positions(p):
    """pos(i) of every row, ``[B, Nq]``, and the number of keys of every batch entry, ``[B]``."""
    B, _, _, Nq, Nk, _, _ = p.shape
    lengths = np.full(B, Nk) if p.kv_lengths is None else np.clip(np.asarray(p.kv_lengths), 0, Nk)
    offset = np.maximum(0, lengths - Nq) if p.q_offset is None else np.full(B, p.q_offset)
    return np.arange(Nq)[None, :] + offset[:, None], lengths


def visible(p):
    """Which keys each row sees, broadcastable to ``[B, Hq, Nq, Nk]``; -inf entries of the bias are not considered."""
    _, _, _, _, Nk, _, _ = p.shape
    pos, lengths = positions(p)
    j = np.arange(Nk)[None, None, :]
    seen = np.broadcast_to(j < lengths[:, None, None], pos.shape + (Nk,)).copy()
    if p.causal:
        seen &= j <= pos[:, :, None]
    left, right = p.window or (-1, -1)
    if left >= 0:
        seen &= j >= pos[:, :, None] - left
    if right >= 0:
        seen &= j <= pos[:, :, None] + right
    seen = seen[:, None]
    return seen if p.mask is None else seen & p.mask


def _sum_to(x, shape):
    """``x`` summed over the axes along which ``shape`` is broadcast to it."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1)
    return x.sum(axis=axes, keepdims=True)


def _sequential_product(a, b):
    """``a @ b`` with the terms of each sum added in order, as a plain loop does (BLAS adds in blocks)."""
    if b.shape[-1] == 1:  # einsum would add up a single column in blocks
        return _sequential_product(a, np.repeat(b, 2, axis=-1))[..., :1]
    return np.einsum("...ij,...jk->...ik", np.ascontiguousarray(a), np.ascontiguousarray(b))


class _Arithmetic:
    """How an evaluation rounds: exactly (float64), or as an unfused implementation in ``dtype`` would.

    With a generator the intermediate grids are shifted by a random factor a row, as another association of the same
    products would shift them, sums have another order, and exponentials are to base 2: each draw is one more sample of
    the rounding errors.
    """

    def __init__(self, dtype=None, rng=None):
        self.exact = dtype is None
        self.work = np.float64 if self.exact else np.float32
        self.dtype = dtype
        self.rng = rng

    def row_factor(self, B, Hq, Nq):
        if self.rng is None:
            return None
        return self.rng.uniform(1.0, 2.0, (B, Hq, Nq, 1)).astype(self.work)

    def rounded(self, x, factor=None):
        """An operand of a matrix product: rounded to the dtype, on the shifted grid if there is one."""
        if self.exact:
            return x
        return round_to(x, self.dtype) if factor is None else round_to(x * factor, self.dtype) / factor

    def shifted(self, m):
        """The row maximum, or another number near it: softmax may be evaluated with any."""
        return m if self.rng is None else m - self.rng.uniform(0.0, 1.0, m.shape).astype(self.work)

    def exp(self, x, shift):
        """``exp(x - shift)``."""
        if self.rng is None:
            return np.exp(x - shift)
        log2_e = self.work(1.0 / LN2)
        return np.exp2(x * log2_e - shift * log2_e)

    def log_sum(self, m, total):
        """``m + log(total)``."""
        if self.rng is None:
            return m + np.log(total)
        return (m * self.work(1.0 / LN2) + np.log2(total)) * self.work(LN2)

    def row_sum(self, x):
        """The sum over the last axis, which stays; in order, if it rounds."""
        return x.sum(-1, keepdims=True) if self.exact or x.shape[-1] == 0 else x.cumsum(axis=-1)[..., -1:]

    def matmul(self, a, b):
        """``a @ b``; a draw adds the terms of its sums in another order."""
        if self.exact:
            return a @ b
        if self.rng is not None:
            order = self.rng.permutation(a.shape[-1])
            a, b = a[..., order], b[..., order, :]
        return _sequential_product(a, b)

    def result(self, x):
        return x if self.exact else round_to(x, self.dtype)


def _evaluate(p, d_o, dlse, how):
    B, Hq, Hkv, Nq, Nk, D, _ = p.shape
    work, grouped = how.work, (B, Hkv, (Hq // Hkv) * Nq)
    q, k, v = (np.asarray(x, work) for x in (p.q, p.k, p.v))
    scale = work(np.float32(D**-0.5 if p.scale is None else p.scale))
    pos, _ = positions(p)
    distance = (np.arange(Nk)[None, None, :] - pos[:, :, None])[:, None].astype(work)  # j - pos(i)
    if p.distance is not None:
        distance = np.broadcast_to(p.distance, (B, 1, Nq, Nk)).astype(work)
    factor = how.row_factor(B, Hq, Nq)

    def over_keys(rows, matrix, transpose):  # rows [B, Hq, Nq, x] times each KV head's matrix
        m = matrix.swapaxes(-1, -2) if transpose else matrix
        return how.matmul(rows.reshape(*grouped, rows.shape[-1]), m).reshape(B, Hq, Nq, m.shape[-1])

    def over_rows(a, b):  # sums over the rows of all query heads of a KV head
        a, b = (x.reshape(*grouped, x.shape[-1]) for x in (a, b))
        return how.matmul(a.swapaxes(-1, -2), b)

    def product(rows, matrix):
        if factor is None:
            return over_keys(rows, matrix, transpose=True)
        return over_keys(rows * factor, matrix, transpose=True) / factor

    t = product(q, k) * scale
    if p.softcap > 0:
        cap = work(np.float32(p.softcap))
        ratio = np.tanh(t / cap)
        t = cap * ratio
    s = t
    if p.alibi is not None:
        s = s + np.asarray(p.alibi, work)[None, :, None, None] * distance
    if p.bias is not None:
        s = s + np.asarray(p.bias, work)
    s = np.where(visible(p), s, work(-np.inf))
    sink = None if p.sinks is None else np.asarray(p.sinks, work)[None, :, None, None]

    m = s.max(axis=-1, keepdims=True, initial=-np.inf).astype(work)
    if sink is not None:
        m = np.maximum(m, sink)
    m = how.shifted(np.where(np.isneginf(m), work(0), m))
    e = how.exp(s, m)
    total = e.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - m)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, how.log_sum(m, total), work(-np.inf))
    probs = e / np.where(total > 0, total, work(1))
    z = None
    if p.dropout_p > 0:
        keep = dropout_keep(p.dropout_p, p.dropout_seed, B, Hq, Nq, Nk, p.dropout_offset)
        kept_share = 1.0 - float(np.float32(p.dropout_p))
        z = keep.astype(work) * work(1.0 / kept_share if kept_share > 0 else 0.0)
    weights = probs if z is None else probs * z
    answer = Answer(o=how.result(over_keys(how.rounded(weights, factor), v, False)), lse=lse[..., 0], probs=probs)
    if d_o is None:
        return answer

    d_o = np.asarray(d_o, work)
    dlse = np.zeros((B, Hq, Nq), work) if dlse is None else np.asarray(dlse, work)
    # A fused backward has only the stored lse: exp(s - lse) carries its rounding.
    finite_lse = np.where(np.isneginf(lse), work(0), lse)
    probs = probs if how.exact else how.exp(s, finite_lse)
    weights = probs if z is None else probs * z
    answer.v = how.result(over_rows(how.rounded(weights, factor), d_o))
    d_probs = product(d_o, v)
    if z is not None:
        d_probs = d_probs * z
    delta = how.row_sum(d_o * answer.o.astype(work)) - dlse[..., None]
    d_s = probs * (d_probs - delta)
    if p.bias is not None:
        answer.terms["bias"] = d_s
        answer.bias = _sum_to(how.row_sum(d_s) if p.bias.shape[-1] == 1 else d_s, p.bias.shape)
    if p.alibi is not None:
        answer.terms["alibi"] = d_s * distance
        answer.alibi = how.row_sum(answer.terms["alibi"]).sum(axis=(0, 2, 3))
    if sink is not None:
        answer.terms["sinks"] = -np.exp(sink - finite_lse) * delta
        answer.sinks = answer.terms["sinks"].sum(axis=(0, 2, 3))
    if p.softcap > 0:
        d_s = d_s * (work(1) - ratio * ratio)
    d_s = how.rounded(d_s, factor)
    answer.q = how.result(over_keys(d_s, k, False) * scale)
    answer.k = how.result(over_rows(d_s, q) * scale)
    return answer


def exact(p, d_o=None, dlse=None):
    """The results of ``p`` in float64 and, if the cotangent ``d_o`` is given, every gradient.

    ``dlse`` is the cotangent of the natural lse, ``[B, Hq, Nq]``.
    """
    return _evaluate(p, d_o, dlse, _Arithmetic())


def unfused(p, d_o=None, dlse=None, rng=None):
    """The results of ``p`` as an unfused implementation in ``p.dtype`` with float32 sums gives them."""
    return _evaluate(p, d_o, dlse, _Arithmetic(p.dtype, rng))


# ---------------------------------------------------------------------------------------------- the error rule

# max|unfused - exact| depends on the luck of its roundings, above all in small problems and where one row dominates:
# it is the largest of this many evaluations, each with other roundings. Only results near the bound need more than one.
_MAX_DRAWS = 64
# Few results that each sum many rounding errors: their spread times this stands for the largest.
_MAX_OF_SUMS = 2.5


def max_error(x, reference):
    """The largest difference; entries that are the same infinity agree, any other NaN or infinity is infinitely far."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    if x.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.where(x == reference, 0.0, np.abs(x - reference))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max())


def _term_spread(terms, exact_terms, shape):
    """The spread that the errors of the terms give their sum to ``shape``; those of a row move together."""
    errors = terms.astype(np.float64) - exact_terms
    if shape[-1] == 1:
        errors = errors.sum(axis=-1, keepdims=True)
    return math.sqrt(_sum_to(errors**2, shape).max(initial=0.0))


def _addition_spread(exact_terms, shape):
    """The spread that adding the terms to ``shape`` up in float32, one by one, gives."""
    axes = tuple(a for a in range(-len(shape), 0) if shape[a] == 1)
    moved = np.moveaxis(exact_terms, axes, range(-len(axes), 0))
    kept, added = moved.shape[: moved.ndim - len(axes)], moved.shape[moved.ndim - len(axes) :]
    partial_sums = moved.reshape(*kept, math.prod(added)).cumsum(axis=-1)
    roundings = (np.square(partial_sums) * (2.0**-24) ** 2 / 3).sum(axis=-1)
    return math.sqrt(roundings.max(initial=0.0))


class ErrorRule:
    """``max|x - exact| <= 2 max|unfused - exact| + half an ulp`` for o and every gradient of one problem."""

    def __init__(self, p, d_o=None, dlse=None, seed=0, names=("o", "q", "k", "v", "bias", "sinks", "alibi")):
        self.answer = exact(p, d_o, dlse)
        self._problem, self._d_o, self._dlse, self._seed = p, d_o, dlse, seed
        self._names = [n for n in names if getattr(self.answer, n) is not None]
        self._errors = {}
        self._draws = 0
        bias_shape = () if p.bias is None else p.bias.shape
        heads = (1, p.q.shape[1], 1, 1)
        padded = (1,) * (4 - len(bias_shape)) + tuple(bias_shape)
        self._shapes = {n: padded if n == "bias" else heads for n in self.answer.terms}
        self._additions = {n: _addition_spread(t, self._shapes[n]) for n, t in self.answer.terms.items()}

    def _unfused(self, rng):
        return unfused(self._problem, self._d_o, self._dlse, rng)

    def _draw(self):
        """Evaluates the unfused computation once more."""
        rng = np.random.default_rng([self._seed, self._draws]) if self._draws else None
        self._draws += 1
        approximate = self._unfused(rng)
        for name in self._names:
            error = max_error(getattr(approximate, name), getattr(self.answer, name))
            if name in self.answer.terms:
                terms = _term_spread(approximate.terms[name], self.answer.terms[name], self._shapes[name])
                error = max(error, _MAX_OF_SUMS * math.hypot(terms, self._additions[name]))
            self._errors[name] = max(error, self._errors.get(name, 0.0))

    def bound(self, name, dtype):
        """The largest error of the result ``name`` that the rule allows, from the draws so far."""
        if not self._draws:
            self._draw()
        reference = getattr(self.answer, name)
        largest = np.abs(reference[np.isfinite(reference)]).max(initial=0.0)
        return 2.0 * self._errors[name] + half_ulp(float(largest), dtype)

    def check(self, name, x, dtype, context="", part=None, terms=1):
        """Raises unless ``x``, of ``dtype`` (a name), is within the rule for the result ``name`` of the problem.

        With ``part``, ``x`` is ``part(result)``: some of its elements, or sums of ``terms`` of them.
        """
        reference, x = getattr(self.answer, name), np.asarray(x, np.float64)
        reference = reference if part is None else part(reference)
        assert x.shape == reference.shape, f"{name}: shape {x.shape}, expected {reference.shape} {context}"
        error, bound = max_error(x, reference), terms * self.bound(name, dtype)
        while bound < error < math.inf and self._draws < _MAX_DRAWS:
            self._draw()
            bound = terms * self.bound(name, dtype)
        assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} ({self._draws} unfused draws) {context}"


LSE_TOLERANCE = 2e-5


def assert_lse(lse, reference, context=""):
    """Raises unless each entry is within 2e-5 of its size, and -inf exactly where the reference is."""
    lse, reference = np.asarray(lse, np.float64), np.asarray(reference, np.float64)
    assert lse.shape == reference.shape, f"lse: shape {lse.shape}, expected {reference.shape} {context}"
    empty = np.isneginf(reference)
    assert np.array_equal(np.isneginf(lse), empty), f"lse: -inf in the wrong rows {context}"
    difference = np.abs(lse[~empty] - reference[~empty])
    allowed = LSE_TOLERANCE * np.maximum(1.0, np.abs(reference[~empty]))
    assert (difference <= allowed).all(), f"lse: off by {difference.max(initial=0.0):.3e} {context}"
