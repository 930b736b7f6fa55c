"""Read and write safetensors headers without touching tensor data.

The format is an 8-byte little-endian length, a JSON object and the data. Everything a merge needs to plan (names,
shapes, dtypes, byte positions) is in the first two, so a plan costs milliseconds whatever the size of the model.
Parsing is strict: a header that overlaps, leaves holes or points past the end of its file is refused before any merge
starts.
"""

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from c2f_utils.errors import C2FError, short
from c2f_utils.files import UNPARSABLE
from c2f_utils.weights import HEADER_LIMIT

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_DIMENSIONS = 64  # as many as torch knows
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is absolute in `file`, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Same:
    """Two stored tensors that a plan takes for the same bytes, checked before merging; `remedy` ends the error."""

    left: TensorInfo
    right: TensorInfo
    remedy: str


@dataclass(frozen=True)
class Header:
    """One file's header; `raw` is the exact header (length and JSON), `size` and `mtime_ns` tell a later overwrite."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes
    size: int
    mtime_ns: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()


def read_header(path: Path) -> Header:
    """Parse and check one safetensors header.

    Raises C2FError naming the file, the tensor and the remedy for a short file, a lying length, broken JSON,
    duplicate names, unknown dtypes, sizes that do not fit shapes, holes, overlaps, and data that is cut off or longer
    than the header says.
    """
    path = Path(path)
    again = "copy or save the file again"
    try:
        with open(path, "rb") as handle:
            stat = os.fstat(handle.fileno())
            start = handle.read(8)
            if len(start) < 8:
                raise C2FError(f"{path}: {stat.st_size} bytes, too short for a safetensors file; {again}")
            (length,) = struct.unpack("<Q", start)
            if length > min(HEADER_LIMIT, stat.st_size - 8):
                raise C2FError(
                    f"{path}: the header says it has {length} bytes, the file has {stat.st_size}; truncated "
                    f"or not safetensors: {again}"
                )
            blob = handle.read(length)
    except OSError as error:
        raise C2FError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    table = _parse_json(path, blob)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise C2FError(f"{path}: __metadata__ must map strings to strings; {again}")
    data_start = 8 + length
    tensors = {name: _entry(path, name, entry, data_start) for name, entry in table.items()}
    _check_layout(path, tensors, data_start, stat.st_size)
    return Header(path, tensors, metadata, start + blob, stat.st_size, stat.st_mtime_ns)


def build_header(entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """Make the header for tensors laid out one after the other; entries are (name, dtype, shape, nbytes)."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, dtype, shape, nbytes in entries:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    blob = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    blob += b" " * (-len(blob) % 8)  # readers that map the file want the data aligned
    return struct.pack("<Q", len(blob)) + blob


def _parse_json(path: Path, blob: bytes) -> dict:
    def unique(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise C2FError(f"{path}: the header names {short(twice)} twice; save the file again")
        return found

    try:
        table = json.loads(blob.decode("utf-8"), object_pairs_hook=unique)
    except UNPARSABLE as error:
        raise C2FError(
            f"{path}: the header is not JSON ({type(error).__name__}); the file is damaged: copy or save it again"
        ) from None
    if not isinstance(table, dict):
        raise C2FError(f"{path}: the header is a JSON {type(table).__name__}, expected an object; save the file again")
    return table


def _entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise C2FError(f"{where}: expected dtype, shape and data_offsets, got {short(entry)}; save the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise C2FError(
            f"{where}: dtype {short(dtype)} is not supported; expected one of {', '.join(ITEM_BYTES)}: save the "
            f"model in one of these"
        )
    if not _naturals(shape):
        raise C2FError(f"{where}: shape {short(shape)} is not a list of natural numbers; save the file again")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise C2FError(f"{where}: data_offsets {short(offsets)} is not [begin, end]; save the file again")
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise C2FError(
            f"{where}: {offsets[1] - offsets[0]} bytes for shape {shape} of {dtype}, expected {nbytes}; "
            f"save the file again"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _naturals(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) <= _DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    position, before = data_start, None
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            what = "overlaps" if info.offset < position else "leaves a hole after"
            raise C2FError(
                f"{path}: tensor {info.name!r} {what} {before or 'the header'!r}; the file is damaged: save it again"
            )
        position, before = info.offset + info.nbytes, info.name
    if position != size:
        last = f" (last tensor {before!r})" if before else ""
        what = "truncated" if position > size else "followed by bytes that belong to no tensor"
        raise C2FError(
            f"{path}: {what}: the header describes {position} bytes, the file has {size}{last}; copy or "
            f"save the file again"
        )
