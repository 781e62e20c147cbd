"""rotary.py: rotary embedding in float64 for the tests, and the error rule of problems whose q and k are rotated."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle


def tables(positions, rotary_dim, base=10000.0):
    """Cosines and sines, float32 ``[positions, rotary_dim / 2]``."""
    angles = np.arange(positions)[:, None] * base ** (-np.arange(rotary_dim // 2) * 2.0 / rotary_dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x, cos, sin, first, interleaved=True, back=False):
    """``x`` ``[B, H, N, D]`` with row t of batch entry b turned by row ``first[b] + t`` of the tables, in float64."""
    pairs, out = cos.shape[1], np.array(x, np.float64)
    a = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    b = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    rows = np.asarray(first)[:, None] + np.arange(x.shape[2])[None, :]
    rows = np.clip(rows, 0, len(cos) - 1)  # behind the keys of a sequence, where x is 0
    c, s = (t.astype(np.float64)[rows][:, None] for t in (cos, -sin if back else sin))
    out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return out


class RotaryRule(oracle.ErrorRule):
    """The error rule of a problem whose ``q`` and ``k`` are given as they are before ``turn_q`` and ``turn_k``.

    ``turn(x, back)`` rotates. What is rotated is rounded before it is multiplied, as is each gradient before it is
    turned back and the result of that.
    """

    def __init__(self, p, d_o, dlse, seed, turn_q, turn_k):
        self._turns = {"q": turn_q, "k": turn_k}
        super().__init__(dataclasses.replace(p, q=turn_q(p.q, False), k=turn_k(p.k, False)), d_o, dlse, seed)
        self._turn_back(self.answer, lambda x: x)
        rounded = {name: oracle.round_to(getattr(self._problem, name), p.dtype) for name in self._turns}
        self._problem = dataclasses.replace(self._problem, **rounded)

    def _unfused(self, rng):
        answer = super()._unfused(rng)
        self._turn_back(answer, lambda x: oracle.round_to(x, self._problem.dtype))
        return answer

    def _turn_back(self, answer, rounded):
        for name, turn in self._turns.items():
            setattr(answer, name, rounded(turn(rounded(getattr(answer, name)), True)))
