"""What the records of a stage hold: the keys that others rely on, and their types."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

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


_OF_FILES = {"config.json": _Config, "status.json": _Status, "provenance.json": _Provenance}


def problem(name: str, record: dict) -> str | None:
    """The first thing in the record of a file name that is not as expected, in words; None for a whole record."""
    try:
        _OF_FILES[name].model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None
