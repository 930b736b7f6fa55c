"""The pass before the kernel: what an operator must know of a whole tensor before it can treat a piece."""

import math
from itertools import chain

from c2f_utils.merge.kernels import Piece, Statistics, Threshold
from c2f_utils.merge.operators import Operator
from c2f_utils.merge.ranges import Target, blocks, chunks
from c2f_utils.merge.readers import Workspace
from c2f_utils.merge.rounding import inner
from c2f_utils.merge.thresholds import thresholds
from c2f_utils.merge.workers import Workers


def gather(
    operator: Operator, options: dict, targets: list[Target], models: int, seed: int, chunk: int, workers: Workers
) -> list[Statistics]:
    """Give each target's statistics; with option scope == "global" the thresholds and scales are those of all targets
    together."""
    grams = [_gram(target, models, chunk, workers) if "gram" in operator.statistics else () for target in targets]
    limits, scales = [()] * len(targets), [()] * len(targets)
    if "thresholds" in operator.statistics:
        first = 0 if "instruct_threshold" in operator.statistics else 1
        groups = [targets] if options.get("scope") == "global" else [[target] for target in targets]
        found = [thresholds(group, first, models, options["density"], seed, chunk, workers) for group in groups]
        each = len(targets) // max(1, len(groups))
        limits = found * each
        if "scales" in operator.statistics:
            kept = zip(groups, found, strict=True)
            scales = [_scales(group, limit, seed, chunk, workers) for group, limit in kept] * each
    return [
        Statistics(gram, limit, target.count, scale)
        for gram, limit, scale, target in zip(grams, limits, scales, targets, strict=True)
    ]


def _scales(
    targets: list[Target], limits: tuple[Threshold, ...], seed: int, chunk: int, workers: Workers
) -> tuple[float, ...]:
    """|d| / |the part of d beyond its threshold| over all targets, of d_I and the residues; 1 where nothing is kept."""
    roles = ["delta.instruct", *(f"delta.coarse.{k}" for k in range(len(limits) - 1))]
    stats = Statistics(thresholds=limits)

    def squares(span: tuple[Target, int, int], workspace: Workspace) -> list[list[float]]:
        target, start, stop = span
        loaded = target.reader.load(start, stop, workspace)
        rows = []
        for low, high in blocks(start, stop):
            wholes = {role: loaded.read(role, low, high) for role in roles}
            piece = Piece(target.name, (target.count,), low, wholes.__getitem__, (), stats, seed)
            pairs = [(whole, piece.trimmed(whole, index)) for index, whole in enumerate(wholes.values())]
            doubles = [part.double() for pair in pairs for part in pair]  # squares of float32 may leave its range
            rows.append([inner(part, part) for part in doubles])
        return rows

    spans = ((target, *span) for target in targets for span in chunks(0, target.count, chunk))
    sums = [math.fsum(column) for column in zip(*chain.from_iterable(workers.map(squares, spans)), strict=True)]
    return tuple(math.sqrt(whole / kept) if kept else 1.0 for whole, kept in zip(sums[::2], sums[1::2], strict=True))


def _gram(target: Target, models: int, chunk: int, workers: Workers) -> tuple[tuple[float, ...], ...]:
    """Inner products of d_I and the residues, summed exactly over fixed blocks."""
    roles = ["delta.instruct", *(f"delta.coarse.{k}" for k in range(models))]
    pairs = [(i, j) for i in range(models + 1) for j in range(i + 1)]

    def products(piece: tuple[int, int], workspace: Workspace) -> list[list[float]]:
        loaded = target.reader.load(*piece, workspace)
        rows = []
        for low, high in blocks(*piece):
            parts = [loaded.read(role, low, high) for role in roles]
            rows.append([inner(parts[i], parts[j]) for i, j in pairs])
            if not all(map(math.isfinite, rows[-1])):
                loaded.blame(target.name, low, high)
                rows[-1] = [inner(parts[i].double(), parts[j].double()) for i, j in pairs]
        return rows

    rows = list(chain.from_iterable(workers.map(products, chunks(0, target.count, chunk))))
    columns = zip(*rows, strict=True) if rows else [()] * len(pairs)
    sums = {pair: math.fsum(column) for pair, column in zip(pairs, columns, strict=True)}
    return tuple(tuple(sums[max(i, j), min(i, j)] for j in range(models + 1)) for i in range(models + 1))
