"""Part of 06, off by default (`merge.sections`): what coefficient would one choose without a checker?

Every merge of the sweep answers the validation prompts three times anew: the first two answers say how far it agrees
with itself and with the others, the third one judges what each rule has chosen, so that no rule is judged by answers
that it chose by. Reward and utility, by which the other two rules choose, are those of the sweep.
"""

from torch import nn

from c2f_utils.coarse.heads import Head
from c2f_utils.domain.problems import check
from c2f_utils.domain.samples import Sample
from c2f_utils.measure import answers, label_free, retention
from c2f_utils.stages.bench import Bench, portable
from c2f_utils.stages.retention_and_sampling import as_text, scored

DRAWS = 3  # answers to every prompt: two are compared, the last one judges


def compare(bench: Bench, operator: dict, sweep: list[dict]) -> dict:
    """`rows` by coefficient (what the rules choose by, and the metrics `judged`), and `rules` with their choices and
    regrets; null for what needs a checker where there is none."""
    price, checked = bench.settings.merge.token_price, bench.settings.embedded
    asked = [_asked(bench, operator, row["coefficient"]) for row in sweep]
    rows = [
        {key: measured[key] for key in ("coefficient", "reward", "mean_tokens")}
        | {"score": measured["score"] if checked else None, "agreement_majority": None, "agreement_draws": None}
        | {key: found[key] for key in ("perplexity", "prompt_perplexity", "judged")}
        for measured, found in zip(sweep, asked, strict=True)
    ]
    if checked:
        votes = [found["votes"] for found in asked]
        majorities = label_free.agreement_with_majority([first for first, _ in votes])
        for row, (first, second), majority in zip(rows, votes, majorities, strict=True):
            row |= {"agreement_majority": majority, "agreement_draws": label_free.agreement(first, second)}
    chosen = label_free.choices(rows, price)
    judged = [row["judged"] for row in rows] if checked else None
    rules = label_free.regrets([row["coefficient"] for row in rows], chosen, judged)
    return {"rows": rows, "rules": rules, "prompts": len(bench.prompts), "token_price": price}


def _asked(bench: Bench, operator: dict, coefficient: float) -> dict:
    recipe = bench.recipe(operator, coefficient)
    return bench.pieces(["label_free", portable(recipe)], lambda: _measured(bench, bench.merged(recipe)))


def _measured(bench: Bench, model: nn.Module) -> dict:
    """Stated results of the first two answers of a merge, perplexities, and the metrics of its third answer."""
    inputs, count = bench.inputs, len(bench.prompts)
    samples = inputs.sampled(model, bench.prompts * DRAWS, bench.settings.models.instruct_form)
    compared, last = samples[: 2 * count], samples[2 * count :]
    prompts = [as_text(sample.prompt.ids, 1) for sample in last if len(sample.prompt.ids) > 1]
    found = {"prompt_perplexity": _perplexity(bench, model, prompts), "votes": None, "judged": None}
    if bench.settings.embedded:
        stated = [check(sample.prompt.problem, sample.answer).last_answer for sample in compared]
        scores = bench.scores(last)
        found["votes"] = [stated[:count], stated[count:]]
        found["judged"] = answers.measure(last) | {"score": sum(scores) / count}
    instruct = bench.loaded(bench.states["instruct"].items())  # in the place of the merge
    return found | {"perplexity": _perplexity(bench, instruct, compared)}


def _perplexity(bench: Bench, model: nn.Module, texts: list[Sample]) -> float:
    return retention.perplexity(scored(bench.inputs, model, Head(model), texts)).value
