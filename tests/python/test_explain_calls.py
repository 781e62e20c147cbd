"""explain_calls(): what runs each attention call of any entry point or model."""

import mlx.core as mx
import pytest
from problems import OWN_ROUTE, cpu_kernels_only, mfa, needs_kernels, random_arrays


def on_cpu(*case):
    return pytest.param(*case, marks=cpu_kernels_only)


def qkv(B=2, Hq=4, Hkv=2, Nq=16, Nk=16, D=16):
    return random_arrays(1, (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, D))


def pools():
    return random_arrays(2, (4, 16, 2, 16), (4, 16, 2, 16))


def rotary():
    return random_arrays(3, (40, 8), (40, 8))


@needs_kernels
def test_each_call_is_explained_as_explain_does():
    q, k, v = qkv()
    calls = mfa.explain_calls(
        lambda: [mfa.flash_attention(q, k, v, causal=True), mfa.flash_attention(q, k, v, backend="composed")]
    )
    assert calls == [mfa.explain(q, k, v, causal=True), mfa.explain(q, k, v, backend="composed")]
    assert [c["route"] for c in calls] == [OWN_ROUTE, "composed"]


@needs_kernels
@pytest.mark.parametrize(
    ("name", "arguments", "calls"),
    [
        ("flash_attention_qkv_packed", lambda: (mx.zeros((1, 2, 8, 3, 16)),), 1),
        ("flash_attention_kv_packed", lambda: (mx.zeros((1, 2, 8, 16)), mx.zeros((1, 2, 8, 2, 16))), 1),
        ("make_shared_prefix_cache", qkv, 1),
        ("flash_attention_splitfuse", lambda: (*qkv(), *qkv(Nq=1)), 2),
        ("flash_attention_cascade", lambda: (qkv()[0], *qkv(B=1, Nk=50)[1:], *qkv()[1:]), 2),
        ("flash_attention_tree", lambda: (*qkv(Nk=40), list(range(-1, 15))), 2),
        on_cpu("flash_attention_paged", lambda: (qkv()[0], *pools(), mx.array([[0, 1], [2, 3]]), [20, 32]), 1),
        on_cpu(
            "flash_attention_paged_varlen",
            lambda: (qkv(B=1)[0], *pools(), mx.array([[0, 1], [2, 3]]), [20, 32], [0, 15, 16]),
            1,
        ),
        ("flash_attention_kvcache", qkv, 1),
        on_cpu("flash_attention_kvcache_rope_append", lambda: (*qkv(), None, None, *rotary()), 1),
        on_cpu("flash_attention_rope", lambda: (*qkv(), *rotary()), 1),
        on_cpu("flash_attention_rope_unified", lambda: (*qkv(), *rotary()), 1),
        ("flash_attention_speculative_verify", lambda: (*qkv(Nk=40), mx.zeros((2, 16), mx.int32)), 1),
    ],
)
def test_entry_points_are_explained(name, arguments, calls):
    explained = mfa.explain_calls(getattr(mfa, name), *arguments())
    assert [e["route"] for e in explained] == [OWN_ROUTE] * calls
    assert all(e["kernel"] for e in explained)


@needs_kernels
@cpu_kernels_only
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_attention_sparse", lambda: (*qkv(), mx.ones((1, 1), mx.bool_))),
        ("flash_attention_gna", lambda: (*qkv(), (4, 4), (3, 3), (1, 1))),
        ("flash_attention_topk", lambda: (*qkv(), 0.5)),
    ],
)
def test_entry_points_of_tiles_and_grids_are_explained(name, arguments):
    (explained,) = mfa.explain_calls(getattr(mfa, name), *arguments())
    assert explained["function"] == name
    assert explained["route"] == OWN_ROUTE


def test_the_function_of_a_call_is_named():
    q, k, v = qkv()
    assert mfa.explain(q, k, v)["function"] == "flash_attention"
    calls = mfa.explain_calls(mfa.flash_attention_cascade, q, k[:1], v[:1], k, v)
    assert {c["function"] for c in calls} == {"flash_attention_cascade"}


def test_nothing_runs_and_nested_recordings_both_see_a_call():
    q, k, v = (x * 2 for x in qkv())
    inner = []
    outer = mfa.explain_calls(lambda: inner.extend(mfa.explain_calls(mfa.flash_attention, q, k, v)))
    assert len(inner) == 1
    assert outer == inner


def test_an_error_passes_through_and_ends_the_recording():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="heads"):
        mfa.explain_calls(mfa.flash_attention, q[:, :3], k, v)
    assert len(mfa.explain_calls(mfa.flash_attention, q, k, v)) == 1
