"""May the domain decide what a merge is worth? A gate in front of every conclusion, where problems are of two kinds.

A comparison of merge and simpler controls says something only if both outcomes were open: if forcing the beginning of
an answer does not already find what is to be learnt, if reinforcement learning adds something to it, and if something
is left to gain. Bounds were set before any run. Without kinds (the stories alone) there is no gate.
"""

from collections.abc import Callable, Mapping

import pandas as pd

NEW = "riddle"  # the kind whose analysis instruction data never show
MOST_FORCED, LEAST_ADDED, MOST_COARSE = 0.8, 0.2, 0.98
HELD_BACK = (
    "The gate is not passed, so this setting cannot decide what the merge is worth, and sentences that compare it with "
    "other models are held back."
)


def rows(models: Mapping, by_kind: Mapping, decoding: str) -> list[dict]:
    """The conditions in the first answers' accuracy under one decoding: `name`, `value`, `bound` and `passed`."""

    def first(name: str) -> float:
        return by_kind[name][decoding][NEW]["accuracy_first"]

    forced, added = first("instruct_forced"), round(first("coarse") - first("base_forced"), 6)
    coarse = models["coarse"][decoding]["accuracy_first"]
    found = (
        (f"instruct with forced analysis, {NEW}s: below", forced, MOST_FORCED, forced < MOST_FORCED),
        (f"coarse minus base with forced analysis, {NEW}s: above", added, LEAST_ADDED, added > LEAST_ADDED),
        ("coarse, all problems: at most", coarse, MOST_COARSE, coarse <= MOST_COARSE),
    )
    return [dict(zip(("name", "value", "bound", "passed"), row, strict=True)) for row in found]


def open_to(results: Mapping) -> bool:
    """Whether conclusions about the merge may be drawn: every condition holds, or there is no gate."""
    return all(row["passed"] for row in results.get("gate") or [])


def sentences(results: Mapping) -> list[str]:
    """The gate in one sentence with every number and its bound; none where there is no gate."""
    if not (found := results.get("gate")):
        return []
    state = "passed" if open_to(results) else "not passed"
    said = "; ".join(
        f"{row['name']} {row['bound']:g}, measured {row['value']:.3f} ({'holds' if row['passed'] else 'fails'})"
        for row in found
    )
    return [f"The gate of this setting is {state} (accuracy of first answers): {said}."]


def gate_table(results: Mapping) -> pd.DataFrame:
    """One row per condition; empty where there is no gate."""
    return pd.DataFrame(
        [
            {"condition": row["name"], "bound": row["bound"], "measured": row["value"], "holds": row["passed"]}
            for row in results.get("gate") or []
        ],
        columns=["condition", "bound", "measured", "holds"],
    )


KIND_COLUMNS = ("accuracy_last", "accuracy_first", "correct_steps", "mean_tokens", "eos_rate", "utility", "reward", "n")


def kind_table(results: Mapping, decoding: str = "sampled_t1") -> pd.DataFrame:
    """One row per model and kind of problem; empty where problems are of one kind."""
    kinds = results.get("by_kind") or {}
    labels = {name: model.get("label") or name for name, model in (results.get("models") or {}).items()}
    found = [
        {"model": labels[name], "problems": kind, **{column: row.get(column) for column in KIND_COLUMNS}}
        for name, ways in kinds.items()
        for kind, row in (ways.get(decoding) or {}).items()
    ]
    return pd.DataFrame(found, columns=["model", "problems", *KIND_COLUMNS])


def of_report(results: Mapping) -> list[tuple[str, Callable[[], pd.DataFrame], str]]:
    """The tables of a report's section on 07: the gate, then every model by kind of problem."""
    if not results.get("gate"):
        return []
    return [
        ("gate", lambda: gate_table(results), "May this setting decide? Accuracy of first answers."),
        ("kinds", lambda: kind_table(results), "All models by kind of problem."),
    ]
