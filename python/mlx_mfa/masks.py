"""Builders of block masks over tokens in a row: which tiles of queries and keys block-sparse attention computes.

A builder gives a bool array ``[NQ, NK]``: entry (r, c) says whether the queries of tile r are multiplied with the keys
of tile c. A pair of tokens that the builder's rule shows always lies in a visible tile.

Every builder, those of :mod:`mlx_mfa.video_masks` too, takes these arguments beside its own:

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

from collections.abc import Sequence

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


def mask_of(rule: _ext.BlockRule, exact: bool, as_lists: bool, as_tokens: bool) -> Mask:
    """What a builder returns for its rule."""
    if as_tokens:
        return rule.tokens()
    if exact:
        rule = rule.exact()
    return rule.lists() if as_lists else rule.tiles()


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
    return mask_of(rule, exact, as_lists, as_tokens)


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
    return mask_of(rule, exact, as_lists, as_tokens)


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
    return mask_of(rule, exact, as_lists, as_tokens)


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
    return mask_of(rule, exact, as_lists, as_tokens)


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
    return mask_of(rule, exact, as_lists, as_tokens)


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
    return mask_of(rule, exact, as_lists, as_tokens)


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
    return mask_of(rule, exact, as_lists, as_tokens)


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
    return mask_of(rule, exact, as_lists, as_tokens)
