"""Results as they lie on disk: how they are found and read, and what their metrics are called. Needs no torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, read_jsonl, root


class Metric(NamedTuple):
    """What a metric is called on an axis, as a column and in a sentence, its digits in a table, and the difference
    that nobody would care about."""

    label: str
    column: str
    words: str = ""
    digits: int = 3
    margin: float = 0.0


METRICS = {
    "accuracy_last": Metric("accuracy, last answer", "accuracy, last", "last-answer accuracy", margin=0.02),
    "accuracy_first": Metric("accuracy, first answer", "accuracy, first", "first-answer accuracy", margin=0.02),
    "correct_steps": Metric("correct steps per answer", "correct steps", "correct steps", 2),
    "mean_tokens": Metric("mean length (tokens)", "tokens", "mean length", 1),
    "rep4": Metric("repeated 4-grams (share)", "rep-4", "repeated 4-grams"),
    "duplicate_sentences": Metric("duplicate sentences (share)", "dup. sentences", "duplicate sentences"),
    "eos_rate": Metric("answers that end by themselves (share)", "ends itself", "answers that end by themselves"),
    "utility": Metric("utility (points)", "utility", "utility", 2),
    "reward": Metric("reward (z-score)", "reward", "reward", 2, margin=0.1),
    "score": Metric("selection score", "score", "selection score"),
    "n": Metric("answers", "n", "answers"),
    "rollout_tokens": Metric("rollout tokens", "rollout tokens", "rollout tokens", 0),
    "wall_s": Metric("wall time (s)", "wall (s)", "wall time", 1),
    "peak_mb": Metric("peak memory (MiB)", "peak memory (MiB)", "peak memory", 0),
}
LABELS = {name: metric.label for name, metric in METRICS.items()}
MAIN = ("base", "instruct", "coarse", "fine")  # models that are no control
GAINED = ("accuracy_last", "utility", "reward")  # what a model may gain over instruct, the first known one in figures
LAW_OF_03 = "logistic"  # the name under which 04 shows the law of 03
DECODINGS = {"sampled_t1": "sampled at T = 1", "sampled_t07": "sampled at T = 0.7", "greedy": "greedy decoding"}

PARENTS_OF_06 = {"instruct": ("05_instruction_model", "behaviour"), "coarse": ("03_coarse_rlhf", "final")}
NO_CHECKER = "not available here:\nthe exact checker knows only\nthe embedded domain"


def folder(source: object) -> Path | None:
    """The directory of a stage given as a Stage, a path to it or to its results.json; None for plain data."""
    place = getattr(source, "dir", source)
    if not isinstance(place, str | Path):
        return None
    place = Path(place)
    return place.parent if place.is_file() else place


def origin_of(place: Path) -> str:
    """The run, and the stage where it is one, that a folder belongs to, in words."""
    return f"run {place.parent.name} · {place.name}" if place.name[:2].isdigit() else f"run {place.name}"


def load(source: object, stage: str, file: str = "results.json") -> tuple[dict | list, Path | None]:
    """Results of a stage and their directory, from data already read, a Stage, its path, or the run's directory.

    Raises C2FError naming the notebook to run when there are none.
    """
    place = folder(source)
    if place is None:
        if not isinstance(source, dict | list):
            raise C2FError(f"results are {type(source).__name__}; expected a stage, its directory, or its data")
        return source, None
    place = place / stage if (place / stage).is_dir() else place
    if not (place / file).is_file():
        raise C2FError(f"{place / file} does not exist; run notebooks/{stage}.ipynb first")
    return (read_jsonl if file.endswith(".jsonl") else read_json)(place / file), place


def column(rows: Iterable[dict], key: str) -> np.ndarray:
    """One value per row as float, NaN for null or absent."""
    values = [row.get(key) for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def known(values: Sequence | np.ndarray) -> bool:
    """Whether any value is a number."""
    return bool(len(values)) and bool(np.isfinite(np.asarray(values, dtype=float)).any())


def quality(rows: Iterable[dict], wanted: str) -> tuple[str, str]:
    """The metric to draw and a note: `wanted`, or the reward where the exact checker could not score anything."""
    if known(column(rows := list(rows), wanted)) or not known(column(rows, "reward")):
        return wanted, ""
    return "reward", "reward: no exact checker for these data"


def laws_of(results: dict) -> dict[str, dict]:
    """The laws of 04 with the seeds that have a curve: one that was stopped before its first snapshot is left out."""
    found = {}
    for name, law in (results.get("laws") or {}).items():
        seeds = {seed: run for seed, run in (law.get("seeds") or {}).items() if run.get("curve")}
        if seeds:
            found[name] = {**law, "label": law.get("label") or name, "seeds": seeds}
    return found


def target_tokens(laws: dict, metric: str, share: float, reference: str = "fixed_long") -> pd.DataFrame:
    """Rollout tokens at which each law and seed reaches `share` of what the reference law gains, seed by seed.

    The target is start + share * (last - start) of the reference's curve of the same seed, with start its first
    snapshot; crossings are interpolated between snapshots. Columns law, label, seed, share, target, tokens (NaN = not
    reached, or the reference lacks this seed or does not gain).
    """
    rows = []
    for name, law in laws.items():
        for seed, run in law["seeds"].items():
            goal = column(laws.get(reference, {}).get("seeds", {}).get(seed, {}).get("curve", []), metric)
            target = goal[0] + share * (goal[-1] - goal[0]) if len(goal) and goal[-1] > goal[0] else float("nan")
            tokens = column(run["curve"], "rollout_tokens")
            reached = stats.first_crossing(tokens, column(run["curve"], metric), target)
            rows.append({"law": name, "label": law["label"], "seed": seed, "share": share, "target": target})
            rows[-1]["tokens"] = float("nan") if reached is None else reached
    return pd.DataFrame(rows, columns=["law", "label", "seed", "share", "target", "tokens"])


def model_rows(results: dict, decoding: str) -> list[dict]:
    """One flat row per model evaluated with this decoding: name, label, role and its metrics."""
    return [
        {"model": name, "label": model.get("label") or name, "role": model.get("role") or "control", **model[decoding]}
        for name, model in (results.get("models") or {}).items()
        if model.get(decoding)
    ]


def seed_frame(runs: Sequence[dict], names: Sequence[str], decoding: str, metrics: Sequence[str]) -> pd.DataFrame:
    """One row per run, model and metric from several 07 results (in the order of `names`, e.g. run ids)."""
    rows = [
        {"run": name, "model": row["model"], "label": row["label"], "role": row["role"], "metric": metric}
        | {"value": row.get(metric)}
        for name, results in zip(names, runs, strict=True)
        for row in model_rows(results, decoding)
        for metric in metrics
    ]
    return pd.DataFrame(rows, columns=["run", "model", "label", "role", "metric", "value"])


def rows_of(results: dict, key: str) -> list[dict]:
    """Rows of a sweep with their metrics at the top level, wherever they were nested."""
    rows = []
    for row in results.get(key) or []:
        nested = row.get("metrics")
        rows.append({**row, **nested} if isinstance(nested, dict) else dict(row))
    return rows


def parents_of(place: Path | None) -> dict[str, dict]:
    """Metrics of the two parents as their own stages of the same run measured them; {} where they are not there."""
    found = {}
    for role, (stage, key) in PARENTS_OF_06.items():
        path = place.parent / stage / "results.json" if place else None
        if path is not None and path.is_file():
            found[role] = read_json(path).get(key) or {}
    return found


def operator_name(operator: str | dict | None) -> str | None:
    """An operator as the rows of 06 name it: its name, with its numbers in brackets."""
    if not isinstance(operator, dict):
        return operator
    options = [
        f"{key} {value:g}" for key, value in operator.items() if isinstance(value, int | float) and key != "seed"
    ]
    return f"{operator['name']} ({', '.join(options)})" if options else operator["name"]


def with_baselines(results: dict) -> dict:
    """The same results with the critic-free baselines among the laws, for figures and tables of both."""
    return results | {"laws": results["laws"] | results.get("critic_free", {})}


def committed_seeds(name: str, labels: dict[str, str]) -> tuple[list[dict], list[str]]:
    """Committed evaluations of several seeds (`benchmarks/tiny_seeds.py`) as results of 07, and the seeds' names."""
    study = committed(name)
    runs = []
    for models in study["models"].values():
        roles = {key: key if key in MAIN else "control" for key in models}
        rows = {k: {"label": labels.get(k, k), "role": roles[k], study["decoding"]: row} for k, row in models.items()}
        runs.append({"models": rows})
    return runs, [f"seed {seed}" for seed in study["models"]]


def committed(name: str) -> dict:
    """The results of a larger study that are committed with the project, `benchmarks/results/<name>.json`.

    Raises C2FError where the package was installed without them.
    """
    file = root() / "benchmarks" / "results" / f"{name}.json"
    if not file.is_file():
        raise C2FError(f"{file} does not exist: the larger studies come with the project's repository, not the package")
    return read_json(file)
