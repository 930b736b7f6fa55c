"""Where a tensor's values come from, and reading any range of them into reused buffers.

A source is a stored tensor, or a stored tensor of the base plus a low-rank change. Ranges are in elements of the flat
tensor. Buffers belong to a `Workspace`, one per thread, so that memory depends on the chunk and never on the tensor.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from c2f_utils.errors import C2FError
from c2f_utils.merge.headers import ITEM_BYTES, TensorInfo
from c2f_utils.merge.kernels import BLOCK
from c2f_utils.merge.lora import Delta
from c2f_utils.merge.rounding import TORCH

FACTORS_KEPT = 4  # pairs of low-rank factors held at a time


@dataclass(frozen=True)
class Source:
    """A stored tensor, plus `delta` when it is the base's under an adapter."""

    info: TensorInfo
    delta: Delta | None = None


class Files:
    """Open files of one merge, closed together; positions are explicit, so threads share them."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._factors: OrderedDict[Delta, Factors] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __del__(self) -> None:  # of models that stay open for as long as they are asked (`stored.py`)
        self.__exit__()

    def handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]

    def factors(self, delta: Delta) -> "Factors":
        """Give a low-rank change's factors, of which a few are kept: neighbouring chunks ask for the same."""
        with self._lock:
            found = self._factors.pop(delta, None)
        found = found or Factors(delta, self)
        with self._lock:
            self._factors[delta] = found
            while len(self._factors) > FACTORS_KEPT:
                self._factors.popitem(last=False)
        return found

    def read(self, info: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Fill the buffer's front with elements start .. stop as stored; raises C2FError when the file has shrunk."""
        size = ITEM_BYTES[info.dtype]
        view = buffer[: (stop - start) * size]
        done, position = 0, info.offset + start * size
        while done < view.nbytes:
            try:
                count = os.preadv(self.handle(info.file), [view[done:]], position + done)
            except OSError as error:
                raise C2FError(
                    f"{info.file}: tensor {info.name!r} cannot be read ({error.strerror}); check the disk"
                ) from None
            if count == 0:
                raise C2FError(
                    f"{info.file}: ends inside tensor {info.name!r}; the file changed since the plan was "
                    f"made: plan again"
                )
            done += count
        return view


class Workspace:
    """Reused byte buffers of one thread, by purpose."""

    def __init__(self) -> None:
        self._buffers: dict[object, np.ndarray] = {}

    def bytes(self, purpose: object, size: int) -> np.ndarray:
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.nbytes < size:
            buffer = self._buffers[purpose] = np.empty(size, dtype=np.uint8)
        return buffer[:size]


def as_tensor(raw: np.ndarray, dtype: str) -> Tensor:
    """View bytes as a flat tensor of the safetensors dtype."""
    return torch.from_numpy(raw).view(TORCH[dtype]) if raw.nbytes else torch.empty(0, dtype=TORCH[dtype])


class Factors:
    """The two factors of one low-rank change in float64; rows are computed in fixed blocks, so that chunks cannot
    change a bit.
    """

    def __init__(self, delta: Delta, files: Files) -> None:
        a, b = (_whole(info, files).double() for info in (delta.a, delta.b))
        left, right = (a.t(), b.t()) if delta.transposed else (b, a)
        self.left, self.right, self.scale = left.contiguous(), right.contiguous(), delta.scale
        self.rows = max(1, BLOCK // max(1, self.right.shape[1]))

    def fill(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write elements start .. stop of scale * left @ right into `out`, float32 [stop - start]."""
        columns = self.right.shape[1]
        first = start // columns // self.rows * self.rows
        while first * columns < stop:
            block = (self.left[first : first + self.rows] @ self.right).mul_(self.scale).float().view(-1)
            origin = first * columns
            low, high = max(start, origin), min(stop, origin + block.numel())
            out[low - start : high - start] = block[low - origin : high - origin]
            first += self.rows
        return out


def _whole(info: TensorInfo, files: Files) -> Tensor:
    return as_tensor(files.read(info, 0, info.numel, np.empty(info.nbytes, dtype=np.uint8)), info.dtype).view(
        info.shape
    )


class Opened:
    """All sources of one tensor, ready to load chunks; `models` maps instruct, base, coarse.0, ... to sources."""

    def __init__(self, models: dict[str, Source], files: Files) -> None:
        self.models, self.files = models, files

    def load(self, start: int, stop: int, workspace: Workspace, roles: tuple[str, ...] | None = None) -> "Loaded":
        """Read elements start .. stop of the models named (default all), each stored tensor once."""
        stored: dict[tuple, Tensor] = {}
        raw, deltas = {}, {}
        for role in roles or self.models:
            source = self.models[role]
            key = (source.info.file, source.info.offset)
            if key not in stored:
                buffer = workspace.bytes(("in", len(stored)), (stop - start) * ITEM_BYTES[source.info.dtype])
                stored[key] = as_tensor(self.files.read(source.info, start, stop, buffer), source.info.dtype)
            raw[role] = stored[key]
            if source.delta:
                out = as_tensor(workspace.bytes(("delta", role), (stop - start) * 4), "F32")
                deltas[role] = self.files.factors(source.delta).fill(start, stop, out)
        return Loaded(start, raw, deltas, {role: str(source.info.file) for role, source in self.models.items()})


class Loaded:
    """One chunk of every model; `read` is what a `Piece` calls."""

    def __init__(
        self, start: int, raw: dict[str, Tensor], deltas: dict[str, Tensor], origins: dict[str, str] | None = None
    ) -> None:
        self.start, self.raw, self.deltas, self.origins = start, raw, deltas, origins or {}
        self._block, self._converted = slice(0), {}

    def to(self, device: torch.device) -> "Loaded":
        """The same values on another device."""
        moved = ({role: values.to(device) for role, values in held.items()} for held in (self.raw, self.deltas))
        return Loaded(self.start, *moved, self.origins)

    def read(self, what: str, low: int, high: int) -> Tensor:
        """Give elements low .. high (of the tensor) of a model, or of `delta.<model>` = model - base, as float32."""
        part = slice(low - self.start, high - self.start)
        if what.startswith("delta."):
            role = what.removeprefix("delta.")
            return (
                self.deltas[role][part]
                if role in self.deltas
                else self._floats(role, part) - self._floats("base", part)
            )
        values = self._floats(what, part)
        return values + self.deltas[what][part] if what in self.deltas else values

    def _floats(self, role: str, part: slice) -> Tensor:
        """Convert once per block: base and instruct are asked for several times."""
        if self._block != part:
            self._block, self._converted = part, {}
        if role not in self._converted:
            self._converted[role] = self.raw[role][part].float()
        return self._converted[role]

    def blame(self, name: str, low: int, high: int) -> None:
        """Raise C2FError for the first NaN or infinity of any model within low .. high; return when all are finite."""
        for role, values in self.raw.items():
            part = values[low - self.start : high - self.start]
            bad = torch.nonzero(~torch.isfinite(part))
            if part.is_floating_point() and len(bad):
                where, value = low + int(bad[0]), float(part[bad[0]])
                file = self.origins.get(role, role)
                raise C2FError(
                    f"{file}: tensor {name!r} of {role} has {value} at element {where}; a merge would "
                    f"spread it: mend or retrain {role}"
                )
        for role, values in self.deltas.items():
            if not bool(torch.isfinite(values[low - self.start : high - self.start]).all()):
                raise C2FError(
                    f"{role}: the adapter's factors for tensor {name!r} hold NaN or infinity; retrain the adapter"
                )
