"""Random bits that depend on seed, tensor and element only.

A generator that can jump (PCG64DXSM) is keyed by (seed, tensor name and purpose) and advanced to the element's word. So
a chunk draws the same bits whichever chunk, thread, shard layout or resume point it comes from. Each element takes as
few bits as its purpose allows, because drawing is what a random merge spends most of its time on.
"""

import hashlib
from functools import lru_cache

import numpy as np

_WORD_BITS = 64  # one step of the generator
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio, odd


def bits(seed: int, stream: str, start: int, count: int, width: int) -> np.ndarray:
    """Give `count` unsigned integers of `width` (8, 16 or 32) bits for elements start .. start+count of the stream."""
    lanes = _WORD_BITS // width
    first = start // lanes
    steps = -(-(start + count) // lanes) - first
    # `integers` lets other threads run meanwhile; `random_raw`, the shorter way to the same words, does not.
    words = _generator(seed, stream, first).integers(0, 2**64 - 1, size=steps, dtype=np.uint64, endpoint=True)
    return words.astype("<u8", copy=False).view(f"<u{width // 8}")[start - first * lanes :][:count]


def chosen(seed: int, stream: str, start: int, count: int, share: float) -> np.ndarray:
    """Choose elements independently with probability `share`, a multiple of 2**-16; gives bool [count]."""
    width = 8 if share * 2**8 % 1 == 0 else 16
    return bits(seed, stream, start, count, width) < round(share * 2**width)


def spread(seed: int, stream: str, start: int, count: int) -> np.ndarray:
    """Give one uint32 per element such that those below x are a share x / 2**32 of any run, evenly spread.

    Multiples of the golden ratio modulo one (a Weyl sequence), shifted by seed and stream: cheaper than random bits,
    and closer to the share. No two of 2**32 neighbours are equal.
    """
    key = hashlib.sha256(f"{seed}|{stream}".encode()).digest()
    offset = np.uint32((int.from_bytes(key[:4], "little") + start * _GOLDEN) % 2**32)
    return _multiples(count) + offset


@lru_cache(maxsize=4)  # most blocks are equally long
def _multiples(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32) * np.uint32(_GOLDEN)


def normal(seed: int, stream: str, count: int) -> np.ndarray:
    """Give `count` standard normal float32 numbers for a whole tensor; not addressable by element, so never used in a
    stream.
    """
    return _generator(seed, stream, 0).standard_normal(count, dtype=np.float32)


def _generator(seed: int, stream: str, steps: int) -> np.random.Generator:
    key = hashlib.sha256(f"{seed}|{stream}".encode()).digest()
    return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(key[:16], "little")).advance(steps))
