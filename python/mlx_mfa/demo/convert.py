"""Conversion of a GGUF file (architecture "llama", byte-level BPE vocabulary) into a folder that mlx-lm loads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .gguf import GgufFile

DTYPES = ("bfloat16", "float32", "float16", "packed")
GROUP_SIZE = 32  # GGUF's block is MLX's quantisation group

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OPTIONAL_TENSORS = {"output.weight"}  # absent when the output layer shares the embedding

# How GPT-2's tokenizer cuts text before merging (published with the model; also in the GGUF specification's loaders).
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


class LlamaShape:
    """The sizes of a llama model, read from GGUF metadata and checked against each other."""

    def __init__(self, gguf: GgufFile):
        architecture = gguf.get("general.architecture", str)
        if architecture != "llama":
            raise _unsupported(gguf, f"architecture {architecture!r}; only 'llama' is")
        scaling = gguf.get("llama.rope.scaling.type", str, "none")
        if scaling != "none" or "rope_freqs.weight" in gguf.tensors:
            raise _unsupported(gguf, "scaled rotary frequencies")
        self.layers = self._positive(gguf, "llama.block_count")
        self.hidden = self._positive(gguf, "llama.embedding_length")
        self.feed_forward = self._positive(gguf, "llama.feed_forward_length")
        self.heads = self._positive(gguf, "llama.attention.head_count")
        self.kv_heads = self._positive(gguf, "llama.attention.head_count_kv", self.heads)
        self.context = self._positive(gguf, "llama.context_length")
        self.head_dim = self._positive(gguf, "llama.attention.key_length", self.hidden // self.heads or 1)
        self.vocabulary = len(gguf.get("tokenizer.ggml.tokens", list))
        if self.heads % self.kv_heads:
            raise _damaged(gguf, f"{self.heads} query heads are not a multiple of {self.kv_heads} key/value heads")
        if self.head_dim % 2 or gguf.get("llama.rope.dimension_count", int, self.head_dim) != self.head_dim:
            raise _unsupported(gguf, f"rotary embedding over part of a head (head dim {self.head_dim})")
        if self.layers > 10_000 or self.vocabulary == 0:  # before a loop or a table of that size is made
            raise _damaged(gguf, f"{self.layers} layers and a vocabulary of {self.vocabulary}")

    @staticmethod
    def _positive(gguf: GgufFile, key: str, default: int | None = None) -> int:
        value = gguf.get(key, int, default)
        if value <= 0:
            raise _damaged(gguf, f"metadata {key!r} must be positive; got {value}")
        return value

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the file must hold, GGUF name to shape."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "attn_norm": (self.hidden,),
            "attn_q": (queries, self.hidden),
            "attn_k": (keys, self.hidden),
            "attn_v": (keys, self.hidden),
            "attn_output": (self.hidden, queries),
            "ffn_norm": (self.hidden,),
            "ffn_gate": (self.feed_forward, self.hidden),
            "ffn_up": (self.feed_forward, self.hidden),
            "ffn_down": (self.hidden, self.feed_forward),
        }
        embedding = (self.vocabulary, self.hidden)
        out: dict[str, tuple[int, ...]] = {"token_embd.weight": embedding, "output_norm.weight": (self.hidden,)}
        out["output.weight"] = embedding
        for index in range(self.layers):
            out.update({f"blk.{index}.{part}.weight": shape for part, shape in layer.items()})
        return out

    def check(self, gguf: GgufFile) -> None:
        """Raise ``ValueError`` unless the file holds exactly the expected tensors in the expected shapes."""
        expected = self.tensors()
        for name, shape in expected.items():
            if name not in gguf.tensors:
                if name in OPTIONAL_TENSORS:
                    continue
                raise _damaged(gguf, f"tensor {name!r} is missing")
            if gguf.tensors[name].shape != shape:
                raise _damaged(gguf, f"tensor {name!r} has shape {gguf.tensors[name].shape}; expected {shape}")
        extra = sorted(set(gguf.tensors) - set(expected))
        if extra:
            raise _unsupported(gguf, f"tensor {extra[0]!r}")


def _unsupported(gguf: GgufFile, what: str) -> ValueError:
    return ValueError(f"[convert] {gguf.path}: not supported: {what}")


def _damaged(gguf: GgufFile, problem: str) -> ValueError:
    return ValueError(f"[convert] {gguf.path}: {problem}")


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj``."""
    stem = name.removesuffix(".weight")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{TENSOR_NAMES[part]}"
    return TENSOR_NAMES[stem]


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a Q or K projection back in the order of half-split rotary pairs.

    GGUF interleaves them: within a head, row ``2 i + s`` there is row ``s * head_dim / 2 + i`` here.
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def pack_words(quants: np.ndarray, bits: int) -> np.ndarray:
    """Quants ``[..., blocks, 32]`` as MLX's uint32 words ``[..., columns * bits / 32]``, first value lowest."""
    per_word = 32 // bits
    grouped = quants.reshape(*quants.shape[:-2], -1, per_word).astype(np.uint32)
    return np.bitwise_or.reduce(grouped << (bits * np.arange(per_word, dtype=np.uint32)), axis=-1)


def convert_weights(
    gguf: GgufFile, shape: LlamaShape, dtype: str, on_tensor: Callable[[], None] = lambda: None
) -> tuple[dict[str, mx.array], dict[str, Any] | None]:
    """Every tensor under its mlx-lm name, and the ``quantization`` entry of config.json (None if all are decoded)."""
    rotary_heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
    weights: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    float_dtype = mx.float16 if dtype == "packed" else getattr(mx, dtype)  # float16: what GGUF's own scales are
    for name, info in gguf.tensors.items():
        module, heads = hf_name(name), rotary_heads.get(name.split(".")[-2])

        def ordered(rows: np.ndarray, heads: int | None = heads) -> mx.array:
            return mx.array(np.ascontiguousarray(unpermute(rows, heads) if heads else rows))

        if dtype == "packed" and info.is_quantised:
            packed = gguf.quantised(name)
            bits[module] = packed.bits
            weights[f"{module}.weight"] = ordered(pack_words(packed.quants, packed.bits))
            weights[f"{module}.scales"] = ordered(_as_float16(gguf, name, packed.scale))
            weights[f"{module}.biases"] = ordered(_as_float16(gguf, name, packed.bias))
        else:
            weights[f"{module}.weight"] = ordered(gguf.floats(name)).astype(float_dtype)
            mx.eval(
                weights[f"{module}.weight"]
            )  # now, or every tensor would be held in float32 until the file is written
        on_tensor()
    if not bits:
        return weights, None
    common = Counter(bits.values()).most_common(1)[0][0]
    others = {module: {"group_size": GROUP_SIZE, "bits": b} for module, b in bits.items() if b != common}
    return weights, {"group_size": GROUP_SIZE, "bits": common, **others}


def _as_float16(gguf: GgufFile, name: str, values: np.ndarray) -> np.ndarray:
    if np.abs(values).max() > np.finfo(np.float16).max:
        raise _unsupported(gguf, f"tensor {name!r}: its bias does not fit float16")
    return values.astype(np.float16)


def model_config(gguf: GgufFile, shape: LlamaShape, dtype: str, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The contents of config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": _short(gguf.get("llama.attention.layer_norm_rms_epsilon", float)),
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": _short(gguf.get("llama.rope.freq_base", float, 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "float16" if dtype == "packed" else dtype,
    }
    for role in ("bos", "eos"):
        if (token := _special_token(gguf, role)) is not None:
            config[f"{role}_token_id"] = token
    if quantization:
        config["quantization"] = quantization
    return config


def _short(value: float) -> float:
    """A float32 as the shortest decimal that gives it back: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _special_token(gguf: GgufFile, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in gguf.metadata:
        return None
    token, count = gguf.get(key, int), len(gguf.get("tokenizer.ggml.tokens", list))
    if not 0 <= token < count:
        raise _damaged(gguf, f"metadata {key!r} is {token}; the vocabulary has {count} tokens")
    return token


def write_tokenizer(gguf: GgufFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a byte-level BPE vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    kind, cutting = gguf.get("tokenizer.ggml.model", str), gguf.get("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2":
        raise _unsupported(gguf, f"tokenizer model {kind!r}; only byte-level BPE ('gpt2') is")
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "gpt-2": [
            pre_tokenizers.Split(Regex(GPT2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if cutting not in steps:
        raise _unsupported(gguf, f"pre-tokenizer {cutting!r}; only {', '.join(map(repr, steps))} are")

    tokens = gguf.get("tokenizer.ggml.tokens", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _damaged(gguf, "the vocabulary names a token twice")
    merges = [tuple(pair.split(" ")) for pair in gguf.get("tokenizer.ggml.merges", list)]
    for pair in merges:
        # The tokenizers library aborts on some of these instead of raising.
        if len(pair) != 2 or any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise _damaged(gguf, f"merge {' '.join(pair)!r} does not join two tokens of the vocabulary into a third")
    types = gguf.metadata.get("tokenizer.ggml.token_type", np.zeros(len(tokens), np.int32))
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise _damaged(gguf, f"metadata 'tokenizer.ggml.token_type' must be an array of {len(tokens)} integers")

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[cutting])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.get("llama.context_length", int),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": gguf.get("tokenizer.ggml.add_bos_token", bool, False),
    }
    if "tokenizer.chat_template" in gguf.metadata:
        config["chat_template"] = gguf.get("tokenizer.chat_template", str)
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := _special_token(gguf, role)) is not None:
            config[f"{name}_token"] = tokens[token]
    write_json(folder / "tokenizer_config.json", config)


def write_model(gguf: GgufFile, folder: Path, dtype: str, on_tensor: Callable[[], None] = lambda: None) -> None:
    """Write the model folder of ``gguf`` into the existing, empty ``folder``.

    Args:
        gguf: The source.
        folder: Where the files go.
        dtype: One of ``DTYPES``; "packed" keeps quantised tensors as they are (MLX affine, group size 32).
        on_tensor: Called after each tensor.

    Raises:
        ValueError: The file is no llama model of the kind described in this module, or ``dtype`` is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"[convert] dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    shape = LlamaShape(gguf)
    shape.check(gguf)
    write_tokenizer(gguf, folder)
    weights, quantization = convert_weights(gguf, shape, dtype, on_tensor)
    write_json(folder / "config.json", model_config(gguf, shape, dtype, quantization))
    try:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    except RuntimeError as error:  # MLX reports a full disk this way
        raise OSError(f"cannot write {folder / 'model.safetensors'}: {error}") from error


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
