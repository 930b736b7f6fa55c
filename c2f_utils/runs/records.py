"""The records of a stage (`config.json`, `status.json`, `provenance.json`), checked as they are read: a damaged one is
a sentence about its own stage and concerns no other."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, too_deep
from c2f_utils.runs import locks

_Time = Annotated[AwareDatetime, Field(strict=False)]


class _Record(BaseModel):
    """What others rely on; further keys, of this version and of others, are as they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Settings(_Record):
    __pydantic_extra__: dict[str, dict | bool]  # the sections, and `study`
    profile: str
    seed: int


class _Config(_Record):
    settings: _Settings
    threads: Annotated[int, Field(ge=1)]


class _Status(_Record):
    status: Literal["running", "done", "stopped", "failed", "killed"]
    started: _Time
    heartbeat: _Time
    finished: _Time | None
    peak_mb: float
    alarms: list[str]
    pid: int | None = None
    host: str | None = None


class _Model(_Record):
    sha256: str
    bytes: int


class _Session(_Record):
    code: dict = {}
    versions: dict = {}


class _Provenance(_Record):
    inputs: dict[str, str]
    parents: dict[str, str]
    words: dict[str, str] = {}
    models: dict[str, _Model] = {}
    sessions: list[_Session]


_RECORDS = {"config.json": _Config, "status.json": _Status, "provenance.json": _Provenance}


def read(path: Path) -> dict:
    """One record, empty where there is none; raises C2FError that says how it is damaged."""
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise C2FError(f"{path} holds a {type(found).__name__}; expected an object")
    if too_deep(found):
        raise C2FError(f"{path} is nested too deep to be what was written")
    try:
        _RECORDS[path.name].model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise C2FError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return found


def whole(folder: Path) -> dict[str, dict]:
    """The records of a stage by file name; raises C2FError that says what makes the stage unusable.

    Without a `config.json` among them it has not begun.
    """
    found = {name: read(folder / name) for name in _RECORDS}
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
