"""caches.py: problems over KV caches and pools of pages for the tests, with NaN in everything that must not be read."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import oracle
from problems import Case, normal, to_mlx

LENGTHS = (0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 100)
PAGES = (1, 2, 3, 7, 16, 32, 64, 100)
RENAMED = {"alibi_slopes": "alibi", "attn_bias": "bias"}


def random_options(rng, B, Hq, Nq, Nk, keys):
    """Modifiers for the problem, with the arguments of the call beside them. ``keys``: the axis Nk of the call."""
    options, arguments = {"causal": bool(rng.random() < 0.6)}, {}

    def padded(x, fill):  # the call's last axis may be longer than that of the problem
        if x.shape[-1] == 1:
            return x
        return np.concatenate([x, np.full(x.shape[:-1] + (keys - Nk,), fill, x.dtype)], axis=-1)

    def shape():
        return tuple(n if rng.random() < 0.5 else 1 for n in (B, Hq, Nq, Nk))

    if rng.random() < 0.2:
        options["scale"] = 0.25
    if rng.random() < 0.3:
        options["window"] = tuple(int(w) for w in rng.choice((-1, 0, 1, 5, 63), size=2))
    if rng.random() < 0.25:
        options["softcap"] = 2.0
    if rng.random() < 0.25:
        options["alibi"] = rng.choice((0.5, 0.125, -0.03125), size=Hq)
        arguments["alibi_slopes"] = to_mlx(options["alibi"], "float32")
    if rng.random() < 0.3:
        options["bias"] = normal(rng, shape(), "float32")
        arguments["attn_bias"] = to_mlx(padded(options["bias"], 0), "float32")
    if rng.random() < 0.3:
        options["mask"] = rng.random(shape()) < 0.7
        arguments["mask"] = mx.array(padded(options["mask"], True))
    if rng.random() < 0.3:
        options["sinks"] = normal(rng, (Hq,), "float32")
        arguments["sinks"] = to_mlx(options["sinks"], "float32")
    if rng.random() < 0.2:
        options |= {"dropout_p": 0.5, "dropout_seed": int(rng.integers(0, 2**63))}
    return options, arguments


def keywords(p):
    """The arguments of a call that are no arrays."""
    return {
        "causal": p.causal, "scale": p.scale, "softcap": p.softcap, "window_size": p.window, "dropout_p": p.dropout_p,
        "dropout_seed": p.dropout_seed if p.dropout_p > 0 else None, "return_lse": True,
    }  # fmt: skip


def make_problem(rng, lengths, *, Hq, Hkv, Nq, D, Dv, dtype, **options):
    """A problem with standard normal arrays and these key lengths; what lies behind them is 0."""
    B, Nk = len(lengths), max(1, int(np.max(lengths, initial=0)))
    k, v = normal(rng, (B, Hkv, Nk, D), dtype), normal(rng, (B, Hkv, Nk, Dv), dtype)
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = 0
    q = normal(rng, (B, Hq, Nq, D), dtype)
    return oracle.Problem(q, k, v, dtype=dtype, kv_lengths=np.asarray(lengths), **options)


def case_of(rng, p, label=""):
    """A case of ``p`` with random cotangents."""
    B, Hq, _, Nq, _, _, Dv = p.shape
    d_o, dlse = normal(rng, (B, Hq, Nq, Dv), p.dtype), normal(rng, (B, Hq, Nq), "float32")
    return Case(p, {}, d_o, dlse, to_mlx(d_o, p.dtype), label)


@dataclasses.dataclass
class Pools:
    """Pools as numpy arrays and the table of each sequence; ``gather`` is the inverse of the scatter that made them."""

    k: np.ndarray
    v: np.ndarray
    table: np.ndarray
    lengths: np.ndarray

    @property
    def page_size(self):
        return self.k.shape[1]

    @property
    def keys(self):
        """The keys that the table has room for."""
        return self.table.shape[1] * self.page_size

    def slots(self):
        """``(b, j, page, token)`` of every key that a sequence has."""
        for b, n in enumerate(self.lengths):
            for j in range(n):
                yield b, j, self.table[b, j // self.page_size], j % self.page_size

    def gather(self, pool, Nk):
        """``[pages, page_size, H, *]`` to ``[B, H, Nk, *]``, 0 behind each sequence; the other slots must be 0."""
        rest, out = pool.copy(), np.zeros((len(self.lengths), pool.shape[2], Nk, pool.shape[3]), pool.dtype)
        for b, j, page, token in self.slots():
            out[b, :, j] = pool[page, token]
            rest[page, token] = 0
        assert not rest.any(), "a gradient where no sequence has a key"
        return out


def make_pools(rng, k, v, lengths, page_size, room=None, unused=-1):
    """Pools with the keys of each sequence in pages of random order, and NaN in everything else."""
    lengths = np.asarray(lengths)
    pages = -(-lengths // page_size)
    columns = max(1, int(pages.max(initial=0))) + int(rng.integers(0, 3)) if room is None else -(-room // page_size)
    total = int(pages.sum()) + 3
    free = list(rng.permutation(total))
    table = np.full((len(lengths), columns), unused, np.int32)
    for b, n in enumerate(pages):
        table[b, :n] = [free.pop() for _ in range(n)]
    pools = Pools(
        np.full((total, page_size, k.shape[1], k.shape[3]), np.nan),
        np.full((total, page_size, v.shape[1], v.shape[3]), np.nan),
        table,
        lengths,
    )
    for b, j, page, token in pools.slots():
        pools.k[page, token], pools.v[page, token] = k[b, :, j], v[b, :, j]
    return pools


def random_sizes(rng):
    """Numbers of sequences, heads and channels, and a dtype."""
    Hkv, G = int(rng.choice((1, 2))), int(rng.choice((1, 1, 2, 3)))
    return int(rng.integers(1, 5)), {
        "Hq": Hkv * G, "Hkv": Hkv, "D": int(rng.choice((2, 8, 18, 32, 64))), "Dv": int(rng.choice((1, 8, 24, 64))),
        "dtype": str(rng.choice(("float32", "float16", "bfloat16"))),
    }  # fmt: skip


def paged_parts(pools, arguments, Nk):
    """How gradients of a call's arrays become those of the problem's."""
    parts = {"k": lambda g: {"k": pools.gather(g, Nk)}, "v": lambda g: {"v": pools.gather(g, Nk)}}
    for name in arguments:
        if name == "attn_bias":
            parts[name] = lambda g: {"bias": g if g.shape[-1] == 1 else g[..., :Nk]}
        elif name in RENAMED:
            parts[name] = lambda g, name=name: {RENAMED[name]: g}
    return parts


def random_paged(rng, Nq):
    """A paged problem with random sizes, modifiers and pages."""
    B, sizes = random_sizes(rng)
    lengths = rng.choice(LENGTHS, B)
    if rng.random() < 0.1:
        lengths[0] = 300
    Nk, page = max(1, int(lengths.max())), int(rng.choice(PAGES))
    p = make_problem(rng, lengths, Nq=Nq, **sizes)
    pools = make_pools(rng, p.k, p.v, lengths, page, unused=int(rng.choice((-1, -7, 2**31 - 1))))
    options, arguments = random_options(rng, B, sizes["Hq"], Nq, Nk, pools.keys)
    for name, value in options.items():
        setattr(p, name, value)
    label = f"{sizes} lengths {lengths} queries {Nq} page {page} {sorted(options)} {options['causal']}"
    return case_of(rng, p, label), pools, arguments


def paged_inputs(p, pools, arguments, q):
    return {"q": to_mlx(q, p.dtype), "k": to_mlx(pools.k, p.dtype), "v": to_mlx(pools.v, p.dtype)} | {
        n: x for n, x in arguments.items() if mx.issubdtype(x.dtype, mx.floating)
    }
