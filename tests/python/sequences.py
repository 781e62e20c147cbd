"""sequences.py: packed sequences for the tests, and the padded dense problem that the oracle computes for them.

Sequence b of the padded problem has its rows first; the rows and keys behind them are hidden, and ``q_offset`` gives
each sequence the positions of its own lengths.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
from problems import normal


@dataclasses.dataclass
class Sequences:
    """B sequences: their lengths, and the padded problem with cotangents that are 0 behind each sequence."""

    query_lengths: np.ndarray
    key_lengths: np.ndarray
    problem: oracle.Problem
    d_o: np.ndarray
    dlse: np.ndarray
    label: str = ""

    @property
    def cu_q(self):
        return starts(self.query_lengths)

    @property
    def cu_k(self):
        return starts(self.key_lengths)


def starts(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def pack(x, lengths):
    """``[B, H, N, ...]`` to ``[1, H, sum of lengths, ...]``."""
    return np.concatenate([x[b, :, :n] for b, n in enumerate(lengths)], axis=1)[None]


def unpack(x, lengths, longest):
    """The inverse of :func:`pack`, with zeros behind the sequences."""
    out = np.zeros((len(lengths), x.shape[1], longest) + x.shape[3:], x.dtype)
    for b, first in enumerate(starts(lengths)[:-1]):
        out[b, :, : lengths[b]] = x[0, :, first : first + lengths[b]]
    return out


def make_sequences(rng, query_lengths, key_lengths, Hq=2, Hkv=None, D=16, Dv=None, dtype="float32", **options):
    """Sequences with standard normal q, k, v and cotangents; ``options`` are those of ``oracle.Problem``."""
    nq, nk = np.asarray(query_lengths), np.asarray(key_lengths)
    B, Hkv, Dv = len(nq), Hkv or Hq, Dv or D
    Nq, Nk = max(1, nq.max(initial=0)), max(1, nk.max(initial=0))
    q, k, v = (normal(rng, s, dtype) for s in ((B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv)))
    d_o, dlse = normal(rng, (B, Hq, Nq, Dv), dtype), normal(rng, (B, Hq, Nq), "float32")
    real = np.arange(Nq)[None, :] < nq[:, None]  # [B, Nq]
    for x in (d_o, dlse):
        x[~np.broadcast_to(real[:, None], x.shape[:3])] = 0
    lengths = nk if options.get("kv_lengths") is None else np.minimum(nk, options["kv_lengths"])
    mask = np.ones((1, 1, 1, 1), bool) if options.get("mask") is None else options["mask"]
    options |= {
        "mask": mask & real[:, None, :, None],
        "kv_lengths": lengths,
        "q_offset": np.maximum(0, lengths - nq),
    }
    p = oracle.Problem(q=q, k=k, v=v, dtype=dtype, **options)
    return Sequences(nq, nk, p, d_o, dlse)
