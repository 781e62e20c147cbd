"""Tables of rotary embedding for video tokens: golden angles, token order, defaults, bad sizes."""

import mlx.core as mx
import numpy as np
import pytest
from problems import golden, mfa

# Float64 angles rounded once: half an ulp of a cosine or sine, and the golden file's 12 digits.
TOLERANCE = 1e-7


def expected_tables(grid_h, grid_w, num_frames, widths, theta):
    """The definition, one token at a time, in float64."""
    angles = []
    for f in range(num_frames):
        for y in range(grid_h):
            for x in range(grid_w):
                row = []
                for position, d in zip((y, x, f), widths):
                    row += [position * theta ** (-2 * p / d) for p in range(d // 2)]
                angles.append(row)
    return np.cos(angles), np.sin(angles)


@pytest.mark.parametrize(
    ("arguments", "widths", "theta"),
    [
        ({"grid_h": 3, "grid_w": 4, "num_frames": 2}, (42, 42, 44), 1e4),
        ({"grid_h": 5, "grid_w": 1, "num_frames": 3, "head_dim": 64}, (20, 20, 24), 1e4),
        ({"grid_h": 2, "grid_w": 3, "num_frames": 1, "d_h": 8, "d_w": 4, "d_t": 0, "theta": 500.0}, (8, 4, 0), 500.0),
        ({"grid_h": 2, "grid_w": 2, "num_frames": 2, "d_h": 0, "head_dim": 12}, (0, 4, 8), 1e4),
        ({"grid_h": 2, "grid_w": 2, "num_frames": 4, "d_h": 200, "d_w": 2, "d_t": 2}, (200, 2, 2), 1e4),
    ],
)
def test_tables_are_the_angles_of_row_column_and_frame(arguments, widths, theta):
    tables = mfa.make_rope_3d_tables(**arguments)
    expected = expected_tables(arguments["grid_h"], arguments["grid_w"], arguments["num_frames"], widths, theta)
    for table, values in zip(tables, expected):
        assert table.dtype == mx.float32
        assert table.shape == values.shape
        assert np.abs(np.array(table) - values).max() <= TOLERANCE


def test_golden_angles():
    for case in golden("rope.json")["three_dim"]:
        t, h, w = case["position_t_h_w"]
        d_t, d_h, d_w = case["split_t_h_w"]
        cos, sin = mfa.make_rope_3d_tables(h + 1, w + 1, t + 1, d_h, d_w, d_t)
        token = (t * (h + 1) + h) * (w + 1) + w
        assert cos.shape[1] == case["d"] // 2
        starts = {"t": (d_h + d_w) // 2, "h": 0, "w": d_h // 2}
        widths = {"t": d_t, "h": d_h, "w": d_w}
        for i, axis in enumerate("thw"):
            first, last = starts[axis], starts[axis] + widths[axis] // 2 - 1
            for pair, angles in ((first, "angles_first_of_each_axis"), (last, "angles_last_of_each_axis")):
                assert abs(cos[token, pair].item() - np.cos(case[angles][i])) <= TOLERANCE
                assert abs(sin[token, pair].item() - np.sin(case[angles][i])) <= TOLERANCE


def test_tables_are_exact_far_from_the_origin():
    cos, _ = mfa.make_rope_3d_tables(1, 1, 100_000, d_h=0, d_w=0, d_t=4)
    angle = 99_999 * np.array([1.0, 1e4**-0.5])
    assert np.abs(np.array(cos[-1]) - np.cos(angle)).max() <= TOLERANCE


MISTAKES = {
    "no rows": ((0, 4, 1), {}, "grid_h, grid_w and num_frames must be positive; got 0, 4 and 1"),
    "negative frames": ((2, 4, -1), {}, "grid_h, grid_w and num_frames must be positive; got 2, 4 and -1"),
    "odd width": ((2, 4, 1), {"d_h": 3}, "d_h must be even and not negative; got 3"),
    "odd rest": ((2, 4, 1), {"head_dim": 63}, "d_t must be even and not negative; got 23"),
    "negative width": ((2, 4, 1), {"d_w": -2}, "d_w must be even and not negative; got -2"),
    "too wide": ((2, 4, 1), {"d_h": 64, "d_w": 66}, r"d_h \+ d_w must be at most head_dim = 128; got 64 \+ 66"),
    "no channels": ((2, 4, 1), {"head_dim": 0}, "head_dim must be positive; got 0"),
    "base zero": ((2, 4, 1), {"theta": 0.0}, "theta must be finite and positive; got 0"),
    "base not a number": ((2, 4, 1), {"theta": float("nan")}, "theta must be finite and positive; got nan"),
    "too many tokens": ((2**16, 2**16, 2), {}, r"at most 2\^31 - 1 rows and columns"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_refused_with_its_reason(mistake):
    arguments, options, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=rf"^\[make_rope_3d_tables\] .*{words}"):
        mfa.make_rope_3d_tables(*arguments, **options)
