"""PORTIA: a second look at pairs on which a judge contradicts itself when the answers change places.

After Li et al. 2024 (Split and Merge, arXiv 2310.01432). Both answers are split into as many parts, the parts are
aligned and shown side by side (part 1 of one, part 1 of the other, part 2, ...): first parts of about equal length,
then, if the two orders still disagree, parts that say alike. Nothing is lost: the parts of an answer, put together, are
the answer. Meant for flipped pairs only: `second_look` asks up to four times again.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

PARTS = 3
FINEST = 16  # segments per answer that alignment tells apart: its cost grows with the fourth power

_END = re.compile(r"[.!?]+[\"')\]”’*_]*\s+|[。！？]+\s*|\n\s*")
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"(?:^|\n)[ \t]*\d+$")

Parts = tuple[list[str], list[str]]


def segments(text: str) -> list[str]:
    """The text cut at the ends of its sentences and lines, code blocks whole; put together, the segments are it."""
    code = [match.span() for match in _CODE.finditer(text)]
    cuts = [
        match.end()
        for match in _END.finditer(text)
        if match.end() < len(text)
        and not any(start < match.end() < end for start, end in code)
        and not _NUMBER.search(text[max(0, match.start() - 12) : match.start()])  # "1." begins an item of a list
    ]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def by_length(a: str, b: str, k: int = PARTS) -> Parts:
    """Both answers in k parts, cut at the segments' ends nearest to equal lengths; fewer where one has fewer."""
    pieces = segments(a), segments(b)
    count = min(k, *map(len, pieces))
    first, second = (_joined(each, _even(each, count)) for each in pieces)
    return first, second


def by_meaning(a: str, b: str, k: int = PARTS) -> Parts:
    """Both answers in k parts with the largest sum of overlaps between parts of one number.

    The overlap of two parts is 2 * words in common / words of both, as counts. Exact over all cuts at segments' ends,
    by dynamic programming; an answer of more than FINEST segments is first reduced to that many.
    """
    pieces = [_joined(each, _even(each, min(FINEST, len(each)))) for each in (segments(a), segments(b))]
    count = min(k, *map(len, pieces))
    overlap = _overlaps(*pieces)
    # best [ends of a, ends of b]: the largest sum of the parts so far, if they end there.
    best = np.full((overlap.shape[0], overlap.shape[2]), -np.inf)
    best[0, 0] = 0.0
    before = []
    for _ in range(count):
        sums = best[:, None, :, None] + overlap  # [start a, end a, start b, end b]
        flat = np.moveaxis(sums, 2, 1).reshape(-1, sums.shape[1], sums.shape[3])
        before.append(flat.argmax(0))
        best = flat.max(0)
    ends = [tuple(len(each) for each in pieces)]
    for step in reversed(before):
        ends.insert(0, divmod(int(step[ends[0]]), overlap.shape[2]))
    first, second = (_joined(each, [end[side] for end in ends[1:]]) for side, each in enumerate(pieces))
    return first, second


def merged(first: Sequence[str], second: Sequence[str]) -> str:
    """The aligned parts of both answers as one text, part by part, for a judge's prompt."""
    lines = []
    for number, (one, other) in enumerate(zip(first, second, strict=True), start=1):
        lines += [f"[Answer A, part {number}]", one.strip("\n"), f"[Answer B, part {number}]", other.strip("\n")]
    return "\n".join(lines)


def ways(a: str, b: str, k: int = PARTS) -> list[tuple[str, Parts]]:
    """The alignments worth asking about, by name, in this order: one that shows whole answers, or the same as an
    earlier one, is left out."""
    found: list[tuple[str, Parts]] = []
    for name, split in (("length", by_length), ("meaning", by_meaning)):
        parts = split(a, b, k)
        if len(parts[0]) > 1 and parts not in [known for _, known in found]:
            found.append((name, parts))
    return found


def _joined(pieces: Sequence[str], ends: Sequence[int]) -> list[str]:
    return ["".join(pieces[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _even(pieces: Sequence[str], count: int) -> list[int]:
    """Ends (numbers of pieces) of `count` parts whose lengths are as equal as the pieces allow, the last one all."""
    reached = np.cumsum([len(piece) for piece in pieces])
    ends: list[int] = []
    for number in range(1, count):
        first, last = (ends[-1] if ends else 0) + 1, len(pieces) - (count - number)
        away = np.abs(reached[first - 1 : last] - reached[-1] * number / count)
        ends.append(first + int(away.argmin()))
    return [*ends, len(pieces)]


def _overlaps(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Overlap of every part of a with every part of b, [start, end, start, end] in pieces; -inf for no part."""
    counted = [[Counter(re.findall(r"\w+", piece.lower())) for piece in pieces] for pieces in (a, b)]
    words = {word: number for number, word in enumerate(sorted(set().union(*counted[0], *counted[1])))}
    reached = []
    for pieces in counted:
        table = np.zeros((len(pieces) + 1, len(words)))
        for row, counts in enumerate(pieces, start=1):
            for word, times in counts.items():
                table[row, words[word]] = times
        reached.append(table.cumsum(0))
    found = np.full((len(a) + 1, len(a) + 1, len(b) + 1, len(b) + 1), -np.inf)
    parts_b = reached[1][None, :] - reached[1][:, None]  # [start, end, words]; only end > start is a part
    for start in range(len(a)):
        for end in range(start + 1, len(a) + 1):
            part = reached[0][end] - reached[0][start]
            common = np.minimum(part, parts_b).sum(2)
            found[start, end] = 2 * common / np.maximum(part.sum() + parts_b.sum(2), 1)
    found[:, :, ~np.triu(np.ones((len(b) + 1, len(b) + 1), bool), 1)] = -np.inf
    return found
