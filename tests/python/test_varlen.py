"""flash_attention_varlen: packed sequences against the float64 oracle and against one dense call for each sequence."""

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np
import oracle
import pytest
from entry_points import BLOCKS, run_block
from problems import DTYPES, cpu_kernels_only, dtype_name, needs_kernels, normal, strided, to_mlx, to_numpy
from sequences import make_sequences, pack, unpack
from test_packed import as_view, fused, fused_parts, stacked, stacked_parts

pytestmark = [needs_kernels, cpu_kernels_only]

LENGTHS = (0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 100)


def random_sequences(rng, packed=""):
    """Sequences with random lengths, dtype and modifiers that ``packed`` can hold, and the call's other arguments."""
    B, Hkv, G = int(rng.integers(1, 6)), int(rng.choice((1, 2))), int(rng.choice((1, 1, 2, 3)))
    D, Dv = int(rng.choice((1, 8, 17, 32, 64))), int(rng.choice((1, 8, 24, 64)))
    dtype, Hq = str(rng.choice(DTYPES)), Hkv * G
    nq, nk = rng.choice(LENGTHS, B), rng.choice(LENGTHS, B)
    if rng.random() < 0.1:
        nk[0] = 300
    Dv = D if packed else Dv
    nk = nq if packed == "qkv" else nk
    Nq, Nk = max(1, nq.max()), max(1, nk.max())
    options, arguments = {"causal": rng.random() < 0.5}, {}

    def term(shape):
        return tuple(n if rng.random() < 0.5 else 1 for n in shape)

    if rng.random() < 0.3:
        options["window"] = tuple(int(w) for w in rng.choice((-1, 0, 1, 5, 63), size=2))
    if rng.random() < 0.25:
        options["softcap"] = 2.0
    if rng.random() < 0.25:
        options["alibi"] = rng.choice((0.5, 0.125, -0.03125), size=Hq)
        arguments["alibi_slopes"] = to_mlx(options["alibi"], "float32")
    if rng.random() < 0.3:
        options["bias"] = normal(rng, term((B, Hq, Nq, Nk)), "float32")
        arguments["attn_bias"] = to_mlx(options["bias"], "float32")
    if rng.random() < 0.3:
        options["mask"] = rng.random(term((B, Hq, Nq, Nk))) < 0.7
        arguments["mask"] = mx.array(options["mask"])
    if rng.random() < 0.3:
        options["sinks"] = normal(rng, (Hq,), "float32")
        arguments["sinks"] = to_mlx(options["sinks"], "float32")
    if rng.random() < 0.2:
        options["kv_lengths"] = np.array([rng.integers(0, n + 1) for n in nk])
        arguments["kv_lengths"] = mx.array(options["kv_lengths"].astype(np.int32))
    if rng.random() < 0.2:
        options |= {"dropout_p": 0.5, "dropout_seed": int(rng.integers(0, 2**63))}
    s = make_sequences(rng, nq, nk, Hq, Hkv, D, Dv, dtype, **options)
    s.label = f"{dtype} Hq{Hq} Hkv{Hkv} D{D} Dv{Dv} queries {nq} keys {nk} {sorted(options)} {options['causal']}"
    return s, arguments, str(rng.choice(("dense", "bnhd", "gap", "reversed", "packed")))


def call(s, arguments, *arrays, function=mfa.flash_attention_varlen, **extra):
    p = s.problem
    keywords = {
        "max_seqlen_q": p.q.shape[2], "max_seqlen_k": p.k.shape[2], "causal": p.causal, "softcap": p.softcap,
        "window_size": p.window, "dropout_p": p.dropout_p,
        "dropout_seed": p.dropout_seed if p.dropout_p > 0 else None, "return_lse": True,
    }  # fmt: skip
    return function(*arrays, mx.array(s.cu_q), mx.array(s.cu_k), **(keywords | arguments | extra))


def check_sequences(s, arguments, layout="dense", seed=0, packed=""):
    """``packed`` names the arrays that lie in one: "qkv" or "kv"."""
    p = s.problem
    rows = {"q": pack(p.q, s.query_lengths), "k": pack(p.k, s.key_lengths), "v": pack(p.v, s.key_lengths)}
    arrays = {n: strided(x, p.dtype, layout) for n, x in rows.items() if n not in packed}
    extra, parts = {}, {}
    if packed:
        join, split = ((fused, fused_parts), (stacked, stacked_parts))[seed % 2]
        arrays[packed] = as_view(join(*(rows[n] for n in packed)), np.random.default_rng(seed), p.dtype)
        parts[packed] = split(packed, [rows[n].shape[1] for n in packed])
        extra = {"function": getattr(mfa, f"flash_attention_varlen_{packed}_packed"), "num_kv_heads": p.k.shape[1]}
        if packed == "qkv":
            extra["num_heads"] = p.q.shape[1]
    own = {"alibi_slopes": "alibi", "attn_bias": "bias", "sinks": "sinks"}  # differentiable arguments
    names = [*arrays, *(n for n in own if n in arguments)]
    given = arrays | arguments

    def function(*values):
        changed = dict(zip(names, values))
        now = [changed.pop(n) for n in arrays]
        return call(s, arguments | changed, *now, **extra)

    cotangents = [
        to_mlx(pack(s.d_o, s.query_lengths), p.dtype),
        to_mlx(pack(s.dlse, s.query_lengths) * oracle.LN2, "float32"),
    ]
    (o, lse), gradients = mx.vjp(function, [given[n] for n in names], cotangents)
    mx.eval(o, lse, gradients)
    rule = oracle.ErrorRule(p, s.d_o, s.dlse, seed)
    Nq, Nk = p.q.shape[2], p.k.shape[2]
    rule.check("o", unpack(to_numpy(o), s.query_lengths, Nq), dtype_name(o), s.label)
    expected = pack(rule.answer.lse, s.query_lengths)
    oracle.assert_lse(np.array(lse) * oracle.LN2, expected, s.label)
    for name, gradient in zip(names, gradients):
        for part, x in parts.get(name, lambda g, name=name: {name: g})(to_numpy(gradient)).items():
            if part == "q":
                x = unpack(x, s.query_lengths, Nq)
            elif part in "kv":
                x = unpack(x, s.key_lengths, Nk)
            rule.check(own.get(part, part), x, dtype_name(gradient), s.label)


@pytest.mark.parametrize("packed", ["", "qkv", "kv"])
@pytest.mark.parametrize("block", BLOCKS)
def test_random_sequences_are_within_the_error_rule(block, packed, seed):
    def check(rng, index):
        check_sequences(*random_sequences(rng, packed), seed=index, packed=packed)

    run_block(block, seed, check)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_each_sequence_has_the_bits_of_a_call_of_its_own(dtype, causal, seed):
    rng = np.random.default_rng(seed)
    s = make_sequences(rng, (5, 0, 130, 64, 1), (5, 9, 600, 0, 513), Hq=4, Hkv=2, D=32, dtype=dtype)
    q, k, v = (to_mlx(pack(x, n), dtype) for x, n in zip((s.problem.q, s.problem.k, s.problem.v),
               (s.query_lengths, s.key_lengths, s.key_lengths)))  # fmt: skip
    o, lse = call(s, {"causal": causal}, q, k, v)
    for b in range(len(s.query_lengths)):
        i, j = slice(s.cu_q[b], s.cu_q[b + 1]), slice(s.cu_k[b], s.cu_k[b + 1])
        own_o, own_lse = mfa.flash_attention(q[:, :, i], k[:, :, j], v[:, :, j], causal=causal, return_lse=True)
        assert mx.array_equal(o[:, :, i], own_o).item(), f"sequence {b}"
        assert mx.array_equal(lse[:, :, i], own_lse).item(), f"sequence {b}"


def test_sequences_do_not_read_each_other(seed):
    rng = np.random.default_rng(seed)
    s = make_sequences(rng, (40, 33, 20), (40, 300, 20), causal=True)
    q, k, v = (to_mlx(pack(x, n), "float32") for x, n in zip((s.problem.q, s.problem.k, s.problem.v),
               (s.query_lengths, s.key_lengths, s.key_lengths)))  # fmt: skip

    def gradients(q, k, v):
        return mx.grad(lambda *x: call(s, {}, *x)[0][:, :, :40].sum(), argnums=(0, 1, 2))(q, k, v)

    clean_o, clean = call(s, {}, q, k, v)[0], gradients(q, k, v)
    behind = [mx.where(mx.arange(x.shape[2])[:, None] >= 40, mx.nan, x) for x in (q, k, v)]
    o, poisoned = call(s, {}, *behind)[0], gradients(*behind)
    assert mx.array_equal(o[:, :, :40], clean_o[:, :, :40]).item()
    for x, y in zip(poisoned, clean):
        assert mx.array_equal(x[:, :, :40], y[:, :, :40]).item()


def test_thousands_of_short_sequences(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 3000)
    s = make_sequences(rng, lengths, lengths, Hq=2, D=8, causal=True)
    check_sequences(s, {})


def test_no_sequences_and_no_rows():
    q = mx.zeros((1, 2, 0, 8))
    for starts in ([0], [0, 0], [0, 0, 0]):
        o, lse = mfa.flash_attention_varlen(q, q, q, starts, starts, return_lse=True)
        assert o.shape == (1, 2, 0, 8)
        assert lse.shape == (1, 2, 0)
        mx.eval(o, lse)


def test_works_under_compile_checkpoint_and_async_eval(seed):
    s = make_sequences(np.random.default_rng(seed), (9, 30), (20, 30), causal=True)
    q, k, v = (to_mlx(pack(x, n), "float32") for x, n in zip((s.problem.q, s.problem.k, s.problem.v),
               (s.query_lengths, s.key_lengths, s.key_lengths)))  # fmt: skip

    def function(q, k, v):
        return call(s, {}, q, k, v)[0]

    expected = function(q, k, v)
    compiled = mx.compile(function)(q, k, v)
    mx.async_eval(compiled)
    assert mx.array_equal(compiled, expected).item()
    assert mx.array_equal(mx.checkpoint(function)(q, k, v), expected).item()
    mapped = mx.vmap(function)(*(mx.stack([x, 2 * x]) for x in (q, k, v)))
    assert mx.array_equal(mapped[0], expected).item()
    assert mx.array_equal(mapped[1], function(2 * q, 2 * k, 2 * v)).item()


@pytest.mark.parametrize("heads", [1, 4])
def test_every_sequence_sees_the_tiles_of_the_block_mask(heads, seed):
    rng = np.random.default_rng(seed)
    s = make_sequences(rng, (40, 0, 130, 64), (33, 9, 130, 0), Hq=4, Hkv=2, D=8, causal=True)
    q, k, v = (to_mlx(pack(x, n), "float32") for x, n in zip((s.problem.q, s.problem.k, s.problem.v),
               (s.query_lengths, s.key_lengths, s.key_lengths)))  # fmt: skip
    tiles = rng.random((heads, 9, 5)) < 0.5  # of 16 queries and 32 keys
    visible = mx.array(tiles.repeat(16, axis=1).repeat(32, axis=2)[None, :, :130, :130])
    expected = call(s, {"mask": visible}, q, k, v)
    given = mx.array(tiles if heads > 1 else tiles[0])
    for mask, size in ((given, (16, 32)), (mfa.BlockMask(given, (16, 32), q_len=130, kv_len=130), None)):
        o, lse = call(s, {"block_mask": mask, "block_size": size}, q, k, v)
        assert mx.array_equal(o, expected[0]).item()
        assert mx.array_equal(lse, expected[1]).item()

    def gradients(**extra):
        return mx.grad(lambda *x: call(s, extra, *x)[0].square().sum(), argnums=(0, 1, 2))(q, k, v)

    masks = {"block_mask": given, "block_size": (16, 32)}
    for x, y in zip(gradients(**masks), gradients(mask=visible)):
        assert mx.allclose(x, y, rtol=1e-4, atol=1e-5).item()


@pytest.mark.parametrize("layout", ["fused", "stacked"])
def test_packed_arrays_are_their_parts(layout, seed):
    s = make_sequences(np.random.default_rng(seed), (9, 0, 70), (9, 0, 70), Hq=2, D=8, causal=True)
    parts = [to_mlx(pack(x, s.query_lengths), "float32") for x in (s.problem.q, s.problem.k, s.problem.v)]
    if layout == "fused":  # [1, N, heads * D]
        joined = mx.concatenate(parts, axis=1).swapaxes(1, 2).flatten(2)
        kv = mx.concatenate(parts[1:], axis=1).swapaxes(1, 2).flatten(2)
    else:  # [1, H, N, parts, D]
        joined, kv = mx.stack(parts, axis=3), mx.stack(parts[1:], axis=3)
    starts = mx.array(s.cu_q)
    expected = mfa.flash_attention_varlen(*parts, starts, starts, causal=True)
    heads = {"num_kv_heads": 2}
    out = mfa.flash_attention_varlen_qkv_packed(joined, starts, starts, causal=True, num_heads=2, **heads)
    assert mx.array_equal(out, expected).item()
    out, lse = mfa.flash_attention_varlen_kv_packed(parts[0], kv, starts, starts, causal=True, return_lse=True, **heads)
    assert mx.array_equal(out, expected).item()
    assert lse.shape == (1, 2, 79)
    gradient = mx.grad(lambda x: mfa.flash_attention_varlen_qkv_packed(x, starts, starts, num_heads=2, **heads).sum())
    assert gradient(joined).shape == joined.shape
    with pytest.raises(ValueError, match=r"^\[flash_attention_varlen_qkv_packed\] "):
        mfa.flash_attention_varlen_qkv_packed(parts[0], starts, starts)


MISTAKES = {
    "packed batch": ({"q": (2, 2, 9, 8)}, "packed q must have batch size 1; got 2"),
    "q of rank 3": ({"q": (2, 9, 8)}, "q and k must have 4 dimensions"),
    "starts of rank 2": ({"cu_seqlens_q": [[0, 9]]}, "cu_seqlens_q must have 1 dimension"),
    "float starts": ({"cu_seqlens_k": [0.0, 4.0, 9.0]}, "cu_seqlens_k must have an integer dtype"),
    "other counts": ({"cu_seqlens_q": [0, 9]}, "cu_seqlens_q and cu_seqlens_k must have one shape"),
    "no starts": ({"cu_seqlens_q": []}, "at least one element"),
    "starts not from 0": ({"cu_seqlens_q": [1, 4, 9]}, "cu_seqlens_q must begin with 0; got 1"),
    "decreasing": ({"cu_seqlens_k": [0, 4, 3]}, "cu_seqlens_k must not decrease; got 3 after 4"),
    "short": ({"cu_seqlens_q": [0, 4, 8]}, "cu_seqlens_q must end with the number of packed queries, 9; got 8"),
    "long": ({"cu_seqlens_k": [0, 4, 10]}, "cu_seqlens_k must end with the number of packed keys, 9; got 10"),
    "negative": ({"cu_seqlens_k": [0, -1, 9]}, "cu_seqlens_k must not decrease; got -1 after 0"),
    "beyond int32": ({"cu_seqlens_k": [0, 2**40, 9]}, "cu_seqlens_k must be integers of 32 bits; got 1099511627776"),
    "longer than said": ({"max_seqlen_q": 4}, "no sequence may have more than 4 queries; got 5 in sequence 1"),
    "negative longest": ({"max_seqlen_k": -1}, "max_seqlen_k must not be negative; got -1"),
    "mask of other shape": ({"mask": (3, 1, 1, 9)}, "mask must be broadcastable"),
    "lengths of other shape": ({"kv_lengths": [1, 2, 3]}, "kv_lengths must have shape"),
    "block mask of another size": ({"block_mask": (2, 2), "block_size": 4}, "block_mask must have 3 by 3 tiles"),
    "window": ({"window_size": 3}, "window_size must be a tuple"),
    "backend": ({"backend": "composed"}, "backend must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_clear_error(mistake):
    changes, message = MISTAKES[mistake]
    arguments = {"q": (1, 2, 9, 8), "k": (1, 2, 9, 8), "v": (1, 2, 9, 8), "cu_seqlens_q": [0, 4, 9],
                 "cu_seqlens_k": [0, 4, 9]} | changes  # fmt: skip
    for name in ("q", "k", "v"):
        arguments[name] = mx.zeros(arguments[name])
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        arguments[name] = mx.array(arguments[name]) if arguments[name] else mx.zeros((0,), mx.int32)
    if "mask" in arguments:
        arguments["mask"] = mx.ones(arguments["mask"], mx.bool_)
    if "block_mask" in arguments:
        arguments["block_mask"] = mx.ones(arguments["block_mask"], mx.bool_)
    if "beyond" in mistake:
        arguments["cu_seqlens_k"] = mx.array([0, 2**40, 9], mx.int64)
    error = RuntimeError if mistake == "backend" else ValueError
    with pytest.raises(error, match=r"^\[flash_attention_varlen\] .*" + message):
        mfa.flash_attention_varlen(**arguments)


def test_starts_that_are_computed_are_checked_when_they_are_evaluated():
    q = mx.zeros((1, 2, 9, 8))
    starts = mx.array([0, 5, 9]) + mx.array([0, 0, 1])
    out = mfa.flash_attention_varlen(q, q, q, starts, mx.array([0, 4, 9]))
    with pytest.raises(RuntimeError, match="cu_seqlens_q must end with"):
        mx.eval(out)
    mx.eval(mfa.flash_attention(q, q, q))  # the stream goes on


def test_random_starts_are_computed_or_refused(seed):
    rng = np.random.default_rng(seed)
    q = mx.zeros((1, 1, 6, 4))
    accepted = 0
    for _ in range(10_000):
        starts = [rng.choice((0, 0, 0, 3, 6, 6, 7, -1, 2**31 - 1, -(2**31)), rng.integers(0, 5)).tolist() for _ in "qk"]
        arrays = [mx.array(s, mx.int32) if s else mx.zeros((0,), mx.int32) for s in starts]
        try:
            out = mfa.flash_attention_varlen(q, q, q, *arrays)
        except ValueError:
            continue
        accepted += 1
        assert not mx.isnan(out).any().item()
    assert 0 < accepted < 1000
