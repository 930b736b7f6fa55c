"""Repetition measures on one answer or many, always with the length they were taken at.

Question: how much of an answer says again what it has said before? Inputs: token ids or words (any hashable items), and
text for the sentence measures. Outputs: plain numbers. Redundancy grows with length for any writer, so comparisons
between models use fixed prefixes (`rep4_at`) beside the whole answer, with the count of answers long enough.
"""

import gzip
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Loop(NamedTuple):
    """The periodic end of an answer: `tokens` items that repeat with `period`; (0, 0) when nothing repeats."""

    period: int
    tokens: int


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple]:
    """All n-grams in order, as tuples; empty when there are fewer than n tokens."""
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1")
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def rep_n(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that are repeats, 1 - unique/all; 0 when the answer has no n-gram (Welleck et al. 2020)."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that are different, 1 - rep_n."""
    return 1 - rep_n(tokens, n)


def rep4_at(tokens: Sequence[Hashable], prefix: int) -> float | None:
    """`rep_n` with n = 4 of the first `prefix` tokens; None when the answer is shorter, so that it is not counted."""
    return rep_n(tokens[:prefix], 4) if len(tokens) >= prefix else None


def repeated_spans(tokens: Sequence[Hashable], n: int = 4) -> np.ndarray:
    """Mask [len(tokens)] of bool: the token lies in an n-gram that has occurred before (the first one stays clear)."""
    mask = np.zeros(len(tokens), dtype=bool)
    seen: set[tuple] = set()
    for start, gram in enumerate(ngrams(tokens, n)):
        if gram in seen:
            mask[start : start + n] = True
        seen.add(gram)
    return mask


def loop_tail(tokens: Sequence[Hashable]) -> Loop:
    """The longest end of the answer that repeats itself at least twice in full, with its shortest period.

    Linear time: the Z-function of the reversed answer at p says for how long the end agrees with itself p tokens back.
    """
    tail = tokens[::-1]
    size = len(tail)
    agree = [0] * size
    left = right = 0
    best = Loop(0, 0)
    for period in range(1, size):
        if period < right:
            agree[period] = min(right - period, agree[period - left])
        while period + agree[period] < size and tail[agree[period]] == tail[period + agree[period]]:
            agree[period] += 1
        if period + agree[period] > right:
            left, right = period, period + agree[period]
        if agree[period] >= period and agree[period] + period > best.tokens:
            best = Loop(period, agree[period] + period)
    return best


def sentences(text: str) -> list[str]:
    """Sentences of a text, lower case and single-spaced; a full stop inside a number does not end one."""
    parts = (" ".join(part.lower().split()) for part in _SENTENCE_END.split(text))
    return [part for part in parts if part]


def duplicate_sentence_share(parts: Sequence[Hashable]) -> float:
    """Share of sentences that are exact repeats of an earlier one; 0 for no sentence."""
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def near_duplicate_rate(parts: Iterable[str], threshold: float = 0.8, least_words: int = 4) -> float:
    """Share of sentences, among those of `least_words` or more, like an earlier one (Jaccard of word bigrams)."""
    kept: list[frozenset] = []
    known: set[frozenset] = set()
    total = repeats = 0
    for part in parts:
        words = part.split()
        if len(words) < least_words:
            continue
        total += 1
        pairs = frozenset(zip(words, words[1:], strict=False))
        if pairs in known or any(_jaccard(pairs, earlier) >= threshold for earlier in kept):
            repeats += 1
        if pairs not in known:
            known.add(pairs)
            kept.append(pairs)
    return repeats / total if total else 0.0


def _jaccard(a: frozenset, b: frozenset) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def gzip_ratio(text: str) -> float:
    """Raw bytes over gzip bytes (level 9, no time stamp): larger means more repetition; 0 for an empty text."""
    raw = text.encode("utf-8")
    return len(raw) / len(gzip.compress(raw, compresslevel=9, mtime=0)) if raw else 0.0


def prefix_table(answers: Sequence[Sequence[Hashable]], prefixes: Iterable[int]) -> list[dict]:
    """Rows {"prefix", "rep4", "n"}: mean repeated 4-gram share of the n answers long enough (rep4 None when n = 0)."""
    rows = []
    for prefix in prefixes:
        values = [value for answer in answers if (value := rep4_at(answer, prefix)) is not None]
        rows.append({"prefix": prefix, "rep4": sum(values) / len(values) if values else None, "n": len(values)})
    return rows
