"""test_integrations_mlx_lm.py: mlx-lm models give the same logits through this package; unpatching leaves no trace."""

import importlib
import io
import subprocess
import sys

import mlx.core as mx
import mlx_mfa
import pytest

mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")

from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import base, llama, qwen2  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache  # noqa: E402
from mlx_mfa.integrations.mlx_lm import (  # noqa: E402
    get_patch_stats,
    is_patched,
    patch_mlx_lm,
    patched_mlx_lm,
    unpatch_mlx_lm,
)

STOCK = base.scaled_dot_product_attention
TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 4e-2, mx.float16: 5e-3}


@pytest.fixture(autouse=True)
def unpatched():
    assert base.scaled_dot_product_attention is STOCK
    yield
    unpatch_mlx_lm()


def tiny_llama(dtype=mx.float32, hidden_size=64):
    mx.random.seed(3)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=hidden_size,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=101,
        )
    )
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def run_model(model, chunks, cache=None):
    """Logits of all tokens, fed in chunks through one cache."""
    cache = make_prompt_cache(model) if cache is None else cache
    tokens = mx.array([[(7 * i + 3) % 101 for i in range(sum(chunks))]])
    out, at = [], 0
    for length in chunks:
        out.append(model(tokens[:, at : at + length], cache=cache))
        mx.eval(out[-1])
        at += length
    return mx.concatenate(out, axis=1).astype(mx.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("chunks", [[1], [33], [17, 1, 1], [8, 24, 5, 1]])
def test_logits_match_stock_in_prefill_chunks_and_decode(dtype, chunks):
    model = tiny_llama(dtype)
    stock = run_model(model, chunks)
    with patched_mlx_lm():
        ours = run_model(model, chunks)
        stats = get_patch_stats()
    assert mx.abs(ours - stock).max().item() <= TOLERANCE[dtype] * max(1.0, mx.abs(stock).max().item())
    assert (stats["mfa_calls"], stats["fallback_calls"], stats["mfa_ratio"]) == (2 * len(chunks), 0, 1.0)


def test_greedy_tokens_match_stock():
    model = tiny_llama()

    def generate():
        steps = generate_step(mx.array([5, 17, 3, 88]), model, max_tokens=20)
        return [int(token) for token, _ in steps]

    stock = generate()
    with patched_mlx_lm():
        assert generate() == stock


def random_call(Hq=4, Hkv=2, Nq=5, Nk=9, D=16, Dv=16, dtype=mx.float32):
    shapes = [(2, Hq, Nq, D), (2, Hkv, Nk, D), (2, Hkv, Nk, Dv)]
    return [mx.random.normal(shape).astype(dtype) for shape in shapes]


MASKS = {
    "none": lambda: None,
    "causal": lambda: "causal",
    "bool Nq x Nk": lambda: base.create_causal_mask(5, 4),
    "bool window": lambda: base.create_causal_mask(5, 4, window_size=3),
    "bool per batch": lambda: base.create_causal_mask(5, 4, left_padding=mx.array([0, 3])),
    "bool per head": lambda: (mx.random.uniform(shape=(1, 4, 5, 9)) > 0.3) | (mx.arange(9) == 0),
    "additive Nq x Nk": lambda: mx.random.normal((5, 9)),
    "additive rank 3": lambda: mx.random.normal((4, 5, 9)),
    "additive per batch": lambda: mx.random.normal((2, 1, 5, 9)),
    "additive with -inf": lambda: mx.where(base.create_causal_mask(5, 4), 0.0, -mx.inf),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_mask_and_sinks_match_stock_and_are_routed(mask, sinks):
    q, k, v = random_call()
    arguments = {"cache": KVCache(), "scale": 0.3, "mask": mask(), "sinks": mx.random.normal((4,)) if sinks else None}
    expected = STOCK(q, k, v, **arguments)
    with patched_mlx_lm():
        out = base.scaled_dot_product_attention(q, k, v, **arguments)
        assert get_patch_stats()["mfa_calls"] == 1
    assert out.dtype == expected.dtype
    assert mx.allclose(out, expected, atol=2e-5).item()


def test_an_additive_mask_in_the_dtype_of_the_queries_is_taken():
    q, k, v = random_call(dtype=mx.bfloat16)
    mask = mx.random.normal((5, 9)).astype(mx.bfloat16)
    expected = STOCK(q, k, v, None, 0.25, mask)
    with patched_mlx_lm():
        out = base.scaled_dot_product_attention(q, k, v, None, 0.25, mask)
    assert mx.abs(out.astype(mx.float32) - expected.astype(mx.float32)).max().item() < 3e-2


def test_gradients_flow_through_the_patch():
    q, k, v = random_call()

    def loss(q, k, v):
        return (base.scaled_dot_product_attention(q, k, v, None, 0.25, "causal") ** 2).sum()

    expected = mx.grad(loss, argnums=(0, 1, 2))(q, k, v)
    with patched_mlx_lm():
        ours = mx.grad(loss, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(ours, expected, strict=True):
        assert mx.allclose(a, b, atol=1e-4).item()


def test_a_quantised_cache_stays_with_mlx_lm():
    model = tiny_llama(hidden_size=128)  # heads of 32: the smallest group of a quantised cache

    def run():
        return run_model(model, [12, 1], [QuantizedKVCache(group_size=32, bits=8) for _ in range(2)])

    with mlx_mfa.hooks.hooked(False):  # which would compute the activations
        stock = run()
        with patched_mlx_lm():
            patched = run()
            stats = get_patch_stats()
    assert mx.array_equal(stock, patched).item()
    assert stats["fallback_reasons"] == {"quantised cache": 4}
    assert stats["mfa_calls"] == 0


REFUSED = {
    "integer mask": ({"mask": mx.ones((5, 9), mx.int32)}, {}, "mask is neither"),
    "causal with more queries than keys": ({"mask": "causal"}, {"Nk": 3}, "more queries than keys"),
}


@pytest.mark.parametrize(("arguments", "sizes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_goes_to_the_original_and_is_counted(arguments, sizes, reason):
    q, k, v = random_call(**sizes)
    with patched_mlx_lm():
        base.scaled_dot_product_attention(q, k, v, None, 0.25, **arguments)
        stats = get_patch_stats()
    assert stats["mfa_calls"] == 0
    assert reason in next(iter(stats["fallback_reasons"]))


def bound_names():
    """Every module attribute of mlx-lm that is an attention function, by identity."""
    return {
        f"{name}.{attribute}": value
        for name, module in list(sys.modules.items())
        if name.startswith("mlx_lm")
        for attribute, value in vars(module).items()
        if attribute == "scaled_dot_product_attention"
    }


def test_patch_reaches_every_module_and_unpatch_restores_it_by_identity():
    before = bound_names()
    assert patch_mlx_lm(verbose=False) is True
    assert is_patched()
    ours = base.scaled_dot_product_attention
    assert ours is not STOCK
    assert llama.scaled_dot_product_attention is ours
    assert qwen2.scaled_dot_product_attention is ours
    assert unpatch_mlx_lm() is True
    assert not is_patched()
    after = bound_names()
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_modules_imported_while_patched_are_patched_and_restored():
    sys.modules.pop("mlx_lm.models.starcoder2", None)
    patch_mlx_lm(verbose=False)
    late = importlib.import_module("mlx_lm.models.starcoder2")
    assert late.scaled_dot_product_attention is base.scaled_dot_product_attention
    unpatch_mlx_lm()
    assert late.scaled_dot_product_attention is STOCK


def test_a_reference_kept_after_unpatching_acts_as_the_original():
    q, k, v = random_call()
    patch_mlx_lm(verbose=False)
    kept = base.scaled_dot_product_attention
    unpatch_mlx_lm()
    calls = get_patch_stats()["forward_calls"]
    assert mx.array_equal(kept(q, k, v, None, 0.25, "causal"), STOCK(q, k, v, None, 0.25, "causal")).item()
    assert get_patch_stats()["forward_calls"] == calls


def test_patching_twice_is_patching_once(capsys):
    assert patch_mlx_lm()
    assert "patched in" in capsys.readouterr().out
    ours = base.scaled_dot_product_attention
    assert patch_mlx_lm()
    assert capsys.readouterr().out == ""
    assert base.scaled_dot_product_attention is ours
    assert unpatch_mlx_lm() is True
    assert unpatch_mlx_lm() is False
    assert base.scaled_dot_product_attention is STOCK


@pytest.mark.skipif(not mlx_mfa.is_mfa_available(), reason="no kernels for this processor")
def test_the_activation_is_ours_only_while_patched_with_hooks():
    stock = llama.swiglu
    gate, x = mx.random.normal((3, 40)), mx.random.normal((3, 40))
    expected = gate * mx.sigmoid(gate) * x

    def primitives():
        text = io.StringIO()
        mx.export_to_dot(text, llama.swiglu(gate, x))
        assert mx.allclose(llama.swiglu(gate, x), expected, atol=1e-5).item()
        return "MfaSwiglu" in text.getvalue()

    for wanted in (False, True):
        with mlx_mfa.hooks.hooked(wanted):
            assert not primitives()
            with patched_mlx_lm():
                assert llama.swiglu is not stock
                assert primitives() == wanted
            assert llama.swiglu is stock


def test_a_block_inside_a_patch_does_not_end_it():
    with patched_mlx_lm():
        with patched_mlx_lm():
            pass
        assert is_patched()
    assert not is_patched()


def test_a_block_that_fails_restores_the_original():
    with pytest.raises(ZeroDivisionError), patched_mlx_lm():
        raise ZeroDivisionError
    assert base.scaled_dot_product_attention is STOCK


def test_statistics_start_at_zero_with_each_patch():
    q, k, v = random_call()
    for _ in range(2):
        with patched_mlx_lm():
            base.scaled_dot_product_attention(q, k, v, None, 0.25, None)
            stats = get_patch_stats()
        assert (stats["forward_calls"], stats["steel_calls"], stats["steel_ratio"]) == (1, 1, 1.0)


def test_no_kernel_for_the_machine_leaves_mlx_lm_alone(monkeypatch, capsys):
    monkeypatch.setattr(mlx_mfa, "is_mfa_available", lambda: False)
    assert patch_mlx_lm() is False
    assert "no kernel" in capsys.readouterr().out
    assert base.scaled_dot_product_attention is STOCK


def test_an_attention_function_with_other_arguments_is_refused(monkeypatch):
    monkeypatch.setattr(base, "scaled_dot_product_attention", lambda queries, keys: None)
    with pytest.raises(RuntimeError, match=r"should take \(queries, keys, values, cache.*takes \(queries, keys\)"):
        patch_mlx_lm()
    assert not is_patched()


def test_a_name_of_ones_own_for_the_original_is_left_alone():
    with patched_mlx_lm():
        assert STOCK is not base.scaled_dot_product_attention
        assert STOCK.__module__ == "mlx_lm.models.base"


def test_without_mlx_lm_the_error_is_one_clear_line():
    code = (
        "import sys; sys.modules['mlx_lm'] = None\n"
        "from mlx_mfa.integrations.mlx_lm import patch_mlx_lm\n"
        "try:\n    patch_mlx_lm()\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[patch_mlx_lm] mlx-lm is not installed; install it with: pip install mlx-lm\n"
