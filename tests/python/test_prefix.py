"""Cascade attention over a shared prefix, shared prefix caches, prefill beside decode."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from entry_points import BLOCKS, check_entry, run_block
from problems import (
    ON_GPU,
    cpu_kernels_only,
    keywords,
    mfa,
    needs_kernels,
    normal,
    random_arrays,
    random_case,
    to_mlx,
    to_numpy,
)


def cascade_sizes(rng):
    while True:
        B, Hkv, G = int(rng.integers(1, 5)), int(rng.choice((1, 2, 3))), int(rng.choice((1, 1, 2, 4)))
        Nq, Nk = int(rng.choice((1, 1, 2, 7, 33, 65))), int(rng.choice((0, 1, 2, 31, 64, 129)))
        if B * Hkv * G * Nq * Nk <= 1e5:
            D, Dv = (int(rng.choice((1, 8, 17, 40, 64, 128))) for _ in range(2))
            return B, Hkv * G, Hkv, Nq, Nk, D, Dv


def before_own_keys(x, value, P):
    """A term of the scores of the own keys as one of prefix and own keys."""
    return np.concatenate([np.full(x.shape[:-1] + (P,), value, x.dtype), x], axis=-1)


def over_own_keys(x, Nk):
    return np.broadcast_to(x, x.shape[:-1] + (Nk,)).copy()


@needs_kernels
@pytest.mark.parametrize("block", BLOCKS)
def test_random_cascades_are_attention_over_the_concatenation(block, seed):
    def check(rng, index):
        case = random_case(rng, cascade_sizes)
        own = case.problem
        B, _, Hkv, Nq, Nk, D, Dv = own.shape
        P = int(rng.choice((0, 1, 8, 63, 64, 100, 257))) or int(Nk == 0)
        k_prefix, v_prefix = normal(rng, (1, Hkv, P, D), own.dtype), normal(rng, (1, Hkv, P, Dv), own.dtype)
        terms = {}
        if own.bias is not None:
            terms["bias"] = over_own_keys(own.bias, Nk)
            case.arrays["bias"] = to_mlx(terms["bias"], str(case.arrays["bias"].dtype).removeprefix("mlx.core."))
            terms["bias"] = before_own_keys(terms["bias"], 0, P)
        if own.mask is not None:
            terms["mask"] = before_own_keys(over_own_keys(own.mask, Nk), True, P)
        lengths = np.full(B, Nk) if own.kv_lengths is None else np.asarray(own.kv_lengths)
        case.problem = dataclasses.replace(
            own,
            k=np.concatenate([np.broadcast_to(k_prefix, (B, *k_prefix.shape[1:])), own.k], axis=2),
            v=np.concatenate([np.broadcast_to(v_prefix, (B, *v_prefix.shape[1:])), own.v], axis=2),
            kv_lengths=P + lengths,
            q_offset=P + np.maximum(0, lengths - Nq),
            **terms,
        )
        case.label = f"P{P} {case.label}"
        inputs = case.arrays | {"k_prefix": to_mlx(k_prefix, own.dtype), "v_prefix": to_mlx(v_prefix, own.dtype)}

        def call(x):
            return mfa.flash_attention_cascade(
                x["q"], x["k_prefix"], x["v_prefix"], x["k"], x["v"], return_lse=True, **keywords(own, x)
            )

        def own_keys(name):
            return lambda g: {name: (g, lambda full: full[:, :, P:], 1)}

        def prefix(name):
            return lambda g: {name: (g, lambda full: full[:, :, :P].sum(0, keepdims=True), B)}

        parts = {"k": own_keys("k"), "v": own_keys("v"), "k_prefix": prefix("k"), "v_prefix": prefix("v")}
        parts["bias"] = lambda g: {"bias": (g, lambda full: full[..., P:], 1)}
        check_entry(case, inputs, call, parts, seed=index)

    run_block(block, seed, check)


def cascade_arrays(B=4, Hq=4, Hkv=2, Nq=1, P=300, Nk=40, D=32, dtype="float32"):
    return random_arrays(
        11, (B, Hq, Nq, D), (1, Hkv, P, D), (1, Hkv, P, D), (B, Hkv, Nk, D), (B, Hkv, Nk, D), dtype=dtype
    )


def test_a_cascade_reads_the_prefix_in_place(peak_bytes):
    q, k_prefix, v_prefix, k, v = cascade_arrays(B=8, P=20_000)
    mx.eval(q, k_prefix, v_prefix, k, v)
    peak = peak_bytes(lambda: mx.eval(mfa.flash_attention_cascade(q, k_prefix, v_prefix, k, v)))
    assert peak < k_prefix.nbytes / 4


@needs_kernels
def test_a_cascade_reads_the_prefix_once_for_the_batch():
    """The whole batch is one problem of one batch entry, whose group of heads is that of all entries."""
    q, k_prefix, v_prefix, k, v = cascade_arrays()
    B, Hq = q.shape[:2]
    folded = q.reshape(B, 2, Hq // 2, 1, 32).transpose(1, 0, 2, 3, 4).reshape(1, B * Hq, 1, 32)
    o_prefix, lse_prefix = mfa.flash_attention(folded, k_prefix, v_prefix, return_lse=True)
    o_prefix = o_prefix.reshape(2, B, Hq // 2, 1, 32).transpose(1, 0, 2, 3, 4).reshape(B, Hq, 1, 32)
    lse_prefix = lse_prefix.reshape(2, B, Hq // 2, 1).transpose(1, 0, 2, 3).reshape(B, Hq, 1)
    own = mfa.flash_attention(q, k, v, causal=True, return_lse=True)
    expected, _ = mfa.merge_attention_states(o_prefix, lse_prefix, *own)
    assert mx.allclose(mfa.flash_attention_cascade(q, k_prefix, v_prefix, k, v), expected, atol=1e-6)


def test_what_a_cascade_hides_is_not_read():
    q, k_prefix, v_prefix, k, v = cascade_arrays(Nq=3)
    lengths, window = [40, 5, 12, 3], (50, -1)
    hidden = mx.arange(300) < 300 - 50  # no row is further than 39 behind the prefix: row 0 of entry 3 sees 50 back
    nan = mx.array(float("nan"))
    poisoned = [mx.where(hidden[None, None, :, None], nan, x) for x in (k_prefix, v_prefix)]
    own_hidden = (mx.arange(40)[None, :] >= mx.array(lengths)[:, None])[:, None, :, None]
    own = [mx.where(own_hidden, nan, x) for x in (k, v)]
    for options in ({"window_size": window}, {"window_size": window, "kv_lengths": lengths}):
        mine = own if "kv_lengths" in options else (k, v)
        expected = mfa.flash_attention_cascade(q, k_prefix, v_prefix, k, v, **options)
        assert mx.array_equal(mfa.flash_attention_cascade(q, *poisoned, *mine, **options), expected)


CASCADE_MISTAKES = {
    "batched prefix": ({"k_prefix": mx.zeros((2, 2, 9, 8))}, r"k_prefix must have shape \[1, Hkv, P, head dimension\]"),
    "prefix of rank 3": ({"v_prefix": mx.zeros((2, 9, 6))}, r"v_prefix must have shape .*; got \(2,9,6\)"),
    "other heads": (
        {"k_prefix": mx.zeros((1, 4, 9, 8))},
        r"k_prefix must have the heads and the head dimension .*; got \(1,4,9,8\) and \(2,2,7,8\)",
    ),
    "other head dim": ({"v_prefix": mx.zeros((1, 2, 9, 8))}, "v_prefix must have the heads and the head dimension"),
    "other length": ({"v_prefix": mx.zeros((1, 2, 8, 6))}, "k_prefix and v_prefix must have the same length"),
    "other dtype": (
        {"k_prefix": mx.zeros((1, 2, 9, 8), mx.float16)},
        "k_prefix must have the dtype of the own keys and values; got float16 and float32",
    ),
    "q of rank 3": ({"q": mx.zeros((4, 5, 8))}, r"q must have 4 dimensions \[B, Hq, Nq, D\]; got shape \(4,5,8\)"),
    "lengths past the keys": ({"kv_lengths": [8, 3]}, r"kv_lengths must be in \[0, Nk\] = \[0, 7\]; got 8"),
    "sinks of key heads": ({"sinks": mx.zeros(2)}, r"sinks must have shape \(4,\), one value for each head"),
    "window": ({"window_size": 3}, "window_size must be a tuple of two integers; got 3"),
    "mask over the prefix": ({"mask": mx.ones((1, 1, 5, 16), mx.bool_)}, "mask must be broadcastable"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CASCADE_MISTAKES)
def test_mistake_in_a_cascade_is_refused(mistake):
    change, words = CASCADE_MISTAKES[mistake]
    if ON_GPU and "kv_lengths" in change:
        pytest.skip("lengths are clipped on GPUs")
    arguments = {
        "q": mx.zeros((2, 4, 5, 8)),
        "k_prefix": mx.zeros((1, 2, 9, 8)),
        "v_prefix": mx.zeros((1, 2, 9, 6)),
        "k": mx.zeros((2, 2, 7, 8)),
        "v": mx.zeros((2, 2, 7, 6)),
    }
    mfa.flash_attention_cascade(**arguments)
    with pytest.raises(ValueError, match=rf"^\[flash_attention_cascade\] .*{words}"):
        mfa.flash_attention_cascade(**(arguments | change))


@needs_kernels
@cpu_kernels_only
def test_a_window_with_lengths_takes_no_more_than_its_mask(peak_bytes):
    """`B * Nq * P` bytes, beside what the call without a window takes."""
    B, Nq, P = 4, 256, 8192
    q, k, v = random_arrays(5, (B, 2, Nq, 8), (B, 2, Nq, 8), (B, 2, Nq, 8))
    prefix = random_arrays(6, (1, 2, P, 8), (1, 2, P, 8))
    mx.eval(q, k, v, prefix)

    def run(**options):
        mx.eval(mfa.flash_attention_cascade(q, *prefix, k, v, kv_lengths=[200] * B, **options))

    run()
    plain = peak_bytes(run)
    assert peak_bytes(lambda: run(window_size=(P, 0))) < plain + 1.1 * B * Nq * P


def test_a_shared_prefix_cache_is_attention_and_the_arrays_given():
    q, k, v = random_arrays(2, (1, 4, 50, 16), (1, 2, 50, 16), (1, 2, 50, 16))
    out, k_kept, v_kept = mfa.make_shared_prefix_cache(q, k, v, scale=0.3)
    assert k_kept is k
    assert v_kept is v
    assert mx.array_equal(out, mfa.flash_attention(q, k, v, scale=0.3, causal=True))
    options = {"causal": False, "softcap": 2.0, "window_size": (5, 3)}
    out, _, _ = mfa.make_shared_prefix_cache(q, k, v, **options)
    assert mx.array_equal(out, mfa.flash_attention(q, k, v, **options))


def test_a_prefix_cache_and_a_cascade_are_one_long_attention():
    q, k, v = random_arrays(8, (3, 4, 70, 16), (3, 2, 70, 16), (3, 2, 70, 16))
    q, k, v = (
        mx.concatenate([mx.broadcast_to(x[:1, :, :50], (3, *x[0, :, :50].shape)), x[:, :, 50:]], 2) for x in (q, k, v)
    )
    first, k_prefix, v_prefix = mfa.make_shared_prefix_cache(q[:1, :, :50], k[:1, :, :50], v[:1, :, :50])
    rest = mfa.flash_attention_cascade(q[:, :, 50:], k_prefix, v_prefix, k[:, :, 50:], v[:, :, 50:])
    whole = mfa.flash_attention(q, k, v, causal=True)
    assert mx.allclose(whole[:1, :, :50], first, atol=1e-6)
    assert mx.allclose(whole[:, :, 50:], rest, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("block", BLOCKS)
def test_random_prefix_caches_are_attention(block, seed):
    def check(rng, index):
        case = random_case(rng, cascade_sizes)

        def call(x):
            options = keywords(case.problem, x)
            out, lse, k, v = mfa.make_shared_prefix_cache(x["q"], x["k"], x["v"], return_lse=True, **options)
            assert k is x["k"]
            assert v is x["v"]
            return out, lse

        check_entry(case, case.arrays, call, seed=index)

    run_block(block, seed, check)


SHARED = ("scale", "causal", "softcap", "window", "alibi", "sinks", "dropout_p", "dropout_seed")  # by both halves


def random_halves(rng):
    """Two cases of one number of heads and with the same shared options."""
    prefill = random_case(rng, cascade_sizes)
    _, Hq, Hkv, *_ = prefill.problem.shape

    def decode_sizes(rng):
        while True:
            B, Nq, Nk = int(rng.integers(1, 6)), int(rng.choice((1, 1, 2, 17))), int(rng.choice((0, 1, 64, 129, 300)))
            if B * Hq * Nq * Nk <= 1e5:
                D, Dv = (int(rng.choice((1, 8, 17, 40, 64, 128))) for _ in range(2))
                return B, Hq, Hkv, Nq, Nk, D, Dv

    decode = random_case(rng, decode_sizes, without=(*SHARED, "dropout"))
    shared = {name: getattr(prefill.problem, name) for name in SHARED}
    decode.problem = dataclasses.replace(decode.problem, **shared)
    decode.arrays = {n: x for n, x in decode.arrays.items() if n not in SHARED}
    decode.arrays |= {n: x for n, x in prefill.arrays.items() if n in SHARED}
    return prefill, decode


@needs_kernels
@pytest.mark.parametrize("which", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("block", BLOCKS)
def test_random_halves_of_splitfuse_are_attention(block, which, seed):
    def check(rng, index):
        halves = random_halves(rng)

        def call(x):
            arrays = [case.arrays for case in halves]
            arrays[which] = x
            options = keywords(halves[which].problem, x)
            for name in ("attn_bias", "mask", "kv_lengths"):
                del options[name]
            for half, a in zip(("prefill", "decode"), arrays):
                options |= {f"attn_bias_{half}": a.get("bias"), f"mask_{half}": a.get("mask")}
                options[f"kv_lengths_{half}"] = a.get("kv_lengths")
            tensors = [a[n] for a in arrays for n in "qkv"]
            return mfa.flash_attention_splitfuse(*tensors, return_lse=True, **options)[which]

        check_entry(halves[which], halves[which].arrays, call, seed=index)

    run_block(block, seed, check)


def splitfuse_arrays():
    return random_arrays(3, *[(1, 2, 20, 16)] * 3, (2, 2, 1, 16), *[(2, 2, 30, 16)] * 2)


@needs_kernels
@cpu_kernels_only
def test_splitfuse_is_one_node_of_the_graph(tmp_path):
    out = mfa.flash_attention_splitfuse(*splitfuse_arrays())
    mx.export_to_dot(str(tmp_path / "graph.dot"), *out)
    nodes = (tmp_path / "graph.dot").read_text()
    assert nodes.count('label ="MfaAttentionGroup"') == 1, nodes
    assert '"MfaAttention"' not in nodes


@pytest.mark.parametrize("axes", [(0,) * 6, (0, 1, 2, None, None, None), (None, None, None, 2, 1, 0)])
def test_splitfuse_is_mapped_half_by_half(axes):
    arrays = splitfuse_arrays()
    mapped = [x if a is None else mx.stack([x, x * 0.5], axis=a) for x, a in zip(arrays, axes)]
    results = mx.vmap(mfa.flash_attention_splitfuse, in_axes=axes)(*mapped)
    for v, factor in enumerate((1, 0.5)):
        each = [x if a is None else x * factor for x, a in zip(arrays, axes)]
        for mine, expected in zip(results, mfa.flash_attention_splitfuse(*each)):
            assert mx.allclose(mine[v], expected, atol=1e-6)


def test_splitfuse_is_two_attentions():
    prefill = random_arrays(3, (1, 4, 40, 16), (1, 2, 60, 16), (1, 2, 60, 16))
    decode = random_arrays(4, (5, 4, 1, 16), (5, 2, 90, 16), (5, 2, 90, 16))
    lengths = [90, 3, 50, 1, 77]
    options = {"softcap": 5.0, "window_size": (30, 0)}
    out_prefill, out_decode = mfa.flash_attention_splitfuse(*prefill, *decode, kv_lengths_decode=lengths, **options)
    assert mx.array_equal(out_prefill, mfa.flash_attention(*prefill, causal=True, **options))
    assert mx.array_equal(out_decode, mfa.flash_attention(*decode, causal=True, kv_lengths=lengths, **options))
    only, nothing = mfa.flash_attention_splitfuse(*prefill, None, None, None, scale=0.5, causal=False)
    assert nothing is None
    assert mx.array_equal(only, mfa.flash_attention(*prefill, scale=0.5))
    nothing, only = mfa.flash_attention_splitfuse(None, None, None, *decode)
    assert nothing is None
    assert mx.array_equal(only, mfa.flash_attention(*decode, causal=True))


def test_gradients_flow_through_both_halves_of_splitfuse():
    arrays = splitfuse_arrays()

    def loss(*x):
        return sum(o.sum() for o in mfa.flash_attention_splitfuse(*x))

    def separate(*x):
        return sum(mfa.flash_attention(*half, causal=True).sum() for half in (x[:3], x[3:]))

    for mine, expected in zip(*(mx.grad(f, argnums=tuple(range(6)))(*arrays) for f in (loss, separate))):
        assert np.array_equal(to_numpy(mine), to_numpy(expected))


def test_splitfuse_refuses_what_is_missing():
    q, k, v = random_arrays(3, *[(1, 2, 4, 16)] * 3)
    with pytest.raises(
        ValueError, match=r"^\[flash_attention_splitfuse\] q_prefill or q_decode must be given; got None"
    ):
        mfa.flash_attention_splitfuse(None, k, v, None, k, v)
    with pytest.raises(ValueError, match=r"^\[flash_attention_splitfuse\] q_decode needs keys and values; got None"):
        mfa.flash_attention_splitfuse(q, k, v, q, None, v)
