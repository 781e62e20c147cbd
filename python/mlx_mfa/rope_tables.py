"""Tables of rotary position embedding for tokens of a video."""

from __future__ import annotations

import mlx.core as mx

from . import _ext


def make_rope_3d_tables(
    grid_h: int,
    grid_w: int,
    num_frames: int,
    d_h: int | None = None,
    d_w: int | None = None,
    d_t: int | None = None,
    head_dim: int = 128,
    theta: float = 10000.0,
) -> tuple[mx.array, mx.array]:
    """Cosines and sines of rotary embedding (arXiv:2104.09864) for the tokens of a video, one axis after the other.

    Tokens are numbered row-major over (frame, row, column). The columns of the tables are the pairs that turn with the
    row, then those of the column, then those of the frame; pair ``p`` of an axis of ``d`` channels turns by
    ``position * theta ** (-2 * p / d)``. Angles are computed in float64.

    Args:
        grid_h, grid_w (int): Rows and columns of tokens of a frame.
        num_frames (int): Frames.
        d_h, d_w (int, optional): Channels of rows and columns, even. Default: a third of ``head_dim``, rounded down to
            an even number.
        d_t (int, optional): Channels of frames, even. Default: what ``d_h`` and ``d_w`` leave of ``head_dim``.
        head_dim (int): The head dimension that the defaults divide. Default 128.
        theta (float): Base of the frequencies. Default 10000.

    Returns:
        tuple: ``(cos, sin)``, float32 ``[num_frames * grid_h * grid_w, (d_h + d_w + d_t) // 2]``.

    Raises:
        ValueError: If a size is not positive, a width is odd or negative, or ``d_h + d_w`` exceeds ``head_dim``.
    """
    return _ext.rope_3d_tables(grid_h, grid_w, num_frames, d_h, d_w, d_t, head_dim, theta)
