"""pictures.py: draws who sees whom in docs/images, one picture for each pattern of visibility, from the library itself.

Each picture is what a public function computes: with equal scores and values that name their key, an output is positive
where the row sees the key. Rows are queries, columns are keys. Usage: python docs/pictures.py [folder]
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np
from PIL import Image, ImageDraw

IMAGES = pathlib.Path(__file__).resolve().parent / "images"
CELL, MARGIN = 12, 18
VISIBLE, HIDDEN, LINE, INK = (38, 99, 160), (232, 236, 241), (255, 255, 255), (70, 70, 70)


def seen(attend: Callable[..., mx.array], Nq: int, Nk: int) -> np.ndarray:
    """Which keys ``attend(q, k, v)`` lets each query see, bool ``[Nq, Nk]``."""
    q, k = mx.zeros((1, 1, Nq, 8)), mx.zeros((1, 1, Nk, 8))
    return np.array(attend(q, k, mx.eye(Nk)[None, None]))[0, 0] > 0


def dense(Nq: int, Nk: int, **options: object) -> np.ndarray:
    return seen(lambda q, k, v: mfa.flash_attention(q, k, v, **options), Nq, Nk)


def segments(*lengths: int) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    N = starts[-1]
    return seen(lambda q, k, v: mfa.flash_attention_varlen(q, k, v, starts, starts, causal=True), N, N)


def tiles(visible: np.ndarray, side: int, **options: object) -> np.ndarray:
    Nq, Nk = (n * side for n in visible.shape)
    blocks = mfa.BlockMask(mx.array(visible), (side, side))
    return seen(lambda q, k, v: mfa.flash_attention_sparse(q, k, v, blocks, **options), Nq, Nk)


def neighbourhood(shape: tuple, window: tuple, stride: tuple, **options: object) -> np.ndarray:
    N = int(np.prod(shape))
    return seen(lambda q, k, v: mfa.flash_attention_gna(q, k, v, shape, window, stride, **options), N, N)


def tree(parents: list[int], committed: int) -> np.ndarray:
    N = len(parents)
    return seen(lambda q, k, v: mfa.flash_attention_tree(q, k, v, parents), N, committed + N)


def topk(Nq: int, Nk: int, ratio: float) -> np.ndarray:
    q, k = (mx.random.normal((1, 1, n, 8), key=mx.random.key(n)) for n in (Nq, Nk))
    return np.array(mfa.flash_attention_topk(q, k, mx.eye(Nk)[None, None], ratio))[0, 0] > 0


def pages(table: list[list[int]], lengths: list[int], page: int, count: int) -> np.ndarray:
    """The tokens of a pool that each of the sequences sees, four causal queries a sequence."""
    q, k = mx.zeros((len(table), 1, 4, 8)), mx.zeros((count, page, 1, 8))
    v = mx.eye(count * page).reshape(count, page, 1, count * page)
    out = mfa.flash_attention_paged(q, k, v, mx.array(table), lengths, causal=True)
    return np.array(out).reshape(-1, count * page) > 0


def built(builder: Callable[..., mx.array], *arguments: object, **options: object) -> np.ndarray:
    """The mask of a builder for tiles of one token."""
    return np.array(builder(*arguments, block_size=1, **options))


def cascade(prefix: int, own: int) -> np.ndarray:
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mfa.flash_attention_cascade(q, k[:, :, :prefix], v[:, :, :prefix], k[:, :, prefix:], v[:, :, prefix:])

    return seen(attend, own, prefix + own)


def sink_window(N: int, sinks: int, window: int) -> np.ndarray:
    keys = mx.arange(N)
    mask = (keys < sinks)[None, :] | (keys[:, None] - keys[None, :] <= window)
    return dense(N, N, causal=True, mask=mask)


def checkerboard(n: int) -> np.ndarray:
    rng = np.random.default_rng(4)
    return (rng.random((n, n)) < 0.35) | np.eye(n, dtype=bool)


# name: (what is drawn, the distance of lines in cells where tiles, rows of a grid or parts of the keys are to be seen)
PICTURES: dict[str, tuple[Callable[[], np.ndarray], int]] = {
    "full": (lambda: dense(16, 24), 0),
    "causal": (lambda: dense(24, 24, causal=True), 0),
    "causal_chunk": (lambda: dense(8, 24, causal=True), 0),
    "window": (lambda: dense(24, 24, window_size=(4, 2)), 0),
    "causal_window": (lambda: dense(24, 24, causal=True, window_size=(5, 0)), 0),
    "lengths": (lambda: dense(8, 24, causal=True, kv_lengths=[17]), 0),
    "sink_window": (lambda: sink_window(24, 3, 5), 0),
    "segments": (lambda: segments(5, 11, 8), 0),
    "cascade": (lambda: cascade(16, 8), 16),
    "tree": (lambda: tree([-1, 0, 0, 1, 1, 2, 5], 8), 8),
    "block_sparse": (lambda: tiles(checkerboard(6), 4), 4),
    "block_sparse_causal": (lambda: tiles(checkerboard(6), 4, causal=True), 4),
    "gna_1d": (lambda: neighbourhood((24,), (7,), (1,)), 0),
    "gna_1d_shift": (lambda: neighbourhood((24,), (7,), (1,), boundary="shift"), 0),
    "gna_1d_stride": (lambda: neighbourhood((24,), (8,), (4,)), 0),
    "gna_1d_dilation": (lambda: neighbourhood((24,), (5,), (1,), dilation=3), 0),
    "gna_1d_causal": (lambda: neighbourhood((24,), (6,), (1,), causal=True), 0),
    "gna_2d": (lambda: neighbourhood((6, 6), (3, 3), (1, 1)), 6),
    "gna_3d": (lambda: neighbourhood((3, 4, 3), (2, 3, 3), (1, 1, 1)), 12),
    "topk": (lambda: topk(16, 24, 0.25), 0),
    "pages": (lambda: pages([[3, 1, -1], [0, 4, 2]], [7, 10], 4, 6), 4),
    "segment_mask": (lambda: built(mfa.make_segment_mask, [5, 11, 8]), 0),
    "cross_stream": (
        lambda: built(
            mfa.make_cross_stream_mask, 12, 24, pattern="segment", q_segments=[3, 5, 4], kv_segments=[8, 4, 12]
        ),
        0,
    ),
    "diagonal": (lambda: np.array(mfa.make_diagonal_mask(24, (1, 1), num_diagonals=3, bandwidth=2)), 0),
    "strided": (lambda: built(mfa.make_strided_mask, 24, 3, 6), 0),
    "spatial_2d": (lambda: built(mfa.make_spatial_2d_mask, 5, 5, 1), 5),
    "spatial_3d": (lambda: built(mfa.make_spatial_3d_mask, 3, 3, 4, 1, 1), 9),
    "axial_spatial": (lambda: built(mfa.make_axial_spatial_mask, 3, 3, 4), 9),
    "axial_temporal": (lambda: built(mfa.make_axial_temporal_mask, 3, 3, 4), 9),
    "dilated_temporal": (lambda: built(mfa.make_dilated_temporal_mask, 2, 2, 8, 3), 4),
    "reference_frame": (lambda: built(mfa.make_reference_frame_mask, 2, 3, 6, [0], temporal_radius=1), 6),
    "adaptive_window": (
        lambda: built(
            mfa.make_adaptive_window_mask, 4, 4, 2, 4, 4, 1, train_resolution=(8, 8), inference_resolution=(16, 16)
        ),
        16,
    ),
}  # fmt: skip


def draw(visible: np.ndarray, lines: int) -> Image.Image:
    """The picture of a mask, with a line after each ``lines`` cells if that is not 0."""
    rows, columns = visible.shape
    image = Image.new("RGB", (MARGIN + columns * CELL + 1, MARGIN + rows * CELL + 1), LINE)
    canvas = ImageDraw.Draw(image)
    for i, j in np.ndindex(rows, columns):
        x, y = MARGIN + j * CELL, MARGIN + i * CELL
        canvas.rectangle((x + 1, y + 1, x + CELL - 1, y + CELL - 1), VISIBLE if visible[i, j] else HIDDEN)
    for n in range(0, max(rows, columns) + 1, lines or rows + columns):
        if lines and n <= columns:
            canvas.line((MARGIN + n * CELL, MARGIN, MARGIN + n * CELL, MARGIN + rows * CELL), INK)
        if lines and n <= rows:
            canvas.line((MARGIN, MARGIN + n * CELL, MARGIN + columns * CELL, MARGIN + n * CELL), INK)
    # Arrows: keys to the right, queries down.
    middle = MARGIN // 2
    canvas.line((MARGIN, middle, MARGIN + 4 * CELL, middle), INK)
    canvas.polygon([(MARGIN + 4 * CELL + d, middle + e) for d, e in ((6, 0), (0, -4), (0, 4))], INK)
    canvas.line((middle, MARGIN, middle, MARGIN + 4 * CELL), INK)
    canvas.polygon([(middle + e, MARGIN + 4 * CELL + d) for d, e in ((6, 0), (0, -4), (0, 4))], INK)
    return image


def main(folder: pathlib.Path) -> None:
    """Writes all pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pattern, lines) in PICTURES.items():
        draw(pattern(), lines).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
