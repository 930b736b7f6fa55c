"""Everything that has been run: stages on disk, the latest that fits, and the table of all of them. Needs no torch."""

from collections.abc import Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils.errors import C2FError, short
from c2f_utils.files import PACKED, outputs
from c2f_utils.runs import index, provenance, records
from c2f_utils.runs.locks import age
from c2f_utils.runs.stage import WEIGHTS, Stage, run_folder

if TYPE_CHECKING:
    import pandas as pd

OF_SETTINGS = {"source": "the settings'"}  # what 03 records for a law or reward that is not an object of the user's
_USUAL = provenance.fingerprint(OF_SETTINGS)


def stages(run_id: str) -> Iterator[Stage]:
    """Every whole stage of a run that has begun, by name; set-aside ones (`.old-k`) are left out."""
    found = (Stage(folder) for folder in index.folders(run_id))
    return (stage for stage in found if not stage.damage() and stage.config())


def latest(
    stage: str, profile: str, seed: int, prefer: dict | None = None, weights: dict[str, str | None] | None = None
) -> Stage | None:
    """The stage finished last with equal profile and seed, or None; those with exactly the settings `prefer` first.

    An actor trained under a law or reward of the user's own serves its own run only: no setting would tell of it.
    Nor does one that recorded other `weights` (identities by role) serve, nor one out of a pack, which has none.
    """
    meant = {f"{WEIGHTS}{role}": value for role, value in (weights or {}).items() if value}
    preferred = provenance.fingerprint(prefer)
    found = [
        (facts["settings"] == preferred, facts["status"]["finished"], run)
        for run, _, facts in index.stages(stage)
        if "damage" not in facts
        and facts["status"]["status"] == "done"
        and (facts["profile"], facts["seed"]) == (profile, seed)
        and not _own(facts["inputs"])
        and all(facts["inputs"].get(key, value) == value for key, value in meant.items())
    ]
    found.sort(key=lambda each: each[:2], reverse=True)
    return next(filter(_can_lend, (Stage(outputs() / run / stage) for *_, run in found)), None)


def _can_lend(stage: Stage) -> bool:
    """Whether its run is not out of a pack, and its results, if it keeps any, can be read: asked of the one to be lent
    only, since they may be large."""
    if (stage.dir.parent / PACKED).exists():
        return False
    try:
        return not (stage.dir / "results.json").exists() or isinstance(stage.results(), dict)
    except C2FError:
        return False


def own_parts(stage: Stage) -> list[str]:
    """Which of law, reward and operator the stage was made with as an object of the user's, not by its settings."""
    return _own(stage.provenance().get("inputs", {}))


def _own(inputs: dict[str, str]) -> list[str]:
    return [name for name in ("law", "reward", "operator") if inputs.get(name, _USUAL) != _USUAL]


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
    if wrong := [item for item in run_ids if item != besides and not begun(item)]:
        raise C2FError(f"runs = {short(list(run_ids))}: {_unknown(wrong[0])}")


def begun(run_id: object) -> bool:
    """Whether there is a run of this id with a whole stage in it; any object may be asked about."""
    try:
        run_folder(run_id)
    except C2FError:
        return False
    return any(True for _ in stages(run_id))


def known(run_id: str) -> Path:
    """The folder of a run that holds anything of a stage, damaged or not; raises C2FError for any other id."""
    try:
        folder = run_folder(run_id)
    except C2FError:
        raise C2FError(_unknown(run_id)) from None
    if not any(path.name[:2].isdecimal() for path in index.folders(run_id)):
        raise C2FError(_unknown(run_id))
    return folder


def _unknown(run_id: object) -> str:
    there = list(dict.fromkeys(run for run, *_ in index.stages()))
    more = f" and {len(there) - _NAMED} more (c2f runs)" if len(there) > _NAMED else ""
    return f"there is no run {short(run_id)} in {outputs()}; there are: {', '.join(there[:_NAMED]) or 'none'}{more}"


_NAMED = 20  # runs that a message lists


def heartbeat_age(run_id: str) -> float | None:
    """Seconds since any stage of a run last showed that it is alive, or None for a new run."""
    return min((age(stage.status()["heartbeat"]) for stage in stages(run_id)), default=None)


def threads_of(run_id: str) -> int | None:
    """The thread count that the stages of a run were begun with (the last one's), or None for a new run."""
    counts = [stage.config()["threads"] for stage in stages(run_id)]
    return counts[-1] if counts else None


def table() -> "pd.DataFrame":
    """`rows` as a table."""
    import pandas as pd

    return pd.DataFrame(rows(), columns=COLUMNS)


def rows() -> list[dict[str, object]]:
    """One row per stage on disk, the latest last: state, where training stands, time, memory, parents, alarms.

    Of a damaged stage the alarm says what is wrong with it. `changed` names the settings that differ from the
    profile's, and a law, reward or operator of the user's. Units: `minutes` of wall time, `peak_mb` in MiB.
    """
    found = [row(*each) for each in index.stages()]
    return sorted(found, key=lambda each: each["started"])


COLUMNS = (
    "run", "stage", "profile", "seed", "status", "iteration", "reward", "kl_per_token", "mean_tokens", "started",
    "minutes", "peak_mb", "changed", "parents", "alarms",
)  # fmt: skip


def row(run: str, stage: str, facts: dict) -> dict[str, object]:
    """One row of `rows`, of what `index.facts` says of a stage."""
    found = dict.fromkeys(COLUMNS) | {"run": run, "stage": stage}
    if "damage" in facts:
        return found | {"status": "damaged", "started": "", "alarms": facts["damage"]}
    status = facts["status"]
    times = [datetime.fromisoformat(status[name] or status["heartbeat"]) for name in ("started", "finished")]
    own = [f"own {part} {facts['words'].get(part, '')}".strip() for part in _own(facts["inputs"])]
    return found | {
        **{name: facts[name] for name in ("profile", "seed")},
        **facts["last"],
        "status": records.state(status),
        "started": status["started"][:19],
        "minutes": round((times[1] - times[0]).total_seconds() / 60, 1),
        "peak_mb": status["peak_mb"],
        "changed": "; ".join([*facts["changed"], *own]),
        "parents": ", ".join(f"{other}/{name[:2]}" for name, other in facts["parents"].items()),
        "alarms": "; ".join(status["alarms"]),
    }
