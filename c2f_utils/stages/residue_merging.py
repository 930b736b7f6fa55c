"""06: how much residue, in which layers, by which operator? Every choice is made on validation problems; test
problems wait for 07.

One coefficient for all tensors is the default (`model/`). Everything richer is tried beside it, and the best of all
that was tried is kept as the control `best_recipe`, so that 07 can say on test problems whether the search was worth
it. With `merge.select: best_recipe` that best one is `model/`, and one coefficient the control.
"""

from c2f_utils import merge
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.runs.run import Run
from c2f_utils.stages import controls, variants
from c2f_utils.stages.bench import Bench
from c2f_utils.stages.inputs import keep_samples


def make(run: Run) -> dict:
    """Results of 06: the sweeps, the chosen recipe, the residue's anatomy; `model/` is the Fine Actor, `controls/`
    its controls."""
    here, settings = run.here, run.settings
    if here.loaded:
        return here.results()
    bench, operator, sections = Bench(run), {"name": settings.merge.operator}, settings.merge.sections
    for each in (operator, *settings.merge.other_operators):
        bench.recipe(each, 1.0)  # a mistyped operator is refused before the first sweep
    with here.timer("sweeps"):
        sweep = bench.sweep(operator)
        best = max(sweep, key=lambda row: row["score"])
        c = best["coefficient"]
        chosen = bench.recipe(operator, c)
        bench.compare_with(chosen)
        operators = [{"operator": variants.operator_text(operator), "spec": operator, **best}]
        found = {
            "layers": variants.parts(bench, operator, c) if "layers" in sections else [],
            "depths": variants.depths(bench, operator, c) if "depths" in sections else [],
            "operators": operators + variants.others(bench, settings.merge.other_operators),
        }
    with here.timer("averages and decode-time merging"):
        found["averages"] = variants.averages(run, bench, operator, c) if "averages" in sections else []
        found["proxies"] = variants.proxies(bench, c) if "proxies" in sections else []
    richest = _richest(bench, operator, c, best["score"], found)
    made = {"one_coefficient": chosen, "best_recipe": richest["recipe"]}
    fine = made.pop(settings.merge.select)
    with here.timer("merge"):
        report = merge.run_merge(merge.plan_merge(fine), here.path("model"))
        found["roundings"] = variants.roundings(run, bench, fine) if "roundings" in sections else []
    for name, recipe in made.items():
        controls.keep(run, bench, name, bench.merged(recipe))
    form = {"instruct": settings.models.instruct_form}
    parents = {
        name: bench.row(bench.inputs.answers(bench.loaded(bench.states[name]), bench.prompts, form=form.get(name)))
        for name in bench.states
    }
    here.save_results(
        {
            "chosen": {"operator": operator, "coefficient": c},
            "select": settings.merge.select,
            "score": bench.score_text,
            "parents": parents,
            "sweep": sweep,
            **found,
            "best_recipe": {
                "name": richest["name"],
                "score": richest["score"],
                "tried": richest["tried"],
                "recipe": _portable(richest["recipe"]),
            },
            "controls": dict(controls.make(run, bench, c)),
            "anatomy": merge.anatomy(*(bench.states[name] for name in ("base", "instruct", "coarse"))),
            "survival": report.survival,
        }
    )
    fine = loading.load_causal(here.dir / "model", settings.models)
    samples = bench.answers(fine)
    keep_samples(here, answers.rows(samples, "fine", "sampled_t1", bench.inputs.reward), settings)
    return here.results()


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


def _portable(recipe: merge.Recipe) -> dict:
    """A recipe without the folders of its models: results say the same wherever the run lies."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("base", "instruct", "coarse")}
