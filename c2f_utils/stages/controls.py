"""Controls of notebook 06: what the merge must beat, each made with the same care. Those that train are in `rivals`.

A control gets the same grid of coefficients and the same score, or the coefficient chosen for the method where only
that compares like with like; its note says which.
"""

from collections.abc import Iterator

from torch import nn

from c2f_utils import merge
from c2f_utils.models import loading
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Merge
from c2f_utils.stages import rivals
from c2f_utils.stages.bench import Bench


def expected(settings: Merge) -> int:
    """How many merges are measured for the controls that are asked for, and beside them."""
    swept = {"interpolation", "coarse_interpolation", "fixed_long_residue", "distilled_merge"} & {*settings.controls}
    return 3 + len(swept) * len(settings.coefficients)  # its three parents first


def make(run: Run, bench: Bench, coefficient: float) -> Iterator[tuple[str, dict]]:
    """Make and save the control models to `controls/<name>/`; yields each name and how it was made."""
    merges = {
        "interpolation": _interpolation,
        "coarse_interpolation": _coarse_interpolation,
        "random_residue": _random,
        "fixed_long_residue": _fixed_long,
    }
    for name in run.settings.merge.controls:
        if name in rivals.MAKERS:
            model, note = rivals.MAKERS[name](run, bench)
        else:
            with run.here.timer(name):
                model, note = merges[name](run, bench, coefficient)
        keep(run, bench, name, model)
        del model  # before the next one is made
        yield name, note


def keep(run: Run, bench: Bench, name: str, model: nn.Module) -> None:
    loading.save_model(model, bench.inputs.tokenizer, run.here.path("controls", name))


def _interpolation(run: Run, bench: Bench, coefficient: float) -> tuple[nn.Module, dict]:
    return _swept(bench, "lerp", "instruct + c (base - instruct)", bench.states["base"], "base")


def _coarse_interpolation(run: Run, bench: Bench, coefficient: float) -> tuple[nn.Module, dict]:
    return _swept(bench, "lerp", "instruct + c (coarse - instruct)")


def _swept(
    bench: Bench, operator: str, formula: str, state: merge.StateDict | None = None, of: str = "coarse"
) -> tuple[nn.Module, dict]:
    spec = {"name": operator}
    sweep = bench.sweep(spec, state, of)
    chosen = max(sweep, key=lambda row: row["score"])["coefficient"]
    note = f"{formula}, c chosen on the same grid by the same score"
    return bench.merged(bench.recipe(spec, chosen), state), {"coefficient": chosen, "sweep": sweep, "note": note}


def _random(run: Run, bench: Bench, coefficient: float) -> tuple[nn.Module, dict]:
    state = merge.random_residue(bench.states["base"], bench.states["coarse"], run.settings.seed)
    note = "Gaussian residue of equal norm per tensor, the chosen coefficient"
    return bench.merged(bench.recipe({"name": "residue"}, coefficient), state), {
        "coefficient": coefficient,
        "note": note,
    }


def _fixed_long(run: Run, bench: Bench, coefficient: float) -> tuple[nn.Module, dict]:
    state = bench.actor(run.parent("04_length_schedules").model(f"models/fixed_long-s{run.settings.seed}"))
    return _swept(bench, "residue", "residue of the actor trained under the fixed long limit", state, "fixed_long")
