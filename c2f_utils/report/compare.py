"""Runs against each other: which settings tell them apart, and which results differ.

Inputs: run directories. Outputs: tables, and the text of `c2f diff`. Runs that differ in their seed alone are
repetitions of one experiment; any other setting makes them arms of a comparison, and nothing is averaged over arms.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.files import flat, outputs, read_json, read_jsonl
from c2f_utils.report import figures_models, sources
from c2f_utils.report.results import MAIN
from c2f_utils.settings.config import Settings

_OF_SETTINGS = "that of the settings"  # a law, reward or operator that is no object of the user's
_NOT_SET = "not set"
_OF_A_RUN = tuple(sources.STAGES)[1:]  # 00 may have been run with any settings


def settings(runs: Sequence[Path], seed: bool = False) -> pd.DataFrame:
    """The settings that differ between runs: dotted name, the stages (of all runs) concerned, the value in each run.

    Objects of the user's (law, reward, operator) count as settings, the seed only where it is asked for.
    """
    found = [sources.find_stages(run) for run in runs]
    rows: dict[tuple, list[str]] = {}
    for stage in [name for name in _OF_A_RUN if all(name in stages for stages in found)]:
        recorded = [_recorded(stages[stage], seed) for stages in found]
        for key in dict.fromkeys(key for each in recorded for key in each):
            values = tuple(str(each.get(key, _NOT_SET)) for each in recorded)
            if len(set(values)) > 1:
                rows.setdefault((key, *values), []).append(stage[:2])
    table = [(key, ", ".join(stages), *values) for (key, *values), stages in rows.items()]
    return pd.DataFrame(table, columns=["setting", "stages", *(run.name for run in runs)])


def _recorded(stage: Path, seed: bool) -> dict[str, object]:
    """What a stage was made with, dotted; settings that its version did not have count with their default."""
    try:
        made = Settings.recorded(sources.read(stage / "config.json").get("settings", {}), stage.name)
        words = sources.read(stage / "provenance.json").get("words", {})
        own = {f"own {part}": said for part, said in words.items() if said != _OF_SETTINGS}
        dotted = flat({key: value for key, value in made.items() if seed or key != "seed"})
    except (AttributeError, TypeError) as error:
        raise C2FError(f"the records of {stage} are damaged ({error}); c2f table says how") from None
    return {key: value for key, value in dotted.items() if value is not None} | own


def arms(runs: Sequence[Path]) -> list[list[Path]]:
    """Runs grouped into experiments: those of a group differ in nothing but their seed."""
    groups: list[list[Path]] = []
    for run in runs:
        mine = next((group for group in groups if settings([group[0], run]).empty), None)
        if mine is None:
            groups.append([run])
        else:
            mine.append(run)
    return groups


def view(run: Path, others: Sequence[object]) -> list:
    """Of exactly two runs: the settings that differ, differences on the problems that both answered, the curves of 03.

    Nothing for another number of runs with results, since there is then nothing, or more than a page, to show.
    """
    pair = sources.with_results(run, others)
    if len(pair) != 2:
        return []
    return [settings(pair, seed=True), paired(pair), figures_models.two_curves(pair)]


def paired(pair: Sequence[Path]) -> pd.DataFrame:
    """First minus second run on the test problems of which both kept an answer, per model: the mean difference with its
    95 % bootstrap interval, not corrected for their number.

    The reward is left out: it is a z-score within its run.
    """
    kept = [read_jsonl(run / "07_evaluation" / "samples.jsonl") for run in pair]
    answers = [{(row["model"], row["decoding"], row["prompt"]): row for row in rows} for rows in kept]
    both = [key for key in answers[0] if key in answers[1]]
    rows = []
    for model, decoding in dict.fromkeys(key[:2] for key in both if key[0] in MAIN):
        couples = [[each[key] for each in answers] for key in both if key[:2] == (model, decoding)]
        for metric, value in _OF_ANSWERS.items():
            values = [[value(row) for row in side] for side in zip(*couples, strict=True)]
            if None not in values[0] + values[1]:
                found = stats.paired_bootstrap(*values)
                rows.append({"model": model, "decoding": decoding, "metric": metric, **found._asdict()})
    return pd.DataFrame(rows, columns=["model", "decoding", "metric", "difference", "low", "high", "n"])


_OF_ANSWERS = {
    "last answer right": lambda row: None if row["gold"] is None else float(row["last_answer"] == row["gold"]),
    "first answer right": lambda row: None if row["gold"] is None else float(row["first_answer"] == row["gold"]),
    "utility": lambda row: row["utility"],
    "tokens": lambda row: float(row["tokens"]),
}


# On the command line


def text(a: str, b: str, every: bool = False) -> str:
    """What differs between two runs in the outputs folder: settings, then every number of their common stages.

    The rows of a list are summed up in one line unless `every` number is asked for. Raises C2FError for a run without
    results.
    """
    pair = [with_results(name) for name in (a, b)]
    first, second = (sources.find_stages(run) for run in pair)
    differing = settings(pair, seed=True)
    lines = [f"settings that differ: {a} | {b}"]
    lines += [f"  {row[0]} (in {row[1]}): {row[2]} | {row[3]}" for row in differing.itertuples(index=False)]
    lines[1:] = lines[1:] or ["  none"]
    lines.append(f"results that differ: {a} | {b}")
    for stage in sources.STAGES:
        if stage in first and stage in second:
            files = [stages[stage] / "results.json" for stages in (first, second)]
            lines += _results(stage, files, every)
        elif stage in first or stage in second:
            lines.append(f"  {stage}: only in {a if stage in first else b}")
    return "\n".join(lines)


def with_results(name: str) -> Path:
    """The folder of a run in the outputs folder; raises C2FError for one without results."""
    run = outputs() / name
    if not sources.find_stages(run):
        known = sorted({path.parent.parent.name for path in outputs().glob("*/0[0-7]_*/results.json")})
        raise C2FError(f"there is no run {name!r} with results in {outputs()}; there are: {', '.join(known) or 'none'}")
    return run


def _results(stage: str, files: Sequence[Path], every: bool) -> list[str]:
    if files[0].read_bytes() == files[1].read_bytes():
        return [f"  {stage}: identical"]
    there, here = (numbers(read_json(file)) for file in files)
    keys = list(dict.fromkeys([*there, *here]))
    changed = {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}
    lines, lists = [f"  {stage}: {len(changed)} of {len(keys)} numbers differ"], {}
    for key, values in changed.items():
        if every or "[" not in key:
            lines.append(f"    {key}: {_both(values)}")
        else:
            lists.setdefault(key.partition("[")[0], {})[key] = values
    for name, entries in lists.items():
        count = sum(key.startswith(f"{name}[") for key in keys)
        furthest = max(entries, key=lambda key: _apart(entries[key]))
        lines.append(f"    {name}: {len(entries)} of {count}, furthest apart {furthest}: {_both(entries[furthest])}")
    return lines


def numbers(value: object, name: str = "") -> dict[str, float]:
    """Every number in a result by its place, e.g. `curve[3].reward` or `layers[only mlp].score`; switches are no
    numbers."""
    if isinstance(value, dict):
        parts = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [(f"{name}[{place}]", item) for place, item in zip(_places(value), value, strict=True)]
    else:
        return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
    return {key: number for place, item in parts for key, number in numbers(item, place).items()}


def _places(rows: list) -> Sequence[object]:
    """What tells the rows of a list apart: their words, where they have any, or else their numbers in the list."""
    words = [" ".join(item for item in row.values() if isinstance(item, str)) for row in rows if isinstance(row, dict)]
    named = all(0 < len(each) <= 80 for each in words) and len(set(words)) == len(rows)
    return words if named else range(len(rows))


def _both(values: tuple[float | None, float | None]) -> str:
    return " | ".join("none" if value is None else f"{value!r}" for value in values)


def _apart(values: tuple[float | None, float | None]) -> float:
    return math.inf if None in values else abs(values[0] - values[1])
