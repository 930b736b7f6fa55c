"""Check a finished merge: random slices recomputed in float64 from the inputs, with another reader than the one that
wrote them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from c2f_utils.errors import C2FError, problems
from c2f_utils.files import write_json
from c2f_utils.merge.compute import apply, make_piece
from c2f_utils.merge.headers import ITEM_BYTES, TensorInfo, read_header
from c2f_utils.merge.kernels import Piece
from c2f_utils.merge.merge_report import REPORT, Report, load_report
from c2f_utils.merge.plan import Placement, Plan, plan_merge
from c2f_utils.merge.readers import Source
from c2f_utils.merge.recipe import Recipe
from c2f_utils.merge.rounding import TORCH

_LENGTH = 256  # elements per slice
_HALF_UNIT = {
    "F64": 2.0**-24,
    "F32": 2.0**-24,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
}  # arithmetic is float32 even for F64 outputs
_TINY = {"F64": 1e-38, "F32": 1e-38, "F16": 6e-8, "BF16": 1e-38}


@dataclass(frozen=True)
class Verified:
    """Outcome of a verification: slices checked, elements checked, and the worst error in units of what rounding
    allows (at most 1).
    """

    slices: int
    elements: int
    worst: float


def verify(out_dir: Path | str, recipe: Recipe, samples: int = 64, seed: int = 0) -> Verified:
    """Recompute `samples` random slices of the output in float64 and compare; raises C2FError naming every slice that
    differs.

    Also compares tensors, shapes and dtypes of the output with the plan. Thresholds and inner products are taken from
    the report.
    """
    out_dir = Path(out_dir)
    report, plan = load_report(out_dir), plan_merge(recipe)
    if report.recipe != recipe.to_dict():
        raise C2FError(f"{out_dir} was merged with another recipe; verify with the recipe in its merge_report.json")
    found = _check_layout(out_dir, plan)
    if found:
        raise problems(f"{out_dir} does not match its recipe:", found)
    generator = np.random.default_rng(seed)
    filled = [placement for placement in plan.placements if placement.numel]
    sizes = np.array([placement.numel for placement in filled], dtype=np.float64)
    # Half by size, half by tensor: norms are few elements, and an error there matters as much.
    chosen = [
        *generator.choice(len(filled), samples - samples // 2, p=sizes / sizes.sum()),
        *generator.choice(len(filled), samples // 2),
    ]
    worst, elements, bad = 0.0, 0, []
    for number in chosen:
        placement = filled[number]
        start = int(generator.integers(0, max(1, placement.numel - _LENGTH + 1)))
        stop = min(placement.numel, start + _LENGTH)
        error = _compare(out_dir, plan, report, placement, start, stop)
        worst, elements = max(worst, error), elements + stop - start
        if not error <= 1.0:
            bad.append(
                f"{placement.file}: tensor {placement.name!r}, elements {start} to {stop}: off by "
                f"{error:.3g} times the rounding error"
            )
    if bad:
        raise problems(f"{out_dir} is not what its recipe gives; merge again:", bad)
    return Verified(len(chosen), elements, worst)


def verify_and_record(out_dir: Path | str, recipe: Recipe, samples: int = 64, seed: int = 0) -> Verified:
    """As `verify`, and write the outcome into merge_report.json as `verified`; a failed one leaves null there."""
    report, file = load_report(out_dir), Path(out_dir) / REPORT
    if report.verified is not None:  # of an earlier time
        report.verified = None
        write_json(file, report.to_dict())
    found = verify(out_dir, recipe, samples, seed)
    report.verified = {**asdict(found), "seed": seed}
    write_json(file, report.to_dict())
    return found


def _check_layout(out_dir: Path, plan: Plan) -> list[str]:
    found = []
    for file in plan.files:
        try:
            header = read_header(out_dir / file.name)
        except C2FError as error:
            found.append(str(error))
            continue
        wanted = {p.name: (p.dtype, p.shape) for p in plan.placements if p.file == file.name}
        have = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
        found += [
            f"{file.name}: tensor {name!r} is {have.get(name)}, expected {wanted.get(name)}"
            for name in sorted(set(wanted) | set(have))
            if wanted.get(name) != have.get(name)
        ]
    return found


class _Exact:
    """float64 views of slices; residues are float32 differences, as the operators define them."""

    def __init__(self, placement: Placement, start: int, stop: int) -> None:
        self._sources, self._range = placement.sources, (start, stop)

    def read(self, what: str, *_: int) -> torch.Tensor:
        role = what.removeprefix("delta.")
        source = self._sources[role]
        if not what.startswith("delta."):
            return self._plain(source) + (self._low_rank(source) if source.delta else 0.0)
        if source.delta:
            return self._low_rank(source)
        return (self._plain(source).float() - self._plain(self._sources["base"]).float()).double()

    def _plain(self, source: Source) -> torch.Tensor:
        return _slice(source.info, *self._range).double()

    def _low_rank(self, source: Source) -> torch.Tensor:
        delta, (start, stop) = source.delta, self._range
        a, b = (_slice(info, 0, info.numel).double().view(info.shape) for info in (delta.a, delta.b))
        left, right = (a.t(), b.t()) if delta.transposed else (b, a)
        columns = right.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = (left[first:last] @ right * delta.scale).reshape(-1)
        return rows[start - first * columns : stop - first * columns].float().double()


def _slice(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    with safe_open(info.file, "pt") as handle:
        return handle.get_tensor(info.name).reshape(-1)[start:stop]


def _compare(out_dir: Path, plan: Plan, report: Report, placement: Placement, start: int, stop: int) -> float:
    size = ITEM_BYTES[placement.dtype]
    with open(out_dir / placement.file, "rb") as handle:
        handle.seek(placement.offset + start * size)
        stored = torch.frombuffer(bytearray(handle.read((stop - start) * size)), dtype=TORCH[placement.dtype])
    segment = next(segment for segment in placement.segments if segment.start <= start < segment.stop)
    stop = min(stop, segment.stop)
    stored = stored[: stop - start]
    low, high = (0, placement.numel) if placement.rank_two else (start, stop)
    exact = _Exact(placement, low, high)
    if segment.kind != "merge":
        wanted = exact.read("instruct" if segment.kind == "instruct" else "coarse.0")
        scale = wanted.abs()
    else:
        stats = report.get_statistics(placement.name)
        piece = make_piece(exact, plan.recipe, placement.name, placement.shape, low, high, stats)
        wanted = apply(plan.operator, plan.options, piece, placement.coefficient)
        scale = piece.instruct.abs() + wanted.abs() + sum(part.abs() for part in _terms(piece, plan))
    wanted, scale = wanted[start - low : stop - low], scale[start - low : stop - low]
    if not placement.dtype.startswith(("F", "BF")):
        return 0.0 if bool((stored.double() == wanted).all()) else float("inf")
    stochastic = 2.0 if plan.recipe.out_dtype == "bfloat16_stochastic" else 1.0
    # float32 arithmetic may err by some units of its largest term; a matrix operator by many more
    arithmetic = (2.0**-12 if placement.rank_two else 2.0**-20) * scale
    allowed = stochastic * _HALF_UNIT[placement.dtype] * wanted.abs() * 1.01 + arithmetic + _TINY[placement.dtype]
    return float(((stored.double() - wanted).abs() / allowed).max())


def _terms(piece: Piece, plan: Plan) -> list[torch.Tensor]:
    return [piece.base, piece.residue] if "base" in plan.operator.reads else [piece.coarse]
