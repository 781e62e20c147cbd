"""Builders of block masks: which tiles of queries and keys block-sparse attention computes.

A builder gives a bool array ``[NQ, NK]``: entry (r, c) says whether the queries of tile r are multiplied with the keys
of tile c. Tokens of a video are numbered row-major over (frame, row, column); ``patch_size`` divides height and width
by integer division. A pair of tokens that the builder's rule shows always lies in a visible tile.

Every builder takes these arguments beside its own:

``head_dim`` (int)
    Sets the tile: 32 queries by 32 keys up to 64, else 32 by 16. Default 128.
``block_size`` (int or tuple of int)
    ``(block_q, block_k)``, or one number for both: another tile.
``exact`` (bool)
    Leave out tiles that hold no visible pair of tokens; boxes around tiles, which the spatial builders go by, keep
    some. It takes a test of token pairs in each tile.
``as_lists`` (bool)
    Return a :class:`BlockMask`, built without the dense mask in between.
``as_tokens`` (bool)
    Return the rule itself, a bool array ``[Nq, Nk]`` over tokens.

Every builder raises ValueError if a number is not as its documentation says; the message says what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from . import _ext
from ._ext import BlockMask
from ._options import tile_sides

BlockSize = int | Sequence[int] | None
Mask = mx.array | BlockMask


def default_block_size(head_dim: int, block_size: BlockSize, function: str) -> tuple[int, int]:
    """``(block_q, block_k)`` of a mask for heads of ``head_dim`` channels, unless ``block_size`` says another."""
    if block_size is not None:
        return tile_sides(block_size, function)
    return (32, 32) if head_dim <= 64 else (32, 16)


def _mask(rule: _ext.BlockRule, exact: bool, as_lists: bool, as_tokens: bool) -> Mask:
    if as_tokens:
        return rule.tokens()
    if exact:
        rule = rule.exact()
    return rule.lists() if as_lists else rule.tiles()


def _video(
    function: str, height: int, width: int, frames: int, patch: int, temporal_patch: int = 1
) -> tuple[int, int, int]:
    """(frames, height, width) in tokens."""
    if patch < 1 or temporal_patch < 1:
        raise ValueError(
            f"[{function}] patch sizes must be 1 or more; got patch_size {patch}, temporal_patch_size {temporal_patch}"
        )
    return frames // temporal_patch, height // patch, width // patch


def _radius(function: str, name: str, radius: int | None) -> int:
    """The radius, -1 for None."""
    if radius is None:
        return -1
    if radius < 0:
        raise ValueError(f"[{function}] {name} must be 0 or more; got {radius}")
    return radius


def make_causal_block_mask(
    seq_len: int,
    head_dim: int = 128,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Key j is visible to query i if ``j <= i``.

    Args:
        seq_len (int): Tokens.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_causal_block_mask")
    rule = _ext.causal_blocks(seq_len, size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_sliding_window_mask(
    seq_len: int,
    window_size: int,
    head_dim: int = 128,
    causal: bool = False,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Key j is visible to query i if ``|i - j| <= window_size``, and ``j <= i`` if causal.

    Args:
        seq_len (int): Tokens.
        window_size (int): Tokens on either side.
        causal (bool): Only keys up to the query. Default False.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_sliding_window_mask")
    rule = _ext.sliding_window_blocks(seq_len, window_size, causal, size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_spatial_2d_mask(
    height: int,
    width: int,
    spatial_radius: int,
    head_dim: int = 128,
    patch_size: int = 1,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Tokens of an image at most ``spatial_radius`` rows and columns apart, by the boxes around tiles.

    Args:
        height, width (int): Of the image, before patches.
        spatial_radius (int): In tokens.
        patch_size (int): Side of the patch that is a token. Default 1.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_spatial_2d_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = _video(name, height, width, 1, patch_size)
    radius = _radius(name, "spatial_radius", spatial_radius)
    rule = _ext.spatial_blocks(shape, (0, radius, radius), size, name)
    return _mask(rule, exact, as_lists, as_tokens)


def make_spatial_3d_mask(
    height: int,
    width: int,
    num_frames: int,
    spatial_radius: int,
    temporal_radius: int,
    head_dim: int = 128,
    patch_size: int = 1,
    temporal_patch_size: int = 1,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Tokens of a video at most the radii apart in rows and columns and in frames, by the boxes around tiles.

    Args:
        height, width, num_frames (int): Of the video, before patches.
        spatial_radius (int): In tokens, of rows and of columns.
        temporal_radius (int): In frames of tokens.
        patch_size, temporal_patch_size (int): Sides of the patch that is a token. Default 1.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_spatial_3d_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = _video(name, height, width, num_frames, patch_size, temporal_patch_size)
    space, time = _radius(name, "spatial_radius", spatial_radius), _radius(name, "temporal_radius", temporal_radius)
    rule = _ext.spatial_blocks(shape, (time, space, space), size, name)
    return _mask(rule, exact, as_lists, as_tokens)


def make_segment_mask(
    segment_lengths: Sequence[int],
    head_dim: int = 128,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Tokens of the same segment see each other.

    Args:
        segment_lengths (sequence of int): Tokens of each segment; 0 is allowed.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    lengths = [int(n) for n in segment_lengths]
    size = default_block_size(head_dim, block_size, "make_segment_mask")
    rule = _ext.segment_blocks(lengths, lengths, False, size, "make_segment_mask")
    return _mask(rule, exact, as_lists, as_tokens)


def make_causal_segment_mask(
    segment_lengths: Sequence[int],
    head_dim: int = 128,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Key j is visible to query i if they are of the same segment and ``j <= i``.

    Args:
        segment_lengths (sequence of int): Tokens of each segment; 0 is allowed.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    lengths = [int(n) for n in segment_lengths]
    size = default_block_size(head_dim, block_size, "make_causal_segment_mask")
    rule = _ext.segment_blocks(lengths, lengths, True, size, "make_causal_segment_mask")
    return _mask(rule, exact, as_lists, as_tokens)


def make_adaptive_window_mask(
    height: int,
    width: int,
    num_frames: int = 1,
    base_window_h: int = 16,
    base_window_w: int = 16,
    base_window_t: int = 4,
    train_resolution: Sequence[int] = (256, 256),
    inference_resolution: Sequence[int] = (512, 512),
    head_dim: int = 128,
    patch_size: int = 1,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """A window of rows and columns that shrinks as the resolution grows, by the boxes around tiles.

    It reaches half of ``max(1, base * train / inference)`` to either side. The window of frames is not scaled.

    Args:
        height, width, num_frames (int): Of the video, before patches.
        base_window_h, base_window_w, base_window_t (int): Windows at the resolution of training, in tokens.
        train_resolution, inference_resolution (tuple of int): ``(height, width)``.
        patch_size (int): Side of the patch that is a token. Default 1.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_adaptive_window_mask"
    (train_h, train_w), (now_h, now_w) = train_resolution, inference_resolution
    if min(train_h, train_w, now_h, now_w) < 1:
        raise ValueError(
            f"[{name}] resolutions must be positive; got {tuple(train_resolution)} and {tuple(inference_resolution)}"
        )
    if min(base_window_h, base_window_w, base_window_t) < 0:
        raise ValueError(
            f"[{name}] windows must be 0 or more; got {base_window_h}, {base_window_w} and {base_window_t}"
        )
    rows = max(1, base_window_h * train_h // now_h) // 2
    columns = max(1, base_window_w * train_w // now_w) // 2
    size = default_block_size(head_dim, block_size, name)
    shape = _video(name, height, width, num_frames, patch_size)
    rule = _ext.spatial_blocks(shape, (base_window_t // 2, rows, columns), size, name)
    return _mask(rule, exact, as_lists, as_tokens)


def make_axial_spatial_mask(
    height: int,
    width: int,
    num_frames: int,
    head_dim: int = 128,
    patch_size: int = 1,
    spatial_radius: int | None = None,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Tokens of the same frame, at most ``spatial_radius`` rows and columns apart.

    Args:
        height, width, num_frames (int): Of the video, before patches.
        patch_size (int): Side of the patch that is a token. Default 1.
        spatial_radius (int, optional): In tokens. Default: the whole frame.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_axial_spatial_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = _video(name, height, width, num_frames, patch_size)
    radius = _radius(name, "spatial_radius", spatial_radius)
    rule = _ext.spatial_blocks(shape, (0, radius, radius), size, name)
    return _mask(rule, exact, as_lists, as_tokens)


def make_axial_temporal_mask(
    height: int,
    width: int,
    num_frames: int,
    head_dim: int = 128,
    patch_size: int = 1,
    temporal_radius: int | None = None,
    causal: bool = False,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Tokens of the same place in frames at most ``temporal_radius`` apart; causal: no later frame. Always exact.

    Args:
        height, width, num_frames (int): Of the video, before patches.
        patch_size (int): Side of the patch that is a token. Default 1.
        temporal_radius (int, optional): In frames. Default: all frames.
        causal (bool): Default False.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_axial_temporal_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = _video(name, height, width, num_frames, patch_size)
    radius = _radius(name, "temporal_radius", temporal_radius)
    rule = _ext.axial_temporal_blocks(shape, radius, causal, size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_dilated_temporal_mask(
    height: int,
    width: int,
    num_frames: int,
    dilation_rate: int,
    local_window: int = 1,
    head_dim: int = 128,
    patch_size: int = 1,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Tokens of frames at most ``local_window`` apart or apart by a multiple of ``dilation_rate``.

    Args:
        height, width, num_frames (int): Of the video, before patches.
        dilation_rate (int): 1 or more.
        local_window (int): In frames. Default 1.
        patch_size (int): Side of the patch that is a token. Default 1.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_dilated_temporal_mask")
    shape = _video("make_dilated_temporal_mask", height, width, num_frames, patch_size)
    rule = _ext.dilated_temporal_blocks(shape, dilation_rate, local_window, size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_sink_window_mask(
    seq_len: int,
    window_size: int,
    num_sink_tokens: int,
    head_dim: int = 128,
    causal: bool = False,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """The first ``num_sink_tokens`` keys, for every query, and the keys of :func:`make_sliding_window_mask`.

    Sinks are visible also to queries before them: attention that must not look ahead takes ``causal=True`` itself.

    Args:
        seq_len (int): Tokens.
        window_size (int): Tokens on either side.
        num_sink_tokens (int): Keys that all see.
        causal (bool): The window ends at the query. Default False.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_sink_window_mask")
    rule = _ext.sink_window_blocks(seq_len, window_size, num_sink_tokens, causal, size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_reference_frame_mask(
    height: int,
    width: int,
    num_frames: int,
    reference_frames: Sequence[int],
    spatial_radius: int | None = None,
    temporal_radius: int = 1,
    head_dim: int = 128,
    patch_size: int = 1,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Keys of the reference frames, for every query, and keys at most the radii away, by the boxes around tiles.

    Args:
        height, width, num_frames (int): Of the video, before patches.
        reference_frames (sequence of int): Frames that all see.
        spatial_radius (int, optional): In tokens; of other frames than the references. Default: the whole frame.
        temporal_radius (int): In frames. Default 1.
        patch_size (int): Side of the patch that is a token. Default 1.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_reference_frame_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = _video(name, height, width, num_frames, patch_size)
    space, time = _radius(name, "spatial_radius", spatial_radius), _radius(name, "temporal_radius", temporal_radius)
    references = [int(frame) for frame in reference_frames]
    rule = _ext.reference_frame_blocks(shape, references, (time, space, space), size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_cross_stream_mask(
    n_tokens_q: int,
    n_tokens_kv: int,
    head_dim: int = 128,
    pattern: str = "full",
    q_segments: Sequence[int] | None = None,
    kv_segments: Sequence[int] | None = None,
    q_frames: int | None = None,
    kv_frames: int | None = None,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Which keys of another stream the queries see.

    Args:
        n_tokens_q, n_tokens_kv (int): Tokens of the streams.
        pattern (str): ``"full"``: all. ``"temporal"``: those of the same frame, each stream's frames having
            ``tokens // frames`` tokens and the last also those left over. ``"segment"``: those of the same segment.
            Default ``"full"``.
        q_segments, kv_segments (sequence of int, optional): Lengths that add up to the tokens, as many in both.
        q_frames, kv_frames (int, optional): Frames of the streams.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.

    Raises:
        ValueError: If the pattern is unknown, or what it needs is missing or does not fit.
    """
    name, size = "make_cross_stream_mask", default_block_size(head_dim, block_size, "make_cross_stream_mask")
    if pattern == "full":
        rule = _ext.full_blocks(n_tokens_q, n_tokens_kv, size, name)
    elif pattern == "temporal":
        if q_frames is None or kv_frames is None:
            raise ValueError(f'[{name}] pattern "temporal" needs q_frames and kv_frames; got {q_frames}, {kv_frames}')
        rule = _ext.cross_frame_blocks(n_tokens_q, n_tokens_kv, q_frames, kv_frames, size, name)
    elif pattern == "segment":
        if q_segments is None or kv_segments is None:
            raise ValueError(
                f'[{name}] pattern "segment" needs q_segments and kv_segments; got {q_segments}, {kv_segments}'
            )
        queries, keys = [int(n) for n in q_segments], [int(n) for n in kv_segments]
        if (sum(queries), sum(keys)) != (n_tokens_q, n_tokens_kv):
            raise ValueError(
                f"[{name}] segments must add up to {n_tokens_q} queries and {n_tokens_kv} keys;"
                f" got {sum(queries)} and {sum(keys)}"
            )
        rule = _ext.segment_blocks(queries, keys, False, size, name)
    else:
        raise ValueError(f'[{name}] pattern must be "full", "temporal" or "segment"; got {pattern!r}')
    return _mask(rule, exact, as_lists, as_tokens)


def make_gna_mask(
    seq_shape: Sequence[int],
    window_size: Sequence[int],
    stride: Sequence[int],
    head_dim: int = 128,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Tokens that are neighbours in :func:`flash_attention_gna`, by the boxes around tiles.

    Args:
        seq_shape (sequence of int): Tokens along each of 1 to 3 axes.
        window_size (sequence of int): Keys of a query along each axis; windows are cut at the borders.
        stride (sequence of int): Queries that share a window; ``1 <= stride <= window <= size``.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_gna_mask")
    rule = _ext.neighbourhood_blocks(list(seq_shape), list(window_size), list(stride), size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_diagonal_mask(
    seq_len: int,
    block_size: int | Sequence[int] = 0,
    num_diagonals: int = 1,
    bandwidth: int = 1,
    head_dim: int = 128,
    *,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Blocks of tokens on the diagonal and beside it: at most ``num_diagonals // 2 * bandwidth`` blocks apart.

    Args:
        seq_len (int): Tokens.
        block_size (int or tuple of int): Tokens of a block of the pattern; 0: the keys of a tile. A tuple is, as in
            the other builders, the tile ``(block_q, block_k)``. Default 0.
        num_diagonals (int): Diagonals of blocks, the main one included. Default 1.
        bandwidth (int): Blocks that a diagonal is wide. Default 1.
        head_dim, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    if isinstance(block_size, int):
        block, size = block_size, default_block_size(head_dim, None, "make_diagonal_mask")
    else:
        block, size = 0, default_block_size(head_dim, block_size, "make_diagonal_mask")
    if block < 0 or num_diagonals < 0 or bandwidth < 0:
        raise ValueError(
            "[make_diagonal_mask] block_size, num_diagonals and bandwidth must be 0 or more;"
            f" got {block}, {num_diagonals} and {bandwidth}"
        )
    rule = _ext.diagonal_blocks(seq_len, block or size[1], num_diagonals // 2 * bandwidth, size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_strided_mask(
    seq_len: int,
    window_size: int,
    global_stride: int,
    head_dim: int = 128,
    *,
    block_size: BlockSize = None,
    exact: bool = False,
    as_lists: bool = False,
    as_tokens: bool = False,
) -> Mask:
    """Keys at most ``window_size // 2`` away, and every key that is a multiple of ``global_stride``, token 0 included.

    Tiles are visible if their centres are within ``window_size // 2`` and the longer side of a tile; ``exact``
    tightens that.

    Args:
        seq_len (int): Tokens.
        window_size (int): Width of the window in tokens.
        global_stride (int): Distance of the keys that all see; 1 or more.
        head_dim, block_size, exact, as_lists, as_tokens: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_strided_mask")
    rule = _ext.strided_blocks(seq_len, window_size, global_stride, size)
    return _mask(rule, exact, as_lists, as_tokens)


def make_temporal_group_mask(
    num_frames: int,
    spatial_size: int,
    groups: Sequence[Mapping[str, Any]],
    head_dim: int = 128,
    seed: int = 42,
    *,
    block_size: BlockSize = None,
    as_lists: bool = False,
) -> Mask:
    """Tiles by the distance between their nearest frames, each group of distances with its density.

    A tile is visible if for some group its distance lies in the range and its draw is below the density. Each tile has
    one uniform draw, that of ``numpy.random.RandomState(seed).random((NQ, NK))``.

    Args:
        num_frames, spatial_size (int): Frames, and tokens of a frame.
        groups (sequence of dict): ``{"distance_range": (low, high), "density": p}``: ``low <= distance < high``; a
            density of 1 or more keeps all.
        seed (int): 0 to 2^32 - 1. Default 42.
        head_dim, block_size, as_lists: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.

    Raises:
        ValueError: If a group lacks a key or a number is out of range.
    """
    name = "make_temporal_group_mask"
    if not 0 <= seed < 2**32:
        raise ValueError(f"[{name}] seed must be 0 to 2^32 - 1; got {seed}")
    ranges = []
    for group in groups:
        if "distance_range" not in group or "density" not in group:
            raise ValueError(f"[{name}] a group must have distance_range and density; got {dict(group)}")
        low, high = group["distance_range"]
        # No two frames are 2^31 apart: an open range may say so by infinity.
        ranges.append((math.ceil(min(low, 2**31)), math.ceil(min(high, 2**31)), float(group["density"])))
    size = default_block_size(head_dim, block_size, "make_temporal_group_mask")
    return _mask(_ext.temporal_group_blocks(num_frames, spatial_size, ranges, seed, size), False, as_lists, False)


def make_temporal_distance_bias(
    num_frames: int,
    spatial_size: int,
    num_heads: int,
    decay_rate: float | Sequence[float] | mx.array = 1.0,
    decay_type: str = "linear",
    head_dim: int = 128,
) -> mx.array:
    """A bias that falls with the distance ``d`` of the frames of query and key, to be added to the scores.

    Args:
        num_frames, spatial_size (int): Frames, and tokens of a frame.
        num_heads (int): Heads.
        decay_rate (float or sequence of float): ``r``, one or one for each head. Default 1.
        decay_type (str): ``"linear"``: ``-r d``. ``"exponential"``: ``-r (e^d - 1)``. ``"log"``: ``-r ln(1 + d)``.
            Default ``"linear"``.
        head_dim (int): Not used.

    Returns:
        array: float32 ``[1, num_heads, N, N]`` with ``N = num_frames * spatial_size``; at most 2 GiB.

    Raises:
        ValueError: If the decay is unknown, there are not as many rates as heads, or the bias is too large.
    """
    given: Any = decay_rate.tolist() if isinstance(decay_rate, mx.array) else decay_rate
    rates = [float(r) for r in given] if isinstance(given, Sequence) else [float(given)] * num_heads
    if len(rates) != num_heads:
        raise ValueError(
            f"[make_temporal_distance_bias] decay_rate must be one number or {num_heads}, one for each head;"
            f" got {len(rates)}"
        )
    return _ext.temporal_distance_bias(num_frames, spatial_size, rates, decay_type)


def temporal_distance_bias_to_mask(
    bias: mx.array,
    threshold: float = -2.0,
    head_dim: int = 128,
    *,
    block_size: BlockSize = None,
    as_lists: bool = False,
) -> Mask:
    """Tiles in which some pair of tokens has a bias of at least ``threshold``, for some head and batch entry.

    Args:
        bias (array): ``[B, H, N, N]``, ``[H, N, N]`` or ``[N, N]``; float32, float16 or bfloat16.
        threshold (float): Default -2.
        head_dim, block_size, as_lists: As the module says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.

    Raises:
        ValueError: If the bias has another rank or dtype, or the threshold is NaN.
    """
    mask = _ext.bias_blocks(bias, threshold, default_block_size(head_dim, block_size, "temporal_distance_bias_to_mask"))
    return mask if as_lists else mask.to_dense()


def tile_order(shape: Sequence[int], tile: Sequence[int]) -> tuple[mx.array, mx.array]:
    """The order of tokens that makes tiles of a grid contiguous: ``x[..., order, :]`` has tile after tile.

    Args:
        shape (sequence of int): Tokens along each of 1 to 3 axes.
        tile (sequence of int): Tokens of a tile along each axis; tiles at the far borders may be smaller.

    Returns:
        tuple of array: int32 ``order [N]``, the row-major tokens in their new order, and int32 ``sizes`` of the tiles.

    Raises:
        ValueError: If a number is not positive, or the two are not as many.
    """
    return _ext.tile_order(list(shape), list(tile))
