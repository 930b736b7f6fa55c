"""What a merge did: per tensor and per module family, above all how much of the wanted change survived output rounding.

No times are written, and paths only as the recipe gives them, so that equal merges give equal reports.
"""

import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils.errors import C2FError
from c2f_utils.files import outputs, read_json
from c2f_utils.merge import names
from c2f_utils.merge.kernels import Statistics, Threshold
from c2f_utils.merge.plan import Placement, Plan
from c2f_utils.merge.rounding import Tally
from c2f_utils.weights import is_hub

if TYPE_CHECKING:
    import pandas

REPORT = "merge_report.json"
SURVIVAL_WARNING = 0.9
_REMEDY = (
    "set out_dtype: float32 or bfloat16_stochastic, and give the coarse model in float32 or as a LoRA adapter; "
    "otherwise an evaluation measures little more than the instruct model"
)


@dataclass
class Report:
    """Result of a merge. `rows` per tensor, `survival` per family (None: no change wanted), `warnings` to be read.

    `verified` holds what `verify_and_record` found, if it was called. `seconds`, `bytes_read` and `bytes_written`
    describe this run only and are not stored.
    """

    out_dir: Path
    recipe: dict
    key: str
    fingerprint: str
    rows: list[dict]
    survival: dict[str, float | None]
    warnings: list[str]
    notes: list[str]
    formula: str
    inputs: dict[str, str]
    versions: dict[str, str]
    statistics: dict[str, dict]
    verified: dict[str, float] | None = None
    seconds: float = field(default=0.0, compare=False)
    bytes_read: int = field(default=0, compare=False)
    bytes_written: int = field(default=0, compare=False)
    resumed: bool = field(default=False, compare=False)

    def table(self) -> "pandas.DataFrame":
        """Give the rows as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows).astype({"layer": "Int64"})

    def to_dict(self) -> dict:
        transient = ("out_dir", "seconds", "bytes_read", "bytes_written", "resumed")
        return {key: value for key, value in self.__dict__.items() if key not in transient}

    def get_statistics(self, name: str) -> Statistics | None:
        """Give the statistics that the kernel saw for a tensor, or None when it needed none."""
        found = self.statistics.get(name) or self.statistics.get("*")
        return decode_statistics(found) if found else None


def load_report(folder: Path) -> Report:
    """Read the report of a finished merge; raises C2FError when the folder holds none."""
    path = Path(folder) / REPORT
    content = read_json(path)
    try:
        return Report(out_dir=Path(folder), **content)
    except TypeError:
        raise C2FError(f"{path} is not a merge report of this version; merge again") from None


def encode_statistics(stats: Statistics) -> dict:
    """Give JSON that keeps every bit: floats as hexadecimal text, because thresholds may be infinite."""
    return {
        "gram": [[value.hex() for value in row] for row in stats.gram],
        "thresholds": [[t.value.hex(), t.tie_cut, t.density] for t in stats.thresholds],
        "count": stats.count,
        "scales": [scale.hex() for scale in stats.scales],
    }


def decode_statistics(content: dict) -> Statistics:
    """Inverse of `encode_statistics`."""
    gram = tuple(tuple(float.fromhex(value) for value in row) for row in content["gram"])
    return Statistics(
        gram,
        tuple(Threshold(float.fromhex(v), cut, density) for v, cut, density in content["thresholds"]),
        content["count"],
        tuple(map(float.fromhex, content.get("scales", ()))),  # a merge made earlier has none
    )


def build_report(
    plan: Plan, out_dir: Path, tallies: dict[str, Tally], statistics: dict[str, dict], fingerprint: str
) -> Report:
    """Assemble rows, family survival and warnings from the tallies of all tensors."""
    rows, families = [], {}
    for placement in plan.placements:
        tally = tallies.get(placement.name, Tally())
        family = names.family_of(placement.name)
        families.setdefault(family, []).append(tuple(_scale(placement, tally) * value for value in tally.row))
        rows.append(_row(placement, tally, family, statistics))
    survival = {family: Tally.total(found).survival for family, found in families.items()}
    return Report(
        out_dir=out_dir,
        recipe=plan.recipe.to_dict(),
        key=plan.key,
        fingerprint=fingerprint,
        rows=rows,
        survival=survival,
        warnings=_warnings(plan, rows, survival),
        notes=list(plan.notes),
        formula=f"{plan.operator.formula} (ours: the paper's formula is not public)",
        inputs=dict(sorted(plan.stamps.items())),
        versions=_versions(),
        statistics=statistics,
    )


def _scale(placement: Placement, tally: Tally) -> float:
    """Large tensors are measured in part; sums over them are scaled up."""
    return placement.merged / tally.elements if tally.elements else 0.0


def _row(placement: Placement, tally: Tally, family: str, statistics: dict[str, dict]) -> dict:
    reads_base = "base" in placement.sources and tally.elements > 0
    stats = statistics.get(placement.name) or statistics.get("*")
    scale = _scale(placement, tally)
    thresholds = decode_statistics(stats).thresholds if stats and placement.merged else ()
    return {
        "tensor": placement.name,
        "layer": names.layer_of(placement.name),
        "module": names.module_of(placement.name),
        "family": family,
        "coefficient": placement.coefficient,
        "action": placement.action,
        "dtype": placement.dtype,
        "elements": placement.numel,
        "measured": tally.elements / placement.merged if placement.merged else None,
        "norm_instruct": (scale * tally.instruct) ** 0.5 if reads_base else None,
        "norm_coarse": (scale * tally.coarse) ** 0.5 if reads_base else None,
        "cosine": tally.cosine if reads_base else None,
        "norm_change": (scale * tally.wanted) ** 0.5,
        "changed": tally.changed / tally.elements if tally.elements else 0.0,
        "stored_changed": tally.stored_changed / tally.elements if tally.elements else 0.0,
        "survival": tally.survival,
        "rounding_error": (tally.error / tally.wanted) ** 0.5 if tally.wanted > 0 else None,
        "density": [threshold.density for threshold in thresholds if threshold.value >= 0] or None,
    }


def _warnings(plan: Plan, rows: list[dict], survival: dict[str, float | None]) -> list[str]:
    found = []
    low = {family: value for family, value in survival.items() if value is not None and value < SURVIVAL_WARNING}
    if low:
        worst = ", ".join(f"{family} {value:.2f}" for family, value in sorted(low.items(), key=lambda item: item[1]))
        found.append(f"output rounding swallowed part of the residue (share left: {worst}): {_REMEDY}")
    merged = [row for row in rows if "merge" in row["action"]]
    known = [row for row in merged if row["norm_coarse"] is not None]
    if known and all(row["norm_coarse"] == 0 for row in known):
        found.append(
            "every coarse residue is zero: the coarse model equals the base; check that coarse names the trained model"
        )
    elif merged and all(row["norm_change"] == 0 for row in merged):
        found.append("nothing was changed: every merged tensor equals the instruct model; check coefficient and coarse")
    twins = [
        row
        for row in known
        if row["norm_coarse"]
        and row["cosine"]
        and row["cosine"] > 1 - 1e-6
        and abs(row["norm_instruct"] / row["norm_coarse"] - 1) < 1e-6
    ]
    if known and len(twins) == len([row for row in known if row["norm_coarse"]]) > 0:
        found.append("coarse and instruct have the same residue: they look like the same model; check both paths")
    far = [row for row in known if row["norm_coarse"] and row["norm_instruct"] > 30 * row["norm_coarse"]]
    if len(far) > len(known) / 2:
        found.append(
            "instruct lies more than 30 times farther from base than coarse does: base may not be the "
            "ancestor of instruct"
        )
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in ("c2f-utils", "torch", "numpy", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _without_places(recipe: dict) -> dict:
    """The recipe with the last parts of its paths only: a card is for others, who have other folders."""
    coarse = recipe["coarse"]
    named = [{**item, "path": _name(item["path"])} for item in coarse] if not isinstance(coarse, str) else _name(coarse)
    return recipe | {"base": _name(recipe["base"]), "instruct": _name(recipe["instruct"]), "coarse": named}


def _name(source: str) -> str:
    """A hub id as it is; of a folder where it lies among the runs, else its own name."""
    if is_hub(source):
        return source
    place = Path(source).absolute()
    return str(place.relative_to(outputs())) if place.is_relative_to(outputs()) else place.name


def model_card(report: Report) -> str:
    """Write the README.md of the merged model from the report alone; nothing is looked up on a network."""
    recipe = _without_places(report.recipe)
    coarse = (
        recipe["coarse"] if isinstance(recipe["coarse"], str) else ", ".join(item["path"] for item in recipe["coarse"])
    )
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- merge",
        "---",
        "",
        "# Merged model",
        "",
        f"Fine Actor by knowledge residue merging: `{report.formula}`.",
        "",
        f"base `{recipe['base']}`, instruct `{recipe['instruct']}`, coarse `{coarse}`; r = coarse - base, "
        f"d_I = instruct - base.",
        "",
        "Recipe:",
        "",
        "```json",
        json.dumps(recipe, indent=1, ensure_ascii=False),
        "```",
        "",
        "| module family | share of the wanted change left after rounding |",
        "|---|---|",
        *(
            f"| {family} | {'no change wanted' if value is None else f'{value:.3f}'} |"
            for family, value in sorted(report.survival.items())
        ),
        "",
        *(f"Warning: {warning}" for warning in report.warnings),
        "",
        f"Tensors: {len(report.rows)}. Fingerprint of the weights: `{report.fingerprint}`. Details: `{REPORT}`.",
        "",
    ]
    return "\n".join(lines)
