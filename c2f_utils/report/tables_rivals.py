"""The table of 07 that sets the merge beside its rivals: what each is worth, what it costs, and the difference.

What a rival costs is all that making it takes beyond base and reward model: where the Coarse Actor or the instruction
model must be there first, their part is in it, and so is the search for a coefficient.
"""

from pathlib import Path

import pandas as pd

from c2f_utils.files import read_jsonl
from c2f_utils.report import sources
from c2f_utils.report.results import load, model_rows
from c2f_utils.report.typeset import heading

STAGE = "07_evaluation"
CAPTION = (
    "The merge beside its rivals: worth, cost and paired differences. Tokens and seconds are of all training beyond "
    "base and reward model; RL tokens are those generated in training, SFT tokens those trained on, prompts "
    "included; search tokens are those of answers to labelled validation problems by which a coefficient was chosen; "
    "seconds are of this machine, and RL counts without evaluations."
)
_SHOWN = ("accuracy_last", "utility", "mean_tokens", "eos_rate")
_PAIRED = ("accuracy_last", "utility")
_COST = ("rl_tokens", "sft_tokens", "search_tokens", "iterations", "seconds")
_ADDED = ("rl_tokens", "sft_tokens", "seconds")
_BOTH = ("coarse", "instruct")
# What must be trained before a model can be made; a control that is not named here needs both.
_FIRST = {
    "base": (), "base_forced": (), "instruct": (), "coarse": (), "instruct_forced": ("instruct",),
    "interpolation": ("instruct",), "ppo_instruct": ("instruct",), "ppo_instruct_tokens": ("instruct",),
    "base_correct": ("instruct",), "parallel_average": (), "fixed_long_residue": ("fixed_long", "instruct"),
}  # fmt: skip
_CHOSEN_WITH_FINE = ("fine", "fine_forced", "one_coefficient", "random_residue")
# Timers of 06 beside those of the control's own name: what two controls share counts for each.
_TIMERS = {
    **dict.fromkeys(_CHOSEN_WITH_FINE, ("sweep",)),
    "best_recipe": ("sweep", "sweeps"),
    "distilled_merge": ("distilled",), "shortest_correct": ("coarse_answers",), "filtered_sft": ("coarse_answers",),
    "base_correct": ("base_answers",),
}  # fmt: skip


def rivals_table(source: object) -> pd.DataFrame:
    """One row per model of stage 07 under its first decoding: metrics (per kind of problem where 07 has them), tokens
    generated in RL, trained on in SFT and answered in search of a coefficient, iterations, seconds, and fine minus it
    with 95 % intervals over prompts.

    Costs are read from the stages beside 07's folder; from plain data they are unknown.
    """
    results, place = load(source, STAGE)
    decoding = sources.decodings(results)[0]
    stages = sources.find_stages(place.parent) if place else {}
    paired = {(row["b"], row["metric"]): row for row in results.get("paired") or [] if row.get("decoding") == decoding}
    rows, kinds = [], {}
    for model in model_rows(results, decoding):
        row = {"model": model["label"]} | {name: model.get(name) for name in _SHOWN}
        by_kind = (results.get("by_kind") or {}).get(model["model"], {}).get(decoding) or {}
        mine = {f"accuracy, {kind}": each.get("accuracy_last") for kind, each in by_kind.items()}
        kinds |= dict.fromkeys(mine)
        name = model["model"].split("_")[0] if model["role"] == "other form" else model["model"]
        row |= mine | _cost(stages, name)
        for metric in _PAIRED:
            found = paired.get((model["model"], metric), {})
            row |= {key: found.get(end) for key, end in _differences(metric).items()}
        rows.append(row)
    differences = [key for metric in _PAIRED for key in _differences(metric)]
    columns = ["model", _SHOWN[0], *kinds, *_SHOWN[1:], *_COST, *differences]
    frame = pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], columns=columns)
    return frame.astype(dict.fromkeys(("rl_tokens", "sft_tokens", "search_tokens", "iterations"), "Int64"))


def _differences(metric: str) -> dict[str, str]:
    """Columns of fine minus the model, and the ends of 07's rows that they hold."""
    name = f"fine minus it, {heading(metric)}"
    return {name: "difference", f"{name}, low": "low", f"{name}, high": "high"}


def _cost(stages: dict[str, Path], name: str) -> dict[str, float | None]:
    """Tokens and seconds of a model of 07 with what must be there first, and the iterations of its own training, else
    of what it is made of; {} where a part is unknown."""
    own = _own(stages, name)
    parts = [own, *(_own(stages, first) for first in _FIRST.get(name, _BOTH))]
    if None in parts:
        return {}
    iterations = next((part["iterations"] for part in parts if part.get("iterations")), None)
    added = {key: round(sum(part.get(key, 0) for part in parts)) for key in _ADDED}
    return added | {"search_tokens": own.get("search_tokens", 0), "iterations": iterations}


def _own(stages: dict[str, Path], name: str) -> dict[str, float] | None:
    match name:
        case "instruct":
            place = stages.get("05_instruction_model")
            tokens = _settings(place).get("instruct", {}).get("tokens")
            seconds = _timings(place).get("training")
            return None if None in (tokens, seconds) else {"sft_tokens": tokens, "seconds": seconds}
        case "coarse":
            return _trained(stages.get("03_coarse_rlhf"))
        case "fixed_long":
            place = stages.get("04_length_schedules")
            return _trained(place, law="fixed_long", seed=_settings(place).get("seed", 0))
    if not (place := stages.get("06_residue_merging")):
        return None
    results = sources.read(place / "results.json")
    said = (results.get("controls") or {}).get(name, {})
    timings = _timings(place)
    iterations = said.get("iterations") or (_trained(place, control=name) or {}).get("iterations")
    return {
        "rl_tokens": said.get("rollout_tokens", 0),
        "sft_tokens": said.get("sft_tokens", 0),
        "seconds": sum(timings.get(timer, 0.0) for timer in (name, *_TIMERS.get(name, ()))),
        "iterations": iterations,
        "search_tokens": _searched(results, name, said),
    }


def _searched(results: dict, name: str, said: dict) -> int | None:
    """Tokens of the answers by which a coefficient was chosen; None where results do not hold all of them."""
    if name == "best_recipe":
        return None
    rows = results.get("sweep") if name in _CHOSEN_WITH_FINE else said.get("sweep")
    return round(sum(row["mean_tokens"] * row["n"] for row in rows or []))


def _trained(place: Path | None, **labels: object) -> dict[str, float] | None:
    """What the rows of a training with these labels say of it; None without any."""
    rows = read_jsonl(place / "metrics.jsonl") if place else []
    rows = [row for row in rows if all(row.get(key) == value for key, value in labels.items())]
    if not rows:
        return None
    seconds = sum(row.get("seconds") or 0.0 for row in rows)
    return {"rl_tokens": rows[-1]["rollout_tokens"], "seconds": seconds, "iterations": len(rows)}


def _settings(place: Path | None) -> dict:
    return sources.read(place / "config.json").get("settings", {}) if place else {}


def _timings(place: Path | None) -> dict:
    return sources.read(place / "timings.json") if place else {}
