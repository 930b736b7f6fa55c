"""The records of a stage (`config.json`, `status.json`, `provenance.json`), checked as they are read: a damaged one is
a sentence about its own stage and concerns no other."""

from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, too_deep
from c2f_utils.runs import locks

_NAMES = ("config.json", "status.json", "provenance.json")


def read(path: Path) -> dict:
    """One record, empty where there is none; raises C2FError that says how it is damaged."""
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise C2FError(f"{path} holds a {type(found).__name__}; expected an object")
    if too_deep(found):
        raise C2FError(f"{path} is nested too deep to be what was written")
    from c2f_utils.runs import record_models  # a tenth of a second, and a list of runs reads none that it knows

    if problem := record_models.problem(path.name, found):
        raise C2FError(f"{path}: {problem}")
    return found


def whole(folder: Path) -> dict[str, dict]:
    """The records of a stage by file name; raises C2FError that says what makes the stage unusable.

    Without a `config.json` among them it has not begun.
    """
    found = {name: read(folder / name) for name in _NAMES}
    # config.json is written last: without it a stage has not begun, unless its status says that it went on.
    begun = found["config.json"] or found["status.json"].get("status", "running") != "running"
    missing = [name for name, record in found.items() if not record]
    if begun and missing:
        raise C2FError(f"{folder / missing[0]} is missing")
    return found


def damage(folder: Path) -> str | None:
    """What makes a stage unusable, in words; None where its records are whole, and where it has not begun."""
    try:
        whole(folder)
    except C2FError as error:
        return str(error)
    return None


def state(status: dict) -> str | None:
    """running, done, stopped, failed, killed, or lost: it says running but its process is gone; None: not begun."""
    if status.get("status") == "running" and not locks.alive(status, locks.age(status.get("heartbeat"))):
        return "lost"
    return status.get("status")
