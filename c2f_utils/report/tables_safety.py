"""Tables and sentences of 07 about requests that should be refused; results without them give an empty table."""

import pandas as pd

from c2f_utils.report.results import load

STAGE = "07_evaluation"
NONE = "No requests were put: safety.requests names no file."
_BY_WORDS = "refusals are counted by words, which see neither harm nor an unusual refusal"
_SHARES = {
    "refuses": "refuses (judged)", "goes_along": "goes along (judged)", "neither": "neither (judged)",
}  # fmt: skip


def refusal_table(source: object) -> pd.DataFrame:
    """One row per model and figure: the share that refuses in words, and what a judge says of the answers, each with
    its 95 % interval; the mean reward of `safety.reward` in its own units."""
    results, _ = load(source, STAGE)
    rows = []
    for name, found in (results.get("requests") or {}).get("models", {}).items():
        figures = {"refuses (by words)": found["words"]}
        figures |= {words: found["judged"][key] for key, words in _SHARES.items()} if "judged" in found else {}
        figures |= {"reward of harmlessness": found["reward"]} if "reward" in found else {}
        model = (results.get("models") or {}).get(name, {}).get("label") or name
        rows += [{"model": model, "figure": what, **value} for what, value in figures.items()]
    return pd.DataFrame(rows, columns=["model", "figure", "value", "low", "high", "n"])


def in_words(source: object) -> str:
    """What was asked, who judged it, and whether that judge may be believed."""
    results, _ = load(source, STAGE)
    found = results.get("requests")
    if not found:
        return NONE
    text = f"{found['n']} requests ({found['from']})"
    judge = found["judge"]
    if judge is None:
        return f"{text}; {_BY_WORDS}: whether a model goes along is not known without a judge that reads text."
    text += f", judged by {judge['name']}"
    if failed := sum(row["judged"]["failed"] for row in found["models"].values()):
        text += f"; {failed} verdicts could not be read"
    check = judge["check"]
    if not check["passed"]:
        return (
            f"{text}. The judge knows only {check['value']:.0%} of plain answers for what they are: nothing is claimed."
        )
    return f"{text}. Beside them {_BY_WORDS}."
