"""Tables of 06 on choosing the coefficient without labels, of one run and over seeds.

Over seeds: `c2f sweep 06 --seeds 8 --overrides FILE --name choice`, with `merge.sections: [label_free]` in that file,
then `regret_over_seeds("choice")`.
"""

from collections.abc import Sequence

import pandas as pd

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.files import outputs
from c2f_utils.report import sweep_results
from c2f_utils.report.results import load

STAGE = "06_residue_merging"
OFF = "Choosing without labels is off: add label_free to merge.sections."
RULES = {
    "agreement_majority": "agreement with the majority against perplexity under instruct",
    "agreement_draws": "agreement of two answers against perplexity under instruct",
    "dots": "agreement of two answers against perplexity of prompts (after DoTS)",
    "reward": "reward minus the price of tokens",
    "checker": "checker minus the price of tokens",
    "blind": "any of the grid",
}
_REGRETS = ("regret_utility", "regret_score")
_QUANTITIES = ("agreement_majority", "agreement_draws", "perplexity", "prompt_perplexity", "reward", "mean_tokens")


def label_free_table(source: object) -> pd.DataFrame:
    """What each rule of stage 06 chooses, whether that is the checker's choice, and its regret in utility and in
    utility minus the price of tokens."""
    results, _ = load(source, STAGE)
    rows = [{**row, "rule": RULES[row["rule"]]} for row in (results.get("label_free") or {}).get("rules", [])]
    return pd.DataFrame(rows, columns=["rule", "coefficient", "same", *_REGRETS])


def quantities_table(source: object) -> pd.DataFrame:
    """What the rules of stage 06 choose by, per coefficient, and the utility of the answers that judge them."""
    results, _ = load(source, STAGE)
    rows = [
        {**row, "utility": (row["judged"] or {}).get("utility")}
        for row in (results.get("label_free") or {}).get("rows", [])
    ]
    return pd.DataFrame(rows, columns=["coefficient", *_QUANTITIES, "utility"])


def in_words(source: object) -> str:
    """What was asked, or that nothing was."""
    results, _ = load(source, STAGE)
    found = results.get("label_free")
    if not found:
        return OFF
    text = f"{found['prompts']} validation prompts, {found['token_price']:g} per token"
    if found["rows"][0]["judged"] is None:
        return f"{text}; without a checker no answer can be compared and no regret is known."
    return f"{text}; regret: how much better the checker's choice is on new answers to the same prompts."


def regret_over_seeds(sources: Sequence[object] | str) -> pd.DataFrame:
    """Per rule over several runs of 06: the share in which it chose as the checker did, and its mean regrets, each
    regret with its 95 % t-interval over runs (`_low` and `_high`; missing for a single run).

    `sources` are results of 06, their folders, those of their runs, or the name of a sweep. Raises C2FError for runs
    without this part, or without a checker.
    """
    if isinstance(sources, str):
        sources = [outputs() / run["run"] for run in sweep_results.read(sources)["runs"] if run["point"] is not None]
    each = [{row["rule"]: row for row in _rules(number, source)} for number, source in enumerate(sources, start=1)]
    if not each:
        raise C2FError("regret over no runs; name at least one")
    rows = []
    for rule, words in RULES.items():
        mine = [found[rule] for found in each if found[rule]["same"] is not None]
        if not mine:
            continue
        row = {"rule": words, "seeds": len(mine), "same": sum(one["same"] for one in mine) / len(mine)}
        for name in _REGRETS:
            found = stats.seed_interval([one[name] for one in mine])
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    bounds = [column for name in _REGRETS for column in (name, f"{name}_low", f"{name}_high")]
    return pd.DataFrame(rows, columns=["rule", "seeds", "same", *bounds])


def _rules(number: int, source: object) -> list[dict]:
    results, place = load(source, STAGE)
    rules = (results.get("label_free") or {}).get("rules")
    name = place or f"run {number}"
    if not rules:
        raise C2FError(f"{name}: nothing was chosen without labels; run 06 again with label_free in merge.sections")
    if all(row["same"] is None for row in rules):
        raise C2FError(f"{name}: regret needs a checker, which only the embedded domain has (data.source 'embedded')")
    return rules
