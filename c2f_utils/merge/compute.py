"""One piece at a time: show it to the kernel, check what comes back, tell whose fault a NaN is."""

from math import isfinite

import torch
from torch import Tensor

from c2f_utils.errors import C2FError
from c2f_utils.merge.kernels import Piece, Statistics, residue
from c2f_utils.merge.operators import Operator
from c2f_utils.merge.plan import Placement, Plan
from c2f_utils.merge.recipe import Recipe
from c2f_utils.merge.rounding import inner, measure
from c2f_utils.merge.sources import Loaded


def recipe_weights(recipe: Recipe) -> tuple[float, ...]:
    return tuple(model.weight for model in recipe.coarse_models)


def make_piece(
    loaded: Loaded,
    weights: tuple[float, ...],
    name: str,
    shape: tuple[int, ...],
    low: int,
    high: int,
    stats: Statistics | None,
    seed: int,
) -> Piece:
    """Give the kernel's view of elements low .. high."""
    return Piece(name, shape, low, lambda what: loaded.read(what, low, high), weights, stats, seed)


def apply(operator: Operator, options: dict, piece: Piece, c: float) -> torch.Tensor:
    """Run the operator's kernel and check that what it gives can be stored; a matrix operator leaves other shapes to
    `residue`.
    """
    if operator.matrix and len(piece.shape) != 2:
        return residue(piece, c)
    merged = operator.kernel(piece, c, **options)
    if operator.builtin:
        return merged
    if (
        not isinstance(merged, torch.Tensor)
        or merged.shape != piece.instruct.shape
        or merged.dtype != piece.instruct.dtype
    ):
        got = f"{tuple(merged.shape)} {merged.dtype}" if isinstance(merged, torch.Tensor) else type(merged).__name__
        raise C2FError(
            f"operator {operator.name!r} gave {got} for a piece of {piece.name!r}, expected a tensor of "
            f"shape {tuple(piece.instruct.shape)} and "
            f"{piece.instruct.dtype}; return one value per element"
        )
    return merged


def copied_row(loaded: Loaded, placement: Placement, role: str, low: int, high: int) -> tuple[float, ...]:
    if loaded.raw[role].is_floating_point():
        values = loaded.read(role, low, high)
        if not isfinite(inner(values, values)):
            loaded.blame(placement.name, low, high)
    return (float(high - low), *(0.0,) * 8)


def overflow_row(
    plan: Plan,
    placement: Placement,
    merged: Tensor,
    part: Tensor,
    instruct: Tensor,
    deltas: tuple[Tensor, Tensor] | None,
    low: int,
) -> tuple[float, ...]:
    """Finite inputs gave a sum that is not: an output that overflows is an error, large squares are merely summed in
    float64.
    """
    bad = torch.nonzero(~torch.isfinite(part.float()))
    if len(bad):
        raise C2FError(
            f"{placement.file}: tensor {placement.name!r} overflows {placement.dtype} at element "
            f"{low + int(bad[0])} with operator "
            f"{plan.operator.name} and coefficient {placement.coefficient}; use out_dtype: float32 or "
            f"bfloat16, or a smaller coefficient"
        )
    doubles = None if deltas is None else tuple(delta.double() for delta in deltas)
    return measure(merged.double(), part.double(), instruct.double(), doubles)
