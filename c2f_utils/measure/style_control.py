"""Ratings of models at equal style: Bradley-Terry with the length and the markup of answers beside the models.

After Arena-Hard's style control (Li et al. 2024, arXiv 2406.11939), with two differences: questions are resampled, not
verdicts, since verdicts on one question are no independent evidence; and every model keeps its column whatever the
style columns are.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.measure import verdict_pairs
from c2f_utils.measure.regression import FREE, logistic, sigmoid

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
MARKUP = {
    "headers": re.compile(r"^ {0,3}#{1,6}\s", re.MULTILINE),
    "lists": re.compile(r"^\s*(?:[-*+]|\d+[.)])\s", re.MULTILINE),
    "bold": re.compile(r"\*\*(?=\S)[^\n]+?\*\*|__(?=\S)[^\n]+?__"),
}


def markup(text: str) -> dict[str, int]:
    """How many headers, list items and bold passages an answer in Markdown has, code blocks left out."""
    prose = _CODE.sub("", text)
    return {name: len(pattern.findall(prose)) for name, pattern in MARKUP.items()}


def style_controlled(
    rows: Sequence[Mapping],
    reference: str,
    texts: Mapping[tuple[str, str, int], str] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> list[dict]:
    """Per judge, every model's chance against `reference`, as judged and at equal style.

    Rows {"judge", "questions", "models": [{"model", "raw", "controlled"}], "style": {feature: interval}}; chances and
    coefficients are {"value", "low", "high"} with intervals over questions. Style is the relative difference of lengths
    (a - b) / (a + b) and, where `texts` holds every answer under (model, question id as text, turn), of the numbers of
    headers, list items and bold passages per token, (a - b) / (a + b + 1). A coefficient is in logits per standard
    size of its difference. Raises C2FError where the reference was never compared or a text is missing.
    """
    found = []
    for judge, table in verdict_pairs.pairs(rows).groupby("judge", sort=False):
        verdict_pairs.against(table, reference)  # refuses one that was never compared
        judged = table.dropna(subset="p")
        if judged.empty:
            continue
        models = sorted({*judged["model_a"], *judged["model_b"]} - {reference})
        style = _style(judged, texts)
        raw = fit(judged, models, {}, resamples, seed)
        held = fit(judged, models, style, resamples, seed)
        found.append({
            "judge": judge, "questions": judged["question"].nunique(),
            "models": [
                {"model": name, "raw": chance(before), "controlled": chance(after)}
                for name, before, after in zip(models, raw, held, strict=False)
            ],
            "style": {name: interval.bounds() for name, interval in zip(style, held[len(models):], strict=True)},
        })  # fmt: skip
    return found


def fit(
    judged: pd.DataFrame, models: Sequence[str], features: Mapping[str, np.ndarray], resamples: int, seed: int
) -> list[stats.Interval]:
    """Bradley-Terry ratings of `models` (logits; a name that is not among them has 0) and coefficients of `features`.

    One column per model, +1 where it is model a and -1 where it is model b. Features, one value per pair, must change
    sign with the order of the two models.
    """
    columns = [(judged["model_a"] == name).to_numpy(float) - (judged["model_b"] == name) for name in models]
    design = np.column_stack([*columns, *features.values()])
    labels, size = judged["p"].to_numpy(), design.shape[1]
    none, free = np.zeros(size), np.full(size, FREE)
    return stats.clustered_bootstrap(
        lambda weights: logistic(design, labels, weights, none, free), judged["question"], resamples, seed
    )


def chance(rating: stats.Interval) -> dict:
    """A rating in logits as the chance against the reference."""
    return {name: float(sigmoid(np.array(value))) for name, value in rating.bounds().items()}


def _style(judged: pd.DataFrame, texts: Mapping | None) -> dict[str, np.ndarray]:
    a, b = judged["tokens_a"].to_numpy(), judged["tokens_b"].to_numpy()
    found = {"length": (a - b) / np.maximum(a + b, 1)}
    if texts is not None:
        counts = [_counts(judged, side, texts) for side in ("a", "b")]
        for name in MARKUP:
            dense = [c[name] / np.maximum(tokens, 1) for c, tokens in zip(counts, (a, b), strict=True)]
            found[name] = (dense[0] - dense[1]) / (dense[0] + dense[1] + 1)
    # Scaled but not centred: which model is a is a matter of the alphabet, and swapping the two must change nothing.
    return {name: values / (np.sqrt((values**2).mean()) or 1) for name, values in found.items()}


def _counts(judged: pd.DataFrame, side: str, texts: Mapping) -> pd.DataFrame:
    keys = list(judged[[f"model_{side}", "question", "turn"]].itertuples(index=False, name=None))
    missing = [key for key in keys if key not in texts]
    if missing:
        raise C2FError(
            f"{len(missing)} judged answers have no text, such as {missing[0]}; expected all of them or none"
        )
    return pd.DataFrame([markup(texts[key]) for key in keys])
