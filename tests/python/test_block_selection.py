"""Selectors: what they keep against float64 scores, where no rounding decides, and every refusal."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from problems import GOLDEN, mfa

CASES = 300
EPS = 2e-5  # float32 means and products of unit-variance rows of up to 40 channels


def cases(seed, family):
    for index in range(CASES):
        yield index, np.random.default_rng([seed, family, index])


def strided(x, dtype, rng):
    """``x`` as an MLX array of some memory layout, and its rounded values as float64."""
    layout = rng.integers(4)
    if layout == 0:
        y = mx.array(x).astype(dtype)
    elif layout == 1:  # [B, N, H, D] in memory
        y = mx.array(x.swapaxes(1, 2).copy()).astype(dtype).swapaxes(1, 2)
    elif layout == 2:  # a slice of every second row
        y = mx.array(x.repeat(2, 2)).astype(dtype)[:, :, ::2]
    else:  # the last axis is not dense
        y = mx.array(x.swapaxes(2, 3).copy()).astype(dtype).swapaxes(2, 3)
    return y, np.array(y.astype(mx.float32)).astype(np.float64)


def problem(rng, longest=120):
    """q and k as MLX arrays and as float64, keys repeated for the query heads, and a block size."""
    B, Hkv, G, D = (int(x) for x in rng.integers(1, [3, 3, 4, 41]))
    nq, nk = (int(x) for x in rng.integers(1, longest, 2))
    dtype = (mx.float32, mx.float16, mx.bfloat16)[rng.integers(3)]
    q, q64 = strided(rng.normal(size=(B, Hkv * G, nq, D)).astype(np.float32), dtype, rng)
    k, k64 = strided(rng.normal(size=(B, Hkv, nk, D)).astype(np.float32), dtype, rng)
    return q, k, q64, k64.repeat(G, 1), tuple(int(x) for x in rng.integers(1, 30, 2))


def means(x, block, sizes=None):
    tiles = -(-x.shape[2] // block)
    rows = [x[:, :, t * block : (t + 1) * block][:, :, : None if sizes is None else sizes[t]] for t in range(tiles)]
    return np.stack([r.mean(2) if r.shape[2] else np.zeros_like(x[:, :, 0]) for r in rows], 2)


def full_shape(mask, shape):
    return np.array(mask).reshape(shape)


def assert_top(kept, scores, allowed, count, label):
    """Each row keeps ``count`` allowed entries, or all there are, and none that it leaves out is better."""
    assert not (kept & ~allowed).any(), label
    assert np.array_equal(kept.sum(-1), np.minimum(count, allowed.sum(-1))), label
    worst = np.where(kept, scores, np.inf).min(-1)
    best = np.where(allowed & ~kept, scores, -np.inf).max(-1)
    assert (worst >= best - EPS).all(), label


def softmax(scores, allowed):
    e = np.where(allowed, np.exp(scores - np.where(allowed, scores, -np.inf).max(-1, keepdims=True)), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def assert_mass(kept, weights, mass, label):
    """Each row keeps a prefix of the ranking that reaches the mass, and none that is longer than needed."""
    total = np.where(kept, weights, 0).sum(-1)
    everything = weights.sum(-1)
    assert (total >= np.minimum(mass, everything) - EPS).all(), label
    smallest = np.where(kept, weights, np.inf).min(-1)
    assert ((total - smallest < mass + EPS) | ~kept.any(-1)).all(), label
    assert (smallest >= np.where(kept, -np.inf, weights).max(-1) - EPS).all(), label


def test_topk_spatial_and_lcsa_keep_the_best_averages(seed):
    for index, rng in cases(seed, 1):
        q, k, q64, k64, block = problem(rng)
        scores = (means(q64, block[0]) @ means(k64, block[1]).swapaxes(2, 3)).mean((0, 1))
        top_k = int(rng.integers(1, 8))
        kept = np.array(mfa.make_topk_spatial_mask(q, k, top_k, block_size=block))
        assert_top(kept, scores, np.ones_like(kept), top_k, index)

        h, w, t, r = (int(x) for x in rng.integers(1, 5, 4))
        n, B, H, D = h * w * t, q.shape[0], q.shape[1], q.shape[3]
        q, q64 = strided(rng.normal(size=(B, H, n, D)).astype(np.float32), q.dtype, rng)
        k, k64 = strided(rng.normal(size=(B, H, n, D)).astype(np.float32), q.dtype, rng)
        scores = (means(q64, block[0]) @ means(k64, block[1]).swapaxes(2, 3)).mean((0, 1))
        radius = None if rng.random() < 0.5 else int(rng.integers(0, 3))
        near = mfa.make_spatial_3d_mask(h, w, t, r, t if radius is None else radius, block_size=block)
        kept = mfa.make_lcsa_mask(q, k, h, w, r, top_k, 128, t, radius, block_size=block)
        assert_top(np.array(kept), scores, np.array(near), top_k, index)


def test_vsa_and_sla_keep_the_best_of_each_row(seed):
    for index, rng in cases(seed, 2):
        q, k, q64, k64, block = problem(rng)
        NQ, NK = -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1])
        shape = (*q.shape[:2], NQ, NK)
        sizes = [[int(x) for x in rng.integers(0, b + 1, n)] for n, b in ((NQ, block[0]), (NK, block[1]))]
        sizes = sizes if rng.random() < 0.5 else [None, None]
        sparsity = float(rng.choice([0, 0.3, 0.5, 0.9, 1]))
        lists = mfa.make_vsa_mask(q, k, sparsity, block_size=block, q_sizes=sizes[0], kv_sizes=sizes[1], as_lists=True)
        assert lists.shape == shape
        kept = full_shape(lists.to_dense(), shape)
        scores = means(q64, block[0], sizes[0]) @ means(k64, block[1], sizes[1]).swapaxes(2, 3)
        count = max(1, math.ceil(round((1 - sparsity) * NK, 6)))
        assert_top(kept, scores, np.ones_like(kept), count, index)

        ratio = float(rng.choice([0, 0.1, 0.5, 1]))
        kept = full_shape(mfa.make_sla_mask(q, k, ratio, block_size=block), shape)
        centred = k64 - k64.mean(2, keepdims=True)
        scores = means(q64, block[0]) @ means(centred, block[1]).swapaxes(2, 3)
        assert_top(kept, scores, np.ones_like(kept), max(1, int(ratio * NK)), index)


def test_draft_masks_keep_one_budget_within_the_neighbourhood(seed):
    for index, rng in cases(seed, 3):
        rows, columns, tokens, R = (int(x) for x in rng.integers(1, 6, 4))
        chunks_q, chunks_k, B, H, D = (int(x) for x in rng.integers(1, [4, 4, 3, 3, 20]))
        W = rows * columns
        q, q64 = strided(rng.normal(size=(B, H, chunks_q * W * tokens, D)).astype(np.float32), mx.float32, rng)
        k, k64 = strided(rng.normal(size=(B, H, chunks_k * W * tokens, D)).astype(np.float32), mx.float32, rng)
        budget = int(rng.integers(0, W * W * chunks_k + 3))
        mask = mfa.make_draft_mask(q, k, rows, columns, budget, local_range=R, window_tokens=tokens)
        kept = full_shape(mask, (B, H, chunks_q, W, chunks_k * W))
        y, x = np.divmod(np.arange(W), columns)
        dy, dx = (a[None] - a[:, None] + R // 2 for a in (y, x))
        local = np.tile((dy >= 0) & (dy < R) & (dx >= 0) & (dx < R), (1, chunks_k))
        assert not (kept & ~local).any(), index
        scores = (means(q64, tokens) @ means(k64, tokens).swapaxes(2, 3)).reshape(kept.shape) / math.sqrt(D)
        weights = softmax(scores, np.broadcast_to(local, kept.shape))
        count = kept.sum((3, 4))
        # Only entries whose weights are the same, such as those of windows that see one other, tie.
        assert (count <= budget).all(), index
        worst = np.where(kept, weights, np.inf).min((3, 4))
        left_out = np.sort(np.where(kept, -1, weights).reshape(*kept.shape[:3], -1), -1)[..., ::-1]
        assert (worst >= left_out[..., 0] - EPS).all(), index
        short = np.minimum(budget, local.sum()) - count  # entries that the budget had room for
        for b, h, c in zip(*np.nonzero(short > 0)):
            assert abs(left_out[b, h, c, 0] - left_out[b, h, c, short[b, h, c]]) <= EPS, index


def test_sparge_keeps_the_mass_and_all_that_means_cannot_judge(seed):
    for index, rng in cases(seed, 4):
        q, k, q64, k64, block = problem(rng)
        NQ, NK = -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1])
        shape = (*q.shape[:2], NQ, NK)
        mass, causal, sink = float(rng.choice([0.0, 0.3, 0.9, 1.0])), bool(rng.integers(2)), bool(rng.integers(2))
        fraction = None if rng.random() < 0.6 else float(rng.choice([0.0, 0.4, 1.0]))
        threshold = float(rng.choice([-1, 0.05, 0.2, 2]))
        options = {"mass": mass, "fraction": fraction, "similarity": threshold, "causal": causal, "sink": sink}
        kept = full_shape(mfa.make_sparge_mask(q, k, **options, block_size=block), shape)

        def similarity(x, side):
            unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
            return (means(unit, side) ** 2).sum(-1)

        sim_q, sim_k = similarity(q64, block[0]), similarity(k64, block[1])
        if min(abs(sim_q - threshold).min(), abs(sim_k - threshold).min()) < EPS:
            continue  # rounding decides
        last = np.minimum(np.arange(1, NQ + 1) * block[0], q.shape[2]) - 1 + max(0, k.shape[2] - q.shape[2])
        seen = (np.arange(NK) * block[1])[None] <= last[:, None] if causal else np.ones((NQ, NK), bool)
        forced = ((sim_q < threshold)[..., None] | (sim_k < threshold)[..., None, :]) & seen
        assert kept[forced].all(), index
        assert not (kept & ~seen).any(), index
        assert not sink or kept[..., 0].all(), index
        candidates = np.broadcast_to(seen, shape) & ~forced
        if sink:
            continue  # the first tile is kept also where the ranking would not
        scores = means(q64, block[0]) @ means(k64, block[1]).swapaxes(2, 3) / math.sqrt(q.shape[3])
        rows = candidates.any(-1)
        chosen = (kept & candidates)[rows]
        if fraction is None:
            assert_mass(chosen, softmax(scores, candidates)[rows], mass, index)
        else:
            assert_top(chosen, scores[rows], candidates[rows], max(1, int(fraction * NK)), index)
        assert kept.any(-1).all(), index


def test_xattention_keeps_the_mass_of_antidiagonals(seed):
    for index, rng in cases(seed, 5):
        q, k, q64, k64, _ = problem(rng)
        S, factor = int(rng.integers(1, 9)), rng.integers(1, 5, 2)
        block = tuple(int(S * f) for f in factor)
        threshold, causal = float(rng.choice([0.2, 0.7, 0.95, 1.0])), bool(rng.integers(2))
        NQ, NK = -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1])
        shape = (*q.shape[:2], NQ, NK)
        mask = mfa.make_xattention_mask(q, k, threshold=threshold, stride=S, causal=causal, block_size=block)
        kept = full_shape(mask, shape)

        gq, gk = -(-q.shape[2] // S), -(-k.shape[2] // S)
        scores = np.zeros((*q.shape[:2], gq, gk))
        for i in range(gq):
            for j in range(gk):
                for u in range(S):
                    a, b = i * S + S - 1 - u, j * S + u
                    if a < q.shape[2] and b < k.shape[2]:
                        scores[:, :, i, j] += (q64[:, :, a] * k64[:, :, b]).sum(-1)
        scores /= math.sqrt(q.shape[3]) * S
        offset = max(0, k.shape[2] - q.shape[2])
        end = np.minimum(np.arange(1, gq + 1) * S, q.shape[2]) - 1 + offset
        allowed = (np.arange(gk) * S)[None] <= end[:, None] if causal else np.ones((gq, gk), bool)
        weights = softmax(scores, np.broadcast_to(allowed, scores.shape))
        sums = np.zeros(shape)
        rows = np.zeros(NQ)
        for i in range(gq):
            rows[i // factor[0]] += 1
            for j in range(gk):
                sums[:, :, i // factor[0], j // factor[1]] += weights[:, :, i, j]
        sums /= rows[:, None]
        first = np.arange(NQ) * block[0] + offset
        last = np.minimum(np.arange(1, NQ + 1) * block[0], q.shape[2]) - 1 + offset
        c = np.arange(NK)
        if causal:
            seen = (c * block[1])[None] <= last[:, None]
            forced = (c == 0)[None] | ((c[None] >= first[:, None] // block[1]) & seen)
            assert not (kept & ~seen).any(), index
            assert kept[:, :, forced].all(), index
            total = np.where(kept, sums, 0).sum(-1)
            assert (total >= threshold - EPS).all(), index
            others = np.where(kept & ~forced, sums, np.inf).min(-1)
            assert (others >= np.where(kept, -np.inf, sums).max(-1) - EPS).all(), index
        else:
            assert_mass(kept, sums, threshold, index)


def test_equal_scores_keep_the_lower_blocks():
    q = k = mx.ones((1, 2, 96, 8))
    kept = np.array(mfa.make_topk_spatial_mask(q, k, 2, block_size=(32, 16)))
    assert np.array_equal(kept, np.tile(np.arange(6) < 2, (3, 1)))
    kept = np.array(mfa.make_vsa_mask(q, k, 0.5, block_size=(32, 16)))
    assert np.array_equal(kept, np.tile(np.arange(6) < 3, (2, 3, 1)))
    # One budget of four: the fifth largest ties with all, and so does everything.
    assert not np.array(mfa.make_draft_mask(q, k, 1, 3, 4, window_tokens=32)).any()


def test_a_nan_row_ranks_last():
    q = mx.ones((1, 1, 32, 8))
    k = mx.concatenate([mx.full((1, 1, 16, 8), math.nan), mx.ones((1, 1, 32, 8))], axis=2)
    assert np.array(mfa.make_topk_spatial_mask(q, k, 2, block_size=(32, 16))).tolist() == [[False, True, True]]


def test_golden_orders_and_sliding_tiles():
    golden = json.loads((GOLDEN / "block_masks.json").read_text())
    for name in ("ragged_tiles", "window_partition"):
        order, sizes = mfa.tile_order(golden[name]["dims"], golden[name]["tile"])
        expected = golden[name].get("order", golden[name].get("first_tile"))
        assert np.array(order)[: len(expected)].tolist() == expected
        assert sorted(np.array(order).tolist()) == list(range(math.prod(golden[name]["dims"])))
        assert np.array(sizes).tolist() == golden[name]["sizes"]
    for row in golden["sliding_tile"]:
        mask = np.array(mfa.make_sliding_tile_mask([row["tiles"]], [row["kernel"]]))
        assert ["".join("01"[int(x)] for x in r) for r in mask] == row["rows"]


def test_sliding_tiles_with_text_and_smaller_blocks():
    lists = mfa.make_sliding_tile_mask((2, 3, 3), (1, 3, 1), tile_tokens=64, text_tokens=70, as_lists=True)
    assert (lists.shape, lists.q_len, lists.block_size) == ((1, 1, 20, 20), 18 * 64 + 70, (64, 64))
    dense = np.array(lists.to_dense())
    assert dense[18:].all()
    assert dense[:, 18:].all()
    assert dense[0, :18].sum() == 3
    fine = np.array(
        mfa.make_sliding_tile_mask((2, 3, 3), (1, 3, 1), tile_tokens=64, text_tokens=70, block_size=(32, 16))
    )
    assert np.array_equal(fine, dense.repeat(2, 0).repeat(4, 1)[: fine.shape[0], : fine.shape[1]])


def array(*shape, dtype=mx.float32):
    return mx.zeros(shape, dtype)


Q, K = array(1, 2, 64, 8), array(1, 2, 64, 8)
MISTAKES = {
    "rank": (lambda: mfa.make_vsa_mask(array(2, 64, 8), K), "make_vsa_mask", "4 dimensions"),
    "rank of k": (lambda: mfa.make_topk_spatial_mask(Q, array(2, 64, 8), 1), "make_topk_spatial_mask", "4 dimensions"),
    "dtype": (lambda: mfa.make_sla_mask(Q, array(1, 2, 64, 8, dtype=mx.float16)), "make_sla_mask", "both the same"),
    "integer": (lambda: mfa.make_sla_mask(*[array(1, 2, 64, 8, dtype=mx.int32)] * 2), "make_sla_mask", "got int32"),
    "batch": (lambda: mfa.make_sparge_mask(Q, array(2, 2, 64, 8)), "make_sparge_mask", "agree in batch"),
    "channels": (lambda: mfa.make_sparge_mask(Q, array(1, 2, 64, 9)), "make_sparge_mask", "head dimension"),
    "heads": (lambda: mfa.make_xattention_mask(Q, array(1, 3, 64, 8)), "make_xattention_mask", "multiple.*2 and 3"),
    "empty": (lambda: mfa.make_vsa_mask(Q, array(1, 2, 0, 8)), "make_vsa_mask", "must not be empty"),
    "top_k": (lambda: mfa.make_topk_spatial_mask(Q, K, 0), "make_topk_spatial_mask", "1 or more; got 0"),
    "lcsa tokens": (lambda: mfa.make_lcsa_mask(Q, K, 4, 4, 1, 1), "make_lcsa_mask", "16 and 16 tokens; got 64 and 64"),
    "sparsity": (lambda: mfa.make_vsa_mask(Q, K, 1.5), "make_vsa_mask", "0 to 1; got 1.5"),
    "sizes": (lambda: mfa.make_vsa_mask(Q, K, q_sizes=[64, 64]), "make_vsa_mask", "q_sizes must have 1 numbers"),
    "size": (lambda: mfa.make_vsa_mask(Q, K, kv_sizes=[65]), "make_vsa_mask", "kv_sizes must be 0 to 64; got 65"),
    "ratio": (lambda: mfa.make_sla_mask(Q, K, math.nan), "make_sla_mask", "0 to 1; got nan"),
    "mass": (lambda: mfa.make_sparge_mask(Q, K, mass=math.nan), "make_sparge_mask", "mass must be 0 to 1; got nan"),
    "fraction": (lambda: mfa.make_sparge_mask(Q, K, fraction=-0.1), "make_sparge_mask", "fraction must be 0 to 1"),
    "stride": (lambda: mfa.make_xattention_mask(Q, K, stride=48), "make_xattention_mask", "must divide .*; got 48"),
    "no stride": (lambda: mfa.make_xattention_mask(Q, K, stride=0), "make_xattention_mask", "got 0"),
    "chunks": (
        lambda: mfa.make_draft_mask(Q, K, 3, 1, 5, window_tokens=32),
        "make_draft_mask",
        "whole chunks of 3 by 1",
    ),
    "windows": (lambda: mfa.make_draft_mask(Q, K, 0, 1, 5), "make_draft_mask", "got 0 and 1"),
    "budget": (lambda: mfa.make_draft_mask(Q, K, 1, 1, -1), "make_draft_mask", "budget must be 0 or more.*got -1"),
    "block": (lambda: mfa.make_vsa_mask(Q, K, block_size=(64, 0)), "make_vsa_mask", r"positive integers.*\(64, 0\)"),
    "tiles": (lambda: mfa.make_sliding_tile_mask((2, 0), (1, 1)), "make_sliding_tile_mask", "tiles must be 1 or more"),
    "window": (lambda: mfa.make_sliding_tile_mask((2, 2), (1,)), "make_sliding_tile_mask", "each as many; got 2 and 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_error(mistake):
    call, function, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=rf"^\[{function}\] .*{message}"):
        call()


def test_malformed_numbers_are_refused_or_answered(seed):
    """Ten thousand calls with small or absurd numbers: a mask, a ValueError or nanobind's TypeError, never a crash."""
    rng = np.random.default_rng(seed)
    numbers = [-(2**63), -1, 0, 1, 2, 3, 7, 64, 2**31, 2**40, 2**63 - 1, 2**64]
    shapes = [(1, 2, 64, 8), (1, 1, 64, 8), (2, 2, 5, 3), (1, 2, 0, 8), (64, 8), (1, 1, 1, 1)]
    arrays = [array(*s, dtype=d) for s in shapes for d in (mx.float32, mx.bfloat16, mx.int32)]

    def n():
        return numbers[rng.integers(len(numbers))]

    def ns():
        return [n() for _ in range(rng.integers(0, 5))]

    def x():
        return arrays[rng.integers(len(arrays))]

    def f():
        return (math.nan, -1.0, 0.0, 0.5, 1.0, math.inf)[rng.integers(6)]

    calls = [
        lambda: mfa.BlockMask(mx.ones([int(i) for i in rng.integers(0, 4, rng.integers(0, 6))], mx.bool_), (n(), n())),
        lambda: mfa.BlockMask(mx.ones((2, 2), mx.bool_), (n(), n()), q_len=n(), kv_len=n()),
        lambda: mfa.make_topk_spatial_mask(x(), x(), n(), n(), block_size=(n(), n())),
        lambda: mfa.make_lcsa_mask(x(), x(), n(), n(), n(), n(), n(), n(), n(), n(), block_size=(n(), n())),
        lambda: mfa.make_draft_mask(x(), x(), n(), n(), n(), local_range=n(), window_tokens=n()),
        lambda: mfa.make_vsa_mask(x(), x(), f(), block_size=(n(), n()), q_sizes=ns(), kv_sizes=ns()),
        lambda: mfa.make_sla_mask(x(), x(), f(), block_size=(n(), n())),
        lambda: mfa.make_sparge_mask(x(), x(), mass=f(), fraction=f(), similarity=f(), block_size=(n(), n())),
        lambda: mfa.make_xattention_mask(x(), x(), threshold=f(), stride=n(), block_size=(n(), n())),
        lambda: mfa.make_sliding_tile_mask(ns(), ns(), tile_tokens=n(), text_tokens=n()),
        lambda: mfa.tile_order(ns(), ns()),
        lambda: mfa.make_cross_stream_mask(n(), n(), n(), "temporal", None, None, n(), n()),
        lambda: mfa.make_cross_stream_mask(n(), n(), n(), "segment", ns(), ns()),
        lambda: mfa.make_temporal_distance_bias(n(), n(), int(rng.integers(-1, 3)), f()),
        lambda: mfa.temporal_distance_bias_to_mask(x(), f(), n(), block_size=(n(), n())),
        lambda: mfa.make_adaptive_window_mask(n(), n(), n(), n(), n(), n(), (n(), n()), (n(), n())),
    ]
    outcomes = {"mask": 0, "error": 0}
    for index in range(10_000):
        try:
            calls[index % len(calls)]()
            outcomes["mask"] += 1
        except (ValueError, TypeError, OverflowError):
            outcomes["error"] += 1
    assert min(outcomes.values()) > 100, outcomes
