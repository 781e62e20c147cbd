"""BlockMask: lists of visible tiles made from dense masks of any rank and strides, refined, and every refusal."""

import mlx.core as mx
import numpy as np
import pytest
from problems import mfa


def lists_of(dense):
    """The lists of a ``[B, H, NQ, NK]`` mask, by the definition: (offsets, ids)."""
    offsets, ids = [], []
    for rows in dense.reshape(-1, *dense.shape[2:]):
        offsets.append(len(ids))
        for row in rows:
            ids.extend(np.flatnonzero(row))
            offsets.append(len(ids))
    return offsets, ids


def strided(mask, rng):
    """The same bool mask as an MLX array of random strides."""
    layout = rng.integers(4)
    if layout == 0:
        return mx.array(mask)
    if layout == 1:
        return mx.array(mask.swapaxes(-1, -2).copy()).swapaxes(-1, -2)
    if layout == 2:
        padded = np.zeros((*mask.shape[:-1], 2 * mask.shape[-1] + 1), bool)
        padded[..., 1::2] = mask
        return mx.array(padded)[..., 1::2]
    return mx.array(mask[..., ::-1, :].copy())[..., ::-1, :]


def test_lists_say_what_the_mask_says(seed):
    rng = np.random.default_rng(seed)
    for case in range(300):
        rank = rng.integers(2, 5)
        block = tuple(int(x) for x in rng.integers(1, 40, 2))
        tiles = rng.integers(1, 9, 2)
        lengths = [int(n * b - rng.integers(0, b)) for n, b in zip(tiles, block)]
        shape = (*rng.integers(1, 4, 2), *tiles)[4 - rank :]
        dense = rng.random(shape) < rng.choice([0, 0.1, 0.5, 1])
        mask = mfa.BlockMask(strided(dense, rng), block, q_len=lengths[0], kv_len=lengths[1])
        full = dense.reshape((1,) * (4 - rank) + dense.shape)
        assert mask.shape == full.shape, case
        assert (mask.q_len, mask.kv_len, mask.block_size) == (*lengths, block)
        offsets, ids = lists_of(full)
        assert np.array(mask.offsets).tolist() == offsets, case
        assert np.array(mask.key_ids).tolist() == ids, case
        offsets, ids = lists_of(full.swapaxes(-1, -2))
        assert np.array(mask.transposed_offsets).tolist() == offsets, case
        assert np.array(mask.query_ids).tolist() == ids, case
        assert np.array_equal(np.array(mask.counts()), full.sum(-1))
        assert mask.count == dense.sum()
        assert mask.density == pytest.approx(dense.mean())
        expected = full[0, 0] if full.shape[:2] == (1, 1) else full[0] if full.shape[0] == 1 else full
        assert np.array_equal(np.array(mask.to_dense()), expected)


def test_refined_tiles_show_the_same_tokens(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        fine, factor = rng.integers(1, 9, 2), rng.integers(1, 5, 2)
        coarse = fine * factor
        dense = rng.random((2, 3, 5)) < 0.4
        lengths = [int(n * b - rng.integers(0, b)) for n, b in zip((3, 5), coarse)]
        mask = mfa.BlockMask(mx.array(dense), tuple(map(int, coarse)), q_len=lengths[0], kv_len=lengths[1])
        refined = mask.refine(tuple(map(int, fine)))
        expected = dense.repeat(factor[0], -2).repeat(factor[1], -1)
        expected = expected[:, : -(-lengths[0] // fine[0]), : -(-lengths[1] // fine[1])]
        assert np.array_equal(np.array(refined.to_dense()), expected)


def test_lengths_default_to_whole_tiles():
    mask = mfa.BlockMask(mx.ones((3, 5), mx.bool_), (32, 16))
    assert (mask.q_len, mask.kv_len, mask.density) == (96, 80, 1.0)
    assert repr(mask) == "BlockMask(batch=1, heads=1, q_len=96, kv_len=80, block_size=(32, 16), count=15)"


def test_masks_without_tiles_are_allowed():
    mask = mfa.BlockMask(mx.zeros((2, 0, 5), mx.bool_), (32, 16))
    assert (mask.shape, mask.count, mask.density) == ((1, 2, 0, 5), 0, 0.0)
    assert mask.to_dense().shape == (2, 0, 5)


MISTAKES = {
    "float": (lambda: mfa.BlockMask(mx.ones((2, 2)), (32, 16)), r"must be bool; got float32"),
    "rank 1": (lambda: mfa.BlockMask(mx.ones((2,), mx.bool_), (32, 16)), r"must be \[NQ, NK\].*got shape \(2\)"),
    "rank 5": (lambda: mfa.BlockMask(mx.ones((1,) * 5, mx.bool_), (32, 16)), r"must be \[NQ, NK\]"),
    "lengths": (
        lambda: mfa.BlockMask(mx.ones((2, 2), mx.bool_), (32, 16), q_len=65),
        r"must have 3 by 2 tiles for 65 queries and 32 keys in blocks of \(32, 16\); got shape \(2,2\)",
    ),
    "negative": (lambda: mfa.BlockMask(mx.ones((2, 2), mx.bool_), (32, 16), kv_len=-1), "0 to 2.31 - 1; got 64 .* -1"),
    "no side": (lambda: mfa.BlockMask(mx.ones((2, 2), mx.bool_), (32, 0)), r"positive integers.*got \(32, 0\)"),
    "wide side": (lambda: mfa.BlockMask(mx.ones((2, 2), mx.bool_), (2**62, 1)), "positive integers below"),
    "many tokens": (lambda: mfa.BlockMask(mx.ones((2, 2), mx.bool_), (2**31 - 1, 1)), "0 to 2.31 - 1; got 4294967294"),
    "no heads": (
        lambda: mfa.BlockMask(mx.ones((0, 2, 2), mx.bool_), (32, 16)),
        "at least one batch entry and one head",
    ),
    "refine": (lambda: mfa.BlockMask(mx.ones((2, 2), mx.bool_), (32, 16)).refine((16, 3)), r"must divide \(32, 16\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_error(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=r"^\[BlockMask(\.refine)?\] .*" + message):
        call()
