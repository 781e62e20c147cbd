"""test_demo_gguf.py: the GGUF reader gives what was written, and refuses every damaged file with a ValueError."""

import struct

import gguf_files as files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_mfa.demo.gguf import GgufFile

VECTOR = ("w", (4,), files.TENSOR_F32, files.f32([1, 2, 3, 4]))


def read(tmp_path, content):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    return GgufFile(path)


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_reads_back(tmp_path, version):
    gguf = read(
        tmp_path,
        files.gguf_bytes(
            [
                ("u8", files.U8, 200),
                ("i16", files.I16, -300),
                ("u64", files.U64, 2**63),
                ("f32", files.F32, 0.5),
                ("yes", files.BOOL, 1),
                ("text", files.STRING, "grüße"),
                ("numbers", files.ARRAY, (files.I32, [1, -2, 3])),
                ("words", files.ARRAY, (files.STRING, ["a", "", "bc"])),
                ("flags", files.ARRAY, (files.BOOL, [1, 0])),
                ("nested", files.ARRAY, (files.ARRAY, [(files.U8, [1]), (files.STRING, ["x"])])),
                ("empty", files.ARRAY, (files.F64, [])),
            ],
            version=version,
        ),
    )
    meta = gguf.metadata
    assert gguf.version == version
    assert (meta["u8"], meta["i16"], meta["u64"], meta["f32"], meta["yes"]) == (200, -300, 2**63, 0.5, True)
    assert meta["text"] == "grüße"
    assert meta["numbers"].tolist() == [1, -2, 3]
    assert meta["words"] == ["a", "", "bc"]
    assert meta["flags"] == [True, False]
    assert meta["nested"][0].tolist() == [1]
    assert meta["nested"][1] == ["x"]
    assert len(meta["empty"]) == 0


def test_get_checks_presence_and_type(tmp_path):
    gguf = read(tmp_path, files.gguf_bytes([("n", files.U32, 7), ("words", files.ARRAY, (files.STRING, ["a"]))]))
    assert gguf.get("n", int) == 7
    assert gguf.get("n", float) == 7.0
    assert gguf.get("words", list) == ["a"]
    assert gguf.get("absent", int, 3) == 3
    with pytest.raises(ValueError, match="metadata 'absent' is missing"):
        gguf.get("absent", int)
    with pytest.raises(ValueError, match="metadata 'n' must be a str; got 7"):
        gguf.get("n", str)


def test_plain_tensors_decode_to_float32(tmp_path):
    values = np.array([[1.5, -2.0, 0.25], [3.0, 1e-3, -7.0]], np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype("<u2")
    gguf = read(
        tmp_path,
        files.gguf_bytes(
            [],
            [
                ("a", (2, 3), files.TENSOR_F32, files.f32(values)),
                ("b", (2, 3), files.TENSOR_F16, values.astype("<f2").tobytes()),
                ("c", (2, 3), files.TENSOR_BF16, bf16.tobytes()),
            ],
        ),
    )
    assert [info.shape for info in gguf.tensors.values()] == [(2, 3)] * 3
    np.testing.assert_array_equal(gguf.floats("a"), values)
    np.testing.assert_array_equal(gguf.floats("b"), values.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(gguf.floats("c"), (bf16.astype(np.uint32) << 16).view(np.float32))


def test_quantised_tensors_decode_as_their_formats_say(tmp_path):
    rng = np.random.default_rng(0)
    scale, bias = np.float16(0.125), np.float16(-0.75)
    nibbles, signed = rng.integers(0, 16, 32), rng.integers(-128, 128, 32)
    halves = bytes(int(nibbles[i]) | int(nibbles[i + 16]) << 4 for i in range(16))
    gguf = read(
        tmp_path,
        files.gguf_bytes(
            [],
            [
                ("q4_0", (1, 32), files.TENSOR_Q4_0, scale.tobytes() + halves),
                ("q4_1", (1, 32), files.TENSOR_Q4_1, scale.tobytes() + bias.tobytes() + halves),
                ("q8_0", (1, 32), files.TENSOR_Q8_0, scale.tobytes() + signed.astype("i1").tobytes()),
            ],
        ),
    )
    np.testing.assert_array_equal(gguf.floats("q4_0")[0], 0.125 * (nibbles - 8))
    np.testing.assert_array_equal(gguf.floats("q4_1")[0], 0.125 * nibbles - 0.75)
    np.testing.assert_array_equal(gguf.floats("q8_0")[0], 0.125 * signed)
    assert [gguf.quantised(name).bits for name in gguf.tensors] == [4, 4, 8]
    assert gguf.quantised("q8_0").quants.dtype == np.uint8


def header(tensors=0, pairs=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def entry(shape=(4,), kind=files.TENSOR_F32, offset=0, name="w"):
    return header(tensors=1) + files.tensor_entry(name, shape, kind, offset) + bytes(256)


NESTED = struct.pack("<IQ", files.ARRAY, 1)
DAMAGED = {
    "empty file": (b"", "not a GGUF file"),
    "other magic": (b"GGML" + bytes(64), "not a GGUF file"),
    "only the magic": (b"GGUF", "version needs 4 bytes"),
    "version 1": (header(version=1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd tensor count": (header(tensors=2**64 - 1), "name of tensor 0"),
    "absurd metadata count": (header(pairs=2**64 - 1), "key of metadata entry 0"),
    "key longer than the file": (header(pairs=1) + struct.pack("<Q", 2**63) + b"key", "cut short"),
    "key that is not UTF-8": (header(pairs=1) + files.pair(b"\xff\xfe", files.U8, 1), "not valid UTF-8"),
    "unknown value type": (header(pairs=1) + files.string("k") + struct.pack("<I", 13), "unknown value type 13"),
    "boolean of 2": (header(pairs=1) + files.pair("k", files.BOOL, 2), "boolean with value 2"),
    "key twice": (header(pairs=2) + 2 * files.pair("k", files.U8, 1), "'k' appears twice"),
    "array of unknown type": (
        header(pairs=1) + files.string("k") + struct.pack("<IIQ", files.ARRAY, 99, 1),
        "unknown value type 99",
    ),
    "array longer than the file": (
        header(pairs=1) + files.string("k") + struct.pack("<IIQ", files.ARRAY, files.F64, 2**61),
        "cut short",
    ),
    "string array longer than the file": (
        header(pairs=1) + files.string("k") + struct.pack("<IIQ", files.ARRAY, files.STRING, 2**61),
        "cut short",
    ),
    "arrays nested without end": (
        header(pairs=1)
        + files.string("k")
        + struct.pack("<I", files.ARRAY)
        + 1000 * struct.pack("<IQ", files.ARRAY, 1),
        "nests arrays more than 4 deep",
    ),
    "rank 0": (entry(shape=()), "has 0 axes"),
    "rank 5": (entry(shape=(1, 1, 1, 1, 1)), "has 5 axes"),
    "empty axis": (entry(shape=(4, 0)), "empty axis"),
    "unknown tensor type": (entry(kind=77), "type 77, which is not supported"),
    "known but unsupported tensor type": (entry(kind=12), r"type 12 \(Q4_K\)"),
    "tensor past the end": (entry(shape=(1000,)), "the file ends at"),
    "offset past the end": (entry(offset=2**40), "the file ends at"),
    "offset near 2**64": (entry(offset=2**64 - 32), "the file ends at"),
    "sizes whose product passes 2**64": (entry(shape=(2**40, 2**40)), "the file ends at"),
    "offset not aligned": (entry(offset=4), "not a multiple of 32"),
    "rows not of whole blocks": (entry(shape=(2, 40), kind=files.TENSOR_Q4_0), "not a multiple of 32"),
    "tensor twice": (header(tensors=2) + 2 * files.tensor_entry("w", (1,), 0, 0) + bytes(64), "'w' appears twice"),
    "alignment 0": (files.gguf_bytes([("general.alignment", files.U32, 0)], [VECTOR]), "power of two"),
    "alignment 24": (files.gguf_bytes([("general.alignment", files.U32, 24)], [VECTOR]), "power of two"),
    "alignment of text": (files.gguf_bytes([("general.alignment", files.STRING, "32")], [VECTOR]), "power of two"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_a_value_error_that_says_what_is_wrong(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, content)
    assert "file.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def small_file():
    raw, _ = files.q4_1(np.random.default_rng(1), (2, 32))
    metadata = [("name", files.STRING, "x"), ("list", files.ARRAY, (files.STRING, ["ab", "c"])), ("n", files.U32, 5)]
    return files.gguf_bytes(metadata, [VECTOR, ("q", (2, 32), files.TENSOR_Q4_1, raw)])


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = small_file()
    last = read(tmp_path, whole).tensors["q"]
    for length in range(last.start + last.nbytes):
        with pytest.raises(ValueError, match=r"\[gguf\]"):
            read(tmp_path, whole[:length])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_with_random_bytes_changed_is_read_or_refused(tmp_path, data):
    content = bytearray(small_file())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]) | st.integers(0, 255))
    try:
        gguf = read(tmp_path, bytes(content))
    except ValueError:
        return
    for name, info in gguf.tensors.items():
        assert gguf.floats(name).shape == info.shape


def test_a_missing_file_and_a_folder_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        GgufFile(tmp_path)
