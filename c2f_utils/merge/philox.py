"""Random bits that depend on seed, tensor and element only.

A counter-based generator (Philox 4x64) is keyed by (seed, tensor name and purpose); its counter is the element
offset. So a chunk draws the same bits whichever chunk, thread, shard layout or resume point it comes from.
"""

import hashlib

import numpy as np

_COUNTER_BITS = 256  # one Philox counter step yields four 64-bit words


def bits(seed: int, stream: str, start: int, count: int, width: int) -> np.ndarray:
    """Give `count` unsigned integers of `width` (16 or 32) bits for elements start .. start+count of the stream."""
    lanes = _COUNTER_BITS // width
    first = start // lanes
    blocks = -(-(start + count) // lanes) - first
    words = _generator(seed, stream, first).integers(0, 2**64 - 1, size=4 * blocks, dtype=np.uint64, endpoint=True)
    return words.view(np.uint16 if width == 16 else np.uint32)[start - first * lanes :][:count]


def scattered(seed: int, stream: str, positions: np.ndarray) -> np.ndarray:
    """Give 32 random bits for single elements, as uint32: a mixing function (splitmix64) of key and position.

    Used where few elements of a block need one, because a Philox block costs the same for one element as for all.
    """
    key = hashlib.sha256(f"{seed}|{stream}".encode()).digest()
    word = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(key[:8], np.uint64)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((word ^ (word >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)


def normal(seed: int, stream: str, count: int) -> np.ndarray:
    """Give `count` standard normal float32 numbers for a whole tensor; not addressable by element, so never used in a
    stream.
    """
    return _generator(seed, stream, 0).standard_normal(count, dtype=np.float32)


def _generator(seed: int, stream: str, counter: int) -> np.random.Generator:
    word = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, word], counter=[counter, 0, 0, 0]))
