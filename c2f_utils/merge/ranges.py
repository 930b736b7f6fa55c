"""Cutting tensors into chunks and blocks, always at the same places, so that no result depends on the chunk size."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from c2f_utils.merge.kernels import BLOCK
from c2f_utils.merge.readers import Loaded, Workspace


class Reader(Protocol):
    """Loads a range of one tensor from every model named, or from all."""

    def load(self, start: int, stop: int, workspace: Workspace, roles: tuple[str, ...] | None = None) -> Loaded: ...


@dataclass(frozen=True)
class Target:
    """The mergeable front of one tensor."""

    name: str
    reader: Reader
    count: int


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a range at multiples of BLOCK: a block is the same whatever chunk it came in."""
    while start < stop:
        end = min(stop, (start // BLOCK + 1) * BLOCK)
        yield start, end
        start = end


def chunks(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut a range into chunks of at most `chunk` elements (a multiple of BLOCK), at multiples of BLOCK."""
    while start < stop:
        end = min(stop, start // BLOCK * BLOCK + chunk)
        yield start, end
        start = end
