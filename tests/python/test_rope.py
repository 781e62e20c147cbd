"""flash_attention_rope and flash_attention_rope_unified: rotation at load against the float64 oracle."""

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np
import pytest
from caches import case_of, keywords, make_problem, random_options, random_sizes
from entry_points import BLOCKS, check_entry, run_block
from problems import cpu_kernels_only, golden, needs_kernels, normal, strided, to_mlx, to_numpy
from rotary import RotaryRule, rotate, tables

pytestmark = [needs_kernels, cpu_kernels_only]

POSITIONS = 256
RENAMED = {"alibi_slopes": "alibi", "attn_bias": "bias"}


def turns(p, cos, sin, q_first, k_first, interleaved):
    return (
        lambda x, back: rotate(x, cos, sin, q_first, interleaved, back),
        lambda x, back: rotate(x, cos, sin, k_first, interleaved, back),
    )


def inputs_of(p, arguments, layout="dense"):
    return {n: strided(getattr(p, n), p.dtype, layout) for n in "qkv"} | {
        n: x for n, x in arguments.items() if mx.issubdtype(x.dtype, mx.floating)
    }


def renamed(arguments):
    return {n: lambda g, n=n: {RENAMED[n]: g} for n in arguments if n in RENAMED}


@pytest.mark.parametrize("function", [mfa.flash_attention_rope, mfa.flash_attention_rope_unified])
@pytest.mark.parametrize("block", BLOCKS)
def test_random_rotations_are_within_the_error_rule(block, function, seed):
    def check(rng, index):
        B, sizes = random_sizes(rng)
        Nq, Nk = (int(rng.choice((1, 2, 7, 17, 33, 65))) for _ in "qk")
        p = make_problem(rng, [Nk] * B, Nq=Nq, **sizes)
        p.kv_lengths = None
        options, arguments = random_options(rng, B, sizes["Hq"], Nq, Nk, Nk)
        for name, value in options.items():
            setattr(p, name, value)
        rotary_dim = 2 * int(rng.integers(1, sizes["D"] // 2 + 1))
        interleaved = bool(rng.random() < 0.5)
        cos, sin = tables(POSITIONS, rotary_dim)
        given = [rng.integers(0, POSITIONS - 65, B) if rng.random() < 0.7 else int(rng.integers(0, 100)) for _ in "qk"]
        first = [np.broadcast_to(x, B) for x in given]
        q_first, k_first = (mx.array(x) if rng.random() < 0.5 and not isinstance(x, int) else x for x in given)

        def call(x):
            q, k, v = (x.pop(n) for n in "qkv")
            rope = {"cache_seqlens": q_first, "k_offset": k_first, "interleaved": interleaved}
            if rng.random() < 0.5:
                rope["rotary_dim"] = rotary_dim
            return function(q, k, v, mx.array(cos), mx.array(sin), **rope, **keywords(p), **(arguments | x))

        label = f"{sizes} Nq {Nq} Nk {Nk} rotary {rotary_dim} {interleaved} from {first} {sorted(options)}"
        case = case_of(rng, p, label)
        rule = RotaryRule(p, case.d_o, case.dlse, index, *turns(p, cos, sin, *first, interleaved))
        layout = str(rng.choice(("dense", "bnhd", "gap", "reversed", "column")))
        check_entry(case, inputs_of(p, arguments, layout), call, renamed(arguments), rule=rule)

    run_block(block, seed, check)


def rotated(x, cos, sin, first=0, interleaved=True):
    """``x`` ``[N, D]`` as a cache stores it."""
    rows = mx.array(x, mx.float32)[None, None]
    _, k, _ = mfa.flash_attention_kvcache_rope_append(
        rows, rows, rows, None, None, mx.array(cos), mx.array(sin), first, interleaved=interleaved
    )
    return np.array(k[0, 0])


def test_rotation_is_that_of_the_golden_file():
    for case in golden("rope.json")["cases"]:
        cos, sin = tables(max(case["positions"]) + 1, case["rotary_dim"], case["base"])
        for x, y, position in zip(case["x"], case["y"], case["positions"]):
            got = rotated([x], cos, sin, position, case["mode"] == "interleaved")
            assert np.abs(got[0] - y).max() < 1e-5 * (1 + position)


def test_attention_sees_the_distance_of_positions_alone(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, (2, 2, 9, 16), "float32"), "float32") for _ in "qkv")
    cos, sin = map(mx.array, tables(POSITIONS, 16))
    near = mfa.flash_attention_rope(q, k, v, cos, sin, cache_seqlens=3, k_offset=[0, 1])
    far = mfa.flash_attention_rope(q, k, v, cos, sin, cache_seqlens=[103, 103], k_offset=[100, 101])
    assert mx.allclose(near, far, rtol=1e-4, atol=1e-4).item()
    assert not mx.allclose(near, mfa.flash_attention_rope(q, k, v, cos, sin, cache_seqlens=4), atol=1e-3).item()


def test_half_split_is_interleaved_on_reordered_channels(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, (1, 2, 9, 16), "float32"), "float32") for _ in "qkv")
    cos, sin = map(mx.array, tables(POSITIONS, 16))
    order = mx.concatenate([mx.arange(0, 16, 2), mx.arange(1, 16, 2)])
    interleaved = mfa.flash_attention_rope(q, k, v, cos, sin, causal=True)
    half = mfa.flash_attention_rope(q[..., order], k[..., order], v, cos, sin, causal=True, interleaved=False)
    assert mx.allclose(interleaved, half, rtol=1e-5, atol=1e-5).item()


def test_rope_3d_makes_the_tables(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, (1, 2, 24, 32), "float32"), "float32") for _ in "qkv")
    cos, sin = mfa.make_rope_3d_tables(3, 4, 2, head_dim=32)
    expected = mfa.flash_attention_rope(q, k, v, cos, sin)
    got = mfa.flash_attention_rope(q, k, v, rope_3d={"grid_h": 3, "grid_w": 4, "num_frames": 2})
    assert mx.array_equal(got, expected).item()
    unified = mfa.flash_attention_rope_unified(
        q, k, v, rope_3d={"grid_h": 3, "grid_w": 4, "num_frames": 2, "theta": 10000.0}, causal=False
    )
    assert mx.array_equal(unified, expected).item()


def test_unified_rotates_only_queries_over_pages(seed):
    rng = np.random.default_rng(seed)
    q = to_mlx(normal(rng, (2, 2, 3, 16), "float32"), "float32")
    pool = to_mlx(normal(rng, (5, 4, 2, 16), "float32"), "float32")
    cos, sin = tables(POSITIONS, 16)
    table, lengths = mx.array([[3, 1], [0, 4]]), mx.array([8, 6])
    out = mfa.flash_attention_rope_unified(
        q, pool, pool, mx.array(cos), mx.array(sin), block_table=table, seq_lens=lengths, cache_seqlens=[5, 3]
    )
    turned = to_mlx(rotate(to_numpy(q), cos, sin, [5, 3]), "float32")
    assert mx.allclose(
        out, mfa.flash_attention_paged(turned, pool, pool, table, lengths, causal=True), atol=1e-5
    ).item()
    implied = mfa.flash_attention_rope_unified(
        q, pool, pool, mx.array(cos), mx.array(sin), block_table=table, seq_lens=lengths
    )
    assert mx.array_equal(out, implied).item()


def test_unified_appends_to_a_cache(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, (1, 2, 9, 16), "float32"), "float32") for _ in "qkv")
    cos, sin = map(mx.array, tables(POSITIONS, 16))
    whole = mfa.flash_attention_rope(q, k, v, cos, sin, causal=True)
    first, k_cache, v_cache = mfa.flash_attention_rope_unified(
        q[:, :, :6], k[:, :, :6], v[:, :, :6], cos, sin, return_updated_cache=True
    )
    rest = mfa.flash_attention_rope_unified(
        q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], cos, sin, k_cache=k_cache, v_cache=v_cache, cache_seqlens=6
    )
    assert mx.allclose(mx.concatenate([first, rest], axis=2), whole, rtol=1e-4, atol=1e-5).item()


def test_works_under_compile_checkpoint_vmap_and_async_eval(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, (2, 2, 9, 16), "float32"), "float32") for _ in "qkv")
    cos, sin = map(mx.array, tables(POSITIONS, 8))

    def function(q, k, v, first):
        return mfa.flash_attention_rope(q, k, v, cos, sin, cache_seqlens=first, causal=True)

    arguments = (q, k, v, mx.array([3, 0]))
    expected = function(*arguments)
    compiled = mx.compile(function)(*arguments)
    mx.async_eval(compiled)
    assert mx.array_equal(compiled, expected).item()
    assert mx.array_equal(mx.checkpoint(function)(*arguments), expected).item()
    mapped = mx.vmap(function, in_axes=(0, None, None, 0))(mx.stack([q, q]), k, v, mx.array([[3, 0], [1, 1]]))
    assert mx.array_equal(mapped[0], expected).item()
    assert mx.array_equal(mapped[1], function(q, k, v, mx.array([1, 1]))).item()


def test_tables_have_no_gradient(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, (1, 1, 4, 8), "float32"), "float32") for _ in "qkv")
    cos, sin = map(mx.array, tables(POSITIONS, 8))
    gradient = mx.grad(lambda c: mfa.flash_attention_rope(q, k, v, c, sin).sum())(cos)
    assert mx.all(gradient == 0).item()


MISTAKES = {
    "no tables": ({"rotary_cos": None}, "rotary_cos and rotary_sin, or rope_3d, must be given"),
    "both": ({"rope_3d": {"grid_h": 2, "grid_w": 2}}, "rope_3d excludes rotary_cos and rotary_sin"),
    "rope_3d with offset": ({"rope_3d": {"grid_h": 2, "grid_w": 2}, "rotary_cos": None, "rotary_sin": None,
                             "cache_seqlens": 3}, "rope_3d counts positions from 0; got cache_seqlens 3"),
    "rope_3d without width": ({"rope_3d": {"grid_h": 2}, "rotary_cos": None, "rotary_sin": None},
                              r"rope_3d must have grid_h and grid_w; got \['grid_h'\]"),
    "q of rank 3": ({"q": (2, 3, 8)}, "q must have 4 dimensions"),
    "tables of rank 1": ({"rotary_cos": (16,)}, "rotary_cos must have 2 dimensions"),
    "other tables": ({"rotary_sin": (16, 3)}, "rotary_cos and rotary_sin must have one shape"),
    "wide tables": ({"rotary_cos": (16, 5), "rotary_sin": (16, 5)},
                    "the rotary tables must have 1 to D / 2 = 4 columns; got 5"),
    "integer tables": ({"dtype": mx.int32}, "rotary_cos must have a floating dtype; got int32"),
    "rotary_dim": ({"rotary_dim": 6}, "rotary_dim must be twice the columns of the rotary tables, 8; got 6"),
    "positions of other count": ({"cache_seqlens": [0, 1, 2]},
                                 "cache_seqlens must have one position for each of the 2 batch entries; got 3"),
    "float positions": ({"cache_seqlens": mx.array([0.0, 1.0])}, "cache_seqlens must have an integer dtype"),
    "negative position": ({"cache_seqlens": [0, -1]},
                          r"the positions of queries must lie in the rotary tables, \[0, 16\); got \[-1, 2\)"),
    "late position": ({"cache_seqlens": 14}, r"the positions of queries must lie in .* got \[14, 17\) for sequence 0"),
    "late key": ({"k_offset": [0, 12]}, r"the positions of keys must lie in .* got \[12, 17\) for sequence 1"),
    "window": ({"window_size": 3}, "window_size must be a tuple"),
    "backend": ({"backend": "sdpa"}, 'backend must be "auto" or "mfa"'),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_clear_error(mistake):
    changes, message = MISTAKES[mistake]
    arguments = {"q": (2, 2, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8), "rotary_cos": (16, 4),
                 "rotary_sin": (16, 4)} | changes  # fmt: skip
    dtype = arguments.pop("dtype", mx.float32)
    for name in ("q", "k", "v", "rotary_cos", "rotary_sin"):
        if arguments[name] is not None:
            arguments[name] = mx.zeros(arguments[name], mx.float32 if name in "qkv" else dtype)
    error = RuntimeError if mistake == "backend" else ValueError
    with pytest.raises(error, match=r"^\[flash_attention_rope\] .*" + message):
        mfa.flash_attention_rope(**arguments)


def test_positions_that_are_computed_are_checked_when_they_are_evaluated():
    q, cos = mx.zeros((1, 1, 3, 8)), mx.zeros((16, 4))
    out = mfa.flash_attention_rope(q, q, q, cos, cos, cache_seqlens=mx.array([13]) + 1)
    with pytest.raises(RuntimeError, match="the positions of queries must lie in the rotary tables"):
        mx.eval(out)
    mx.eval(mfa.flash_attention_rope(q, q, q, cos, cos))  # the stream goes on


def test_unified_modes_that_exclude_each_other():
    q, cos, table = mx.zeros((1, 1, 3, 8)), mx.zeros((16, 4)), mx.array([[0]])
    with pytest.raises(ValueError, match=r"^\[flash_attention_rope_unified\] block_table excludes"):
        mfa.flash_attention_rope_unified(q, q, q, cos, cos, block_table=table, seq_lens=[1], return_updated_cache=True)
    with pytest.raises(ValueError, match=r"^\[flash_attention_rope_unified\] a block_table needs seq_lens"):
        mfa.flash_attention_rope_unified(q, q, q, cos, cos, block_table=table)
