"""06: how much residue, in which layers, by which operator? Every choice is made on validation problems; test problems wait for 07.

Sweeps merge in memory with the kernels of the streaming merger; the chosen recipe is then merged from disk. Each control gets the
same grid of coefficients, or the chosen coefficient where only that is a fair comparison, and says which.
"""

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from c2f_utils import evaluate, limits, merge, models
from c2f_utils.merge.names import layer_count
from c2f_utils.runs import Run
from c2f_utils.workflow import coarse
from c2f_utils.workflow.inputs import Inputs, keep_samples

States = dict[str, dict[str, Tensor]]


def score_of(metrics: dict, price: float) -> float:
    """Length-aware score: utility (reward where no checker exists) minus `price` per token."""
    quality = metrics["utility"] if metrics["utility"] is not None else metrics["reward"]
    return round(quality - price * metrics["mean_tokens"], 6)


class Bench:
    """Merges in memory and measures on validation problems; one model object is reused for all of them."""

    def __init__(self, run: Run):
        self.inputs = Inputs(run)
        self.settings = run.settings
        self.prompts = self.inputs.prompts("validation")
        self.model = self.inputs.instruct()
        self.states: States = {
            "base": _state(self.inputs.base()), "instruct": _state(self.model), "coarse": _state(self.inputs.coarse()),
        }  # fmt: skip
        self.states["instruct"] = {name: value.clone() for name, value in self.states["instruct"].items()}

    def recipe(self, operator: dict, coefficient: float, rules: list[dict] | None = None) -> merge.Recipe:
        """The recipe of a sweep point, on the run's own checkpoints."""
        return merge.Recipe(
            base=self.inputs.base_source, instruct=self.inputs.instruct_source, coarse=self.inputs.coarse_source, operator=operator,
            coefficient={"default": float(coefficient), "rules": rules or []}, out_dtype=self.settings.merge.out_dtype, seed=self.settings.seed,
        )  # fmt: skip

    def merged(self, recipe: merge.Recipe, coarse_state: dict[str, Tensor] | None = None) -> nn.Module:
        """The bench's model with merged weights; valid until the next call."""
        state = merge.merge_state_dicts(recipe, self.states["base"], self.states["instruct"], coarse_state or self.states["coarse"])
        self.model.load_state_dict(state, strict=False)
        return self.model

    def measure(self, recipe: merge.Recipe, coarse_state: dict[str, Tensor] | None = None) -> dict:
        metrics = self.inputs.measured(self.merged(recipe, coarse_state), self.prompts)
        return metrics | {"score": score_of(metrics, self.settings.merge.token_price)}

    def sweep(self, operator: dict, coarse_state: dict[str, Tensor] | None = None) -> list[dict]:
        """Metrics and score for every coefficient of the grid."""
        return [
            {"coefficient": c, **self.measure(self.recipe(operator, c), coarse_state)} for c in self.settings.merge.coefficients
        ]


def make(run: Run) -> dict:
    """Results of 06: the sweeps, the chosen recipe, the residue's anatomy; `model/` is the Fine Actor, `controls/` its controls."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    bench = Bench(run)
    operator = {"name": settings.merge.operator}
    for each in (operator, *settings.merge.other_operators):
        bench.recipe(each, 1.0)  # a mistyped operator is refused before the first sweep
    with here.timer("sweeps"):
        sweep = bench.sweep(operator)
        best = max(sweep, key=lambda row: row["score"])["coefficient"]
        layers = [
            {"name": name, "rules": rules, **bench.measure(bench.recipe(operator, best, rules))}
            for name, rules in _parts(layer_count(bench.states["instruct"]))
        ]
        operators = [{"operator": _text(operator), "coefficient": best, **_row(sweep, best)}]
        for other in settings.merge.other_operators:
            row = max(bench.sweep(other), key=lambda row: row["score"])
            operators.append({"operator": _text(other), **row})
    with here.timer("merge"):
        report = merge.run_merge(merge.plan_merge(bench.recipe(operator, best)), here.path("model"))
    controls = {name: note for name, note in _controls(run, bench, best)}
    here.save_results({
        "chosen": {"operator": operator, "coefficient": best},
        "score": f"{'utility' if settings.embedded else 'reward'} - {settings.merge.token_price:g} x mean tokens, validation problems, T=1",
        "parents": {name: bench.inputs.measured(_load(bench, name), bench.prompts) for name in ("base", "instruct", "coarse")},
        "sweep": sweep, "layers": layers, "operators": operators, "controls": controls,
        "anatomy": merge.anatomy(bench.states["base"], bench.states["instruct"], bench.states["coarse"]),
        "survival": report.survival,
    })  # fmt: skip
    fine = models.load_causal(here.dir / "model", settings.models)
    samples = bench.inputs.answers(fine, bench.prompts)
    keep_samples(here, evaluate.rows(samples, "fine", "sampled_t1", bench.inputs.reward), settings)
    return here.results()


def _controls(run: Run, bench: Bench, best: float) -> Iterator[tuple[str, dict]]:
    """Make and save the control models; yields name and how each was made."""
    settings, wanted = run.settings, run.settings.merge.controls
    if "interpolation" in wanted:
        sweep = bench.sweep({"name": "lerp"}, bench.states["base"])
        chosen = max(sweep, key=lambda row: row["score"])["coefficient"]
        _keep(run, bench, "interpolation", bench.merged(bench.recipe({"name": "lerp"}, chosen), bench.states["base"]))
        yield "interpolation", {"coefficient": chosen, "sweep": sweep, "note": "instruct + c (base - instruct), c chosen on the same grid by the same score"}
    if "random_residue" in wanted:
        state = merge.random_residue(bench.states["base"], bench.states["coarse"], settings.seed)
        _keep(run, bench, "random_residue", bench.merged(bench.recipe({"name": "residue"}, best), state))
        yield "random_residue", {"coefficient": best, "note": "Gaussian residue of equal norm per tensor, the chosen coefficient"}
    if "fixed_long_residue" in wanted:
        folder = run.parent("04_length_schedules").dir / "model"
        state = _state(models.load_actor(folder, settings.models))
        _keep(run, bench, "fixed_long_residue", bench.merged(bench.recipe({"name": "residue"}, best), state))
        yield "fixed_long_residue", {"coefficient": best, "note": "residue of the actor trained under the fixed long limit, the chosen coefficient"}
    if "ppo_instruct" in wanted:
        process = coarse.trainer(
            bench.inputs, limits.make_law(settings.coarse.law), run.here.path("checkpoints", "ppo_instruct"),
            start=bench.inputs.instruct(), evaluated=False,
        )  # fmt: skip
        coarse.restore_rows(run, process, control="ppo_instruct")
        with run.here.timer("ppo_instruct"):
            for row in process:
                run.here.log({"control": "ppo_instruct", **row})
        _keep(run, bench, "ppo_instruct", process.policy.actor)
        yield "ppo_instruct", {"rollout_tokens": process.rollout_tokens, "note": "the same RLHF started from the instruction model, reference = instruct"}


def _keep(run: Run, bench: Bench, name: str, model: nn.Module) -> None:
    models.save_model(model, bench.inputs.tokenizer, run.here.path("controls", name))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


def _load(bench: Bench, name: str) -> nn.Module:
    bench.model.load_state_dict(bench.states[name], strict=False)
    return bench.model


def _row(sweep: list[dict], coefficient: float) -> dict:
    return next({k: v for k, v in row.items() if k != "coefficient"} for row in sweep if row["coefficient"] == coefficient)


def _text(operator: dict) -> str:
    options = ", ".join(f"{key} {value:g}" for key, value in operator.items() if key not in ("name", "seed") and isinstance(value, int | float))
    return f"{operator['name']} ({options})" if options else operator["name"]


def _parts(layers: int) -> list[tuple[str, list[dict]]]:
    """The residue kept in one part of the network only, or everywhere but there; deep networks are cut into four blocks of layers."""
    blocks = [(i * layers // min(4, layers), (i + 1) * layers // min(4, layers)) for i in range(min(4, layers))]
    inside = {}
    for low, high in blocks:
        numbers = "|".join(str(n) for n in range(low, high))
        inside[f"layer {low}" if high == low + 1 else f"layers {low}-{high - 1}"] = rf"\.layers\.({numbers})\."
    inside |= {"attention": r"self_attn\.", "mlp": r"\.mlp\.", "embedding, head, norms": r"embed_tokens|lm_head|norm"}
    only = [(f"only {name}", [{"match": f"^(?!.*({pattern}))", "set": 0.0}]) for name, pattern in inside.items()]
    without = [(f"without {name}", [{"match": pattern, "set": 0.0}]) for name, pattern in inside.items()]
    return only + without
