"""Block masks from what is in q and k: which tiles matter, before attention computes them.

``q`` is ``[B, Hq, Nq, D]`` and ``k`` ``[B, Hkv, Nk, D]``, both float32, float16 or bfloat16, of any strides; ``Hq`` is
a multiple of ``Hkv``. They are evaluated and read at once. Means and scores are float32, and blocks of equal score are
ranked by their number, the lower first. No gradient flows through a selection.

With ``as_lists=True`` a function returns a :class:`BlockMask` instead of a bool array. Each raises ValueError if
shapes, dtypes or numbers are not as documented.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from . import _ext
from ._options import tile_sides
from .masks import BlockMask, BlockSize, Mask, default_block_size
from .video_masks import radius_of, video_shape


def _result(mask: BlockMask, as_lists: bool) -> Mask:
    return mask if as_lists else mask.to_dense()


def make_topk_spatial_mask(
    q: mx.array,
    k: mx.array,
    top_k: int,
    head_dim: int = 128,
    *,
    block_size: BlockSize = None,
    as_lists: bool = False,
) -> Mask:
    """The ``top_k`` key tiles of each query tile by the product of their means, averaged over batch and heads.

    Args:
        q, k (array): As the module says.
        top_k (int): Key tiles to keep, 1 or more; all if there are fewer.
        head_dim (int): Sets the tile, as in :mod:`mlx_mfa.masks`. Default 128.
        block_size (int or tuple of int, optional): Another tile.
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, one mask for all heads.
    """
    name = "make_topk_spatial_mask"
    queries, keys = (x.shape[2] if x.ndim == 4 else 0 for x in (q, k))
    size = default_block_size(head_dim, block_size, name)
    rule = _ext.full_blocks(queries, keys, size, name)
    return _result(_ext.averaged_top_blocks(q, k, rule, top_k, name), as_lists)


def make_lcsa_mask(
    q: mx.array,
    k: mx.array,
    height: int,
    width: int,
    spatial_radius: int,
    top_k: int,
    head_dim: int = 128,
    num_frames: int = 1,
    temporal_radius: int | None = None,
    patch_size: int = 1,
    *,
    block_size: BlockSize = None,
    as_lists: bool = False,
) -> Mask:
    """Of the tiles of the 2-D or 3-D spatial mask, the ``top_k`` of each query tile as :func:`make_topk_spatial_mask`.

    Args:
        q, k (array): As the module says; a token for each place of the video.
        height, width, num_frames (int): Of the video, before patches. Default 1 frame.
        spatial_radius (int): In tokens.
        top_k (int): Key tiles to keep, 1 or more; all that are near if there are fewer.
        head_dim (int): Sets the tile, as in :mod:`mlx_mfa.masks`. Default 128.
        temporal_radius (int, optional): In frames. Default: all frames.
        patch_size (int): Side of the patch that is a token. Default 1.
        block_size (int or tuple of int, optional): Another tile.
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``, one mask for all heads.
    """
    name = "make_lcsa_mask"
    size = default_block_size(head_dim, block_size, name)
    shape = video_shape(name, height, width, num_frames, patch_size)
    space, time = radius_of(name, "spatial_radius", spatial_radius), radius_of(name, "temporal_radius", temporal_radius)
    rule = _ext.spatial_blocks(shape, (time, space, space), size, name)
    return _result(_ext.averaged_top_blocks(q, k, rule, top_k, name), as_lists)


def make_draft_mask(
    q: mx.array,
    k: mx.array,
    window_rows: int,
    window_columns: int,
    budget: int,
    *,
    local_range: int = 11,
    window_tokens: int = 128,
    as_lists: bool = False,
) -> Mask:
    """Locality-constrained sparse attention with one budget for each head and time chunk (FlashVSR, arXiv:2510.12747).

    Tokens lie window by window (see :func:`tile_order`), ``window_rows * window_columns`` windows to a time chunk; keys
    may have more chunks than queries. A window sees those within ``local_range`` rows and columns around it, cut at the
    borders, in every chunk. The products of means, scaled by ``D ** -0.5``, get a softmax over the keys of each window;
    of all entries of a chunk those stay that are larger than the ``budget + 1``-th. A window may be left with none.

    Args:
        q, k (array): As the module says.
        window_rows, window_columns (int): Windows of a chunk.
        budget (int): Tiles to keep of a head and chunk; in the paper ``int(ratio * windows ** 2) - 1``.
        local_range (int): Side of the square of windows that a window sees. Default 11.
        window_tokens (int): Tokens of a window, which is a tile. Default 128, those of 2 by 8 by 8.
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[B, Hq, NQ, NK]``, without the axes of extent 1 in front.
    """
    mask = _ext.draft_blocks(q, k, window_rows, window_columns, budget, local_range, window_tokens)
    return _result(mask, as_lists)


def _share(function: str, name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"[{function}] {name} must be 0 to 1; got {value}")
    return value


def make_vsa_mask(
    q: mx.array,
    k: mx.array,
    sparsity: float = 0.9,
    *,
    block_size: int | Sequence[int] = (64, 64),
    q_sizes: Sequence[int] | None = None,
    kv_sizes: Sequence[int] | None = None,
    as_lists: bool = False,
) -> Mask:
    """The best key tiles of each query tile by the product of means (video sparse attention, arXiv:2505.13389).

    Args:
        q, k (array): As the module says, tile by tile.
        sparsity (float): Share of key tiles to leave out; ``ceil((1 - sparsity) * NK)`` stay, at least 1. Default 0.9.
        block_size (int or tuple of int): The tile. Default (64, 64), cubes of 4.
        q_sizes, kv_sizes (sequence of int, optional): Tokens of each tile that are not padding; they come first.
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[B, Hq, NQ, NK]``, without the axes of extent 1 in front.
    """
    name, size = "make_vsa_mask", tile_sides(block_size, "make_vsa_mask")
    _share(name, "sparsity", sparsity)
    tiles = -(-k.shape[2] // max(1, size[1])) if k.ndim == 4 else 0
    # A share such as 1 - 0.9 is a little above 0.1 in binary: what exceeds a whole tile by rounding is no further tile.
    top_k = max(1, math.ceil((1 - sparsity) * tiles - 1e-9 * tiles))
    q_rows, kv_rows = ([int(n) for n in sizes or ()] for sizes in (q_sizes, kv_sizes))
    return _result(_ext.pooled_top_blocks(q, k, top_k, False, q_rows, kv_rows, size, name), as_lists)


def make_sla_mask(
    q: mx.array,
    k: mx.array,
    ratio: float = 0.1,
    *,
    block_size: int | Sequence[int] = (128, 64),
    as_lists: bool = False,
) -> Mask:
    """The tiles of sparse-linear attention (arXiv:2509.24006) that get softmax attention.

    The mean key of all tokens is taken from the keys; then the ``int(ratio * NK)`` best key tiles of each query tile,
    at least 1, by the product of means.

    Args:
        q, k (array): As the module says.
        ratio (float): Share of key tiles to keep. Default 0.1.
        block_size (int or tuple of int): The tile. Default (128, 64).
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[B, Hq, NQ, NK]``, without the axes of extent 1 in front.
    """
    name, size = "make_sla_mask", tile_sides(block_size, "make_sla_mask")
    _share(name, "ratio", ratio)
    tiles = -(-k.shape[2] // max(1, size[1])) if k.ndim == 4 else 0
    top_k = max(1, int(ratio * tiles))
    return _result(_ext.pooled_top_blocks(q, k, top_k, True, [], [], size, name), as_lists)


def make_sparge_mask(
    q: mx.array,
    k: mx.array,
    *,
    mass: float = 0.98,
    fraction: float | None = None,
    similarity: float = 0.6,
    causal: bool = False,
    sink: bool = False,
    block_size: int | Sequence[int] = (128, 64),
    as_lists: bool = False,
) -> Mask:
    """Key tiles that hold most of the attention, where means can tell (SpargeAttn, arXiv:2502.18137).

    A tile whose tokens differ (the mean cosine between them is below ``similarity``) is kept with all its partners. Of
    the others a query tile keeps the shortest ranking whose softmax of products of means adds up to ``mass``.

    Args:
        q, k (array): As the module says.
        mass (float): Default 0.98.
        fraction (float, optional): Keep this share of the key tiles instead, at least one.
        similarity (float): Default 0.6; -1 switches the test off.
        causal (bool): Only tiles with a key that some query of the tile sees. Default False.
        sink (bool): Keep the first key tile. Default False.
        block_size (int or tuple of int): The tile. Default (128, 64).
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[B, Hq, NQ, NK]``, without the axes of extent 1 in front.
    """
    size = tile_sides(block_size, "make_sparge_mask")
    return _result(_ext.similarity_mass_blocks(q, k, mass, fraction, similarity, causal, sink, size), as_lists)


def make_xattention_mask(
    q: mx.array,
    k: mx.array,
    *,
    threshold: float = 0.9,
    stride: int = 16,
    causal: bool = False,
    block_size: int | Sequence[int] = (128, 128),
    as_lists: bool = False,
) -> Mask:
    """Key tiles by sums along the antidiagonals of their scores (XAttention, arXiv:2503.16428).

    Scores are sums of ``stride`` products along the antidiagonals of squares of ``stride`` tokens, by ``D ** -0.5 /
    stride``; their softmax over the keys is added up in each tile. A query tile keeps the shortest ranking that reaches
    the share ``threshold``; causal, also the first tile and those on the diagonal.

    Args:
        q, k (array): As the module says.
        threshold (float): Default 0.9.
        stride (int): Divides the block size. Default 16.
        causal (bool): Only tiles with a key that some query of the tile sees. Default False.
        block_size (int or tuple of int): The tile. Default (128, 128).
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[B, Hq, NQ, NK]``, without the axes of extent 1 in front.
    """
    size = tile_sides(block_size, "make_xattention_mask")
    return _result(_ext.antidiagonal_blocks(q, k, threshold, stride, causal, size), as_lists)


def make_sliding_tile_mask(
    tiles: Sequence[int],
    window: Sequence[int],
    *,
    tile_tokens: int = 384,
    text_tokens: int = 0,
    block_size: BlockSize = None,
    as_lists: bool = False,
) -> Mask:
    """Sliding tile attention (arXiv:2502.04507): tiles within a window of tiles that stays inside the grid.

    Along each axis tile j is visible to tile i if ``|clamp(i, w // 2, n - 1 - w // 2) - j| <= w // 2``, so an even
    window covers one tile more than it says.

    Args:
        tiles (sequence of int): Tiles along each of 1 to 3 axes; see :func:`tile_order` for the order of tokens.
        window (sequence of int): Tiles of the window along each axis.
        tile_tokens (int): Tokens of a tile. Default 384, those of 6 by 8 by 8.
        text_tokens (int): Tokens after the tiles that see all and are seen by all. Default 0.
        block_size (int or tuple of int, optional): Smaller tiles; the sides divide ``tile_tokens``.
        as_lists (bool): Return a BlockMask. Default False.

    Returns:
        array or BlockMask: bool ``[NQ, NK]``.
    """
    rule = _ext.sliding_tile_blocks(list(tiles), list(window), tile_tokens, text_tokens)
    if block_size is None:
        return rule.lists() if as_lists else rule.tiles()
    return _result(rule.lists().refine(tile_sides(block_size, "make_sliding_tile_mask")), as_lists)
