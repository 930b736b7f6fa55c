"""Output rounding, and how much of the wanted change is left after it.

A 16-bit output swallows small residues: a change below half a unit in the last place disappears, whatever the
arithmetic was. So the change is measured after rounding (`Tally`), and stochastic rounding is offered: unbiased, at
the price of noise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from c2f_utils.merge import kernels, random_bits

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_ROW = 4096  # elements summed in float32 before float64 takes over; fixed: sums must not depend on chunks or threads


def round_to(merged: Tensor, dtype: str, stochastic: bool, seed: int, name: str, start: int) -> Tensor:
    """Round a flat float32 piece to the safetensors dtype; stochastic only towards BF16."""
    if not stochastic or dtype != "BF16":
        return merged.to(TORCH[dtype])
    bits = random_bits.bits(seed, f"{name}|round", start, merged.numel(), 16)
    if kernels.on_cpu(merged):
        return stochastic_bfloat16(merged, bits)
    return stochastic_on_device(merged, torch.from_numpy(bits.view(np.int16)).to(merged.device))


def stochastic_on_device(values: Tensor, bits: Tensor) -> Tensor:
    """`stochastic_bfloat16` in torch's operations, for values on another device than the CPU; bits are int16's."""
    raw = values.contiguous().view(torch.int32)
    magnitude, sign = raw & 0x7FFFFFFF, raw & -(2**31)
    moved = (magnitude + (bits.to(torch.int32) & 0xFFFF)).clamp_max(0x7F7FFFFF)
    untouched = magnitude | (magnitude > 0x7F800000).to(torch.int32) << 22  # infinities, and NaN that stay NaN
    kept = torch.where(magnitude >= 0x7F800000, untouched, moved) | sign
    return (kept >> 16).to(torch.int16).view(torch.bfloat16)


@np.errstate(over="ignore", invalid="ignore")  # an overflow is looked for, not an accident
def stochastic_bfloat16(values: Tensor, bits: np.ndarray) -> Tensor:
    """Round float32 to bfloat16 up with the probability that makes the expectation exact.

    Adding 16 random bits below the kept ones and cutting carries with just that probability, across exponents too.
    Finite values never become infinite (they saturate); infinities and NaN pass untouched.
    """
    flat = values.contiguous().numpy()
    raw = flat.view(np.int32)
    if math.isfinite(np.dot(flat, flat)):  # squares overflow long before rounding up could leave bfloat16's range
        moved = bits.astype(np.int32)
        moved += raw  # sign and magnitude: adding to the pattern moves away from zero on both sides
    else:
        magnitude, sign = raw & 0x7FFFFFFF, raw & np.int32(-(2**31))
        kept = np.minimum(magnitude + bits.astype(np.int32), 0x7F7FFFFF)
        kept = np.where(magnitude >= 0x7F800000, magnitude | (magnitude > 0x7F800000).astype(np.int32) << 22, kept)
        moved = kept.astype(np.int32) | sign
    moved >>= 16
    return torch.from_numpy(moved.astype(np.int16)).view(torch.bfloat16)


@np.errstate(over="ignore", invalid="ignore")  # callers look for infinity
def inner(left: Tensor, right: Tensor) -> float:
    """<left, right> of flat float32 pieces: rows of 4096 in float32, then float64."""
    left, right = left.numpy(), right.numpy()
    whole = left.size // _ROW * _ROW
    rows = np.vecdot(left[:whole].reshape(-1, _ROW), right[:whole].reshape(-1, _ROW))
    return float(rows.sum(dtype=np.float64)) + float(np.vecdot(left[whole:], right[whole:]))


@dataclass(frozen=True)
class Tally:
    """Sums over the elements of one tensor, in float64; the last three are 0 where the operator does not read the
    base.
    """

    elements: float = 0.0
    wanted: float = 0.0  # |merged - instruct|^2 before rounding
    kept: float = 0.0  # <stored - instruct, merged - instruct>
    error: float = 0.0  # |stored - merged|^2
    changed: float = 0.0  # elements with merged != instruct
    stored_changed: float = 0.0  # elements with stored != instruct
    instruct: float = 0.0  # |d_I|^2
    coarse: float = 0.0  # |r|^2
    cross: float = 0.0  # <d_I, r>

    @classmethod
    def total(cls, rows: Iterable[tuple[float, ...]]) -> "Tally":
        """Sum rows (one per block, or one per span) exactly rounded, so that grouping and order change nothing."""
        columns = list(zip(*rows, strict=True))
        return cls(*(math.fsum(column) for column in columns)) if columns else cls()

    @property
    def row(self) -> tuple[float, ...]:
        return tuple(getattr(self, item.name) for item in fields(self))

    @property
    def survival(self) -> float | None:
        """Projection of the stored change on the wanted one: 1 when nothing was lost, None without a change."""
        return self.kept / self.wanted if self.wanted > 0 else None

    @property
    def cosine(self) -> float | None:
        scale = math.sqrt(self.instruct) * math.sqrt(self.coarse)
        return self.cross / scale if scale > 0 else None


def measure(
    merged: Tensor, stored: Tensor, instruct: Tensor, deltas: tuple[Tensor, Tensor] | None
) -> tuple[float, ...]:
    """Tally one piece as a row; `deltas` are d_I and r when the operator reads the base."""
    wanted = merged - instruct
    squares = inner(wanted, wanted)
    changed = _nonzero(wanted)
    kept, error, stored_changed = squares, 0.0, changed
    if stored.dtype != torch.float32:
        back = stored.float()
        change = back - instruct
        lost = back - merged
        kept, error, stored_changed = inner(change, wanted), inner(lost, lost), _nonzero(change)
    sums = (0.0, 0.0, 0.0)
    if deltas is not None:
        d_instruct, r = deltas
        sums = (inner(d_instruct, d_instruct), inner(r, r), inner(d_instruct, r))
    return (float(merged.numel()), squares, kept, error, changed, stored_changed, *sums)


def _nonzero(values: Tensor) -> float:
    """Count what is not zero; counting a comparison's result is far quicker than counting floats."""
    return float(np.count_nonzero(values.numpy() != 0))
