"""Tables and sentences of 07's dialogues: who wins in the judge's eyes, and whether that judge may be believed.

Every table carries the judge's name, and what it fails. Results without dialogues give an empty table.
"""

from collections.abc import Callable

import pandas as pd

from c2f_utils.report import tables_bias, tables_safety
from c2f_utils.report.results import load

STAGE = "07_evaluation"
COMPARED = (
    "wins", "ties", "losses", "failed", "win_rate", "low", "high", "swap_consistency", "first_wins", "tokens_a",
    "tokens_b",
)  # fmt: skip
_HEADINGS = {
    "low": "95 % low", "high": "95 % high", "tokens_a": "tokens of fine", "tokens_b": "tokens of the other",
    "win_rate": "win rate of fine", "first_wins": "first shown wins", "failed": "no verdict",
}  # fmt: skip
NONE = "No dialogues were judged: judge.name is 'none', or the results are of an earlier version."


def stamp(dialogue: dict) -> str:
    """The judge as tables name it: with every check that it fails, and as no judge at all if it is the heuristic."""
    judge = dialogue["judge"]
    failed = [name for name, check in judge["checks"].items() if not check["passed"]]
    words = [f"fails {', '.join(failed)}"] if failed else []
    words += ["for dry runs only"] if judge["name"] == "heuristic" else []
    return f"{judge['name']} ({'; '.join(words)})" if words else judge["name"]


def win_table(source: object, by: str | None = None) -> pd.DataFrame:
    """Fine against each other model; with `by` (category or turn) a row per value of it."""
    dialogue, labels = _dialogue(source)
    rows = []
    for other, found in (dialogue.get("against") or {}).items():
        parts = found[f"by_{by}"] if by else {"": found}
        for value, part in parts.items():
            row = {"fine against": labels.get(other, other), **({by: value} if by else {})}
            rows.append(row | {_HEADINGS.get(key, key): part[key] for key in COMPARED} | {"judge": stamp(dialogue)})
    columns = ["fine against", *([by] if by else []), *(_HEADINGS.get(key, key) for key in COMPARED), "judge"]
    return pd.DataFrame(rows, columns=columns)


def portia_table(source: object) -> pd.DataFrame:
    """What became of the pairs on which the judge contradicted itself, where they were shown again in aligned parts
    (`judge.portia`)."""
    dialogue, labels = _dialogue(source)
    rows = []
    for other, found in (dialogue.get("against") or {}).items():
        if second := found.get("portia"):
            rows.append({
                "fine against": labels.get(other, other), "contradicted itself": second["flipped"],
                **{f"settled by {way}": count for way, count in second["by"].items()},
                "consistent before": found["swap_consistency"], "consistent after": second["swap_consistency"],
                "win rate before": found["win_rate"], "win rate after": second["win_rate"],
                "95 % low": second["low"], "95 % high": second["high"], "judge": stamp(dialogue),
            })  # fmt: skip
    return pd.DataFrame(rows)


def grade_table(source: object) -> pd.DataFrame:
    """Mean grade of every model, where the judge gave any."""
    dialogue, labels = _dialogue(source)
    rows = [
        {"model": labels.get(name, name), "grade": g["mean"], "95 % low": g["low"], "95 % high": g["high"],
         "turn 1": g["turn_1"], "turn 2": g["turn_2"], "graded": g["graded"], "no grade": g["failed"],
         "judge": stamp(dialogue)}
        for name, g in (dialogue.get("grades") or {}).items()
    ]  # fmt: skip
    columns = ["model", "grade", "95 % low", "95 % high", "turn 1", "turn 2", "graded", "no grade", "judge"]
    return pd.DataFrame(rows, columns=columns)


def check_table(source: object) -> pd.DataFrame:
    """The null checks: what every sound judge must say."""
    dialogue, _ = _dialogue(source)
    rows = [
        {"check": name, "value": check["value"], "required": check["required"], "passed": check["passed"],
         "n": check["n"], "no verdict": check["failed"], "judge": stamp(dialogue)}
        for name, check in (dialogue.get("judge") or {}).get("checks", {}).items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["check", "value", "required", "passed", "n", "no verdict", "judge"])


def of_report(results: dict) -> list[tuple[str, Callable[[], pd.DataFrame], str]]:
    """Key, making and caption of what judges said, of which the report leaves out empty ones."""
    found = results.get("dialogue") or {}
    rates, style, panel = (found.get(key) or empty for key, empty in (("win_rates", []), ("style", []), ("panel", {})))
    return [
        ("judged", lambda: win_table(results), "Dialogues: fine against each other model, both orders."),
        ("judge_checks", lambda: check_table(results), "What every sound judge must say."),
        ("judge_portia", lambda: portia_table(results), "Contradictory pairs, judged again in aligned parts."),
        ("judge_grades", lambda: grade_table(results), "Mean grade of every model."),
        (
            "win_rates",
            lambda: _by_label(results, tables_bias.win_rate_table(rates)),
            "Win rates: raw, both orders, at equal length.",
        ),
        (
            "win_rates_at_equal_style",
            lambda: _by_label(results, tables_bias.style_table(style)),
            "Win rates at equal style.",
        ),
        ("judge_bias", lambda: tables_bias.panel_table(panel), "What the judge does besides judging."),
        ("requests", lambda: tables_safety.refusal_table(results), "Answers to requests that should be refused."),
    ]


def _by_label(results: dict, frame: pd.DataFrame) -> pd.DataFrame:
    """A table with the labels of models for their names."""
    _, labels = _dialogue(results)
    named = [name for name in ("model", "baseline") if name in frame]
    return frame.assign(**{name: [labels.get(each, each) for each in frame[name]] for name in named})


def in_words(source: object) -> str:
    """What was asked and by whom it was judged, and, of a judge that may be believed, which models fine beats."""
    dialogue, labels = _dialogue(source)
    if not dialogue:
        return NONE
    judge, asked = dialogue["judge"], dialogue["questions"]
    trained = judge["trained"]
    text = f"{asked['n']} questions, {asked['turns']} turns ({asked['from']}), judged by {stamp(dialogue)}"
    text += f", trained on {trained['pairs']} pairs ({trained['from']})." if trained else "."
    if asked["faulty_references"]:
        text += f" {asked['faulty_references']} reference answers are known to be wrong."
    if failed := sum(found["verdicts_failed"] for found in dialogue["against"].values()):
        text += f" {failed} verdicts could not be read; their pairs are in no rate."
    if not judge["fit"]:
        return f"{text} Nothing is claimed from this judge's verdicts."
    ahead = [labels.get(name, name) for name, found in dialogue["against"].items() if found["low"] > 0.5]
    behind = [labels.get(name, name) for name, found in dialogue["against"].items() if found["high"] < 0.5]
    for said, names in (("Fine is preferred to", ahead), ("Fine is preferred less often than", behind)):
        text += f" {said} {', '.join(names)}." if names else ""
    return text if ahead or behind else f"{text} No win rate differs from one half by more than its interval."


def _dialogue(source: object) -> tuple[dict, dict[str, str]]:
    results, _ = load(source, STAGE)
    return results.get("dialogue") or {}, {name: found["label"] for name, found in results.get("models", {}).items()}
