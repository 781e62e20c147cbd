"""Boolean masks: any shape that broadcasts to [B, Hq, N, S], any strides, read in place."""

import itertools

import mlx.core as mx
import numpy as np
import oracle
import pytest
from problems import (
    READ_IN_PLACE,
    attention,
    check,
    check_case,
    make_case,
    make_problem,
    mfa,
    random_arrays,
    routes,
    to_numpy,
)

FULL = (2, 4, 33, 70)
BROADCASTS = list(itertools.product(*((1, n) for n in FULL)))


def masked_problem(seed, shape, density=0.6, **options):
    mask = np.random.default_rng(seed).random(shape) < density
    return make_problem(seed, B=2, Hq=4, Hkv=2, Nq=33, Nk=70, D=16, mask=mask, **options)


@pytest.mark.parametrize("shape", BROADCASTS)
def test_every_broadcast_shape_agrees_with_the_oracle(shape):
    check(masked_problem(sum(shape), shape))


@routes
@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (1, 4, 33, 1), (2, 4, 33, 70)])
def test_masks_combine_with_causal_and_window_on_every_route(shape, route):
    check(masked_problem(7, shape, causal=True, window=(20, -1)), backend=route)


@pytest.mark.parametrize("shape", [(70,), (33, 70), (33, 1), (4, 33, 70), (4, 1, 70)])
def test_masks_of_lower_rank_broadcast_from_the_right(shape):
    check(masked_problem(len(shape), shape))


@pytest.mark.parametrize("view", ["transposed", "stepped", "offset", "broadcast", "reversed"])
def test_strided_masks_are_read_right(view):
    p = masked_problem(11, FULL)
    case = make_case(p)
    if view == "transposed":
        mask = mx.array(p.mask.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0)
    elif view == "stepped":
        mask = mx.array(np.repeat(p.mask, 3, axis=3))[..., ::3]
    elif view == "offset":
        mask = mx.array(np.pad(p.mask, ((0, 1), (2, 0), (1, 1), (3, 4)), constant_values=True))[:2, 2:, 1:-1, 3:-4]
    elif view == "reversed":
        mask = mx.array(p.mask[..., ::-1].copy())[..., ::-1]
    else:
        p.mask = p.mask[:, :1, :, :]
        mask = mx.broadcast_to(mx.array(p.mask), FULL)
    mx.eval(mask)
    case.arrays["mask"] = mask
    check_case(case)


def blocky_mask(seed, Nq, Nk, planes=(1, 1)):
    """Shows few blocks of 64 x 32: whole tiles of kernels are hidden, also first and last ones, and some rows."""
    rng = np.random.default_rng(seed)
    blocks = rng.random((*planes, -(-Nq // 64), -(-Nk // 32))) < 0.15
    blocks[..., 1, :] = False
    mask = blocks.repeat(64, axis=2).repeat(32, axis=3)[..., :Nq, :Nk]
    return mask & (rng.random(mask.shape) < 0.9)


@pytest.mark.parametrize(
    ("D", "Nk", "dtype"),
    [(64, 1040, "float32"), (64, 1040, "bfloat16"), (128, 901, "bfloat16"), (320, 912, "bfloat16")],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (300, 50)}, {"softcap": 5.0}, {"kv_lengths": np.array([901, 411])}],
    ids=["plain", "causal", "window", "softcap", "lengths"],
)
def test_tiles_that_a_mask_hides_are_left_out(options, D, Nk, dtype):
    Nq, B = 200, 2 if "kv_lengths" in options else 1
    mask = blocky_mask(Nk + D, Nq, Nk, (B, 1))
    p = make_problem(D, B=B, Hq=4, Hkv=2, Nq=Nq, Nk=Nk, D=D, dtype=dtype, mask=mask, **options)
    hidden = ~mask.any(axis=(0, 1, 2))
    assert hidden.any()
    case = make_case(p)
    check_case(case)
    # What no row sees may be anything.
    dirty = dict(case.arrays)
    for name in ("k", "v"):
        dirty[name] = mx.where(mx.array(hidden)[:, None], mx.array(np.nan, dtype=dirty[name].dtype), dirty[name])
    clean_out, dirty_out = attention(p, case.arrays), attention(p, dirty)
    assert mx.array_equal(clean_out, dirty_out)


@routes
def test_rows_that_see_nothing_are_zero_with_zero_gradients(route):
    mask = np.ones((1, 1, 8, 12), bool)
    mask[0, 0, 2] = mask[0, 0, 5] = False
    mask[..., 7] = False
    p = make_problem(5, Hq=2, Nq=8, Nk=12, D=16, mask=mask)
    results = check(p, backend=route)
    for name in ("o", "q"):
        assert (to_numpy(results[name])[:, :, [2, 5]] == 0).all()
    assert np.isneginf(np.array(results["lse"])[:, :, [2, 5]]).all()
    for name in ("k", "v"):
        assert (to_numpy(results[name])[:, :, 7] == 0).all()


@routes
def test_mask_that_hides_everything(route):
    p = make_problem(6, B=2, Hq=2, Nq=9, Nk=40, D=16, mask=np.zeros((1, 1, 1, 1), bool))
    results = check(p, backend=route)
    for name in ("o", "q", "k", "v"):
        assert (to_numpy(results[name]) == 0).all()


def test_lower_triangular_mask_means_causal():
    q, k, v = random_arrays(8, *[(1, 2, 65, 32)] * 3)
    masked = mfa.flash_attention(q, k, v, mask=mx.array(np.tri(65, dtype=bool)[None, None]))
    assert mx.allclose(masked, mfa.flash_attention(q, k, v, causal=True), rtol=0, atol=1e-6)


def test_key_padding_mask_equals_kv_lengths():
    q, k, v = random_arrays(9, (2, 2, 5, 32), (2, 2, 90, 32), (2, 2, 90, 32))
    lengths = np.array([17, 90])
    padding = mx.array(np.arange(90)[None, :] < lengths[:, None])[:, None, None]
    masked = mfa.flash_attention(q, k, v, mask=padding)
    assert mx.allclose(masked, mfa.flash_attention(q, k, v, kv_lengths=mx.array(lengths)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2048), (1, 1, 2048, 1), (1, 1, 2048, 2048)])
def test_broadcast_masks_are_not_expanded(shape, peak_bytes):
    N, Hq = 2048, 8
    q, k, v = random_arrays(10, *[(2, Hq, N, 16)] * 3)
    mask = mx.broadcast_to(mx.random.uniform(shape=shape) < 0.9, (2, Hq, N, N))
    mx.eval(q, k, v, mask)

    def loss(q, k, v):
        return mfa.flash_attention(q, k, v, mask=mask, **READ_IN_PLACE).sum()

    peak = peak_bytes(lambda: mx.eval(mx.grad(loss, argnums=(0, 1, 2))(q, k, v)))
    assert peak < 2 * Hq * N * N / 2  # a byte an entry would be twice that
    assert peak < N * N * 8


def test_mask_is_applied_after_the_bias():
    mask = np.random.default_rng(12).random((1, 1, 1, 40)) < 0.5
    bias = np.where(mask, 0.0, 1e4)
    p = make_problem(12, Hq=2, Nq=9, Nk=40, D=16, mask=mask, bias=bias)
    check(p)
    assert np.allclose(oracle.exact(p).probs[..., ~mask[0, 0, 0]], 0)
