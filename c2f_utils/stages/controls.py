"""Controls of notebook 06: what the merge must beat, each made with the same care.

A control gets the same grid of coefficients and the same score, or the coefficient chosen for the method where only
that compares like with like; its note says which.
"""

from collections.abc import Iterator

from torch import nn

from c2f_utils import merge
from c2f_utils.errors import Stopped
from c2f_utils.models import loading
from c2f_utils.notebook.interrupt import stopping
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Merge
from c2f_utils.settings.laws import make_law
from c2f_utils.stages import coarse_rlhf
from c2f_utils.stages.bench import Bench


def expected(settings: Merge) -> int:
    """How many merges are measured for the controls that are asked for, and beside them."""
    swept = {"interpolation", "fixed_long_residue"}.intersection(settings.controls)
    return 3 + len(swept) * len(settings.coefficients)  # its three parents first


def make(run: Run, bench: Bench, coefficient: float) -> Iterator[tuple[str, dict]]:
    """Make and save the control models to `controls/<name>/`; yields each name and how it was made."""
    wanted = run.settings.merge.controls
    makers = {
        "interpolation": _interpolation,
        "coarse_interpolation": _coarse_interpolation,
        "random_residue": _random,
        "fixed_long_residue": _fixed_long,
        "ppo_instruct": _ppo,
    }
    for name in wanted:
        model, note = makers[name](run, bench, coefficient)
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


def _ppo(run: Run, bench: Bench, coefficient: float) -> tuple[nn.Module, dict]:
    bench.make_room()  # for actor, critic and reward model
    process = coarse_rlhf.trainer(
        bench.inputs,
        make_law(run.settings.coarse.law),
        run.here.path("checkpoints", "ppo_instruct"),
        start=bench.inputs.instruct(),
        evaluated=False,
    )
    coarse_rlhf.restore_rows(run, process, control="ppo_instruct")
    progress = Progress("RLHF from the instruction model", "iteration")
    with run.here.timer("ppo_instruct"), stopping(run.here):
        for row in process:
            run.here.log({"control": "ppo_instruct", **row})
            progress(process.iteration, process.config.iterations)
    if process.iteration < process.config.iterations:
        reached = f"iteration {process.iteration} of {process.config.iterations}"
        raise Stopped(f"RLHF from instruct: stopped after {reached}; run again to continue")
    note = "the same RLHF started from the instruction model, which is also its reference"
    return process.policy.actor, {"rollout_tokens": process.rollout_tokens, "note": note}
