"""Builders of block masks over the frames, rows and columns of a video, or over any grid.

Tokens of a video are numbered row-major over (frame, row, column); ``patch_size`` divides height and width by integer
division. The arguments that all builders share are those of :mod:`mlx_mfa.masks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from . import _ext
from .masks import BlockSize, Mask, default_block_size, mask_of


def video_shape(
    function: str, height: int, width: int, frames: int, patch: int, temporal_patch: int = 1
) -> tuple[int, int, int]:
    """(frames, height, width) in tokens."""
    if patch < 1 or temporal_patch < 1:
        raise ValueError(
            f"[{function}] patch sizes must be 1 or more; got patch_size {patch}, temporal_patch_size {temporal_patch}"
        )
    return frames // temporal_patch, height // patch, width // patch


def radius_of(function: str, name: str, radius: int | None) -> int:
    """The radius, -1 for None."""
    if radius is None:
        return -1
    if radius < 0:
        raise ValueError(f"[{function}] {name} must be 0 or more; got {radius}")
    return radius


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_spatial_2d_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = video_shape(name, height, width, 1, patch_size)
    radius = radius_of(name, "spatial_radius", spatial_radius)
    rule = _ext.spatial_blocks(shape, (0, radius, radius), size, name)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_spatial_3d_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = video_shape(name, height, width, num_frames, patch_size, temporal_patch_size)
    space, time = radius_of(name, "spatial_radius", spatial_radius), radius_of(name, "temporal_radius", temporal_radius)
    rule = _ext.spatial_blocks(shape, (time, space, space), size, name)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

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
    shape = video_shape(name, height, width, num_frames, patch_size)
    rule = _ext.spatial_blocks(shape, (base_window_t // 2, rows, columns), size, name)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_axial_spatial_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = video_shape(name, height, width, num_frames, patch_size)
    radius = radius_of(name, "spatial_radius", spatial_radius)
    rule = _ext.spatial_blocks(shape, (0, radius, radius), size, name)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_axial_temporal_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = video_shape(name, height, width, num_frames, patch_size)
    radius = radius_of(name, "temporal_radius", temporal_radius)
    rule = _ext.axial_temporal_blocks(shape, radius, causal, size)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_dilated_temporal_mask")
    shape = video_shape("make_dilated_temporal_mask", height, width, num_frames, patch_size)
    rule = _ext.dilated_temporal_blocks(shape, dilation_rate, local_window, size)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    name = "make_reference_frame_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = video_shape(name, height, width, num_frames, patch_size)
    space, time = radius_of(name, "spatial_radius", spatial_radius), radius_of(name, "temporal_radius", temporal_radius)
    references = [int(frame) for frame in reference_frames]
    rule = _ext.reference_frame_blocks(shape, references, (time, space, space), size)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, exact, as_lists, as_tokens: As :mod:`mlx_mfa.masks` says.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, unless asked otherwise.
    """
    size = default_block_size(head_dim, block_size, "make_gna_mask")
    rule = _ext.neighbourhood_blocks(list(seq_shape), list(window_size), list(stride), size)
    return mask_of(rule, exact, as_lists, as_tokens)


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
        head_dim, block_size, as_lists: As :mod:`mlx_mfa.masks` says.

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
    return mask_of(_ext.temporal_group_blocks(num_frames, spatial_size, ranges, seed, size), False, as_lists, False)


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
        head_dim, block_size, as_lists: As :mod:`mlx_mfa.masks` says.

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
