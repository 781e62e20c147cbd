"""test_decoder_layers.py: layers of a llama model as one operation have the bits of their parts, and step aside."""

import copy
import gc
import itertools

import mlx.core as mx
import mlx.nn as nn
import pytest
from linear_problems import needs_kernels, on_cpu

mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")

from mlx_lm.models import llama  # noqa: E402
from mlx_lm.models.cache import KVCache, make_prompt_cache  # noqa: E402
from mlx_mfa import _ext, hooks  # noqa: E402
from mlx_mfa.integrations import decoder_layers  # noqa: E402
from mlx_mfa.integrations.mlx_lm import get_patch_stats, patched_mlx_lm, unpatch_mlx_lm  # noqa: E402

pytestmark = [needs_kernels, on_cpu]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def in_force():
    with hooks.hooked(True), patched_mlx_lm():
        yield


def make_model(dtype=mx.bfloat16, quantised=None, **changes):
    mx.random.seed(3)
    sizes = {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 101,
    }
    model = llama.Model(llama.ModelArgs(**sizes | changes))
    for layer in model.layers:  # norms that do something
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = mx.random.uniform(0.5, 1.5, norm.weight.shape)
    model.set_dtype(dtype)
    if quantised is not None:
        bits, group_size = quantised
        nn.quantize(model, group_size, bits, class_predicate=lambda _path, m: isinstance(m, nn.Linear))
    mx.eval(model.parameters())
    return model


def filled(model, length=19, batch=1):
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[(5 * i + 2 * b) % 101 for i in range(length)] for b in range(batch)]), cache=cache))
    return cache


@pytest.fixture
def one_operation(monkeypatch):
    """Counts the layers that are part of one operation, and the calls; with `allowed` false there are none."""

    class Switch:
        allowed, taken, calls = True, 0, 0

    original = _ext.try_decoder_layers

    def counted(x, stack, caches, causal):
        result = original(x, stack, caches, causal) if Switch.allowed else None
        Switch.taken += len(caches) if result is not None else 0
        Switch.calls += result is not None
        return result

    monkeypatch.setattr(_ext, "try_decoder_layers", counted)
    return Switch


def steps(model, cache, chunks, batch=1):
    """Logits of each chunk, and the cache's contents."""
    out, at = [], 0
    for length in chunks:
        tokens = mx.array([[(7 * (i + at) + 3 + b) % 101 for i in range(length)] for b in range(batch)])
        out.append(model(tokens, cache=cache))
        mx.eval(out[-1])
        at += length
    return [*out, *(a[..., : c.offset, :] for c in cache for a in (c.keys, c.values))]


def assert_same_bits_as_parts(model, switch, chunks, batch=1, length=19):
    fused_cache, cache = filled(model, length, batch), filled(model, length, batch)
    fused = steps(model, fused_cache, chunks, batch)
    assert (switch.taken, switch.calls) == (len(chunks) * len(model.layers), len(chunks))
    switch.allowed = False
    parts = steps(model, cache, chunks, batch)
    for a, b in zip(fused, parts, strict=True):
        assert a.dtype == b.dtype
        assert mx.isfinite(a).all().item()
        assert mx.array_equal(a, b).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("quantised", [None, (4, 64), (8, 32), (4, 32), (6, 64), (3, 128), (2, 64), (5, 32)])
def test_same_bits_as_the_parts(one_operation, dtype, quantised):
    assert_same_bits_as_parts(make_model(dtype, quantised), one_operation, [1, 1, 3, 8, 1])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 48},
        {"rope_traditional": True},
        {"rope_scaling": LLAMA3},
        {"rope_theta": 500000.0},
        {"hidden_size": 96, "intermediate_size": 100},
    ],
)
def test_same_bits_for_other_shapes_and_rotations(one_operation, changes):
    assert_same_bits_as_parts(make_model(**changes), one_operation, [1, 2])


def test_same_bits_in_batches(one_operation):
    assert_same_bits_as_parts(make_model(), one_operation, [1, 2, 1], batch=3)


def test_same_bits_over_many_keys(one_operation):
    assert_same_bits_as_parts(make_model(mx.float32), one_operation, [1, 5], length=700)


@pytest.mark.parametrize("layers", [1, 8, 9, 17])
def test_same_bits_of_any_number_of_layers(one_operation, layers):
    assert_same_bits_as_parts(make_model(num_hidden_layers=layers), one_operation, [1, 3])


def test_layers_with_rotations_of_their_own(one_operation):
    model = make_model(num_hidden_layers=3)
    model.layers[1].self_attn.rope = nn.RoPE(32, base=777.0)
    model.layers[2].self_attn.rope = nn.RoPE(32, base=777.0, traditional=True)
    assert_same_bits_as_parts(model, one_operation, [1, 2])


def test_projections_of_different_kinds(one_operation):
    model = make_model()
    for layer, bits in zip(model.layers, (4, 8), strict=True):
        layer.self_attn.k_proj = layer.self_attn.k_proj.to_quantized(64, bits)
        layer.mlp.up_proj = layer.mlp.up_proj.to_quantized(32, 3)
    assert_same_bits_as_parts(model, one_operation, [1, 4])


def test_a_row_has_the_same_bits_alone_and_among_others():
    model = make_model()
    alone, together = filled(model), filled(model)
    rows = mx.concatenate(steps(model, alone, [1, 1, 1, 1])[:4], axis=1)
    assert mx.array_equal(rows, steps(model, together, [4])[0]).item()


def test_the_cache_is_written_in_place_also_while_work_is_in_flight():
    model = make_model()
    cache = filled(model)
    token, many = mx.array([[3]]), mx.zeros((20_000_000,))
    mx.eval(token, many, [c.state[:2] for c in cache])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.async_eval(mx.argmax(many))  # keeps the stream busy while the steps are handed to it
    for _ in range(20):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.async_eval(token)
    mx.eval(token)
    assert mx.get_peak_memory() - before < cache[0].keys.nbytes


def test_a_copy_of_the_cache_keeps_what_it_held(one_operation):
    model = make_model()
    cache = filled(model)
    kept = copy.deepcopy(cache)
    expected = [mx.array(a) + 0 for c in kept for a in (c.keys, c.values)]
    mx.eval(expected)
    first = steps(model, cache, [1, 1])
    for a, b in zip(expected, (a for c in kept for a in (c.keys, c.values)), strict=True):
        assert mx.array_equal(a, b).item()
    for a, b in zip(first, steps(model, kept, [1, 1]), strict=True):
        assert mx.array_equal(a, b).item()
    assert one_operation.taken == 8


def test_a_trimmed_cache_is_written_from_its_new_end(one_operation):
    model = make_model()
    cache = filled(model)
    first = steps(model, cache, [3])
    for c in cache:
        c.trim(3)
    for a, b in zip(first, steps(model, cache, [3]), strict=True):
        assert mx.array_equal(a, b).item()


def test_weights_that_change_are_seen(one_operation):
    model = make_model()
    down = model.layers[1].mlp.down_proj
    seen = [steps(model, filled(model), [1])[0]]
    down.weight = 2 * down.weight
    mx.eval(down.weight)
    seen.append(steps(model, filled(model), [1])[0])
    down.weight[3] = 0
    mx.eval(down.weight)
    seen.append(steps(model, filled(model), [1])[0])
    assert one_operation.taken == 6
    assert not any(mx.array_equal(a, b).item() for a, b in itertools.pairwise(seen))


@pytest.fixture
def readings(monkeypatch):
    """One entry for each time that layers were read, their number."""
    numbers = []
    original = _ext.prepare_decoder

    def counted(layers):
        numbers.append(len(layers))
        return original(layers)

    monkeypatch.setattr(_ext, "prepare_decoder", counted)
    return numbers


def test_layers_are_read_once_for_all_tokens(readings):
    model, other = make_model(), make_model()
    cache, others = filled(model), filled(other)
    steps(model, cache, [1, 1, 3])
    steps(other, others, [1, 1])
    steps(model, filled(model), [1, 1])
    assert readings == [2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.layers[1].self_attn.rope, "base", 777.0),
        lambda m: setattr(m.layers[1].self_attn.rope, "scale", 0.5),
        lambda m: setattr(m.layers[0].self_attn, "scale", 0.3),
        lambda m: setattr(m.layers[1].post_attention_layernorm, "eps", 0.5),
        lambda m: m.layers[1].input_layernorm.weight.__setitem__(slice(3, 5), 4),
        lambda m: m.layers[0].self_attn.__setitem__("v_proj", m.layers[1].self_attn.v_proj),
        lambda m: m.layers[0].mlp.gate_proj.__setitem__("weight", m.layers[1].mlp.gate_proj.weight),
        lambda m: nn.quantize(m, 64, 4, class_predicate=lambda path, _module: path.endswith("up_proj")),
        lambda m: m.model.layers.reverse(),
        lambda m: m.model.__setitem__("layers", m.layers[1:] + m.layers[:1]),
        lambda m: m.model.layers.__setitem__(1, copy.deepcopy(m.layers[0])),
    ],
)
def test_what_changes_between_tokens_is_read_again(one_operation, readings, change):
    model = make_model()
    before = steps(model, filled(model), [1])[0]
    prompt = filled(model)
    change(model)
    mx.eval(model.parameters())
    cache, again = copy.deepcopy(prompt), copy.deepcopy(prompt)
    after = steps(model, cache, [1, 1])
    assert readings == [2, 2]
    assert not mx.array_equal(before, after[0]).item()
    one_operation.allowed = False
    for a, b in zip(after, steps(model, again, [1, 1]), strict=True):
        assert mx.array_equal(a, b).item()


def test_a_bias_put_in_between_tokens_is_added():
    model = make_model()
    cache = filled(model)
    steps(model, cache, [1])
    projection = model.layers[1].self_attn.q_proj
    projection.bias = mx.full((128,), 3, mx.bfloat16)
    with_bias = steps(model, cache, [1])[0]
    del projection.bias
    cache[0].trim(1), cache[1].trim(1)
    assert not mx.array_equal(with_bias, steps(model, cache, [1])[0]).item()


@pytest.mark.parametrize("decoded", ["model", "layer"])
def test_what_was_read_goes_with_the_model(decoded):
    gc.collect()
    before = mx.get_active_memory()
    model = make_model(hidden_size=512)
    cache = filled(model)
    mx.eval(model(mx.array([[1]]), cache=cache))
    if decoded == "layer":
        mx.eval(model.layers[0](mx.ones((1, 1, 512), mx.bfloat16), None, cache=cache[0]))
    assert mx.get_active_memory() - before > 1 << 20
    del model, cache
    gc.collect()
    assert mx.get_active_memory() - before < 1 << 16


def test_a_call_without_a_cache_lets_go_of_the_weights():
    model = make_model()
    steps(model, filled(model), [1])
    weight = model.layers[0].mlp.up_proj.weight
    mx.eval(model(mx.array([[1, 2]])))
    before = mx.get_active_memory()
    model.layers[0].mlp.up_proj.weight = weight + 1
    del weight
    mx.eval(model.parameters())
    assert mx.get_active_memory() == before


def test_weights_that_are_not_evaluated_run_part_by_part_once(one_operation):
    model = make_model()
    cache = filled(model)
    for layer in model.layers:
        layer.mlp.up_proj.weight = layer.mlp.up_proj.weight + 1
    assert [steps(model, cache, [1]) is not None and one_operation.taken for _ in range(2)] == [0, 2]


def one_token(model, cache, mask=None):
    return model.layers[0](mx.ones((1, 1, 128), mx.bfloat16), mask, cache=cache)


def full_cache():
    cache = KVCache()
    cache.update_and_fetch(*(mx.ones((1, 2, 256, 32), mx.bfloat16) for _ in range(2)))
    return cache


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.self_attn, "q_proj", nn.Linear(128, 128, bias=True)),
        lambda m: setattr(m.mlp, "up_proj", m.mlp.up_proj.to_quantized(32, mode="mxfp4")),
        lambda m: setattr(m, "input_layernorm", nn.LayerNorm(128)),
        lambda m: setattr(m.self_attn, "rope", lambda x, offset=0: x),
        lambda m: setattr(m.mlp, "gate_proj", nn.Linear(128, 256, bias=False)),  # float32
    ],
)
def test_other_parts_run_one_by_one(one_operation, change):
    model = make_model()
    change(model.layers[0])
    mx.eval(one_token(model, filled(model)[0]))
    assert one_operation.taken == 0


def test_beside_a_layer_that_does_not_qualify_each_other_is_an_operation(one_operation):
    model = make_model(num_hidden_layers=3)
    model.layers[1].self_attn.q_proj.bias = mx.ones((128,), mx.bfloat16)
    cache, again = filled(model), filled(model)
    out = steps(model, cache, [1])
    assert (one_operation.taken, one_operation.calls) == (2, 2)
    one_operation.allowed = False
    for a, b in zip(out, steps(model, again, [1]), strict=True):
        assert mx.array_equal(a, b).item()


def test_a_layer_that_someone_else_computes_is_called(one_operation, monkeypatch):
    model = make_model()
    cache = filled(model)
    calls = []
    ours = llama.TransformerBlock.__call__

    def listening(self, *args, **kwargs):
        calls.append(self)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", listening)
    steps(model, cache, [1])
    assert (calls, one_operation.calls) == (model.layers, 2)


def test_embeddings_may_be_given(one_operation):
    model = make_model()
    tokens = mx.array([[5]])
    out = model(tokens, cache=filled(model))
    given = model(None, cache=filled(model), input_embeddings=model.model.embed_tokens(tokens))
    assert mx.array_equal(out, given).item()
    assert one_operation.taken == 4


@pytest.mark.parametrize(
    ("cache", "mask"),
    [
        (lambda: None, None),
        (KVCache, None),
        (full_cache, None),
        (lambda: filled(make_model())[0], mx.array([[True] * 20])),
    ],
)
def test_other_calls_run_part_by_part(one_operation, cache, mask):
    mx.eval(one_token(make_model(), cache(), mask))
    assert one_operation.taken == 0


def test_nine_tokens_run_part_by_part(one_operation):
    model = make_model()
    steps(model, filled(model), [9])
    assert one_operation.taken == 0


def test_gradients_through_a_step_with_a_cache(one_operation):
    model = make_model(mx.float32)
    cache = filled(model)

    def loss(x):
        kept = copy.deepcopy(cache[0])
        return model.layers[0](x, None, cache=kept).square().sum()

    gradient = mx.grad(loss)(mx.ones((1, 1, 128)))
    assert one_operation.taken == 0
    assert mx.abs(gradient).max().item() > 0


def test_only_while_hooks_and_patch_are_in_force(one_operation):
    model = make_model()
    cache = filled(model)
    with hooks.hooked(False):
        steps(model, cache, [1])
    assert one_operation.taken == 0
    steps(model, cache, [1])
    assert one_operation.taken == 2


def test_an_attention_function_put_in_by_someone_else_is_called(one_operation, monkeypatch):
    model = make_model()
    cache = filled(model)
    calls = []
    ours = llama.scaled_dot_product_attention

    def listening(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    monkeypatch.setattr(llama, "scaled_dot_product_attention", listening)
    steps(model, cache, [1])
    assert (len(calls), one_operation.taken) == (2, 0)


def test_layers_count_as_calls_of_attention():
    model = make_model()
    cache = filled(model)
    before = get_patch_stats()["mfa_calls"]
    steps(model, cache, [1, 1])
    assert get_patch_stats()["mfa_calls"] - before == 4


@pytest.mark.parametrize("kind", [llama.TransformerBlock, llama.LlamaModel])
def test_unpatching_gives_the_class_its_function_back(kind):
    unpatch_mlx_lm()
    stock = kind.__call__
    with patched_mlx_lm():
        assert kind.__call__ is not stock
    assert kind.__call__ is stock


def test_code_that_is_not_known_is_left_alone(monkeypatch):
    unpatch_mlx_lm()

    def other(self, x):
        return x

    monkeypatch.setattr(llama.MLP, "__call__", other)
    stock = llama.TransformerBlock.__call__
    assert decoder_layers.decoder_layers(lambda: True, lambda _count: None) is None
    with patched_mlx_lm():
        assert llama.TransformerBlock.__call__ is stock
