"""Block-sparse attention: the oracle with the expanded mask, the bits of the dense call, hidden tiles, bad masks."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from entry_points import BLOCKS, check_entry, run_block
from problems import DTYPES, cpu_kernels_only, keywords, mfa, needs_kernels, random_arrays, random_case, to_numpy

on_kernels = [needs_kernels, cpu_kernels_only]
routes = pytest.mark.parametrize("route", [pytest.param("mfa", marks=on_kernels), "composed"])

TILES = (16, 32, 48, 64, 128)


def sparse_sizes(rng):
    while True:
        B, Hkv, G = int(rng.integers(1, 4)), int(rng.choice((1, 2, 3))), int(rng.choice((1, 1, 2, 4)))
        Nq, Nk = (int(rng.choice((1, 7, 31, 64, 65, 129, 257, 300, 513))) for _ in range(2))
        if B * Hkv * G * Nq * Nk <= 3e5:
            D, Dv = (int(rng.choice((1, 8, 17, 40, 64, 72, 128))) for _ in range(2))
            return B, Hkv * G, Hkv, Nq, Nk, D, Dv


def random_block_mask(rng, B, Hq, Nq, Nk, tile):
    """A bool array of rank 2 to 4, with empty rows and columns among them."""
    lead = [(), (Hq,), (B, Hq)][int(rng.integers(3))]
    shape = (*lead, -(-Nq // tile[0]), -(-Nk // tile[1]))
    visible = rng.random(shape) < rng.choice((0.0, 0.1, 0.4, 0.8, 1.0), p=(0.05, 0.3, 0.3, 0.25, 0.1))
    if rng.random() < 0.3:
        visible &= rng.random((*shape[:-1], 1)) < 0.7
    if rng.random() < 0.3:
        visible &= rng.random((*shape[:-2], 1, shape[-1])) < 0.7
    return visible


def expanded(visible, Nq, Nk, tile):
    """The mask of tokens, of rank 4."""
    tokens = visible.repeat(tile[0], axis=-2).repeat(tile[1], axis=-1)[..., :Nq, :Nk]
    return tokens.reshape((1,) * (4 - tokens.ndim) + tokens.shape)


def random_tile(rng):
    return int(rng.choice(TILES)), int(rng.choice(TILES))


@pytest.mark.parametrize(
    ("name", "route"),
    [
        pytest.param("flash_attention_sparse", "mfa", marks=on_kernels),
        ("flash_attention_sparse", "composed"),
        pytest.param("sparse_attention_dispatch", "mfa", marks=on_kernels),
        pytest.param("sparse_attention_nax", "mfa", marks=on_kernels),
    ],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_random_block_masks_are_attention_with_the_expanded_mask(block, name, route, seed):
    def check(rng, index):
        case = random_case(rng, sparse_sizes)
        p, arrays = case.problem, case.arrays
        B, Hq, _, Nq, Nk, _, _ = p.shape
        tile = random_tile(rng)
        visible = random_block_mask(rng, B, Hq, Nq, Nk, tile)
        tokens = expanded(visible, Nq, Nk, tile)
        case.problem = dataclasses.replace(p, mask=tokens if p.mask is None else tokens & p.mask)
        case.label = f"tile {tile} mask {visible.shape} {visible.mean():.2f} {case.label}"
        given, size = mx.array(visible), tile
        if rng.random() < 0.5:
            given, size = mfa.BlockMask(given, tile, q_len=Nq, kv_len=Nk), None

        def call(x):
            options = keywords(p, x)
            if name == "flash_attention_sparse":
                options["block_size"] = size
            else:
                options |= {"block_tile": size, "token_mask": options.pop("mask", None)}
            return getattr(mfa, name)(x["q"], x["k"], x["v"], given, return_lse=True, backend=route, **options)

        check_entry(case, arrays, call, seed=index)

    run_block(block, seed, check)


@needs_kernels
@cpu_kernels_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq", [1, 70, 300])
def test_results_have_the_bits_of_the_dense_call_with_the_expanded_mask(dtype, Nq, seed):
    rng = np.random.default_rng([seed, Nq])
    for tile in ((16, 16), (64, 32), (32, 128), (128, 128)):
        Nk = 520
        q, k, v = random_arrays(7, (2, 4, Nq, 64), (2, 2, Nk, 64), (2, 2, Nk, 40), dtype=dtype)
        for density in (0.1, 0.6, 1.0):
            visible = rng.random((2, 4, -(-Nq // tile[0]), -(-Nk // tile[1]))) < density
            mask = mx.array(expanded(visible, Nq, Nk, tile))
            blocks = mfa.BlockMask(mx.array(visible), tile, q_len=Nq, kv_len=Nk)
            options = {"causal": density == 0.6, "softcap": 3.0 if density == 0.1 else 0.0}

            def sparse(q, k, v):
                return mfa.flash_attention_sparse(q, k, v, blocks, return_lse=True, **options)  # noqa: B023

            def dense(q, k, v):
                return mfa.flash_attention(q, k, v, mask=mask, return_lse=True, **options)  # noqa: B023

            for mine, expected in zip(sparse(q, k, v), dense(q, k, v)):
                assert mx.array_equal(mine, expected)


@needs_kernels
@cpu_kernels_only
def test_coarse_tiles_are_their_expansion_to_finer_ones():
    q, k, v = random_arrays(7, (1, 2, 200, 32), (1, 2, 300, 32), (1, 2, 300, 32))
    coarse = mfa.BlockMask(mx.random.uniform(shape=(4, 5)) < 0.5, (64, 64), q_len=200, kv_len=300)
    fine = coarse.refine((16, 32))
    expected = mfa.flash_attention_sparse(q, k, v, coarse)
    assert mx.array_equal(mfa.flash_attention_sparse(q, k, v, fine), expected)


@needs_kernels
@cpu_kernels_only
def test_hidden_tiles_are_not_read():
    """NaN in all keys and values that no tile shows, and in the rows of queries that see nothing."""
    tile, N = (32, 64), 300
    q, k, v = random_arrays(9, (1, 2, N, 32), (1, 1, N, 32), (1, 1, N, 32))
    visible = np.random.default_rng(1).random((10, 5)) < 0.5
    visible[:, 1], visible[:, 4], visible[3] = False, False, False
    blocks = mfa.BlockMask(mx.array(visible), tile, q_len=N, kv_len=N)
    hidden_keys = mx.array(~visible.any(0).repeat(tile[1])[:N])[None, None, :, None]
    hidden_rows = mx.array(~visible.any(1).repeat(tile[0])[:N])[None, None, :, None]
    nan = mx.array(float("nan"))

    def results(q, k, v):
        f = lambda *x: mfa.flash_attention_sparse(*x, blocks, causal=True)  # noqa: E731
        return [f(q, k, v), *mx.vjp(f, [q, k, v], [mx.ones_like(q)])[1]]

    clean = results(q, k, v)
    poisoned = results(mx.where(hidden_rows, nan, q), mx.where(hidden_keys, nan, k), mx.where(hidden_keys, nan, v))
    for mine, expected in zip(poisoned, clean):
        assert mx.array_equal(mine, expected)
    assert (clean[0][:, :, 96:128] == 0).all()


@needs_kernels
@cpu_kernels_only
def test_a_nan_reaches_only_the_rows_whose_tiles_show_it():
    tile, N = (16, 32), 128
    q, k, v = random_arrays(9, (1, 1, N, 16), (1, 1, N, 16), (1, 1, N, 16))
    visible = np.eye(8, 4, dtype=bool) | (np.arange(8)[:, None] % 4 == np.arange(4)[None])
    clean = mfa.flash_attention_sparse(q, k, v, mx.array(visible), block_size=tile)
    v[:, :, 40] = float("nan")
    out = to_numpy(mfa.flash_attention_sparse(q, k, v, mx.array(visible), block_size=tile))
    sees = visible[:, 1].repeat(tile[0])
    assert np.isnan(out[0, 0, sees]).all()
    assert np.array_equal(out[0, 0, ~sees], to_numpy(clean)[0, 0, ~sees])


def test_an_empty_mask_gives_zeros_and_no_gradient():
    q, k, v = random_arrays(9, (2, 4, 50, 16), (2, 2, 60, 16), (2, 2, 60, 16))
    nothing = mfa.BlockMask(mx.zeros((2, 2), mx.bool_), (32, 32), q_len=50, kv_len=60)
    out, lse = mfa.flash_attention_sparse(q, k, v, nothing, return_lse=True)
    assert (out == 0).all()
    assert np.isneginf(np.array(lse)).all()
    gradients = mx.grad(lambda *x: mfa.flash_attention_sparse(*x, nothing).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all((g == 0).all() for g in gradients)


@needs_kernels
@cpu_kernels_only
def test_a_full_mask_is_dense_attention():
    q, k, v = random_arrays(9, (2, 4, 70, 16), (2, 2, 90, 16), (2, 2, 90, 16))
    everything = mfa.BlockMask(mx.ones((5, 6), mx.bool_), (16, 16), q_len=70, kv_len=90)
    for options in ({}, {"causal": True}, {"window_size": (20, 3)}):
        expected = mfa.flash_attention(q, k, v, **options)
        assert mx.array_equal(mfa.flash_attention_sparse(q, k, v, everything, **options), expected)


@needs_kernels
@cpu_kernels_only
@pytest.mark.parametrize(("D", "tile"), [(32, (32, 32)), (64, (32, 32)), (128, (32, 16)), (128, (32, 32))])
def test_tiles_are_taken_from_the_shape_of_the_mask(D, tile):
    q, k, v = random_arrays(9, (1, 2, 100, D), (1, 2, 130, D), (1, 2, 130, D))
    visible = mx.random.uniform(shape=(-(-100 // tile[0]), -(-130 // tile[1]))) < 0.5
    expected = mfa.flash_attention_sparse(q, k, v, visible, block_size=tile)
    assert mx.array_equal(mfa.flash_attention_sparse(q, k, v, visible), expected)


@needs_kernels
@cpu_kernels_only
def test_other_names_are_the_same_function():
    q, k, v = random_arrays(9, (1, 2, 128, 64), (1, 2, 128, 64), (1, 2, 128, 64))
    for tile, function in ((16, mfa.sparse_attention_dispatch), (32, mfa.sparse_attention_nax)):
        visible = mx.random.uniform(shape=(128 // tile, 128 // tile)) < 0.5
        expected = mfa.flash_attention_sparse(q, k, v, visible, 0.2, True, block_size=tile)
        assert mx.array_equal(function(q, k, v, visible, scale=0.2, causal=True), expected)
        assert mx.array_equal(function(q, k, v, visible, block_tile=(tile, tile), scale=0.2, causal=True), expected)
    ignored = {"density_threshold": 1.0, "density": 0.5, "precomputed_bias": mx.zeros((1, 1, 128, 128))}
    again = mfa.sparse_attention_dispatch(q, k, v, visible, block_tile=32, scale=0.2, causal=True, **ignored)
    assert mx.array_equal(again, expected)


def test_one_block_mask_serves_compiled_and_vectorised_functions():
    q, k, v = random_arrays(9, (2, 2, 64, 16), (2, 2, 64, 16), (2, 2, 64, 16))
    blocks = mfa.BlockMask(mx.random.uniform(shape=(4, 4)) < 0.5, (16, 16))

    def f(q, k, v):
        return mfa.flash_attention_sparse(q, k, v, blocks, causal=True)

    expected = f(q, k, v)
    assert mx.array_equal(mx.compile(f)(q, k, v), expected)
    stacked = mx.vmap(f)(*(mx.stack([x, x * 0.5]) for x in (q, k, v)))
    assert mx.array_equal(stacked[0], expected)


def arguments():
    return {
        "q": mx.zeros((2, 4, 70, 8)),
        "k": mx.zeros((2, 2, 90, 8)),
        "v": mx.zeros((2, 2, 90, 6)),
        "block_mask": mx.ones((3, 3), mx.bool_),
    }


def a_block_mask(shape=(3, 3), q_len=70, kv_len=90):
    return mfa.BlockMask(mx.ones(shape, mx.bool_), (32, 32), q_len=q_len, kv_len=kv_len)


MISTAKES = {
    "float mask": (lambda: {"block_mask": mx.ones((3, 3))}, "block_mask must be bool; got float32"),
    "mask of rank 1": (
        lambda: {"block_mask": mx.ones((9,), mx.bool_)},
        r"block_mask must have shape \[NQ, NK\], \[H, NQ, NK\] or \[B, H, NQ, NK\]; got \(9\)",
    ),
    "mask of rank 5": (lambda: {"block_mask": mx.ones((1, 1, 1, 3, 3), mx.bool_)}, "block_mask must have shape"),
    "too few tiles": (
        lambda: {"block_mask": mx.ones((3, 2), mx.bool_)},
        r"block_mask must have tiles of \(32, 32\) for 70 queries and 90 keys, or block_size must be given; got",
    ),
    "tiles of another size": (
        lambda: {"block_size": (16, 32)},
        r"block_mask must have 5 by 3 tiles of \(16, 32\) for 70 queries and 90 keys; got shape \(3,3\)",
    ),
    "two sizes above 64": (
        lambda: {"q": mx.zeros((2, 4, 70, 72)), "k": mx.zeros((2, 2, 90, 72)), "block_mask": mx.ones((3, 5), mx.bool_)},
        r"block_mask must have tiles of \(32, 16\) or \(32, 32\) for",
    ),
    "tile of zero": (lambda: {"block_size": 0}, r"block_size must be positive; got \(0, 0\)"),
    "negative tile": (lambda: {"block_size": (32, -1)}, r"block_size must be positive; got \(32, -1\)"),
    "three sides": (lambda: {"block_size": (1, 2, 3)}, "block_size must be an integer or a pair of integers"),
    "fraction": (lambda: {"block_size": 1.5}, "block_size must be an integer or a pair of integers; got 1.5"),
    "heads of keys": (
        lambda: {"block_mask": mx.ones((2, 3, 3), mx.bool_)},
        "the block mask must be of 1 or 4 heads; got 2",
    ),
    "another batch": (
        lambda: {"block_mask": mx.ones((3, 4, 3, 3), mx.bool_)},
        "the block mask must be of 1 or 2 batch entries; got 3",
    ),
    "lists of other lengths": (
        lambda: {"block_mask": a_block_mask(q_len=71)},
        "the block mask must be of 70 queries and 90 keys; got one of 71 and 90",
    ),
    "lists of whole tiles": (lambda: {"block_mask": a_block_mask(q_len=None, kv_len=None)}, "got one of 96 and 96"),
    "lists of other heads": (lambda: {"block_mask": a_block_mask((3, 3, 3))}, "must be of 1 or 4 heads; got 3"),
    "q of rank 3": (lambda: {"q": mx.zeros((4, 70, 8))}, "q and k must have 4 dimensions"),
    "unknown backward": (lambda: {"backward": "fast"}, 'backward must be one of "auto", .*; got \'fast\''),
    "head dims": (lambda: {"k": mx.zeros((2, 2, 90, 7))}, "q and k must have the same head dimension; got 8 and 7"),
    "window": (lambda: {"window_size": (1,)}, "window_size must be a tuple of two integers"),
    "token mask": (lambda: {"mask": mx.ones((3, 3), mx.bool_)}, "mask must be broadcastable"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_refused_with_its_reason(mistake):
    change, words = MISTAKES[mistake]
    mfa.flash_attention_sparse(**arguments())
    with pytest.raises(ValueError, match=rf"^\[flash_attention_sparse\] .*{words}"):
        mfa.flash_attention_sparse(**(arguments() | change()))


def test_a_traced_mask_is_refused():
    given = arguments()
    mask = given.pop("block_mask")
    with pytest.raises(ValueError, match="block_mask must be known when the graph is built, not traced"):
        mx.compile(lambda m: mfa.flash_attention_sparse(**given, block_mask=m))(mask)


def test_masks_of_another_type_are_type_errors():
    for mask in (None, [[True]], np.ones((3, 3), bool)):
        with pytest.raises(TypeError):
            mfa.flash_attention_sparse(**(arguments() | {"block_mask": mask}))


def test_random_malformed_masks_are_refused_or_run(seed):
    rng = np.random.default_rng(seed)
    q, k, v = random_arrays(1, (1, 2, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8))
    ran = 0
    for _ in range(10_000):
        shape = tuple(int(n) for n in rng.choice((0, 1, 2, 3, 5), size=int(rng.integers(0, 6))))
        dtype = mx.bool_ if rng.random() < 0.9 else mx.int32
        side = rng.choice((-1, 0, 1, 8, 16, 20, 40, 2**40), size=2)
        size = None if rng.random() < 0.3 else (int(side[0]), int(side[1]))
        if rng.random() < 0.1:  # as it should be
            shape, size = (5, 2), (8, 20)
        try:
            out = mfa.flash_attention_sparse(q, k, v, mx.ones(shape, dtype), block_size=size)
        except ValueError:
            continue
        ran += 1
        assert out.shape == q.shape
        assert mx.isfinite(out).all()
    assert 500 < ran < 9000
