"""`c2f clean`: free the disk of old stages, and of nothing that something kept was made from.

A stage goes as a whole; with the last one of a run its folder, unless something is in it that no command here wrote.
Never touched: a run at work, the runs of a sweep that is not done and the stages lent to them, parents of anything
kept (and theirs), links, and what is no stage.
"""

import argparse
import contextlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from c2f_utils.errors import C2FError, short

_UNITS = {"h": 1 / 24, "d": 1.0, "w": 7.0}
_SETASIDE = re.compile(r"(\d\d_\w+)\.old-\d+")
_WRITTEN = re.compile(
    r"STOP|(run|pack)\.json|\..+\.(claim|partial)|\d\d_\w+\.(running|refused)\.(ipynb|log)"
)  # in a run
_USUAL = "failed,killed,lost,stopped,damaged"  # done ones only where they are asked for


@dataclass(frozen=True)
class Candidate:
    """A stage's folder, its state, its age in days, its size in bytes."""

    folder: Path
    state: str
    days: float
    size: float


def add_command(commands: argparse._SubParsersAction) -> None:
    """`c2f clean`."""
    parser = commands.add_parser(
        "clean", help="free the disk of old stages", description="Says what would be deleted and how much that frees, "
        "asks, and deletes. A parent of something kept, a run at work and a sweep in progress stay."
    )  # fmt: skip
    parser.add_argument("--older-than", required=True, metavar="AGE", help="since the last sign of life: 12h, 30d, 4w")
    parser.add_argument(
        "--status", default=_USUAL, help=f"states, with commas (default: {_USUAL}; set-aside stages go in any state)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(action=_clean)


def _clean(options: argparse.Namespace) -> int:
    from c2f_utils.files import outputs
    from c2f_utils.headless.look import states_named

    days, states = _days(options.older_than), states_named(options.status)
    if not (options.dry_run or options.yes or sys.stdin.isatty()):
        raise C2FError("nobody can be asked here, so nothing is deleted; say --yes, or --dry-run to look only")
    found = candidates(days, states)
    if not found:
        print(f"nothing in {outputs()} is that old and in these states")
        return 0
    for each in found:
        print(f"{each.size / 2**20:10.1f} MB  {each.days:6.1f} d  {each.state:8} {each.folder.relative_to(outputs())}")
    print(f"{sum(each.size for each in found) / 2**20:10.1f} MB in {len(found)} stages")
    if options.dry_run:
        return 0
    if not options.yes and input("delete them? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was deleted")
        return 0
    freed, kept = delete(found, days, states)
    print("\n".join([*kept, f"{freed / 2**20:.1f} MB freed"]))
    return 0


def _days(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if not match:
        raise C2FError(f"--older-than {short(text)}: expected a number with h, d or w, e.g. 12h, 30d, 4w")
    return int(match[1]) * _UNITS[match[2]]


def candidates(days: float, states: Sequence[str]) -> list[Candidate]:
    """Stages that gave no sign of life for so many days and are in one of these states, or set aside; without those
    that something kept needs."""
    from c2f_utils.runs import disk

    chosen = _chosen(days, states)
    return [Candidate(each, state, _age(each), disk.used(each)) for each, state in sorted(chosen.items())]


def _chosen(days: float, states: Sequence[str]) -> dict[Path, str]:
    from c2f_utils.files import outputs

    every = dict(_stages(outputs()))
    working, swept = _at_work(every), _of_sweeps(outputs(), every)
    chosen = {
        folder
        for folder, state in every.items()
        if not (folder.is_symlink() or folder.parent.is_symlink() or folder.parent in working or folder in swept)
        and (state in states or _SETASIDE.fullmatch(folder.name))
        and _age(folder) > days
    }
    queue = [folder for folder in every if folder not in chosen]
    while queue:  # what is kept keeps its parents, and those theirs
        for parent in _parents(queue.pop(), set(chosen)):
            if parent in chosen:
                chosen.discard(parent)
                queue.append(parent)
    return {folder: every[folder] for folder in chosen}


def delete(found: Sequence[Candidate], days: float, states: Sequence[str]) -> tuple[float, list[str]]:
    """Delete stages that are still candidates once their runs are claimed, and the files of runs left without any.

    Returns the bytes freed, and a line for each stage or run that stayed, with the reason.
    """
    from c2f_utils.runs import locks, registry

    freed, stayed, claimed = 0.0, [], []
    try:
        for run in dict.fromkeys(each.folder.parent for each in found):
            try:
                other = locks.take(run / ".run.claim", registry.heartbeat_age(run.name))
            except OSError as error:
                stayed.append(f"{run} stays: {error.strerror}")
                continue
            if other:
                stayed.append(f"{run} stays: process {other['pid']} on {other['host']} has begun to work in it")
            else:
                claimed.append(run)
        still = _chosen(days, states)  # minutes may have passed since somebody was asked
        for each in found:
            if each.folder.parent not in claimed:
                continue
            if still.get(each.folder) != each.state:
                stayed.append(f"{each.folder} stays: it has changed, or something needs it by now")
                continue
            shutil.rmtree(each.folder, ignore_errors=True)
            if each.folder.exists():
                stayed.append(f"{each.folder} could not be deleted")
            else:
                freed += each.size
    finally:
        for run in claimed:
            if any(path.is_dir() for path in run.iterdir()):  # stages or a report
                locks.release(run / ".run.claim")
            else:
                _remove(run)
    return freed, stayed


def _remove(run: Path) -> None:
    """Delete what commands wrote into the folder of a run, and the folder if nothing of the user's is in it."""
    for path in run.iterdir():
        if _WRITTEN.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run.rmdir()


def _stages(outputs: Path) -> Iterator[tuple[Path, str]]:
    """Every stage that has begun, with its state: set-aside ones, and those behind links, which need parents, too."""
    from c2f_utils.runs.run import PARENTS
    from c2f_utils.runs.stage import Stage

    for run in sorted(path for path in outputs.glob("*") if path.is_dir()):
        for folder in sorted(path for path in run.iterdir() if path.is_dir()):
            if _name(folder) in PARENTS and (state := Stage(folder).state()):
                yield folder, state


def _name(folder: Path) -> str:
    setaside = _SETASIDE.fullmatch(folder.name)
    return setaside[1] if setaside else folder.name


def _age(folder: Path) -> float:
    """Days since a stage's last heartbeat; of a damaged one, since its folder changed."""
    from c2f_utils.runs import locks
    from c2f_utils.runs.stage import Stage

    stage = Stage(folder)
    seconds = time.time() - folder.stat().st_mtime if stage.damage() else locks.age(stage.status()["heartbeat"])
    return seconds / 86400


def _at_work(every: dict[Path, str]) -> set[Path]:
    """The runs in which something works, or a command is between two notebooks."""
    from c2f_utils.runs import locks, registry

    runs = {folder.parent for folder, state in every.items() if state == "running"}
    for run in {folder.parent for folder in every} - runs:
        claims = [path for path in run.glob(".*.claim") if path.stat().st_size]
        beat = registry.heartbeat_age(run.name) if claims else None
        if any(locks.holder(path, beat) for path in claims):
            runs.add(run)
    return runs


def _of_sweeps(outputs: Path, every: dict[Path, str]) -> set[Path]:
    """The stages of each sweep of which one is not done, with those of other runs that it found and did not make
    again; raises C2FError for a sweep that cannot be read."""
    from c2f_utils.files import read_json

    found: set[Path] = set()
    for path in outputs.glob("*/sweep.json"):
        try:
            record = read_json(path)["runs"]
            runs = {outputs / run["run"]: run["notebooks"] for run in record}
            lent = {outputs / lender / name for run in record for name, lender in run.get("lent", {}).items()}
            done = all(every.get(run / Path(name).stem) == "done" for run, names in runs.items() for name in names)
        except (LookupError, TypeError, AttributeError):
            raise C2FError(f"{path} is not what a sweep writes; delete it, and its runs are runs like others") from None
        found |= set() if done else lent | {folder for folder in every if folder.parent in runs}
    return found


def _parents(folder: Path, chosen: set[Path]) -> Iterator[Path]:
    """The stages that one was made from, set aside since or not; where it does not say so any more, all that it may
    have been made from."""
    from c2f_utils.runs import records
    from c2f_utils.runs.run import PARENTS

    try:
        record = records.read(folder / "provenance.json")
        parents = record["parents"]
    except (C2FError, KeyError):  # damaged or missing
        yield from [other for other in chosen if _name(other) in PARENTS[_name(folder)]]
        return
    for name, run in parents.items():
        parent, recorded = folder.parent.parent / run / name, record["inputs"].get(name)
        yield parent
        aside = [each for each in chosen if each.parent == parent.parent and each != parent and _name(each) == name]
        if aside and recorded and _fingerprint(parent) != recorded:
            yield from [each for each in aside if _fingerprint(each) in (recorded, None)]


def _fingerprint(folder: Path) -> str | None:
    """What a stage built on this one would record of it; None where it cannot be told."""
    from c2f_utils.runs.stage import Stage

    try:
        return Stage(folder).fingerprint()
    except C2FError:
        return None
