"""Everything that has been run: stages on disk, the latest that fits, and the table of all of them. Needs no torch."""

from collections.abc import Collection, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from c2f_utils.errors import C2FError, short
from c2f_utils.files import flat, outputs, read_jsonl
from c2f_utils.runs import provenance
from c2f_utils.runs.locks import age
from c2f_utils.runs.stage import WEIGHTS, Stage

if TYPE_CHECKING:
    import pandas as pd

OF_SETTINGS = {"source": "the settings'"}  # what 03 records for a law or reward that is not an object of the user's


def stages(name: str = "*", run_id: str = "*") -> Iterator[Stage]:
    """Every whole stage on disk that has begun, by run and stage name; set-aside ones (`.old-k`) are left out."""
    return (stage for stage in _there(name, run_id) if not stage.damage())


def _there(name: str, run_id: str) -> Iterator[Stage]:
    """The stages of `stages`, and damaged ones."""
    for folder in sorted(path for path in outputs().glob(f"{run_id}/{name}") if path.is_dir()):
        stage = Stage(folder)
        if ".old-" not in stage.name and (stage.damage() or stage.config()):
            yield stage


def latest(
    stage: str, profile: str, seed: int, prefer: dict | None = None, weights: dict[str, str | None] | None = None
) -> Stage | None:
    """The stage finished last with equal profile and seed, or None; those with exactly the settings `prefer` first.

    An actor trained under a law or reward of the user's own serves its own run only: no setting would tell of it.
    Nor does one that recorded other `weights` (identities by role) serve.
    """
    meant = {f"{WEIGHTS}{role}": value for role, value in (weights or {}).items() if value}
    found = [item for item in stages(stage) if item.done and kind_of(item) == (profile, seed) and not own_parts(item)]
    made_with = {item.dir: item.provenance().get("inputs", {}) for item in found}
    found = [item for item in found if all(made_with[item.dir].get(k, v) == v for k, v in meant.items())]
    found.sort(key=lambda item: (item.config()["settings"] == prefer, item.status()["finished"]), reverse=True)
    return next(filter(_has_results, found), None)


def _has_results(stage: Stage) -> bool:
    """Whether its results, if it keeps any, can be read: asked of the one to be lent only, since they may be large."""
    try:
        return not (stage.dir / "results.json").exists() or isinstance(stage.results(), dict)
    except C2FError:
        return False


def own_parts(stage: Stage) -> list[str]:
    """Which of law, reward and operator the stage was made with as an object of the user's, not by its settings."""
    inputs, usual = stage.provenance().get("inputs", {}), provenance.fingerprint(OF_SETTINGS)
    return [name for name in ("law", "reward", "operator") if inputs.get(name, usual) != usual]


def kind_of(stage: Stage) -> tuple[str, int]:
    """Profile and seed that a stage was made with."""
    settings = stage.config()["settings"]
    return settings["profile"], settings["seed"]


def began_since(stage: Stage, moment: datetime) -> bool:
    """Whether the stage was begun (or continued) after a time, and so by whoever started then."""
    started = None if stage.damage() else stage.status().get("started")
    return bool(started) and datetime.fromisoformat(started) >= moment


def refuse_unknown(run_ids: Collection[object], besides: str | None = None) -> None:
    """Raise C2FError for what is not the id of a run on disk; the run `besides` may be about to be made."""
    if not run_ids:
        return
    known = sorted({stage.run_id for stage in stages()})
    if wrong := [item for item in run_ids if item not in (*known, besides)]:
        raise C2FError(
            f"runs = {short(list(run_ids))}: there is no run {short(wrong[0])} in {outputs()}; there are: "
            f"{', '.join(known) or 'none'}"
        )


def heartbeat_age(run_id: str) -> float | None:
    """Seconds since any stage of a run last showed that it is alive, or None for a new run."""
    return min((age(stage.status()["heartbeat"]) for stage in stages(run_id=run_id)), default=None)


def threads_of(run_id: str) -> int | None:
    """The thread count that the stages of a run were begun with (the last one's), or None for a new run."""
    counts = [stage.config()["threads"] for stage in stages(run_id=run_id)]
    return counts[-1] if counts else None


def table(run_id: str = "*") -> "pd.DataFrame":
    """One row per stage on disk, the latest last: state, where training stands, time, memory, parents, alarms.

    Of a damaged stage the alarm says what is wrong with it. `changed` names the settings that differ from the
    profile's, and a law, reward or operator of the user's. Units: `minutes` of wall time, `peak_mb` in MiB.
    """
    import pandas as pd

    rows = [
        {"run": item.run_id, "stage": item.name, "status": "damaged", "started": "", "alarms": damage}
        if (damage := item.damage())
        else _row(item)
        for item in _there("*", run_id)
    ]
    rows.sort(key=lambda row: row["started"])
    return pd.DataFrame(rows, columns=_COLUMNS)


_PROGRESS = ("iteration", "reward", "kl_per_token", "mean_tokens")

_COLUMNS = [
    "run", "stage", "profile", "seed", "status", *_PROGRESS, "started", "minutes", "peak_mb",
    "changed", "parents", "alarms",
]  # fmt: skip


def _row(stage: Stage) -> dict[str, object]:
    settings, status = stage.config()["settings"], stage.status()
    last, alarms = {}, list(status["alarms"])
    try:
        last = dict((read_jsonl(stage.dir / "metrics.jsonl") or [{}])[-1])
    except (C2FError, TypeError, ValueError) as error:  # no row of ours
        alarms.append(f"metrics.jsonl is damaged: {error}")
    end = status["finished"] or status["heartbeat"]
    return {
        "run": stage.run_id,
        "stage": stage.name,
        "profile": settings["profile"],
        "seed": settings["seed"],
        "status": stage.state(),
        **{key: last.get(key) for key in _PROGRESS},
        "started": status["started"][:19],
        "minutes": round((age(status["started"]) - age(end)) / 60, 1),
        "peak_mb": status["peak_mb"],
        "changed": "; ".join([*_changed(stage.name, settings), *_own(stage)]),
        "parents": ", ".join(f"{run}/{name[:2]}" for name, run in stage.provenance().get("parents", {}).items()),
        "alarms": "; ".join(alarms),
    }


def _own(stage: Stage) -> list[str]:
    """The parts that are objects of the user's, as they were recorded in words."""
    words = stage.provenance().get("words", {})
    return [f"own {part} {words.get(part, '')}".strip() for part in own_parts(stage)]


def _changed(name: str, settings: dict) -> list[str]:
    from c2f_utils.settings.load import load_settings

    try:
        usual = load_settings(settings["profile"], settings["seed"], study=settings.get("study", False)).for_stage(name)
    except C2FError as error:  # a profile of an older version
        return [str(error)]
    theirs, ours = flat(settings), flat(usual)
    return [f"{key}={value!r}" for key, value in theirs.items() if ours.get(key, ...) != value]
