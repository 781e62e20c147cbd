"""Reader of GGUF model files (versions 2 and 3, little-endian): metadata, tensor table, tensor data.

A file is not trusted: every length, count and offset is checked against the size of the file before it is used, so a
damaged or hostile file ends in a ``ValueError`` that says what is wrong. Layout of the format: the GGUF specification
in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_RANK = 4  # of a tensor, by the specification
MAX_ARRAY_DEPTH = 4  # real files nest once at most; the limit keeps a hostile file from exhausting the stack
BLOCK = 32  # weights in one quantised block

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
# What one unit of a tensor looks like in the file: one weight, or one block of 32 for the quantised types.
LAYOUT = {
    F32: np.dtype("<f4"),
    F16: np.dtype("<f2"),
    BF16: np.dtype("<u2"),
    Q4_0: np.dtype([("scale", "<f2"), ("quants", "u1", 16)]),
    Q4_1: np.dtype([("scale", "<f2"), ("bias", "<f2"), ("quants", "u1", 16)]),
    Q8_0: np.dtype([("scale", "<f2"), ("quants", "i1", 32)]),
}
QUANTISED = frozenset({Q4_0, Q4_1, Q8_0})
TYPE_NAMES = {F32: "F32", F16: "F16", Q4_0: "Q4_0", Q4_1: "Q4_1", Q8_0: "Q8_0", BF16: "BF16"}
OTHER_TYPE_NAMES = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``shape`` slowest axis first, ``start`` and ``nbytes`` in the file."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def is_quantised(self) -> bool:
        return self.type in QUANTISED


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor: weight = ``quants * scale + bias`` in blocks of 32.

    ``quants`` is uint8 ``[..., columns / 32, 32]`` holding ``bits`` bits each; ``scale`` and ``bias`` are float32
    ``[..., columns / 32]``.
    """

    quants: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    bits: int


class _Cursor:
    """Reads forward through the file and refuses to go past its end."""

    def __init__(self, data: memoryview, path: Path):
        self.data = data
        self.path = path
        self.at = 0

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"[gguf] {self.path}: {problem}")

    def require(self, nbytes: int, what: str) -> None:
        if nbytes > len(self.data) - self.at:
            raise self.fail(
                f"{what} needs {nbytes} bytes at offset {self.at}; the file ends at {len(self.data)} (cut short?)"
            )

    def take(self, nbytes: int, what: str) -> memoryview:
        self.require(nbytes, what)
        piece = self.data[self.at : self.at + nbytes]
        self.at += nbytes
        return piece

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.u64(f"length of {what}"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not valid UTF-8: {error.reason}") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A metadata value: int, float, bool, str, a numpy array of numbers, or a list of anything else."""
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self._array(what, depth)
        if kind not in SCALARS:
            raise self.fail(f"{what} has unknown value type {kind}")
        number = np.frombuffer(self.take(SCALARS[kind].itemsize, what), SCALARS[kind])[0].item()
        return self._bool(number, what) if kind == BOOL else number

    def _array(self, what: str, depth: int) -> Any:
        if depth >= MAX_ARRAY_DEPTH:
            raise self.fail(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind, count = self.u32(f"item type of {what}"), self.u64(f"length of {what}")
        if kind in SCALARS:
            items = np.frombuffer(self.take(count * SCALARS[kind].itemsize, what), SCALARS[kind])
            return [self._bool(item, what) for item in items.tolist()] if kind == BOOL else items
        if kind not in (STRING, ARRAY):
            raise self.fail(f"{what} is an array of unknown value type {kind}")
        # Even an empty item takes this many bytes, so an absurd count fails here and not after hours of looping.
        self.require(count * (8 if kind == STRING else 12), what)
        return [self.value(kind, what, depth + 1) for _ in range(count)]

    def _bool(self, number: int, what: str) -> bool:
        if number not in (0, 1):
            raise self.fail(f"{what} is a boolean with value {number}")
        return bool(number)


class GgufFile:
    """One GGUF file, mapped into memory.

    Args:
        path: The file.

    Attributes:
        version: 2 or 3.
        metadata: Key to value: int, float, bool, str, numpy array of numbers, or list.
        tensors: Name to :class:`TensorInfo`, in file order.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no GGUF file, is damaged, or holds a tensor type that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:  # OSError for a missing file or a folder; mapping it would say less
            if file.read(4) != MAGIC:
                raise ValueError(f"[gguf] {self.path}: not a GGUF file (it does not start with 'GGUF')")
        self._data = np.memmap(self.path, dtype=np.uint8, mode="r")
        cursor = _Cursor(memoryview(self._data), self.path)
        self._fail = cursor.fail
        cursor.take(4, "magic")
        self.version = cursor.u32("version")
        if self.version not in (2, 3):
            big_endian = int.from_bytes(self.version.to_bytes(4, "little"), "big") in (2, 3)
            raise cursor.fail(
                "big-endian GGUF files are not supported"
                if big_endian
                else f"GGUF version {self.version} is not supported; expected 2 or 3"
            )
        tensor_count, pair_count = cursor.u64("tensor count"), cursor.u64("metadata count")
        self.metadata = self._read_metadata(cursor, pair_count)
        self.tensors = self._read_tensor_table(cursor, tensor_count)

    def _read_metadata(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = cursor.string(f"key of metadata entry {index}")
            if key in metadata:
                raise cursor.fail(f"metadata key {key!r} appears twice")
            metadata[key] = cursor.value(cursor.u32(f"type of metadata {key!r}"), f"metadata {key!r}")
        return metadata

    def _read_tensor_table(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for index in range(count):
            name = cursor.string(f"name of tensor {index}")
            if name in entries:
                raise cursor.fail(f"tensor {name!r} appears twice")
            rank = cursor.u32(f"rank of tensor {name!r}")
            if not 1 <= rank <= MAX_RANK:
                raise cursor.fail(f"tensor {name!r} has {rank} axes; expected 1 to {MAX_RANK}")
            # The file names the fastest axis first; numpy names it last.
            shape = tuple(cursor.u64(f"shape of tensor {name!r}") for _ in range(rank))[::-1]
            kind, offset = cursor.u32(f"type of tensor {name!r}"), cursor.u64(f"offset of tensor {name!r}")
            entries[name] = (kind, shape, offset)

        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise cursor.fail(f"general.alignment must be a power of two of at least 8; got {alignment!r}")
        data_start = -(-cursor.at // alignment) * alignment
        return {
            name: self._locate(cursor, name, kind, shape, offset, data_start, alignment)
            for name, (kind, shape, offset) in entries.items()
        }

    @staticmethod
    def _locate(
        cursor: _Cursor, name: str, kind: int, shape: tuple[int, ...], offset: int, data_start: int, alignment: int
    ) -> TensorInfo:
        if kind not in LAYOUT:
            known = f" ({OTHER_TYPE_NAMES[kind]})" if kind in OTHER_TYPE_NAMES else ""
            supported = ", ".join(TYPE_NAMES.values())
            raise cursor.fail(f"tensor {name!r} has type {kind}{known}, which is not supported; supported: {supported}")
        if 0 in shape:
            raise cursor.fail(f"tensor {name!r} has an empty axis: shape {shape}")
        if offset % alignment:
            raise cursor.fail(f"tensor {name!r} starts at offset {offset}, not a multiple of {alignment}")
        units = math.prod(shape)  # Python integers: a product past 2**64 does not wrap
        if kind in QUANTISED:
            if shape[-1] % BLOCK:
                raise cursor.fail(
                    f"tensor {name!r} is {TYPE_NAMES[kind]} with rows of {shape[-1]} weights, not a multiple of {BLOCK}"
                )
            units //= BLOCK
        start, nbytes = data_start + offset, units * LAYOUT[kind].itemsize
        if start + nbytes > len(cursor.data):
            raise cursor.fail(
                f"tensor {name!r} ends at byte {start + nbytes}; the file ends at {len(cursor.data)} (cut short?)"
            )
        return TensorInfo(name, kind, shape, start, nbytes)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata value ``key``, checked to be a ``kind`` (int, float, str, bool or list of str).

        Raises:
            ValueError: The key is missing and there is no default, or its value is of another type.
        """
        if key not in self.metadata:
            if default is None:
                raise self._fail(f"metadata {key!r} is missing")
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is list and not all(isinstance(item, str) for item in value)):
            expected = "list of str" if kind is list else kind.__name__
            raise self._fail(f"metadata {key!r} must be a {expected}; got {_describe(value)}")
        return value

    def quantised(self, name: str) -> Quantised:
        """A Q4_0, Q4_1 or Q8_0 tensor with unsigned quants, still packed one value a byte."""
        info = self.tensors[name]
        if not info.is_quantised:
            raise self._fail(f"tensor {name!r} is {TYPE_NAMES[info.type]}, not quantised")
        blocks = self._units(info).reshape(*info.shape[:-1], info.shape[-1] // BLOCK)
        scale = blocks["scale"].astype(np.float32)
        if info.type == Q8_0:
            # Signed bytes become 0..255 by flipping the top bit; the bias takes the 128 back.
            return Quantised(blocks["quants"].view(np.uint8) ^ np.uint8(0x80), scale, -128 * scale, 8)
        quants = np.concatenate([blocks["quants"] & 15, blocks["quants"] >> 4], axis=-1)
        bias = -8 * scale if info.type == Q4_0 else blocks["bias"].astype(np.float32)
        return Quantised(quants, scale, bias, 4)

    def floats(self, name: str) -> np.ndarray:
        """A tensor decoded to float32, in its shape."""
        info = self.tensors[name]
        if info.is_quantised:
            packed = self.quantised(name)
            return (packed.quants * packed.scale[..., None] + packed.bias[..., None]).reshape(info.shape)
        units = self._units(info)
        if info.type == BF16:
            units = (units.astype(np.uint32) << 16).view(np.float32)
        return units.astype(np.float32, copy=False).reshape(info.shape)

    def _units(self, info: TensorInfo) -> np.ndarray:
        return self._data[info.start : info.start + info.nbytes].view(np.ndarray).view(LAYOUT[info.type])


def _describe(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
