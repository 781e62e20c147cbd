"""Bad input: each mistake is one clear error, raised when the function is called and before anything is allocated."""

import mlx.core as mx
import numpy as np
import pytest
from problems import ON_GPU, mfa

B, HQ, HKV, NQ, NK, D, DV = 2, 4, 2, 5, 7, 8, 6


def arguments():
    return {
        "q": mx.zeros((B, HQ, NQ, D)),
        "k": mx.zeros((B, HKV, NK, D)),
        "v": mx.zeros((B, HKV, NK, DV)),
    }


def zeros(*shape, dtype=mx.float32):
    return mx.zeros(shape, dtype)


# (what is wrong, the changed arguments, words that the message must hold)
MISTAKES = {
    "q of rank 3": (lambda: {"q": zeros(HQ, NQ, D)}, r"q must have 4 dimensions.*\(4,5,8\)"),
    "k of rank 5": (lambda: {"k": zeros(1, B, HKV, NK, D)}, "k must have 4 dimensions"),
    "v of rank 3": (lambda: {"v": zeros(HKV, NK, DV)}, "v must have 4 dimensions"),
    "q of rank 0": (lambda: {"q": mx.array(1.0)}, "q must have 4 dimensions"),
    "integer q": (lambda: {"q": zeros(B, HQ, NQ, D, dtype=mx.int32)}, "q must be float32, float16 or bfloat16"),
    "integer k": (lambda: {"k": zeros(B, HKV, NK, D, dtype=mx.int32)}, "k must have a floating dtype"),
    "boolean v": (lambda: {"v": zeros(B, HKV, NK, DV, dtype=mx.bool_)}, "v must have a floating dtype"),
    "other batch of k": (lambda: {"k": zeros(B + 1, HKV, NK, D)}, "batch"),
    "other batch of v": (lambda: {"v": zeros(1, HKV, NK, DV)}, "batch"),
    "other heads of v": (lambda: {"v": zeros(B, HKV * 2, NK, DV)}, "heads"),
    "other length of v": (lambda: {"v": zeros(B, HKV, NK + 1, DV)}, "length"),
    "other head dim of k": (lambda: {"k": zeros(B, HKV, NK, D + 1)}, "head dimension"),
    "heads not a multiple": (lambda: {"k": zeros(B, 3, NK, D), "v": zeros(B, 3, NK, DV)}, "multiple.*4.*3"),
    "more key heads than query heads": (lambda: {"k": zeros(B, 8, NK, D), "v": zeros(B, 8, NK, DV)}, "multiple"),
    "no key heads": (lambda: {"k": zeros(B, 0, NK, D), "v": zeros(B, 0, NK, DV)}, "at least one head"),
    "no query heads": (lambda: {"q": zeros(B, 0, NQ, D)}, "at least one head"),
    "head dim 0": (lambda: {"q": zeros(B, HQ, NQ, 0), "k": zeros(B, HKV, NK, 0)}, "head dimension"),
    "head dim of v 0": (lambda: {"v": zeros(B, HKV, NK, 0)}, "head dimension"),
    "head dim too large": (lambda: {"q": zeros(B, HQ, NQ, 577), "k": zeros(B, HKV, NK, 577)}, "head dimension.*577"),
    "head dim of v too large": (lambda: {"v": zeros(B, HKV, NK, 577)}, "head dimension.*577"),
    "scale not a number": (lambda: {"scale": float("nan")}, "scale must be finite"),
    "infinite scale": (lambda: {"scale": float("inf")}, "scale must be finite"),
    "scale beyond float32": (lambda: {"scale": 1e300}, "scale must be finite"),
    "negative softcap": (lambda: {"softcap": -1.0}, "softcap"),
    "softcap not a number": (lambda: {"softcap": float("nan")}, "softcap"),
    "infinite softcap": (lambda: {"softcap": float("inf")}, "softcap"),
    "negative dropout": (lambda: {"dropout_p": -0.1}, "dropout_p"),
    "dropout above one": (lambda: {"dropout_p": 1.5}, "dropout_p"),
    "dropout not a number": (lambda: {"dropout_p": float("nan")}, "dropout_p"),
    "infinite dropout": (lambda: {"dropout_p": float("inf")}, "dropout_p"),
    "window of one number": (lambda: {"window_size": (3,)}, "window_size"),
    "window of three": (lambda: {"window_size": (1, 2, 3)}, "window_size"),
    "window not a tuple": (lambda: {"window_size": 3}, "window_size"),
    "window of fractions": (lambda: {"window_size": (1.5, 2)}, "window_size"),
    "window of words": (lambda: {"window_size": "ab"}, "window_size"),
    "window below -1": (lambda: {"window_size": (-2, 0)}, "window.*-2"),
    "window below -1 on the right": (lambda: {"window_size": (0, -5)}, "window.*-5"),
    "unknown backend": (lambda: {"backend": "fast"}, "backend.*fast"),
    "backend of another build": (lambda: {"backend": "sage"}, "backend.*sage"),
    "slopes of a wrong count": (lambda: {"alibi_slopes": zeros(HQ + 1)}, "alibi_slopes.*shape"),
    "slopes of rank 2": (lambda: {"alibi_slopes": zeros(1, HQ)}, "alibi_slopes.*shape"),
    "boolean slopes": (lambda: {"alibi_slopes": zeros(HQ, dtype=mx.bool_)}, "alibi_slopes.*dtype"),
    "sinks of a wrong count": (lambda: {"sinks": zeros(HKV)}, "sinks.*shape"),
    "complex sinks": (lambda: {"sinks": zeros(HQ, dtype=mx.complex64)}, "sinks.*dtype"),
    "bias of a wrong length": (lambda: {"attn_bias": zeros(1, 1, NQ, NK + 1)}, "attn_bias.*broadcast"),
    "bias of key heads": (lambda: {"attn_bias": zeros(1, HKV, NQ, NK)}, "attn_bias.*broadcast"),
    "bias of rank 5": (lambda: {"attn_bias": zeros(1, 1, 1, NQ, NK)}, "attn_bias.*broadcast"),
    "bias larger than the scores": (
        lambda: {
            "q": zeros(1, HQ, NQ, D),
            "k": zeros(1, HKV, NK, D),
            "v": zeros(1, HKV, NK, DV),
            "attn_bias": zeros(3, 1, NQ, NK),
        },
        "attn_bias.*broadcast",
    ),
    "integer bias": (lambda: {"attn_bias": zeros(1, 1, NQ, NK, dtype=mx.int32)}, "attn_bias.*floating"),
    "boolean bias": (lambda: {"attn_bias": zeros(1, 1, NQ, NK, dtype=mx.bool_)}, "attn_bias.*floating"),
    "mask of a wrong shape": (lambda: {"mask": zeros(1, 1, NK, NQ, dtype=mx.bool_)}, "mask.*broadcast"),
    "mask of another batch": (lambda: {"mask": zeros(3, 1, 1, NK, dtype=mx.bool_)}, "mask.*broadcast"),
    "additive mask": (lambda: {"mask": zeros(1, 1, NQ, NK)}, "mask must have dtype bool"),
    "integer mask": (lambda: {"mask": zeros(1, 1, NQ, NK, dtype=mx.uint8)}, "mask must have dtype bool"),
    "fractional lengths": (lambda: {"kv_lengths": zeros(B)}, "kv_lengths must have an integer dtype"),
    "boolean lengths": (lambda: {"kv_lengths": zeros(B, dtype=mx.bool_)}, "kv_lengths must have an integer dtype"),
    "lengths of a wrong count": (lambda: {"kv_lengths": zeros(B + 1, dtype=mx.int32)}, "kv_lengths.*shape"),
    "lengths of rank 0": (lambda: {"kv_lengths": mx.array(3)}, "kv_lengths.*shape"),
    "a negative length": (lambda: {"kv_lengths": mx.array([-1, 3])}, "kv_lengths.*-1"),
    "a length past the keys": (lambda: {"kv_lengths": mx.array([NK + 1, 3])}, "kv_lengths.*8"),
    "a huge length": (lambda: {"kv_lengths": mx.array([2**62, 3], dtype=mx.int64)}, "kv_lengths"),
    "a huge unsigned length": (lambda: {"kv_lengths": mx.array(np.array([2**63, 3], np.uint64))}, "kv_lengths"),
    "lengths in a list of a wrong count": (lambda: {"kv_lengths": [1, 2, 3]}, "kv_lengths"),
    "a huge number in a list": (lambda: {"kv_lengths": [2**63, 1]}, r"kv_lengths must .*\[9223372036854775808, 1\]"),
    "a huge negative number": (lambda: {"kv_lengths": [-(2**63) - 1, 1]}, "kv_lengths must .*-9223372036854775809"),
    "numpy's huge numbers": (lambda: {"kv_lengths": np.array([2**63, 1], np.uint64)}, "kv_lengths must hold integers"),
    "lengths of words": (lambda: {"kv_lengths": "ab"}, "kv_lengths must hold integers of 64 bits; got 'ab'"),
    "lengths of nothing": (lambda: {"kv_lengths": [None, 1]}, "kv_lengths must hold integers.*None, 1"),
    "seed of a wrong shape": (lambda: {"dropout_p": 0.5, "dropout_seed": zeros(3, dtype=mx.uint32)}, "dropout_seed"),
    "seed of a wrong dtype": (lambda: {"dropout_p": 0.5, "dropout_seed": zeros(2, dtype=mx.int32)}, "dropout_seed"),
    "negative seed": (lambda: {"dropout_p": 0.5, "dropout_seed": -1}, "dropout_seed"),
    "seed of 65 bits": (lambda: {"dropout_p": 0.5, "dropout_seed": 2**64}, "dropout_seed"),
}


if ON_GPU:  # reading the values would wait for the GPU: they are clamped there
    for name in ("a negative length", "a length past the keys", "a huge length", "a huge unsigned length"):
        del MISTAKES[name]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_refused_with_its_reason_before_anything_is_allocated(mistake):
    change, words = MISTAKES[mistake]
    given = arguments() | change()
    mx.eval([a for a in given.values() if isinstance(a, mx.array)])
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for flags in ({}, {"return_lse": True}, {"return_attn_weights": True}):
        with pytest.raises(ValueError, match=rf"^\[flash_attention\] .*{words}") as raised:
            mfa.flash_attention(**(given | flags))
        assert "\n" not in str(raised.value)
    # A list of lengths becomes an array, which is all that may have been made.
    allowance = 64 if isinstance(given.get("kv_lengths"), list) else 0
    assert mx.get_active_memory() <= before + allowance
    assert mx.get_peak_memory() <= before + allowance


@pytest.mark.parametrize("mistake", ["q of rank 3", "unknown backend", "window of one number", "additive mask"])
def test_explain_refuses_what_attention_refuses(mistake):
    change, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=rf"^\[flash_attention\] .*{words}"):
        mfa.explain(**(arguments() | change()))


@pytest.mark.parametrize(
    "change",
    [
        {"q": np.zeros((B, HQ, NQ, D), np.float32)},
        {"k": None},
        {"attn_bias": [[0.0]]},
        {"scale": "big"},
        {"mask": True},
    ],
)
def test_arguments_of_another_type_are_type_errors(change):
    for function in (mfa.flash_attention, mfa.explain):
        with pytest.raises(TypeError, match=rf"^\[{function.__name__}\] {next(iter(change))} must be .*; got .*"):
            function(**(arguments() | change))


x = zeros(1, 2, 4, 8)


def attend(*options, **named):
    return mfa.flash_attention(x, x, x, *options, **named)


TYPES = {
    "number for a flag": (lambda: attend(causal=1), "flash_attention", "causal must be bool; got 1 of type int"),
    "by position": (lambda: attend(None, "yes"), "flash_attention", "causal must be bool; got 'yes' of type str"),
    "no backend": (lambda: attend(backend=None), "flash_attention", "backend must be one of 'auto'"),
    "mask by name": (
        lambda: attend(mask="causal"), "flash_attention",
        "mask must be mlx.core.array or None; got 'causal' of type str",
    ),
    "numpy": (
        lambda: attend(alibi_slopes=np.ones(2)), "flash_attention",
        "alibi_slopes must be mlx.core.array or None; got numpy.ndarray",
    ),
    "one length": (lambda: attend(kv_lengths=3), "flash_attention", "kv_lengths must be .*; got 3"),
    "fractional seed": (
        lambda: attend(dropout_p=0.5, dropout_seed=1.5), "flash_attention",
        "dropout_seed must be int or .*; got 1.5 of type float",
    ),
    "option that is passed on": (
        lambda: mfa.flash_attention_rope(x, x, x, zeros(9, 4), zeros(9, 4), softcap="a"), "flash_attention_rope",
        "softcap must be float; got 'a'",
    ),
    "another entry point": (
        lambda: mfa.flash_attention_paged(x, x, x, zeros(1, 1, dtype=mx.int32), [1], causal=1), "flash_attention_paged",
        "causal must be bool",
    ),
    "product": (lambda: mfa.matmul(x, 2), "matmul", "w must be mlx.core.array; got 2 of type int"),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_a_type_error_names_the_argument_as_the_caller_knows_it(name):
    call, function, message = TYPES[name]
    with pytest.raises(TypeError, match=rf"^\[{function}\] {message}") as raised:
        call()
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("arguments", [{"v": None}, {"colour": 1}])
def test_missing_and_unknown_arguments_are_pythons_own_errors(arguments):
    given = {"q": x, "k": x, "v": x} | arguments
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(TypeError, match=r"flash_attention\(\) "):
        mfa.flash_attention(**given)


def test_booleans_and_integers_of_numpy_are_taken():
    q = mx.random.normal((2, 2, 4, 8))
    lengths = [np.int8(1), np.uint64(2)]
    expected = mfa.flash_attention(q, q, q, causal=True, kv_lengths=[1, 2])
    assert mx.array_equal(mfa.flash_attention(q, q, q, causal=np.bool_(True), kv_lengths=lengths), expected)
    assert mx.array_equal(mfa.flash_attention(q, q, q, None, np.bool_(True), kv_lengths=np.array([1, 2])), expected)


@pytest.mark.parametrize("value", [[2**63], -(2**63) - 1, ["a"]])
def test_huge_numbers_are_refused_by_every_entry_point_that_takes_integers(value):
    table, cache = zeros(1, 1, dtype=mx.int32), zeros(1, 4, 2, 8)
    tables = zeros(9, 4)
    calls = {
        "flash_attention_rope": lambda: mfa.flash_attention_rope(x, x, x, tables, tables, cache_seqlens=value),
        "flash_attention_kvcache": lambda: mfa.flash_attention_kvcache(x, x, x, cache_seqlens=value),
    }
    if isinstance(value, list):
        calls |= {
            "flash_attention_paged": lambda: mfa.flash_attention_paged(x, cache, cache, table, value),
            "flash_attention_varlen": lambda: mfa.flash_attention_varlen(x, x, x, value, value, 4, 4),
            "append_to_cache": lambda: mfa.append_to_cache(x, x, value),
        }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^\[{name}\] \w+ must hold integers of 64 bits; got "):
            call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head_dims": ["x"]}, "head dimension must be an integer from 1 to 576; got 'x'"),
        ({"head_dims": [64.0]}, "head dimension must be .*; got 64.0"),
        ({"head_dims": [-1]}, "head dimension must be .*; got -1"),
        ({"dtypes": ["x"]}, "dtypes must be .*; got 'x'"),
        ({"dtypes": [mx.int32]}, "dtypes must be .*; got mlx.core.int32"),
    ],
)
def test_warmup_refuses_what_attention_does_not_take(given, message):
    with pytest.raises(ValueError, match=rf"^\[warmup_kernels\] .*{message}"):
        mfa.warmup_kernels(**given)


def test_errors_are_raised_under_transformations_too():
    given = arguments()

    def loss(q):
        return mfa.flash_attention(q, given["k"][:, :1], given["v"]).sum()

    for transformed in (mx.grad(loss), mx.compile(loss)):
        with pytest.raises(ValueError, match=r"\[flash_attention\].*heads"):
            transformed(given["q"])
    with pytest.raises(ValueError, match=r"\[flash_attention\].*heads"):
        mx.vmap(loss)(mx.stack([given["q"]] * 2))


def test_a_refused_call_leaves_the_library_usable():
    given = arguments()
    for change, _ in MISTAKES.values():
        with pytest.raises(ValueError, match="flash_attention"):
            mfa.flash_attention(**(given | change()))
    assert (mfa.flash_attention(**given) == 0).all()


EMPTY = {"no queries": (B, 0, NK), "no keys": (B, NQ, 0), "no batch": (0, NQ, NK), "nothing": (0, 0, 0)}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("backend", ["auto", "composed", "sdpa"])
def test_empty_arrays_give_results_of_the_right_shape(case, backend):
    batch, Nq, Nk = EMPTY[case]
    q, k, v = zeros(batch, HQ, Nq, D), zeros(batch, HKV, Nk, D), zeros(batch, HKV, Nk, DV)
    for causal in (False, True):
        out, lse, weights = mfa.flash_attention(
            q, k, v, causal=causal, return_lse=True, return_attn_weights=True, backend=backend
        )
        assert out.shape == (batch, HQ, Nq, DV)
        assert lse.shape == (batch, HQ, Nq)
        assert weights.shape == (batch, HQ, Nq, Nk)
        assert (out == 0).all()
        assert Nk > 0 or np.isneginf(np.array(lse)).all()
    gradients = mx.grad(lambda *x: mfa.flash_attention(*x, backend=backend).sum(), argnums=(0, 1, 2))(q, k, v)
    for gradient, given in zip(gradients, (q, k, v)):
        assert gradient.shape == given.shape
        assert (gradient == 0).all()
