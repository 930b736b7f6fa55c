"""Repetition measures on one answer or many, always with the length they were taken at.

Question: how much of an answer says again what it has said before? Inputs: token ids or words (any hashable items), and
text for the sentence measures. Outputs: plain numbers. Redundancy grows with length for any writer, so comparisons
between models use fixed prefixes (`rep4_at`) beside the whole answer, with the count of answers long enough.
"""

import gzip
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

COMPARED = 64  # answers whose self-BLEU is taken
MEASURES = (
    "tokens", "rep2", "rep3", "rep4", "distinct1", "diversity", "loop_tail", "new_content", "gzip_ratio",
    "near_duplicates", "sentence_bleu",
)  # fmt: skip

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

    A period begins where the last token occurs before. One of at most half the loop found so far is passed over: it
    repeats no longer, since a tail with two periods has that of their greatest common divisor (Fine and Wilf 1965).
    """
    tail = list(tokens[::-1])
    best, period = Loop(0, 0), 0
    while True:
        try:
            period = tail.index(tail[0], max(period, best.tokens // 2) + 1, len(tail) // 2 + 1)
        except (ValueError, IndexError):  # no further one, or no token at all
            return best
        if tail[:period] == tail[period : 2 * period]:
            end = 2 * period
            while end < len(tail) and tail[end] == tail[end - period]:
                end += 1
            if end > best.tokens:
                best = Loop(period, end)


def sentences(text: str) -> list[str]:
    """Sentences of a text, lower case and single-spaced; a full stop inside a number does not end one."""
    parts = (" ".join(part.lower().split()) for part in _SENTENCE_END.split(text))
    return [part for part in parts if part]


def duplicate_sentence_share(parts: Sequence[Hashable]) -> float:
    """Share of sentences that are exact repeats of an earlier one; 0 for no sentence."""
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def near_duplicate_rate(parts: Iterable[str], threshold: float = 0.8, least_words: int = 4) -> float:
    """Share of sentences, among those of `least_words` or more, like an earlier one (Jaccard of word bigrams)."""
    holding: dict[tuple, list[frozenset]] = {}  # earlier sentences by each of their bigrams
    known: set[frozenset] = set()
    total = repeats = 0
    for part in parts:
        words = part.split()
        if len(words) < least_words:
            continue
        total += 1
        pairs = frozenset(zip(words, words[1:], strict=False))
        # A sentence that like lacks fewer than this many of the bigrams, so that it has one of any that many.
        enough = islice(pairs, int((1 - threshold) * len(pairs) + 1e-9) + 1)
        near = chain.from_iterable(holding.get(pair, ()) for pair in enough)
        if pairs in known or any(_jaccard(pairs, earlier) >= threshold for earlier in near):
            repeats += 1
        if pairs not in known:
            known.add(pairs)
            for pair in pairs:
                holding.setdefault(pair, []).append(pairs)
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


def repeats(tokens: Sequence[Hashable], n: int = 4) -> np.ndarray:
    """Mask [number of n-grams] of bool: this n-gram has occurred before; the mean of its first k - n + 1 entries is
    `rep_n` of the first k tokens."""
    grams = ngrams(tokens, n)
    first = dict(zip(reversed(grams), range(len(grams) - 1, -1, -1), strict=True))  # the earliest is written last
    mask = np.ones(len(grams), dtype=bool)
    mask[list(first.values())] = False
    return mask


def self_bleu(parts: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Mean BLEU-n of every part (the words of a sentence, or of an answer) against all others as its references; 0 for
    fewer than two parts. Zhu et al. 2018 (Texygen), BLEU of Papineni et al. 2002; a precision of 0 counts as 0.1 /
    total (Chen and Cherry 2014, method 1).
    """
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return 0.0
    logs = np.zeros(len(parts))
    shifted = [[part[start:] for part in parts] for start in range(n)]
    for order in range(1, n + 1):
        if order == 1:  # words stand for themselves: no tuples are made of them
            kinds = [set(part) for part in parts]
        else:
            kinds = [set(zip(*columns, strict=False)) for columns in zip(*shifted[:order], strict=True)]
        totals = [max(0, len(part) - order + 1) for part in parts]
        seen: set[Hashable] = set()
        shared: set[Hashable] = set()
        for kind in kinds:
            shared |= kind & seen
            seen |= kind
        matched = [len(kind & shared) for kind in kinds]
        # Few parts hold an n-gram more than once; only there counts decide what is clipped.
        repeating = [i for i, kind in enumerate(kinds) if len(kind) < totals[i]]
        counted = {i: Counter(parts[i] if order == 1 else ngrams(parts[i], order)) for i in repeating}
        several: dict[Hashable, list[int]] = {}
        for gram, times in chain.from_iterable(count.items() for count in counted.values()):
            if times > 1:
                several.setdefault(gram, []).append(times)
        for i, count in counted.items():
            matched[i] += sum(_clipped(t, several[gram]) - 1 for gram, t in count.items() if t > 1 and gram in shared)
        logs += [math.log((found or 0.1) / max(1, total)) / n for found, total in zip(matched, totals, strict=True)]
    return float(np.exp(logs + _brevity([len(part) for part in parts])).mean())


def _clipped(times: int, several: Sequence[int]) -> int:
    """How many of a part's `times` occurrences the other part with most matches; `several` are all counts above 1."""
    others = sorted(several)
    others.remove(times)
    return min(times, others[-1] if others else 1)


def _brevity(lengths: Sequence[int]) -> np.ndarray:
    """Logarithm [parts] of BLEU's brevity penalty against the other part nearest in length, the shorter of two."""
    counts, ordered = Counter(lengths), sorted(set(lengths))
    found = {}
    for at, length in enumerate(ordered):
        near = [length] if counts[length] > 1 else ordered[max(0, at - 1) : at] + ordered[at + 1 : at + 2]
        nearest = min(near, key=lambda other: (abs(other - length), other))
        found[length] = min(0.0, 1 - nearest / length)
    return np.array([found[length] for length in lengths])


def profile(
    answers: Sequence[Sequence[Hashable]], text_of: Callable[[Sequence[Hashable]], str], prefixes: Iterable[int]
) -> list[dict]:
    """Every measure at every prefix and of whole answers (`prefix` None, last): means over the `n` answers long enough.

    rep2 to rep4, distinct1 (different tokens), diversity (the product of distinct-2 to distinct-4), loop_tail (share of
    the answer that its periodic end is) and new_content (share of the 4-grams since the prefix before that had not been
    said; None for whole answers) read tokens. gzip_ratio, near_duplicates and sentence_bleu (self-BLEU of an answer's
    sentences) read `text_of` them. self_bleu compares the first COMPARED answers with each other, and is None for
    fewer, since it rises with their number. None throughout where no answer is long enough.
    """
    prefixes = sorted(set(prefixes))
    rows: dict[int | None, list[list[float]]] = {prefix: [] for prefix in [*prefixes, None]}
    for answer in answers:
        masks = [repeats(answer, n) for n in (1, 2, 3, 4)]
        for before, prefix in zip([0, *prefixes], prefixes, strict=False):
            if len(answer) >= prefix:
                rows[prefix].append(_measures(answer[:prefix], masks, before, text_of))
        whole = rows[len(answer)][-1] if len(answer) in prefixes else _measures(answer, masks, 0, text_of)
        rows[None].append(whole)
    table = []
    for prefix, values in rows.items():
        means = np.mean(values, axis=0).tolist() if values else [None] * len(MEASURES)
        long_enough = [answer[:prefix] for answer in answers if prefix is None or len(answer) >= prefix][:COMPARED]
        row = {"prefix": prefix, "n": len(values)} | dict(zip(MEASURES, means, strict=True))
        row["new_content"] = row["new_content"] if prefix else None
        table.append(row | {"self_bleu": self_bleu(long_enough) if len(long_enough) == COMPARED else None})
    return table


def _measures(
    tokens: Sequence[Hashable], masks: Sequence[np.ndarray], before: int, text_of: Callable[[Sequence[Hashable]], str]
) -> list[float]:
    """The numbers named in MEASURES; `masks` are `repeats` of the whole answer for n = 1 to 4."""
    rep1, rep2, rep3, rep4 = (_mean(mask[: max(0, len(tokens) - n)]) for n, mask in enumerate(masks))
    text = text_of(tokens)
    parts = sentences(text)
    loop = loop_tail(tokens).tokens / len(tokens) if tokens else 0.0
    new = 1 - _mean(masks[3][max(0, before - 3) : max(0, len(tokens) - 3)])
    near, bleu = near_duplicate_rate(parts), self_bleu([part.split() for part in parts])
    diversity = (1 - rep2) * (1 - rep3) * (1 - rep4)
    return [len(tokens), rep2, rep3, rep4, 1 - rep1, diversity, loop, new, gzip_ratio(text), near, bleu]


def _mean(mask: np.ndarray) -> float:
    return float(mask.mean()) if len(mask) else 0.0
