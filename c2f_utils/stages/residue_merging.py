"""06: how much residue, in which layers, by which operator? Every choice is made on validation problems; test
problems wait for 07.

One coefficient for all tensors is the default (`model/`). Everything richer is tried beside it, and the best of all
that was tried is kept as the control `best_recipe`, so that 07 can say on test problems whether the search was worth
it. With `merge.select: best_recipe` that best one is `model/`, and one coefficient the control.
"""

from functools import cached_property

from c2f_utils import merge
from c2f_utils.domain.forms import Form
from c2f_utils.domain.samples import analysed_prompts
from c2f_utils.errors import C2FError
from c2f_utils.measure import answers
from c2f_utils.report.results import operator_name
from c2f_utils.runs.run import Run
from c2f_utils.stages import choice_without_labels, controls, own_parts, variants
from c2f_utils.stages.bench import Bench, portable, recipe_of
from c2f_utils.stages.inputs import Inputs, keep_samples, stopped_here

MATRICES = ("base", "instruct", "coarse")


class Merging:
    """Notebook 06 step by step: `sweep`, `choose`, `variants`, `merge`, `finish`, in this order.

    Of a stage done before every step gives what is on disk. `operator` may be one of your own, as `register_operator`
    returns it; the stage then remembers its source and refuses to mix two of them. Raises C2FError before the first
    sweep for an operator that cannot be used.
    """

    def __init__(self, run: Run, operator: merge.Operator | None = None):
        self.run, self.here, self.settings, self.inputs = run, run.here, run.settings, Inputs(run)
        own_parts.record(self.here, operator=operator and operator.kernel)
        own = operator and {"name": operator.name, **operator.options}
        self.operator: dict = own or {"name": self.settings.merge.operator}
        if self.here.loaded and self.results["chosen"]["operator"] != self.operator:
            made = self.results["chosen"]["operator"]["name"]
            raise C2FError(
                f"{self.here.name} in run {run.id!r} was made with operator {made!r}, not {self.operator['name']!r}; "
                "choose another run_id, or set overwrite=True (--overwrite)"
            )
        self.found: dict = dict(self.results) if self.here.loaded else {}
        for each in (self.operator, *self.settings.merge.other_operators):
            self.recipe(1.0, each)  # a mistyped operator is refused before the first sweep

    @property
    def results(self) -> dict:
        return self.here.results()

    @cached_property
    def bench(self) -> Bench:
        """The three models, loaded when first asked for, and the validation problems."""
        return Bench(self.inputs)

    def recipe(self, coefficient: float, operator: dict | None = None) -> merge.Recipe:
        """One coefficient for all tensors, on the run's own checkpoints."""
        return recipe_of(self.inputs, operator or self.operator, coefficient)

    def sweep(self) -> list[dict]:
        """Metrics and score of the operator at every coefficient of the grid."""
        if "sweep" not in self.found:
            grid = self.settings.merge.coefficients
            progress = self.bench.progress.counting(len(grid))
            with self.here.timer("sweep"), stopped_here(self.here), progress:
                self.found["sweep"] = self.bench.sweep(self.operator)
        return self.found["sweep"]

    def choose(self) -> dict:
        """The operator and the coefficient of the best score; every later variant is compared with this merge."""
        if "chosen" not in self.found:
            self._best = max(self.sweep(), key=lambda row: row["score"])
            self.found["chosen"] = {"operator": self.operator, "coefficient": self._best["coefficient"]}
            with self.here.timer("sweeps"), stopped_here(self.here):
                self.bench.compare_with(self.recipe(self._best["coefficient"]))
        return self.found["chosen"]

    def variants(self) -> dict:
        """Rows of everything richer than one coefficient, by kind; those that `merge.sections` leaves out are empty."""
        kinds = ("layers", "depths", "operators", "averages", "proxies")
        if "layers" not in self.found:
            bench, c = self.bench, self.choose()["coefficient"]
            with bench.progress.counting(variants.expected(bench)):
                self._try(bench, self.operator, c)
        return {kind: self.found[kind] for kind in kinds}

    def _try(self, bench: Bench, operator: dict, c: float) -> None:
        sections = self.settings.merge.sections
        with self.here.timer("sweeps"), stopped_here(self.here):
            mine = [{"operator": operator_name(operator), "spec": operator, **self._best}]
            self.found |= {
                "layers": variants.parts(bench, operator, c) if "layers" in sections else [],
                "depths": variants.depths(bench, operator, c) if "depths" in sections else [],
                "operators": mine + variants.others(bench, self.settings.merge.other_operators),
            }
        with self.here.timer("averages and decode-time merging"), stopped_here(self.here):
            self.found["averages"] = variants.averages(self.run, bench, operator, c) if "averages" in sections else []
            self.found["proxies"] = variants.proxies(bench, c) if "proxies" in sections else []

    def merge(self) -> dict[str, float]:
        """Write the Fine Actor to `model/`, what was not selected to `controls/`, and the rounding comparison.

        Returns the share of the wanted change that is left after rounding to the output dtype, per module family.
        """
        if "survival" not in self.found:
            bench, c = self.bench, self.choose()["coefficient"]
            self.variants()
            self._richest = _richest(bench, self.operator, c, self._best["score"], self.found)
            made = {"one_coefficient": self.recipe(c), "best_recipe": self._richest["recipe"]}
            fine = made.pop(self.settings.merge.select)
            with self.here.timer("merge"), stopped_here(self.here):
                self.found["survival"] = merge.run_merge(merge.plan_merge(fine), self.here.path("model")).survival
                wanted = "roundings" in self.settings.merge.sections
                with bench.progress.counting(len(variants.DTYPES)):
                    self.found["roundings"] = variants.roundings(self.run, bench, fine) if wanted else []
            for name, recipe in made.items():
                controls.keep(self.run, bench, name, bench.merged(recipe))
        return self.found["survival"]

    def label_free(self) -> dict | None:
        """What every rule without labels would choose, and its regret; None unless `merge.sections` names it."""
        if "label_free" in self.settings.merge.sections and "label_free" not in self.found:
            with self.here.timer("label-free choice"), stopped_here(self.here):
                self.found["label_free"] = choice_without_labels.compare(self.bench, self.operator, self.sweep())
        return self.found.get("label_free")

    def finish(self) -> dict:
        """Make the other controls, and keep results and samples; returns the results."""
        if "controls" in self.found:
            return self.results
        self.merge()
        unlabelled = self.label_free()
        bench, c = self.bench, self.choose()["coefficient"]
        form = {"instruct": self.settings.models.instruct_form}
        with stopped_here(self.here), bench.progress.counting(controls.expected(self.settings.merge)):
            parents = {name: self._parent(name, form.get(name)) for name in bench.states}
            forced = self._forced(form) if any("by_kind" in row for row in parents.values()) else {}
            self.found["controls"] = dict(controls.make(self.run, bench, c))
        self.here.save_results(
            {
                "chosen": self.found["chosen"],
                "select": self.settings.merge.select,
                "score": bench.score_text,
                "parents": parents,
                **({"forced": forced} if forced else {}),
                "sweep": self.found["sweep"],
                **self.variants(),
                "roundings": self.found["roundings"],
                "best_recipe": {
                    "name": self._richest["name"],
                    "score": self._richest["score"],
                    "tried": self._richest["tried"],
                    "recipe": portable(self._richest["recipe"]),
                },
                "controls": self.found["controls"],
                "anatomy": merge.anatomy(*(bench.states[name] for name in MATRICES)),
                "survival": self.found["survival"],
                **({"label_free": unlabelled} if unlabelled else {}),
            }
        )
        samples = bench.answers(bench.written(self.here.dir / "model"))
        keep_samples(self.here, answers.rows(samples, "fine", "sampled_t1", bench.inputs.reward), self.settings)
        return self.results

    def _parent(self, name: str, form: Form | None, forced: bool = False) -> dict:
        bench = self.bench

        def row() -> dict:
            prompts = analysed_prompts([p.problem for p in bench.prompts]) if forced else bench.prompts
            return bench.row(bench.inputs.answers(bench.loaded(bench.states[name].items()), prompts, form=form))

        return bench.kept(["parent", name, *(["forced"] if forced else [])], row)

    def _forced(self, form: dict[str, Form]) -> dict[str, dict]:
        """Base and instruct with the beginning of an analysis forced: what tuning changed, apart from the will to use
        it."""
        return {name: self._parent(name, form.get(name), forced=True) for name in ("base", "instruct")}


def _richest(bench: Bench, operator: dict, c: float, score: float, found: dict) -> dict:
    """The recipe with the best validation score of everything that was tried as a recipe."""
    tried = [{"name": "one coefficient", "score": score, "recipe": bench.recipe(operator, c)}]
    for row in found["layers"]:
        tried.append(
            {"name": row["name"], "score": row["score"], "recipe": bench.recipe(operator, c, rules=row["rules"])}
        )
    for row in found["depths"]:
        tried.append(
            {"name": row["name"], "score": row["score"], "recipe": bench.recipe(operator, c, knots=row["knots"])}
        )
    for row in found["operators"][1:]:
        tried.append(
            {"name": row["operator"], "score": row["score"], "recipe": bench.recipe(row["spec"], row["coefficient"])}
        )
    return max(tried, key=lambda item: item["score"]) | {
        "tried": len(tried) + len(bench.settings.merge.coefficients) - 1
    }
