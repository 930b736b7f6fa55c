"""One process at a time: a claim on a stage that dies with its owner.

A claim file names its owner (process, its birth, host). It is taken over when that process is gone, or, for a
process on another machine, when its stage has shown no heartbeat for `LOST` seconds. The file stays; only its
content changes, under a short advisory lock, so that of two processes that start at once exactly one wins.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from c2f_utils.files import UNPARSABLE

LOST = 300.0  # seconds without a heartbeat after which a process that cannot be looked up counts as gone


def now() -> str:
    """The time as it is written in status.json."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def age(moment: object) -> float | None:
    """Seconds since an ISO time as written in status.json; None for none."""
    return (datetime.now(UTC) - datetime.fromisoformat(str(moment))).total_seconds() if moment else None


def owner() -> dict[str, object]:
    """Who this process is, in a form that a reused process number does not imitate."""
    return {"pid": os.getpid(), "born": _born(os.getpid()), "host": socket.gethostname()}


def alive(who: dict[str, object], heartbeat_age: float | None) -> bool:
    """Whether the process is still there; `heartbeat_age` in seconds decides for other machines (None: never beat).

    A heartbeat that lies as far ahead proves as little as an old one: a clock was set back since.
    """
    if who.get("host") != socket.gethostname():
        return heartbeat_age is not None and abs(heartbeat_age) < LOST
    pid = int(who["pid"])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it exists and belongs to somebody else
    return _born(pid) == who.get("born")


def take(path: Path, heartbeat_age: float | None) -> dict[str, object] | None:
    """Claim `path` for this process; returns None, or the living owner that has it already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path) as handle:
        holder = _read(handle)
        if holder and holder != owner() and alive(holder, heartbeat_age):
            return holder
        _write(handle, json.dumps(owner()))
    return None


def holder(path: Path, heartbeat_age: float | None) -> dict[str, object] | None:
    """The living owner of the claim other than this process, or None."""
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as handle:
        found = _read(handle)
    return found if found and found != owner() and alive(found, heartbeat_age) else None


def release(path: Path) -> None:
    """Give the claim up if it is ours; harmless otherwise."""
    if path.exists():
        with _exclusive(path) as handle:
            if _read(handle) == owner():
                _write(handle, "")


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[IO[str]]:
    with open(path, "a+", encoding="utf-8") as handle:
        # Some cluster file systems have no advisory locks; the claim then still works but for a race of milliseconds.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle


def _read(handle: IO[str]) -> dict[str, object] | None:
    handle.seek(0)
    try:
        found = json.loads(handle.read() or "null")
    except UNPARSABLE:
        return None  # cut by a kill: nobody's
    return found if isinstance(found, dict) and type(found.get("pid")) is int else None


def _write(handle: IO[str], text: str) -> None:
    handle.seek(0)
    handle.truncate()
    handle.write(text)
    handle.flush()


def _born(pid: int) -> str | None:
    """Start time of a process in kernel ticks; None where there is no /proc; 'gone' for a dead one not yet buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "gone" if fields[0] == "Z" else fields[19]
