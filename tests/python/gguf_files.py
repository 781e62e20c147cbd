"""gguf_files.py: writes small GGUF files for the tests, independently of the reader, and a tiny llama model in one."""

import struct

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALAR_FORMS = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIifBQqd", strict=True))
TENSOR_F32, TENSOR_F16, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q8_0, TENSOR_BF16 = 0, 1, 2, 3, 8, 30


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind, content):
    """The bytes of a metadata value; an array is ``(item kind, [items])``."""
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        item, items = content
        return struct.pack("<IQ", item, len(items)) + b"".join(value(item, x) for x in items)
    return struct.pack("<" + SCALAR_FORMS[kind], content)


def pair(key, kind, content):
    """The bytes of one metadata entry."""
    return string(key) + struct.pack("<I", kind) + value(kind, content)


def tensor_entry(name, shape, kind, offset):
    """The bytes of one row of the tensor table; ``shape`` slowest axis first."""
    dims = b"".join(struct.pack("<Q", n) for n in reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def gguf_bytes(metadata=(), tensors=(), *, version=3, alignment=32):
    """A whole file: ``metadata`` of (key, kind, content), ``tensors`` of (name, shape, kind, raw bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(pair(*entry) for entry in metadata)
    data = b""
    for name, shape, kind, raw in tensors:
        head += tensor_entry(name, shape, kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def f32(array):
    return np.asarray(array, "<f4").tobytes()


def q4_1(rng, shape):
    """Random Q4_1 bytes and the weights they stand for."""
    raw, weights = b"", []
    for _ in range(int(np.prod(shape)) // 32):
        scale, bias = np.float16(rng.uniform(0.01, 0.02)), np.float16(rng.uniform(-0.2, -0.1))
        quants = rng.integers(0, 16, 32)
        raw += scale.tobytes() + bias.tobytes()
        raw += bytes(int(quants[i]) | int(quants[i + 16]) << 4 for i in range(16))
        weights += [float(scale) * int(n) + float(bias) for n in quants]
    return raw, np.array(weights, np.float32).reshape(shape)


def byte_letters():
    """The 256 letters by which a byte-level vocabulary writes the bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TINY = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 96}


def tiny_metadata(**changes):
    """Metadata of a two-layer llama with a byte-level vocabulary; ``changes`` replace entries, None removes one."""
    tokens = ["<|im_start|>", "<|im_end|>", *byte_letters(), "th", "the"]
    types = [3, 3] + [1] * (len(tokens) - 2)
    entries = {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (U32, TINY["layers"]),
        "llama.context_length": (U32, 512),
        "llama.embedding_length": (U32, TINY["hidden"]),
        "llama.feed_forward_length": (U32, TINY["feed_forward"]),
        "llama.attention.head_count": (U32, TINY["heads"]),
        "llama.attention.head_count_kv": (U32, TINY["kv_heads"]),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, 10000.0),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["t h", "th e"])),
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, 1),
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }
    entries.update({key: entry for key, entry in changes.items() if entry is not None})
    return [(key, *entry) for key, entry in entries.items() if changes.get(key, entry) is not None]


def tiny_tensors(seed=0):
    """The tensors of that model: (name, shape, kind, bytes) and the weights they stand for, by name."""
    rng = np.random.default_rng(seed)
    hidden, feed_forward = TINY["hidden"], TINY["feed_forward"]
    keys = TINY["kv_heads"] * hidden // TINY["heads"]
    matrices = {
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (feed_forward, hidden),
        "ffn_up": (feed_forward, hidden),
        "ffn_down": (hidden, feed_forward),
    }
    tensors, weights = [], {}

    def add(name, shape, quantised):
        if quantised:
            raw, weights[name] = q4_1(rng, shape)
        else:
            weights[name] = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.1, shape).astype(np.float32)
            raw = f32(weights[name])
        tensors.append((name, shape, TENSOR_Q4_1 if quantised else TENSOR_F32, raw))

    vocabulary = 2 + 256 + 2
    add("token_embd.weight", (vocabulary, hidden), False)
    for layer in range(TINY["layers"]):
        add(f"blk.{layer}.attn_norm.weight", (hidden,), False)
        add(f"blk.{layer}.ffn_norm.weight", (hidden,), False)
        for part, shape in matrices.items():
            add(f"blk.{layer}.{part}.weight", shape, True)
    add("output_norm.weight", (hidden,), False)
    return tensors, weights


def write_tiny_model(path, **changes):
    """Write the tiny model to ``path`` and return the weights by GGUF name."""
    tensors, weights = tiny_tensors()
    path.write_bytes(gguf_bytes(tiny_metadata(**changes), tensors))
    return weights
