"""The pass before the kernel: inner products of residues, and exact magnitude thresholds, in bounded memory.

A threshold is the k-th largest |d|. A sample brackets it, one pass counts what lies above the bracket and collects
what lies inside, and the k-th is chosen among those. It is exact, so it cannot depend on chunks, threads or luck: a
bad bracket only costs another pass.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np

from c2f_utils.errors import C2FError
from c2f_utils.merge import philox
from c2f_utils.merge.kernels import BLOCK, Statistics, Threshold
from c2f_utils.merge.operators import Operator
from c2f_utils.merge.rounding import inner
from c2f_utils.merge.sources import Loaded, Workspace
from c2f_utils.merge.workers import Workers

COLLECT = 3 << 20  # float32 values held at most per threshold (12 MB)
_SAMPLE_RUNS, _RUN = 1024, 1024  # runs of consecutive elements, spread evenly
_MARGIN = 18.0  # standard errors of a sample quantile; far more than chance needs, because elements of a run are alike


class Reader(Protocol):
    def load(self, start: int, stop: int, workspace: Workspace) -> Loaded: ...


@dataclass(frozen=True)
class Target:
    """The mergeable front of one tensor."""

    name: str
    reader: Reader
    count: int


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a range at multiples of BLOCK, so that a block is the same whatever chunk it came in."""
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


def gather(
    operator: Operator, options: dict, targets: list[Target], models: int, seed: int, chunk: int, workers: Workers
) -> list[Statistics]:
    """Give each target's statistics; with option scope == "global" the thresholds are those of all targets together."""
    grams = [_gram(target, models, chunk, workers) if "gram" in operator.statistics else () for target in targets]
    if "thresholds" not in operator.statistics:
        limits = [()] * len(targets)
    elif options.get("scope") == "global":
        limits = [_thresholds(targets, models, options["density"], seed, chunk, workers)] * len(targets)
    else:
        limits = [_thresholds([target], models, options["density"], seed, chunk, workers) for target in targets]
    return [Statistics(gram, limit, target.count) for gram, limit, target in zip(grams, limits, targets, strict=True)]


def _roles(models: int) -> list[str]:
    return ["delta.instruct", *(f"delta.coarse.{k}" for k in range(models))]


def _gram(target: Target, models: int, chunk: int, workers: Workers) -> tuple[tuple[float, ...], ...]:
    pairs = [(i, j) for i in range(models + 1) for j in range(i + 1)]

    def products(piece: tuple[int, int], workspace: Workspace) -> list[list[float]]:
        loaded = target.reader.load(*piece, workspace)
        rows = []
        for low, high in blocks(*piece):
            parts = [loaded.read(role, low, high) for role in _roles(models)]
            rows.append([inner(parts[i], parts[j]) for i, j in pairs])
            if not all(map(math.isfinite, rows[-1])):
                loaded.blame(target.name, low, high)
                rows[-1] = [inner(parts[i].double(), parts[j].double()) for i, j in pairs]
        return rows

    rows = list(chain.from_iterable(workers.map(products, chunks(0, target.count, chunk))))
    sums = (
        dict(zip(pairs, (math.fsum(column) for column in zip(*rows, strict=True)), strict=True))
        if rows
        else dict.fromkeys(pairs, 0.0)
    )
    return tuple(tuple(sums[max(i, j), min(i, j)] for j in range(models + 1)) for i in range(models + 1))


@dataclass
class _Search:
    """The state of one threshold: k-th largest of n, known to lie within low .. high, `pivot` the best guess."""

    wanted: int
    low: float = 0.0
    high: float = math.inf
    pivot: float = math.nan
    value: float | None = None
    greater: int = 0
    tied: int = 0
    above: int = 0
    inside: int = 0
    stride: int = 1
    values: list[np.ndarray] = field(default_factory=list)

    def start_pass(self) -> None:
        self.above = self.inside = 0
        self.stride, self.values = 1, []

    def take(self, above: int, values: np.ndarray) -> None:
        self.above += above
        self.inside += values.size
        self.values.append(values[:: self.stride])
        while sum(part.size for part in self.values) > COLLECT:
            self.stride *= 2
            self.values = [np.concatenate([part[::2] for part in self.values])]

    def finish_pass(self, more: int, equal: int) -> None:
        """Settle, or narrow the bracket around the wanted rank; `more` and `equal` are exact counts for the pivot."""
        if more < self.wanted <= more + equal:
            self.value, self.greater, self.tied = self.pivot, more, equal
        elif self.above < self.wanted <= self.above + self.inside and self.stride == 1:
            found = np.concatenate(self.values)
            rank = found.size - (self.wanted - self.above)
            found.partition(rank)
            self.value = float(found[rank])
            self.greater = self.above + int(np.count_nonzero(found > self.value))
            self.tied = int(np.count_nonzero(found == self.value))
        elif self.above >= self.wanted:  # the sample misled: look above the bracket
            self._narrow(_after(self.high), math.inf, 0.5)
        elif self.above + self.inside < self.wanted:  # ... or below it
            self._narrow(0.0, _before(self.low), 0.5)
        elif self.wanted <= more:
            self._narrow(_after(self.pivot), self.high, (self.wanted - self.above) / (more - self.above))
        else:
            rest = self.above + self.inside - more - equal
            self._narrow(self.low, _before(self.pivot), (self.wanted - more - equal) / rest)

    def _narrow(self, low: float, high: float, share: float) -> None:
        self.low, self.high = low, high
        sample = np.concatenate(self.values)
        self.aim(sample[(sample >= low) & (sample <= high)], share)

    def aim(self, sample: np.ndarray, share: float) -> None:
        """Choose pivot and bracket from a sample in which the wanted share lies above the threshold."""
        if not sample.size:
            self.pivot = self.low
            return
        sample = np.sort(sample)
        share = min(1.0, max(0.0, share))
        centre = min(sample.size - 1, max(0, round(sample.size * (1 - share)) - 1))
        margin = round(_MARGIN * math.sqrt(sample.size * share * (1 - share))) + 32
        self.pivot = float(sample[centre])
        if centre - margin >= 0:
            self.low = max(self.low, float(sample[centre - margin]))
        if centre + margin < sample.size:
            self.high = min(self.high, float(sample[centre + margin]))


def _after(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(math.inf)))


def _before(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-math.inf)))


def _thresholds(
    targets: list[Target], models: int, density: float, seed: int, chunk: int, workers: Workers
) -> tuple[Threshold, ...]:
    total = sum(target.count for target in targets)
    wanted = 0 if density <= 0 else max(1, int(density * total))
    if wanted == 0 or total == 0:
        return (Threshold(math.inf, 0, 0.0),) * (models + 1)
    if wanted >= total:
        return (Threshold(-1.0, 0, 1.0),) * (models + 1)
    searches = [_Search(wanted) for _ in range(models + 1)]
    if total > COLLECT:
        for search, sample in zip(searches, _sample(targets, total, models, workers), strict=True):
            search.aim(sample, wanted / total)
    while any(search.value is None for search in searches):
        _count(targets, searches, chunk, workers)
    return tuple(_settle(index, search, targets, total, seed, chunk, workers) for index, search in enumerate(searches))


def _pieces(targets: list[Target], chunk: int) -> Iterator[tuple[Target, int, int]]:
    for target in targets:
        for low, high in chunks(0, target.count, chunk):
            yield target, low, high


def _sizes(target: Target, loaded: Loaded, role: str, low: int, high: int) -> np.ndarray:
    size = loaded.read(role, low, high).abs().numpy()
    if not np.isfinite(size.max()):
        loaded.blame(target.name, low, high)
        raise C2FError(
            f"tensor {target.name!r}: a residue overflows float32 at elements {low} to {high}; mend the models"
        )
    return size


def _sample(targets: list[Target], total: int, models: int, workers: Workers) -> list[np.ndarray]:
    starts, first = [], 0
    step = (total - _RUN) / (_SAMPLE_RUNS - 1)
    positions = [int(number * step) for number in range(_SAMPLE_RUNS)]
    for target in targets:
        inside = [position - first for position in positions if first <= position < first + target.count]
        starts += [(target, low, min(target.count, low + _RUN)) for low in inside]
        first += target.count

    def draw(piece: tuple[Target, int, int], workspace: Workspace) -> list[np.ndarray]:
        target, low, high = piece
        loaded = target.reader.load(low, high, workspace)
        return [_sizes(target, loaded, role, low, high).copy() for role in _roles(models)]

    drawn = list(workers.map(draw, starts))
    return [np.concatenate([parts[index] for parts in drawn]) for index in range(models + 1)]


def _count(targets: list[Target], searches: list[_Search], chunk: int, workers: Workers) -> None:
    """One pass over the data for all thresholds still open."""
    open_ = [(index, search) for index, search in enumerate(searches) if search.value is None]
    roles = _roles(len(searches) - 1)
    bounds = [(search.low, search.high, search.pivot) for _, search in open_]

    def tally(piece: tuple[Target, int, int], workspace: Workspace) -> list[tuple[int, np.ndarray, int, int]]:
        target, start, stop = piece
        loaded = target.reader.load(start, stop, workspace)
        found = [(0, [], 0, 0) for _ in open_]
        for low, high in blocks(start, stop):
            for position, ((index, _), (least, most, pivot)) in enumerate(zip(open_, bounds, strict=True)):
                size = _sizes(target, loaded, roles[index], low, high)
                over = size > most
                values = size[(size >= least) & ~over]
                above, parts, more, equal = found[position]
                parts.append(values)
                more += int(np.count_nonzero(values > pivot))
                equal += int(np.count_nonzero(values == pivot))
                found[position] = (above + int(np.count_nonzero(over)), parts, more, equal)
        return [(above, np.concatenate(parts), more, equal) for above, parts, more, equal in found]

    more, equal = [0] * len(open_), [0] * len(open_)
    for _, search in open_:
        search.start_pass()
    for results in workers.map(tally, _pieces(targets, chunk)):
        for position, (above, values, greater, same) in enumerate(results):
            open_[position][1].take(above, values)
            more[position] += greater
            equal[position] += same
    for position, (_, search) in enumerate(open_):
        search.finish_pass(search.above + more[position], equal[position])


def _settle(
    index: int, search: _Search, targets: list[Target], total: int, seed: int, chunk: int, workers: Workers
) -> Threshold:
    """Turn a magnitude into a rule that keeps the wanted number although many elements may share that magnitude."""
    value, need = float(search.value), search.wanted - search.greater
    if value == 0.0:
        return Threshold(0.0, 0, search.greater / total)  # only zeros are left to choose from
    if need == search.tied:
        return Threshold(_before(value), 0, search.wanted / total)
    if search.tied > COLLECT:
        return Threshold(value, round(need / search.tied * 2**32), search.wanted / total)
    words = np.concatenate(list(workers.map(_tie_words(index, value, seed), _pieces(targets, chunk))))
    words.sort()
    return Threshold(value, int(words[need]), (search.greater + int(np.count_nonzero(words < words[need]))) / total)


def _tie_words(index: int, value: float, seed: int) -> Callable[[tuple[Target, int, int], Workspace], np.ndarray]:
    role = _roles(index)[index]

    def words(piece: tuple[Target, int, int], workspace: Workspace) -> np.ndarray:
        target, start, stop = piece
        loaded = target.reader.load(start, stop, workspace)
        found = [np.empty(0, np.uint32)]
        for low, high in blocks(start, stop):
            tied = loaded.read(role, low, high).abs().numpy() == value
            if tied.any():
                found.append(philox.bits(seed, f"{target.name}|tie:{index}", low, high - low, 32)[tied])
        return np.concatenate(found)

    return words
