"""Sweeps as they lie on disk: which runs one has, what each of them found, and what that says over seeds.

A sweep is a folder beside its runs, `outputs/<sweep>/sweep.json`, written once before work by `headless/sweeps.py`.
Needs no torch.
"""

from pathlib import Path

import pandas as pd

from c2f_utils import stats
from c2f_utils.errors import C2FError, short
from c2f_utils.files import outputs, read_json
from c2f_utils.report.results import METRICS
from c2f_utils.report.sources import decodings

FILE = "sweep.json"
_KEYS = {"sweep": str, "notebooks": list, "profile": str, "grid": dict, "seeds": list, "runs": list}

# The numbers that one run of a stage is judged by. 04 compares laws inside of a run and has none.
_HEADLINES = {
    "01_base_model": lambda found: found["behaviour"],
    "02_reward_model": lambda found: {"pair_accuracy": found["pair_accuracy"]},
    "03_coarse_rlhf": lambda found: found["final"] | {"rollout_tokens": found["rollout_tokens"]},
    "05_instruction_model": lambda found: found["behaviour"],
    "06_residue_merging": lambda found: found["operators"][0],  # the merge that was chosen
    "07_evaluation": lambda found: found["models"]["fine"][decodings(found)[0]],
}
_NUMBERS = (*(name for name in METRICS if name != "n"), "pair_accuracy")


def names() -> list[str]:
    """The sweeps in the outputs folder."""
    return sorted(path.parent.name for path in outputs().glob(f"*/{FILE}"))


def read(name: str) -> dict:
    """The record of a sweep; raises C2FError for an unknown or damaged one."""
    if name not in names():
        raise C2FError(f"there is no sweep {short(name)} in {outputs()}; there are: {', '.join(names()) or 'none'}")
    path = outputs() / name / FILE
    found = read_json(path)
    wrong = [key for key, kind in _KEYS.items() if not isinstance(found, dict) or not isinstance(found.get(key), kind)]
    if wrong or not all(isinstance(run, dict) and {"run", "seed", "point"} <= run.keys() for run in found["runs"]):
        raise C2FError(f"{path} is damaged; delete it and give the command of the sweep again: its runs are kept")
    return found


def of_run(run_id: str) -> str | None:
    """The sweep that a run belongs to, if any."""
    for name in names():
        try:
            if any(run["run"] == run_id for run in read(name)["runs"]):
                return name
        except C2FError:  # somebody else's damaged sweep
            continue
    return None


def sweep_results(name: str, stage: str | None = None) -> pd.DataFrame:
    """One row per point and seed: `run`, the settings of the point, `seed`, `stage`, and the metrics of that stage.

    `stage` defaults to the last one of the sweep that one set of numbers stands for: 07 the Fine Actor, 06 the merge
    that was chosen (validation problems), 03 the Coarse Actor. What is not there yet is missing in its row. Raises
    C2FError for an unknown sweep, and for a stage that it has not or that has no such numbers.
    """
    record = read(name)
    measured = [item for item in record["notebooks"] if item in _HEADLINES]
    if stage is not None and stage not in measured:
        raise C2FError(f"stage = {short(stage)}: expected one of {', '.join(measured) or 'none'}")
    stage = stage or (measured[-1] if measured else None)
    rows = []
    for run in record["runs"]:
        if run["point"] is not None:
            point = {key: _shown(value) for key, value in run["point"].items()}
            row = {"run": run["run"], **point, "seed": run["seed"], "stage": stage}
            rows.append(row | _found(outputs() / run["run"], stage))
    frame = pd.DataFrame(rows)
    return frame.dropna(axis="columns", how="all") if len(frame) else frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means of `sweep_results` over seeds with their 95 % t-intervals: one row per point and metric, in the order of
    the sweep; `low` and `high` are missing for a single seed."""
    settings = settings_of(frame)
    rows = []
    groups = frame.groupby(settings, sort=False, dropna=False) if settings else [((), frame)]
    for values, group in groups:
        for metric in metrics_of(frame):
            known = group[metric].dropna()
            if len(known):
                found = stats.seed_interval(list(known))
                row = dict(zip(settings, values, strict=True)) | {"metric": metric}
                rows.append(row | {"mean": found.value, "low": found.low, "high": found.high, "seeds": found.n})
    return pd.DataFrame(rows, columns=[*settings, "metric", "mean", "low", "high", "seeds"])


def settings_of(frame: pd.DataFrame) -> list[str]:
    """The columns that hold settings of the points."""
    return [column for column in frame.columns if "." in column]


def metrics_of(frame: pd.DataFrame) -> list[str]:
    """The columns that hold metrics, in the order of the house."""
    return [metric for metric in _NUMBERS if metric in frame.columns]


def labels(frame: pd.DataFrame) -> pd.Series:
    """What tells a row's point apart from others, in words, e.g. `iterations 30, token_price 0.02`."""
    columns = [column for column in settings_of(frame) if frame[column].astype(str).nunique() > 1]
    words = [frame[column].map(lambda value, key=column: f"{_last(key)} {_word(value)}") for column in columns]
    together = [", ".join(row) for row in zip(*words, strict=True)] if words else ["all seeds"] * len(frame)
    return pd.Series(together, index=frame.index)


def _found(run: Path, stage: str | None) -> dict[str, float]:
    path = run / str(stage)
    try:
        status = read_json(path / "status.json")["status"]
        found = _HEADLINES[stage](read_json(path / "results.json")) if status == "done" else {}
    except (C2FError, LookupError, TypeError):  # not there yet, or damaged: the table of runs says so
        return {}
    return {key: found.get(key) for key in _NUMBERS if isinstance(found.get(key), int | float)}


def _shown(value: object) -> object:
    """A cell of a table: numbers and words as they are, mappings and lists in words, e.g. `fixed, limit 32`."""
    if isinstance(value, dict):
        return ", ".join(str(item) if key == "name" else f"{key} {_word(item)}" for key, item in value.items())
    return value if isinstance(value, int | float | str) else str(value)


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _last(key: str) -> str:
    return key.rpartition(".")[2]
