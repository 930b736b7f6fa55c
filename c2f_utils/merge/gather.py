"""The pass before the kernel: what an operator must know of a whole tensor before it can treat a piece."""

import math
from itertools import chain

from c2f_utils.merge.kernels import Statistics
from c2f_utils.merge.operators import Operator
from c2f_utils.merge.ranges import Target, blocks, chunks
from c2f_utils.merge.readers import Workspace
from c2f_utils.merge.rounding import inner
from c2f_utils.merge.thresholds import thresholds
from c2f_utils.merge.workers import Workers


def gather(
    operator: Operator, options: dict, targets: list[Target], models: int, seed: int, chunk: int, workers: Workers
) -> list[Statistics]:
    """Give each target's statistics; with option scope == "global" the thresholds are those of all targets together."""
    grams = [_gram(target, models, chunk, workers) if "gram" in operator.statistics else () for target in targets]
    limits = [()] * len(targets)
    if "thresholds" in operator.statistics:
        first = 0 if "instruct_threshold" in operator.statistics else 1
        groups = [targets] if options.get("scope") == "global" else [[target] for target in targets]
        found = [thresholds(group, first, models, options["density"], seed, chunk, workers) for group in groups]
        limits = found * len(targets) if len(groups) < len(targets) else found
    return [Statistics(gram, limit, target.count) for gram, limit, target in zip(grams, limits, targets, strict=True)]


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
