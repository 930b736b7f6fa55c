"""One chunk: read every model, run the kernel block by block, round, look for NaN, measure, write."""

import os
import zlib
from dataclasses import dataclass
from math import isfinite, prod

import torch
from torch import Tensor

from c2f_utils.errors import C2FError
from c2f_utils.merge.headers import ITEM_BYTES
from c2f_utils.merge.kernels import BLOCK, Piece, Statistics, residue
from c2f_utils.merge.operators import Operator
from c2f_utils.merge.plan import Placement, Plan, Segment
from c2f_utils.merge.ranges import blocks
from c2f_utils.merge.readers import Loaded, Opened, Workspace, as_tensor
from c2f_utils.merge.recipe import Recipe
from c2f_utils.merge.rounding import measure, round_to

_MEASURE_EVERY = 16  # blocks of large tensors that are measured for the report: survival is a mean over millions anyway
_MEASURE_ALL = 8 * BLOCK  # elements up to which every block is


@dataclass(frozen=True)
class Task:
    """One chunk of one segment."""

    placement: Placement
    segment: Segment
    opened: Opened
    stats: Statistics | None
    start: int
    stop: int


@dataclass(frozen=True)
class Done:
    """What a chunk leaves: tally rows of its measured blocks and one checksum per block."""

    rows: list[tuple[float, ...]]
    checks: list[int]


def merge_chunk(plan: Plan, task: Task, outputs: dict[str, int], workspace: Workspace) -> Done:
    """Compute or copy one chunk and write it; raises C2FError for NaN, infinity and overflow."""
    placement = task.placement
    taken = {"instruct": "instruct", "coarse": "coarse.0"}.get(task.segment.kind)
    loaded = task.opened.load(task.start, task.stop, workspace, (taken,) if taken else None)
    size = ITEM_BYTES[placement.dtype]
    source = placement.sources[taken or "instruct"]
    rows: list[tuple[float, ...]] = []
    if taken and source.info.dtype == placement.dtype and not source.delta:
        values = loaded.raw[taken]
        view = values.view(torch.uint8).numpy()
        if values.is_floating_point() and not _finite(values):
            loaded.blame(placement.name, task.start, task.stop)
    else:
        view = workspace.bytes("out", (task.stop - task.start) * size)
        out = as_tensor(view, placement.dtype)
        ranges = [(task.start, task.stop)] if placement.rank_two else blocks(task.start, task.stop)
        for low, high in ranges:
            part = out[low - task.start : high - task.start]
            if taken:
                take_block(plan, placement, loaded, taken, part, low, high)
            elif row := _merge(plan, task, loaded, part, low, high):
                rows.append(row)
    _write(outputs[placement.file], view, placement.offset + task.start * size)
    cuts = [(low - task.start, high - task.start) for low, high in blocks(task.start, task.stop)]
    return Done(rows, [zlib.crc32(view[low * size : high * size]) for low, high in cuts])


def _write(handle: int, view: "memoryview", position: int) -> None:
    written = 0
    while written < view.nbytes:
        written += os.pwrite(handle, view[written:], position + written)


def take_block(plan: Plan, placement: Placement, loaded: Loaded, taken: str, part: Tensor, low: int, high: int) -> None:
    """Take a model's values as they are, in the output's dtype; raises C2FError as `merge_block` does."""
    _store(plan.recipe, placement, loaded.read(taken, low, high), part, low)
    if not _finite(part):
        loaded.blame(placement.name, low, high)
        _refuse_overflow(plan, placement, part, low)


def _merge(plan: Plan, task: Task, loaded: Loaded, part: Tensor, low: int, high: int) -> tuple[float, ...] | None:
    """Merge one block into `part`; gives its tally row, or None where it is not measured."""
    placement = task.placement
    piece, merged = merge_block(plan, placement, loaded, part, low, high, task.stats)
    if placement.numel > _MEASURE_ALL and (low // BLOCK) % _MEASURE_EVERY and not placement.rank_two:
        return None
    deltas = (piece.instruct_residue, piece.residue) if "base" in loaded.raw else None
    row = measure(merged, part, piece.instruct, deltas)
    if not all(map(isfinite, row)):  # finite values with squares beyond float32
        doubles = None if deltas is None else tuple(delta.double() for delta in deltas)
        row = measure(merged.double(), part.double(), piece.instruct.double(), doubles)
    return row


def merge_block(
    plan: Plan, placement: Placement, loaded: Loaded, part: Tensor, low: int, high: int, stats: Statistics | None
) -> tuple[Piece, Tensor]:
    """Merge elements low .. high into `part`, rounded; gives what the kernel saw and its result before rounding.

    Raises C2FError for NaN, infinity and overflow.
    """
    piece = make_piece(loaded, plan.recipe, placement.name, placement.shape, low, high, stats)
    if plan.operator.hides and not (_finite(piece.instruct) and _finite(piece.residue)):
        loaded.blame(placement.name, low, high)
    merged = apply(plan.operator, plan.options, piece, placement.coefficient)
    _store(plan.recipe, placement, merged, part, low)
    if not _finite(part):
        loaded.blame(placement.name, low, high)
        _refuse_overflow(plan, placement, part, low)
    return piece, merged


def _store(recipe: Recipe, placement: Placement, values: Tensor, part: Tensor, low: int) -> None:
    stochastic = recipe.out_dtype == "bfloat16_stochastic"
    part.copy_(round_to(values, placement.dtype, True, recipe.seed, placement.name, low) if stochastic else values)


def _finite(values: Tensor) -> bool:
    """False for any NaN or infinity, and also when a sum of finite values overflows: callers then look closely."""
    return isfinite(float(values.sum(dtype=torch.float32) if values.dtype == torch.float16 else values.sum()))


def _refuse_overflow(plan: Plan, placement: Placement, part: Tensor, low: int) -> None:
    bad = torch.nonzero(~torch.isfinite(part))
    if len(bad):
        raise C2FError(
            f"{placement.file}: tensor {placement.name!r} overflows {placement.dtype} at element {low + int(bad[0])} "
            f"with operator {plan.operator.name} and coefficient {placement.coefficient}; use out_dtype: float32 or "
            "bfloat16, or a smaller coefficient"
        )


def recipe_weights(recipe: Recipe) -> tuple[float, ...]:
    """Give the weights of the coarse models, in order."""
    return tuple(model.weight for model in recipe.coarse_models)


def make_piece(
    loaded: Loaded, recipe: Recipe, name: str, shape: tuple[int, ...], low: int, high: int, stats: Statistics | None
) -> Piece:
    """Give the kernel's view of elements low .. high."""
    weights = recipe_weights(recipe)
    return Piece(name, shape, low, lambda what: loaded.read(what, low, high), weights, stats, recipe.seed)


def apply(operator: Operator, options: dict, piece: Piece, c: float) -> Tensor:
    """Run the operator's kernel and check its result; a matrix operator leaves all but whole matrices to `residue`."""
    if operator.matrix and (len(piece.shape) != 2 or piece.instruct.numel() != prod(piece.shape)):
        return residue(piece, c)
    merged = operator.kernel(piece, c, **options)
    if operator.builtin:
        return merged
    wanted = (piece.instruct.shape, piece.instruct.dtype)
    if not isinstance(merged, Tensor) or (merged.shape, merged.dtype) != wanted:
        got = f"{tuple(merged.shape)} {merged.dtype}" if isinstance(merged, Tensor) else type(merged).__name__
        raise C2FError(
            f"operator {operator.name!r} gave {got} for a piece of {piece.name!r}, expected a tensor of shape "
            f"{tuple(wanted[0])} and {wanted[1]}: one value per element"
        )
    return merged
