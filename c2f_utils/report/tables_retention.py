"""Tables of the parts of 07 that ask what is kept, what can be found, and how redundant answers are at equal length.

A run without them gives empty tables.
"""

from collections.abc import Callable

import pandas as pd

from c2f_utils import stats
from c2f_utils.report.results import load
from c2f_utils.report.tables import wide

STAGE = "07_evaluation"
REDUNDANCY = (
    "tokens", "rep2", "rep3", "rep4", "distinct1", "diversity", "gzip_ratio", "near_duplicates", "loop_tail",
    "sentence_bleu", "self_bleu", "new_content",
)  # fmt: skip
_BOUNDS = ("low", "high")


def retention_table(source: object) -> pd.DataFrame:
    """One row per model and figure of stage 07: perplexity by kind of document, its ratio to instruct's, and forward KL
    from instruct (nats per token), each with its interval over documents."""
    results, _ = load(source, STAGE)
    kept, rows = results.get("retention") or {}, []
    names = {kind: found["label"] for kind, found in kept.get("kinds", {}).items()}
    for name, found in kept.get("models", {}).items():
        figures = {f"perplexity, {names[kind]}": value for kind, value in found["perplexity"].items()}
        figures |= {f"ratio to instruct, {names[kind]}": value for kind, value in found["ratio"].items()}
        figures |= {"forward KL from instruct": found["forward_kl"]} if "forward_kl" in found else {}
        rows += [{"model": label(results, name), "figure": what, **value} for what, value in figures.items()]
    return pd.DataFrame(rows, columns=["model", "figure", "value", *_BOUNDS, "n"])


def sampling_table(source: object) -> pd.DataFrame:
    """pass@k and majority votes of stage 07 by model and k, each with its interval over problems."""
    results, _ = load(source, STAGE)
    rows = [
        {"model": label(results, name), "k": row["k"], "figure": words, **row[what]}
        for name, found in (results.get("sampling") or {}).get("models", {}).items()
        for row in found["rows"]
        for what, words in FOUND.items()
    ]
    return pd.DataFrame(rows, columns=["model", "k", "figure", "value", *_BOUNDS, "n"])


FOUND = {"answer": "pass@k", "worked": "pass@k, every step right", "majority": "majority of k"}


def sampling_differences(source: object) -> pd.DataFrame:
    """Paired differences of pass@k over problems, a minus b, of stage 07, and the smallest that so many would show."""
    results, _ = load(source, STAGE)
    rows = [
        {**row, "a": label(results, row["a"]), "b": label(results, row["b"]), "measure": FOUND[row["measure"]]}
        | {"detectable": stats.detectable_within(row["low"], row["high"])}
        for row in (results.get("sampling") or {}).get("paired", [])
    ]
    return pd.DataFrame(rows, columns=["a", "b", "measure", "k", "difference", *_BOUNDS, "p", "detectable", "n"])


def redundancy_table(source: object) -> pd.DataFrame:
    """Every measure of redundancy at every prefix and of whole answers, per model of stage 07; n: answers long
    enough."""
    results, _ = load(source, STAGE)
    rows = [
        {**row, "model": label(results, name), "prefix": "whole" if row["prefix"] is None else str(row["prefix"])}
        for name, found in (results.get("redundancy") or {}).items()
        for row in found
    ]
    return pd.DataFrame(rows, columns=["model", "prefix", "n", *REDUNDANCY])


def label(results: dict, name: str) -> str:
    """What tables and figures call a model of 07."""
    return (results.get("models") or {}).get(name, {}).get("label") or name


def of_report(results: dict) -> list[tuple[str, Callable[[], pd.DataFrame], str]]:
    """Key, making and caption of these tables, of which the report leaves out empty ones."""
    return [
        ("retention", lambda: retention_table(results), "Perplexity by kind of document, and forward KL (nats)."),
        ("retained", lambda: wide(retention_table(results), ["model"], "figure"), "What is kept, model by model."),
        ("pass_at_k", lambda: sampling_table(results), "pass@k and majority votes, 95 % intervals over problems."),
        ("found", lambda: wide(sampling_table(results), ["model", "k"], "figure"), "pass@k and votes, k by k."),
        ("pass_differences", lambda: sampling_differences(results), "Paired differences of pass@k (a minus b)."),
        ("redundancy", lambda: redundancy_table(results), "Redundancy at fixed prefixes and of whole answers."),
    ]
