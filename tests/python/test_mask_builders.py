"""The mask builders: the documented rule of tiles by plain numpy, brute force over tokens, and every refusal.

The C++ tests hold each rule of tokens to an independent one; here the rule over tokens is the builder's own
``as_tokens``, checked for what the names promise, and the tiles are those of the table in docs/masks.md.
"""

import inspect

import mlx.core as mx
import numpy as np
import pytest
from problems import mfa

CASES = 300


def cases(seed, family):
    for index in range(CASES):
        yield index, np.random.default_rng([seed, family, index])


def as_array(mask):
    return np.array(mask)


def block_of(rng):
    return tuple(int(x) for x in rng.integers(1, 24, 2))


def ranges(tokens, side):
    """First and last token of each tile."""
    first = np.arange(0, tokens, side)
    return first, np.minimum(first + side, tokens) - 1


def gap(q, k):
    """Distances of closed ranges, 0 where they overlap."""
    return np.maximum(0, np.maximum(q[0][:, None] - k[1][None], k[0][None] - q[1][:, None]))


def boxes(shape, side):
    """Lowest and highest coordinate of each tile along each axis."""
    places = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape))
    first, last = ranges(places.shape[1], side)
    return [
        (
            np.array([p[a : b + 1].min() for a, b in zip(first, last)]),
            np.array([p[a : b + 1].max() for a, b in zip(first, last)]),
        )
        for p in places
    ]


def tiles_of_tokens(tokens, block):
    """The tiles that hold a True of a mask over tokens."""
    padded = np.zeros([-(-n // b) * b for n, b in zip(tokens.shape, block)], bool)
    padded[: tokens.shape[0], : tokens.shape[1]] = tokens
    return padded.reshape(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1]).any((1, 3))


def check(builder, arguments, block, expected, label, is_exact=False):
    """The tiles are the expected ones and cover the rule over tokens; lists and exact tiles agree with it."""
    tiles = builder(*arguments, block_size=block)
    assert tiles.dtype == mx.bool_
    tiles = as_array(tiles)
    assert np.array_equal(tiles, expected), label
    lists = builder(*arguments, block_size=block, as_lists=True)
    assert np.array_equal(as_array(lists.to_dense()), tiles), label
    assert lists.block_size == block
    tokens = as_array(builder(*arguments, block_size=block, as_tokens=True))
    wanted = tiles_of_tokens(tokens, block)
    assert not (wanted & ~tiles).any(), label
    assert np.array_equal(as_array(builder(*arguments, block_size=block, exact=True)), wanted), label
    if is_exact:
        assert np.array_equal(tiles, wanted), label
    return tokens


def test_causal_and_windows(seed):
    for index, rng in cases(seed, 1):
        n, w, sinks, block, causal = (
            int(rng.integers(1, 200)),
            int(rng.integers(0, 60)),
            int(rng.integers(0, 40)),
            block_of(rng),
            bool(rng.integers(2)),
        )
        q, k = ranges(n, block[0]), ranges(n, block[1])
        below = k[0][None] <= q[1][:, None]
        tokens = check(mfa.make_causal_block_mask, (n,), block, below, index, True)
        assert np.array_equal(tokens, np.tri(n, dtype=bool))
        window = (k[1][None] >= q[0][:, None] - w) & (k[0][None] <= q[1][:, None] + w) & (below | (not causal))
        tokens = check(mfa.make_sliding_window_mask, (n, w, 128, causal), block, window, index, True)
        i, j = np.arange(n)[:, None], np.arange(n)[None]
        assert np.array_equal(tokens, (abs(i - j) <= w) & ((j <= i) | (not causal)))
        sink = window | (np.arange(len(k[0])) < -(-sinks // block[1]))[None]
        check(mfa.make_sink_window_mask, (n, w, sinks, 128, causal), block, sink, index, True)


def test_spatial(seed):
    for index, rng in cases(seed, 2):
        h, w, t = (int(x) for x in rng.integers(1, 12, 3))
        t = min(t, 6)
        patch, time_patch, block = int(rng.integers(1, 3)), int(rng.integers(1, 3)), block_of(rng)
        r, rt = int(rng.integers(0, 6)), int(rng.integers(0, 4))
        height, width, frames = h * patch + int(rng.integers(patch)), w * patch, t * time_patch
        q, k = boxes((t, h, w), block[0]), boxes((t, h, w), block[1])
        gaps = [gap(a, b) for a, b in zip(q, k)]
        expected = (gaps[0] <= rt) & (gaps[1] <= r) & (gaps[2] <= r)
        check(mfa.make_spatial_3d_mask, (height, width, frames, r, rt, 128, patch, time_patch), block, expected, index)
        q, k = boxes((h, w), block[0]), boxes((h, w), block[1])
        expected = (gap(q[0], k[0]) <= r) & (gap(q[1], k[1]) <= r)
        check(mfa.make_spatial_2d_mask, (height, width, r, 128, patch), block, expected, index)


def test_adaptive_window(seed):
    for index, rng in cases(seed, 3):
        h, w, t = (int(x) for x in rng.integers(1, 9, 3))
        base, block = [int(x) for x in rng.integers(0, 20, 3)], block_of(rng)
        train, now = [tuple(int(x) for x in rng.integers(1, 9, 2)) for _ in range(2)]
        radii = [base[2] // 2, *(max(1, base[x] * train[x] // now[x]) // 2 for x in range(2))]
        gaps = [gap(a, b) for a, b in zip(boxes((t, h, w), block[0]), boxes((t, h, w), block[1]))]
        expected = (gaps[0] <= radii[0]) & (gaps[1] <= radii[1]) & (gaps[2] <= radii[2])
        check(mfa.make_adaptive_window_mask, (h, w, t, *base, train, now), block, expected, index)


def test_segments(seed):
    for index, rng in cases(seed, 4):
        lengths = [int(x) for x in rng.integers(0, 40, rng.integers(1, 6))]
        ids = np.repeat(np.arange(len(lengths)), lengths)
        block, n = block_of(rng), len(ids)
        if n == 0:
            continue
        q, k = ranges(n, block[0]), ranges(n, block[1])
        same = gap((ids[q[0]], ids[q[1]]), (ids[k[0]], ids[k[1]])) == 0
        tokens = check(mfa.make_segment_mask, (lengths,), block, same, index, True)
        assert np.array_equal(tokens, ids[:, None] == ids[None])
        causal = same & (k[0][None] <= q[1][:, None])
        check(mfa.make_causal_segment_mask, (lengths,), block, causal, index, True)


def test_axial_and_temporal(seed):
    for index, rng in cases(seed, 5):
        h, w, t = (int(x) for x in rng.integers(1, 9, 3))
        block, r = block_of(rng), int(rng.integers(0, 4))
        radius = None if rng.random() < 0.3 else r
        causal = bool(rng.integers(2))
        gaps = [gap(a, b) for a, b in zip(boxes((t, h, w), block[0]), boxes((t, h, w), block[1]))]
        near = (gaps[1] <= r) & (gaps[2] <= r) if radius is not None else True
        check(mfa.make_axial_spatial_mask, (h, w, t, 128, 1, radius), block, (gaps[0] == 0) & near, index)

        # The original's rule is right, and exact, where tiles divide frames; else the truth over tokens holds.
        n, hw = t * h * w, h * w
        i, j = np.arange(n)[:, None], np.arange(n)[None]
        d = i // hw - j // hw
        truth = (i % hw == j % hw) & (abs(d) <= (t if radius is None else r)) & ((d >= 0) | (not causal))
        tokens = check(
            mfa.make_axial_temporal_mask,
            (h, w, t, 128, 1, radius, causal),
            block,
            tiles_of_tokens(truth, block),
            index,
            True,
        )
        assert np.array_equal(tokens, truth)

        rate, local = int(rng.integers(1, 6)), int(rng.integers(0, 3))
        truth = (abs(d) <= local) | (d % rate == 0)
        check(mfa.make_dilated_temporal_mask, (h, w, t, rate, local), block, tiles_of_tokens(truth, block), index, True)

        frames = [int(x) for x in rng.integers(0, t, rng.integers(0, 3))]
        k = boxes((t, h, w), block[1])[0]
        touches = np.any([(k[0] <= f) & (f <= k[1]) for f in frames], 0) if frames else np.zeros(len(k[0]), bool)
        expected = touches[None] | ((gaps[0] <= local) & near)
        check(mfa.make_reference_frame_mask, (h, w, t, frames, radius, local), block, expected, index)


def test_cross_streams(seed):
    for index, rng in cases(seed, 6):
        frames = int(rng.integers(1, 6))
        nq, nk = (int(x) for x in frames * rng.integers(1, 20, 2))
        block = block_of(rng)
        q, k = ranges(nq, block[0]), ranges(nk, block[1])
        check(mfa.make_cross_stream_mask, (nq, nk), block, np.ones((len(q[0]), len(k[0])), bool), index, True)
        a, b = nq // frames, nk // frames
        overlap = gap((q[0] // a, q[1] // a), (k[0] // b, k[1] // b)) == 0
        check(
            mfa.make_cross_stream_mask,
            (nq, nk, 128, "temporal", None, None, frames, frames),
            block,
            overlap,
            index,
            True,
        )
        lengths = [[a] * frames, [b] * frames]
        check(mfa.make_cross_stream_mask, (nq, nk, 128, "segment", *lengths), block, overlap, index, True)


def test_neighbourhood(seed):
    for index, rng in cases(seed, 7):
        axes = int(rng.integers(1, 4))
        shape = [int(x) for x in rng.integers(1, (120, 14, 7)[axes - 1], axes)]
        window = [int(rng.integers(1, n + 1)) for n in shape]
        stride = [int(rng.integers(1, n + 1)) for n in window]
        block = block_of(rng)
        expected = True
        for x, (q, k) in enumerate(zip(boxes(shape, block[0]), boxes(shape, block[1]))):
            n, w, s = shape[x], window[x], stride[x]
            low = np.maximum(0, q[0] // s * s - (w - s) // 2)
            high = np.minimum(n - 1, (q[1] // s + 1) * s + -(-(w - s) // 2) - 1)
            expected = expected & (gap((low, high), k) == 0)
        check(mfa.make_gna_mask, (shape, window, stride), block, expected, index)


def test_diagonals_and_strides(seed):
    for index, rng in cases(seed, 8):
        n, block = int(rng.integers(1, 200)), block_of(rng)
        w, stride = int(rng.integers(0, 50)), int(rng.integers(1, 70))
        (q0, _), (k0, k1) = ranges(n, block[0]), ranges(n, block[1])
        centres = abs((q0 + block[0] // 2)[:, None] - (k0 + block[1] // 2)[None])
        # Exclusive ends, and token 0 counted: the tile holds a multiple of the stride.
        anchors = (k1 // stride * stride >= k0)[None]
        check(mfa.make_strided_mask, (n, w, stride), block, (centres <= w // 2 + max(block)) | anchors, index)

        side, count, width = int(rng.integers(1, 24)), int(rng.integers(0, 5)), int(rng.integers(0, 3))
        reach = count // 2 * width * side
        square = {"exact": False, "block_size": (side, side)}
        tiles = as_array(mfa.make_diagonal_mask(n, num_diagonals=count, bandwidth=width, **square))
        start = np.arange(0, n, side)
        assert np.array_equal(tiles, abs(start[:, None] - start[None]) <= reach), index
        tokens = as_array(mfa.make_diagonal_mask(n, side, count, width, as_tokens=True))
        i, j = np.arange(n)[:, None] // side, np.arange(n)[None] // side
        assert np.array_equal(tokens, abs(i - j) <= count // 2 * width)
        assert np.array_equal(
            as_array(mfa.make_diagonal_mask(n, side, count, width)), tiles_of_tokens(tokens, (32, 16))
        )


def test_temporal_groups_draw_what_numpy_draws(seed):
    for index, rng in cases(seed, 9):
        frames, size, block, key = (
            int(rng.integers(1, 9)),
            int(rng.integers(1, 30)),
            block_of(rng),
            int(rng.integers(2**32)),
        )
        groups = [
            {
                "distance_range": sorted(int(x) for x in rng.integers(0, 9, 2)),
                "density": float(rng.choice([0, 0.3, 0.8, 1])),
            }
            for _ in range(rng.integers(0, 4))
        ]
        q, k = ranges(frames * size, block[0]), ranges(frames * size, block[1])
        distance = gap([x // size for x in q], [x // size for x in k])
        draws = np.random.RandomState(key).random(distance.shape)
        expected = np.zeros(distance.shape, bool)
        for group in groups:
            low, high = group["distance_range"]
            expected |= (distance >= low) & (distance < high) & ((group["density"] >= 1) | (draws < group["density"]))
        arguments = (frames, size, groups, 128, key)
        assert np.array_equal(as_array(mfa.make_temporal_group_mask(*arguments, block_size=block)), expected), index


@pytest.mark.parametrize("decay", ["linear", "exponential", "log"])
def test_temporal_distance_bias(decay, seed):
    for index, rng in cases(seed, 10):
        frames, size, heads = (int(x) for x in rng.integers(1, 6, 3))
        rates = rng.random(heads) * 3
        rate = float(rates[0]) if heads == 1 else rates.tolist()
        bias = as_array(mfa.make_temporal_distance_bias(frames, size, heads, rate, decay))
        f = np.arange(frames * size) // size
        d = abs(f[:, None] - f[None]).astype(float)
        shape = {"linear": d, "exponential": np.expm1(d), "log": np.log1p(d)}[decay]
        exact = -rates[:, None, None] * shape
        assert bias.shape == (1, heads, frames * size, frames * size)
        assert bias.dtype == np.float32
        np.testing.assert_allclose(bias[0], exact, rtol=1e-6)

        block, threshold = block_of(rng), float(-rng.random() * 6)
        tiles = as_array(mfa.temporal_distance_bias_to_mask(mx.array(bias), threshold, block_size=block))
        assert np.array_equal(tiles, tiles_of_tokens((bias[0] >= np.float32(threshold)).any(0), block)), index


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_bias_of_any_dtype_and_strides_is_read_in_place(dtype, seed):
    rng = np.random.default_rng(seed)
    bias = mx.array(rng.normal(size=(2, 3, 50, 40)).astype(np.float32)).astype(dtype).transpose(0, 1, 3, 2)[:, :, ::2]
    wanted = tiles_of_tokens((np.array(bias.astype(mx.float32)) >= 2.5).any((0, 1)), (7, 5))
    assert np.array_equal(as_array(mfa.temporal_distance_bias_to_mask(bias, 2.5, block_size=(7, 5))), wanted)


def test_tiles_follow_the_head_dimension():
    for head_dim, block in ((32, (32, 32)), (64, (32, 32)), (65, (32, 16)), (128, (32, 16)), (256, (32, 16))):
        assert mfa.make_causal_block_mask(100, head_dim).shape == (4, -(-100 // block[1]))
        assert mfa.make_causal_block_mask(100, head_dim, as_lists=True).block_size == block


def test_one_number_is_the_side_of_a_square_tile():
    assert mfa.make_causal_block_mask(100, block_size=16, as_lists=True).block_size == (16, 16)
    with pytest.raises(
        ValueError, match=r"^\[make_\w+\] block_size must be an integer or a pair of integers; got \(1, 2, 3\)"
    ):
        mfa.make_causal_block_mask(100, block_size=(1, 2, 3))


def test_positional_parameters_are_those_of_the_replaced_package():
    expected = {
        "make_causal_block_mask": "seq_len head_dim",
        "make_sliding_window_mask": "seq_len window_size head_dim causal",
        "make_spatial_2d_mask": "height width spatial_radius head_dim patch_size",
        "make_spatial_3d_mask": "height width num_frames spatial_radius temporal_radius head_dim patch_size"
        " temporal_patch_size",
        "make_segment_mask": "segment_lengths head_dim",
        "make_causal_segment_mask": "segment_lengths head_dim",
        "make_adaptive_window_mask": "height width num_frames base_window_h base_window_w base_window_t"
        " train_resolution inference_resolution head_dim patch_size",
        "make_axial_spatial_mask": "height width num_frames head_dim patch_size spatial_radius",
        "make_axial_temporal_mask": "height width num_frames head_dim patch_size temporal_radius causal",
        "make_dilated_temporal_mask": "height width num_frames dilation_rate local_window head_dim patch_size",
        "make_sink_window_mask": "seq_len window_size num_sink_tokens head_dim causal",
        "make_reference_frame_mask": "height width num_frames reference_frames spatial_radius temporal_radius"
        " head_dim patch_size",
        "make_cross_stream_mask": "n_tokens_q n_tokens_kv head_dim pattern q_segments kv_segments q_frames kv_frames",
        "make_gna_mask": "seq_shape window_size stride head_dim",
        "make_diagonal_mask": "seq_len block_size num_diagonals bandwidth head_dim",
        "make_strided_mask": "seq_len window_size global_stride head_dim",
        "make_temporal_group_mask": "num_frames spatial_size groups head_dim seed",
        "make_temporal_distance_bias": "num_frames spatial_size num_heads decay_rate decay_type head_dim",
        "temporal_distance_bias_to_mask": "bias threshold head_dim",
    }
    for name, parameters in expected.items():
        signature = inspect.signature(getattr(mfa, name)).parameters.values()
        positional = [p.name for p in signature if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert positional == parameters.split(), name
        assert getattr(mfa, name).__doc__


MISTAKES = {
    "negative length": (lambda: mfa.make_causal_block_mask(-1), "make_causal_block_mask", "0 to 2.31 - 1; got -1"),
    "negative window": (lambda: mfa.make_sliding_window_mask(9, -1), "make_sliding_window_mask", "0 or more; got -1"),
    "negative sinks": (lambda: mfa.make_sink_window_mask(9, 1, -1), "make_sink_window_mask", "0 or more; got 1 and -1"),
    "empty image": (
        lambda: mfa.make_spatial_2d_mask(0, 4, 1),
        "make_spatial_2d_mask",
        "at least one token each; got 1, 0",
    ),
    "wide patch": (
        lambda: mfa.make_spatial_2d_mask(4, 4, 1, patch_size=5),
        "make_spatial_2d_mask",
        "at least one token",
    ),
    "no patch": (lambda: mfa.make_spatial_3d_mask(4, 4, 4, 1, 1, 64, 0), "make_spatial_3d_mask", "patch_size 0"),
    "radius": (
        lambda: mfa.make_spatial_3d_mask(4, 4, 4, 1, -1),
        "make_spatial_3d_mask",
        "temporal_radius must be 0 or",
    ),
    "huge video": (lambda: mfa.make_spatial_3d_mask(2**20, 2**20, 4, 1, 1), "make_spatial_3d_mask", "fewer than 2.31"),
    "segment": (lambda: mfa.make_segment_mask([3, -1]), "make_segment_mask", "0 to 2.31 - 1; got -1"),
    "resolution": (
        lambda: mfa.make_adaptive_window_mask(4, 4, inference_resolution=(0, 1)),
        "make_adaptive_window_mask",
        "positive",
    ),
    "dilation": (lambda: mfa.make_dilated_temporal_mask(4, 4, 4, 0), "make_dilated_temporal_mask", "1 or more; got 0"),
    "reference": (lambda: mfa.make_reference_frame_mask(4, 4, 4, [4]), "make_reference_frame_mask", "0 to 3; got 4"),
    "pattern": (lambda: mfa.make_cross_stream_mask(4, 4, pattern="x"), "make_cross_stream_mask", "got 'x'"),
    "no frames": (
        lambda: mfa.make_cross_stream_mask(4, 4, pattern="temporal"),
        "make_cross_stream_mask",
        "needs q_frames",
    ),
    "no segments": (
        lambda: mfa.make_cross_stream_mask(4, 4, pattern="segment"),
        "make_cross_stream_mask",
        "needs q_seg",
    ),
    "many frames": (
        lambda: mfa.make_cross_stream_mask(4, 4, pattern="temporal", q_frames=5, kv_frames=4),
        "make_cross_stream_mask",
        "each frame must have a token",
    ),
    "segment counts": (
        lambda: mfa.make_cross_stream_mask(4, 4, pattern="segment", q_segments=[4], kv_segments=[2, 2]),
        "make_cross_stream_mask",
        "same number of segments; got 1 and 2",
    ),
    "segment sums": (
        lambda: mfa.make_cross_stream_mask(4, 4, pattern="segment", q_segments=[4], kv_segments=[3]),
        "make_cross_stream_mask",
        "add up to 4 queries and 4 keys; got 4 and 3",
    ),
    "stride": (
        lambda: mfa.make_gna_mask((8,), (3,), (4,)),
        "make_gna_mask",
        "stride 4, window 3 and size 8 along axis 0",
    ),
    "axes": (lambda: mfa.make_gna_mask((8, 8), (3,), (1,)), "make_gna_mask", "each as many; got 2, 1 and 1"),
    "global stride": (lambda: mfa.make_strided_mask(8, 3, 0), "make_strided_mask", "1 or more; got 0"),
    "diagonals": (lambda: mfa.make_diagonal_mask(8, 0, -1), "make_diagonal_mask", "0 or more; got 0, -1 and 1"),
    "seed": (lambda: mfa.make_temporal_group_mask(2, 2, [], seed=-1), "make_temporal_group_mask", "got -1"),
    "group": (
        lambda: mfa.make_temporal_group_mask(2, 2, [{"density": 1}]),
        "make_temporal_group_mask",
        "distance_range",
    ),
    "decay": (lambda: mfa.make_temporal_distance_bias(2, 2, 1, 1.0, "x"), "make_temporal_distance_bias", 'got "x"'),
    "rates": (lambda: mfa.make_temporal_distance_bias(2, 2, 3, [1.0]), "make_temporal_distance_bias", "got 1"),
    "large bias": (
        lambda: mfa.make_temporal_distance_bias(256, 256, 1),
        "make_temporal_distance_bias",
        "at most 2 GiB",
    ),
    "integer bias": (
        lambda: mfa.temporal_distance_bias_to_mask(mx.zeros((4, 4), mx.int32)),
        "temporal_distance_bias_to_mask",
        "got int32",
    ),
    "block": (lambda: mfa.make_causal_block_mask(9, block_size=(0, 4)), "make_causal_block_mask", r"got \(0, 4\)"),
    "tokens": (lambda: mfa.make_causal_block_mask(2**20, as_tokens=True), "token_mask", "at most 2.32 elements"),
    "tile": (lambda: mfa.tile_order((4, 4), (2, 0)), "tile_order", "tile must be 1 or more along each axis; got 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_error(mistake):
    call, function, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=rf"^\[{function}\] .*{message}"):
        call()
