"""Exact magnitude thresholds in bounded memory.

A threshold is the k-th largest |d|. A sample brackets it, one pass counts what lies above the bracket and collects what
lies inside, and the k-th is chosen among those. It is exact, so it cannot depend on chunks, threads or luck: a bad
bracket only costs another pass.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from c2f_utils.errors import C2FError
from c2f_utils.merge import random_bits
from c2f_utils.merge.kernels import Threshold
from c2f_utils.merge.ranges import Target, blocks, chunks
from c2f_utils.merge.readers import Loaded, Workspace
from c2f_utils.merge.workers import Workers

COLLECT = 3 << 20  # float32 values held at most per threshold (12 MB)
KEEP_ALL, KEEP_NONE = Threshold(-1.0, 0, 1.0), Threshold(math.inf, 0, 0.0)
_RUN = 1024  # elements of a sampled run; runs are spread evenly, 64 to 1024 of them by size
_MARGIN = 5.0  # standard errors of a sample quantile; more than chance needs, as the elements of a run are alike


def thresholds(
    targets: list[Target], first: int, models: int, density: float, seed: int, chunk: int, workers: Workers
) -> tuple[Threshold, ...]:
    """Give the thresholds that keep the share `density` of |d| over all targets together.

    Index 0 of the result is d_I's, k + 1 that of residue k; with `first` = 1 d_I is not asked for and kept whole.
    Raises C2FError for NaN, infinity and residues beyond float32.
    """
    total = sum(target.count for target in targets)
    wanted = 0 if density <= 0 else max(1, int(density * total))
    skipped = (KEEP_ALL,) * first
    if wanted == 0 or total == 0:
        return skipped + (KEEP_NONE,) * (models + 1 - first)
    if wanted >= total:
        return (KEEP_ALL,) * (models + 1)
    roles = ["delta.instruct", *(f"delta.coarse.{k}" for k in range(models))][first:]
    searches = {role: _Search(wanted) for role in roles}
    if total > COLLECT:
        for role, sample in _sample(targets, total, roles).items():
            searches[role].aim(sample, wanted / total)
    while left := {role: search for role, search in searches.items() if search.value is None}:
        _count(targets, left, chunk, workers)
    found = []
    for index, role in enumerate(roles, start=first):
        found.append(_settle(searches[role], targets, total, role, f"tie:{index}", seed))
    return skipped + tuple(found)


@dataclass
class _Search:
    """The state of one search: the `wanted`-th largest lies within low .. high, `pivot` is the best guess."""

    wanted: int
    low: float = 0.0
    high: float = math.inf
    pivot: float = math.nan
    value: float | None = None
    greater: int = 0  # elements above the value found
    tied: int = 0  # elements equal to it
    above: int = 0
    inside: int = 0
    stride: int = 1
    values: list[np.ndarray] = field(default_factory=list)

    def start_pass(self) -> None:
        self.above = self.inside = 0
        self.stride, self.values = 1, []

    def take(self, above: int, inside: int, values: np.ndarray) -> None:
        """Count, and hold the values inside the bracket that differ from the pivot, thinned when they are too many."""
        self.above += above
        self.inside += inside
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
            larger = self.above + (equal if self.wanted > more else 0)  # the pivot's equals are not among the values
            rank = found.size - (self.wanted - larger)
            found.partition(rank)
            self.value = float(found[rank])
            self.greater = larger + int(np.count_nonzero(found > self.value))
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


def _models(roles: list[str]) -> tuple[str, ...]:
    return ("base", *(role.removeprefix("delta.") for role in roles))


def _sizes(target: Target, loaded: Loaded, role: str, low: int, high: int) -> np.ndarray:
    delta = loaded.read(role, low, high)
    if not math.isfinite(float(delta.sum())) and not bool(np.isfinite(delta.numpy()).all()):
        loaded.blame(target.name, low, high)
        where = f"elements {low} to {high}"
        raise C2FError(f"tensor {target.name!r}: a residue overflows float32 at {where}; mend the models")
    return np.abs(delta.numpy())


def _sample(targets: list[Target], total: int, roles: list[str]) -> dict[str, np.ndarray]:
    workspace, first = Workspace(), 0
    runs = min(1024, max(64, total >> 18))
    step = (total - _RUN) / (runs - 1)
    positions = [int(number * step) for number in range(runs)]
    drawn: dict[str, list[np.ndarray]] = {role: [] for role in roles}
    for target in targets:
        for position in positions:
            if first <= position < first + target.count:
                low, high = position - first, min(target.count, position - first + _RUN)
                loaded = target.reader.load(low, high, workspace, _models(roles))
                for role, sizes in drawn.items():
                    sizes.append(_sizes(target, loaded, role, low, high))
        first += target.count
    return {role: np.concatenate(sizes) for role, sizes in drawn.items()}


@dataclass
class _Found:
    """What one chunk adds to a search; `more` and `equal` count against the pivot."""

    above: int = 0
    inside: int = 0
    more: int = 0
    equal: int = 0
    values: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.float32)])

    def add(self, size: np.ndarray, search: _Search) -> None:
        """Count one block and hold what lies in the bracket; selecting costs most, so the pivot's equals, which may be
        many as 16-bit residues share magnitudes, are only counted.
        """
        if math.isnan(search.pivot):  # no sample: all is held, as of small tensors
            self.inside += size.size
            self.values.append(size)
            return
        over, tied = size > search.high, size == search.pivot
        above, equal = np.count_nonzero(over), np.count_nonzero(tied)
        values = np.empty(0, np.float32)
        if search.low < search.high:
            # positions first: selecting few by a mask directly takes longer
            values = size[np.flatnonzero((size >= search.low) & ~(over | tied))]
        self.above += above
        self.inside += values.size + equal
        self.more += above + np.count_nonzero(values > search.pivot)
        self.equal += equal
        self.values.append(values)


def _count(targets: list[Target], searches: dict[str, _Search], chunk: int, workers: Workers) -> None:
    """One pass over the data for all thresholds still open."""
    needed = _models(list(searches))

    def tally(piece: tuple[Target, int, int], workspace: Workspace) -> dict[str, _Found]:
        target, start, stop = piece
        loaded = target.reader.load(start, stop, workspace, needed)
        found = {role: _Found() for role in searches}
        for low, high in blocks(start, stop):
            for role, search in searches.items():
                found[role].add(_sizes(target, loaded, role, low, high), search)
        return found

    sums = {role: _Found() for role in searches}
    for search in searches.values():
        search.start_pass()
    for found in workers.map(tally, _pieces(targets, chunk)):
        for role, part in found.items():
            searches[role].take(part.above, part.inside, np.concatenate(part.values))
            sums[role].more += part.more
            sums[role].equal += part.equal
    for role, search in searches.items():
        search.finish_pass(sums[role].more, sums[role].equal)


def _pieces(targets: list[Target], chunk: int) -> Iterator[tuple[Target, int, int]]:
    for target in targets:
        for low, high in chunks(0, target.count, chunk):
            yield target, low, high


def _settle(search: _Search, targets: list[Target], total: int, role: str, purpose: str, seed: int) -> Threshold:
    """Turn a magnitude into a rule that keeps the wanted number although many elements may share that magnitude.

    Up to COLLECT elements the number is met exactly; beyond, in expectation, which is then as good and saves a pass.
    """
    value, need = float(search.value), search.wanted - search.greater
    if value == 0.0:
        return Threshold(0.0, 0, search.greater / total)  # only zeros are left to choose from
    if need == search.tied:
        return Threshold(_before(value), 0, search.wanted / total)
    if total > COLLECT:
        return Threshold(value, round(need / search.tied * 2**32), search.wanted / total)
    words, workspace = [], Workspace()
    for target in targets:
        for low, high in blocks(0, target.count):
            loaded = target.reader.load(low, high, workspace, _models([role]))
            tied = np.flatnonzero(np.abs(loaded.read(role, low, high).numpy()) == value)
            words.append(random_bits.spread(seed, f"{target.name}|{purpose}", low, high - low)[tied])
    cut = int(np.sort(np.concatenate(words))[need])
    return Threshold(value, cut, search.wanted / total)
