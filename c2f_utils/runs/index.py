"""What every stage on disk says of itself, without reading it anew: thousands of runs are listed in a second.

The index is a cache in the outputs folder, which may be deleted, damaged or forbidden at any time. An entry counts as
long as the stage's records have the times and sizes that it was read from. The file is replaced whole, so that no lock
is needed on a shared disk: of two writers the later one wins, and the other's entries are read once more.
"""

import contextlib
import functools
import json
import os
import time
import zlib
from pathlib import Path

from c2f_utils.errors import C2FError, CannotWrite
from c2f_utils.files import flat, outputs, read_jsonl, write_bytes
from c2f_utils.runs import provenance, records

FILE = ".stages.json"
WORTH = 100  # stages read anew after which the index is written; as many are read in a tenth of a second
_SETTLED = 2e9  # ns; a file as young as this may change again without its time telling
_READ = ("config.json", "status.json", "provenance.json", "metrics.jsonl")
_PROGRESS = ("iteration", "reward", "kl_per_token", "mean_tokens")


def stages(name: str | None = None) -> list[tuple[str, str, dict]]:
    """Every stage that has begun (or only those called `name`), by run and stage: run, stage, and what is known of it.

    Of a damaged one `{"damage": reason}`; else its `profile`, `seed`, `status`, `inputs`, `parents`, `words`, the
    fingerprint of its `settings` and those that are not the profile's (`changed`), and the `last` row of its metrics.
    Set-aside stages (`.old-k`) are left out.
    """
    known, found, fresh, begun, top = _load(), {}, 0, [], outputs()
    for run in sorted(_inside(top)):
        for each in _stages_of(f"{top}/{run}") if name is None else [name]:
            key = f"{run}/{each}"
            stamp = _stamp(f"{top}/{key}")
            if not any(stamp):
                continue
            entry = known.get(key)
            if entry is None or entry[0] != stamp:
                known_of, fresh = facts(top / key), fresh + 1
                # An error of reading (a disk that was away, a right that was lacking) passes and changes no file.
                settled = time.time_ns() - max(stamp[::2]) > _SETTLED and "damage" not in (known_of or ())
                entry = [stamp if settled else None, known_of]
            found[key] = entry
            if entry[1] is not None:
                begun.append((run, each, entry[1]))
    if fresh >= WORTH:
        _save(known | found if name else found)
    return begun


def folders(run_id: str) -> list[Path]:
    """The folders of a run that are stages, or may be some, by name, without set-aside ones."""
    folder = outputs() / run_id
    return [folder / name for name in _stages_of(str(folder))]


def _stages_of(folder: str) -> list[str]:
    return sorted(name for name in _inside(folder) if ".old-" not in name)


def _inside(folder: str | Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _stamp(folder: str) -> list[int]:
    """Time (ns) and size of each file that is read; zeros for one that is missing."""
    stamp = []
    for name in _READ:
        try:
            found = os.stat(f"{folder}/{name}")
            stamp += (found.st_mtime_ns, found.st_size)
        except OSError:
            stamp += (0, 0)
    return stamp


def facts(folder: Path) -> dict | None:
    """What `stages` says of one stage, read now; None for one that has not begun."""
    try:
        found = records.whole(folder)
    except C2FError as error:
        return {"damage": str(error)}
    config, status, origin = (found[name] for name in _READ[:3])
    if not config:
        return None
    settings, last = config["settings"], {}
    try:
        last = dict((read_jsonl(folder / "metrics.jsonl") or [{}])[-1])
    except (C2FError, TypeError, ValueError) as error:  # no row of ours
        status["alarms"].append(f"metrics.jsonl is damaged: {error}")
    known = {"profile": settings["profile"], "seed": settings["seed"], "status": status}
    known |= {"settings": provenance.fingerprint(settings), "changed": changed(folder.name, settings)}
    known |= {name: origin.get(name, {}) for name in ("inputs", "parents", "words")}
    return known | {"last": {key: last.get(key) for key in _PROGRESS}}


def changed(stage: str, settings: dict) -> list[str]:
    """The recorded settings of a stage that are not its profile's, e.g. `coarse.iterations=5`."""
    try:
        usual = _usual(settings["profile"], settings.get("study", False), stage) | {"seed": settings["seed"]}
    except C2FError as error:  # a profile of an older version
        return [str(error)]
    return [f"{key}={value!r}" for key, value in flat(settings).items() if usual.get(key, ...) != value]


@functools.cache
def _usual(profile: str, study: bool, stage: str) -> dict[str, object]:
    from c2f_utils.settings.load import load_settings

    return flat(load_settings(profile, study=study).for_stage(stage))


def _load() -> dict[str, list]:
    """The entries on disk; none where this code did not write them or their checksum says that they are damaged."""
    try:
        head, _, body = (outputs() / FILE).read_bytes().partition(b"\n")
    except OSError:
        return {}
    return json.loads(body) if head == _head(body) else {}


def _save(entries: dict[str, list]) -> None:
    body = json.dumps(entries).encode()
    with contextlib.suppress(CannotWrite):  # a folder that can only be read is read anew each time
        write_bytes(outputs() / FILE, _head(body) + b"\n" + body)


def _head(body: bytes) -> bytes:
    return f"{provenance.code_digest()} {zlib.crc32(body):08x}".encode()
