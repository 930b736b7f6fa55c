"""Tables of 07's tasks: every model's score with its interval, raw and in the chat template, and Fine against each."""

from collections.abc import Callable

import pandas as pd

from c2f_utils import stats
from c2f_utils.domain.forms import IN_WORDS
from c2f_utils.report.results import load
from c2f_utils.report.words import difference_words, outcome

NO_TASKS = "No task was asked: this run has none (see `tasks.suites`), or was evaluated before there were any."
SUITES = {
    "embedded": "embedded: the project's own generated problems",
    "local": "local: files of this machine",
    "general_11": "general_11: our list (the ten tasks of OLMES, and GSM8K); the paper's eleven are not known to us",
    "lm-eval": "lm-eval's own tasks by name",
}
_SCORE = ("score", "low", "high")
_COLUMNS = ["task", "metric", "shots", "n", "chance", "model"]


def task_table(source: object) -> pd.DataFrame:
    """One row per task and model of stage 07: score with 95 % interval, raw and in the chat template where either was
    measured; `chance` is guessing among the choices. Means over a suite name their tasks."""
    results, _ = load(source, "07_evaluation")
    found, rows = _found(results), {}
    means = [
        {**row, "task": f"mean of {', '.join(row['tasks'])}", "metric": "unweighted mean"}
        for row in found.get("means", [])
    ]
    for row in [*found.get("rows", []), *means]:
        mine = rows.setdefault((row["task"], row["model"]), {
            **{key: row.get(key) for key in _COLUMNS}, "model": _label(results, row["model"]),
        })  # fmt: skip
        form = _form(row)
        mine |= {f"{form}_{key}" if key != "score" else form: row.get(key) for key in _SCORE}
    measured = [form for form in ("raw", "template") if any(form in row for row in rows.values())]
    columns = _COLUMNS + [f"{form}_{key}" if key != "score" else form for form in measured for key in _SCORE]
    order = {row["task"]: None for row in [*found.get("rows", []), *means]}
    ordered = [row for task in order for row in rows.values() if row["task"] == task]
    frame = pd.DataFrame([{key: row.get(key) for key in columns} for row in ordered], columns=columns)
    return frame.astype({"shots": "Int64"})  # a mean of tasks with different shots has none


def paired_task_table(source: object) -> pd.DataFrame:
    """Fine minus every other model on the same questions, per task and form, with 95 % intervals.

    Of right or wrong answers `only fine` and `only other` count those that one of the two got right, and p is McNemar's
    exact one; else it is the bootstrap's. `p_holm` corrects over all comparisons of a form; `detectable` is the
    smallest true difference that so many questions would show (power 80 %).
    """
    results, _ = load(source, "07_evaluation")
    rows = [
        row | {"form": _form(row), "fine minus": _label(results, row["b"])}
        | {"only fine": row.get("mcnemar", {}).get("only_a"), "only other": row.get("mcnemar", {}).get("only_b")}
        for row in _adjusted(results)
    ]  # fmt: skip
    columns = ["task", "form", "fine minus", "difference", "low", "high", "only fine", "only other", "p", "p_holm"]
    columns += ["detectable", "n"]
    return pd.DataFrame([{key: row.get(key) for key in columns} for row in rows], columns=columns)


def sentences(source: object) -> list[str]:
    """What was asked, and where the Fine Actor differs from a model it was made from, after Holm's correction."""
    results, _ = load(source, "07_evaluation")
    found = _found(results)
    if not found.get("rows"):
        return [NO_TASKS]
    asked: dict[str, list[str]] = {}
    for row in found["rows"]:
        names = asked.setdefault(row["suite"], [])
        names += [] if row["task"] in names else [row["task"]]
    words = [f"Asked: {SUITES.get(suite, suite)} ({', '.join(names)})." for suite, names in asked.items()]
    cut = {row["task"]: row["cut_prompts"] for row in found["rows"] if row.get("cut_prompts")}
    words += [f"{task}: {n} prompts did not fit the model and lost their beginning." for task, n in cut.items()]
    rows, clear = told_apart(results)
    for row in clear:
        relation = "higher" if row["difference"] > 0 else "lower"
        numbers = difference_words(row["difference"], row["low"], row["high"])
        other = _label(results, row["b"])
        words.append(f"On {row['task']} ({_form(row)}) fine scores {relation} than {other}: {numbers}.")
    if rows:
        words.append(
            f"In {len(rows) - len(clear)} of {len(rows)} comparisons with base, instruct and coarse the two cannot be "
            "told apart, after Holm's correction over all comparisons of a form."
        )
    return words


def told_apart(results: dict) -> tuple[list[dict], list[dict]]:
    """The comparisons with base, instruct and coarse, and those of them that show a difference after correction."""
    rows = [row for row in _adjusted(results) if row["b"] in ("base", "instruct", "coarse")]
    clear = [row for row in rows if outcome(row["low"], row["high"]) in ("better", "worse") and row["p_holm"] <= 0.05]
    return rows, clear


def of_report(results: dict) -> list[tuple[str, Callable[[], pd.DataFrame], str]]:
    """Key, making and caption of these tables, of which the report leaves out empty ones."""
    return [
        ("tasks", lambda: task_table(results), "Tasks of lm-eval: scores with 95 % intervals over questions."),
        ("tasks_paired", lambda: paired_task_table(results), "Tasks: fine minus each other model, same questions."),
    ]


def _found(results: dict) -> dict:
    return results.get("tasks") or {}


def _adjusted(results: dict) -> list[dict]:
    rows = [row | {"p": row.get("mcnemar", row)["p"]} for row in _found(results).get("paired", [])]
    for template in (False, True):
        mine = [row for row in rows if row["template"] == template]
        for row, p in zip(mine, stats.holm([row["p"] for row in mine]), strict=True):
            row["p_holm"] = p
    return rows


def _form(row: dict) -> str:
    return "template" if row["template"] else "raw"


def _label(results: dict, name: str) -> str:
    """What 07 calls a model, without the form, which has a column of its own here."""
    label = (results.get("models") or {}).get(name, {}).get("label") or name
    for words in IN_WORDS.values():
        label = label.removesuffix(f", {words}")
    return label
