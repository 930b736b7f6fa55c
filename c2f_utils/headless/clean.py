"""`c2f clean`: free the disk of old stages, and of nothing that something kept was made from.

A stage goes as a whole, a run's folder with its last stage. Never touched: a run at work, the runs of a sweep that is
not done, parents of anything kept (and theirs), links, and what is no stage.
"""

import argparse
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

    found = candidates(_days(options.older_than), states_named(options.status))
    if not found:
        print(f"nothing in {outputs()} is that old and in these states")
        return 0
    for each in found:
        print(f"{each.size / 2**20:10.1f} MB  {each.days:6.1f} d  {each.state:8} {each.folder.relative_to(outputs())}")
    print(f"{sum(each.size for each in found) / 2**20:10.1f} MB in {len(found)} stages")
    if options.dry_run:
        return 0
    if not options.yes:
        if not sys.stdin.isatty():
            raise C2FError("nobody can be asked here, and nothing was deleted; say --yes, or --dry-run to look only")
        if input("delete them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was deleted")
            return 0
    freed, kept = delete(found)
    print("\n".join([*kept, f"{freed / 2**20:.1f} MB freed"]))
    return 0


def _days(text: str) -> float:
    match = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if not match:
        raise C2FError(f"--older-than {short(text)}: expected a number with h, d or w, e.g. 12h, 30d, 4w")
    return int(match[1]) * _UNITS[match[2]]


def candidates(days: float, states: Sequence[str]) -> list[Candidate]:
    """Stages that gave no sign of life for so many days and are in one of these states, or set aside; without those
    that something kept needs."""
    from c2f_utils.files import outputs
    from c2f_utils.runs import disk

    every = dict(_stages(outputs()))
    busy = {folder for folder in every if folder.parent in _at_work(every) | _of_sweeps(outputs(), every)}
    ages = {folder: _age(folder) for folder in every}
    chosen = {
        folder
        for folder, state in every.items()
        if folder not in busy and ages[folder] > days and (state in states or _SETASIDE.fullmatch(folder.name))
    }
    queue = [folder for folder in every if folder not in chosen]
    while queue:  # what is kept keeps its parents, and those theirs
        for parent in _parents(queue.pop(), set(chosen)):
            if parent in chosen:
                chosen.discard(parent)
                queue.append(parent)
    return [Candidate(each, every[each], ages[each], disk.used(each)) for each in sorted(chosen)]


def delete(found: Sequence[Candidate]) -> tuple[float, list[str]]:
    """Delete stages, and the folders of runs that hold nothing else; the bytes freed, and a line for each that stayed
    because somebody has begun to work in its run, or it cannot be deleted."""
    from c2f_utils.runs import locks, registry
    from c2f_utils.runs.stage import Stage

    freed, stayed = 0.0, []
    for run in dict.fromkeys(each.folder.parent for each in found):
        claim = run / ".run.claim"
        try:
            other = locks.take(claim, registry.heartbeat_age(run.name))
        except OSError as error:
            stayed.append(f"{run} stays: {error.strerror}")
            continue
        for each in found if other is None else ():
            if each.folder.parent == run and Stage(each.folder).state() == each.state:
                shutil.rmtree(each.folder, ignore_errors=True)
                if each.folder.exists():
                    stayed.append(f"{each.folder} could not be deleted")
                else:
                    freed += each.size
        if other:
            stayed.append(f"{run} stays: process {other['pid']} on {other['host']} has begun to work in it")
        elif not any(path.is_dir() for path in run.iterdir()):  # neither stages nor a report: files of ours alone
            shutil.rmtree(run, ignore_errors=True)
        else:
            locks.release(claim)
    return freed, stayed


def _stages(outputs: Path) -> Iterator[tuple[Path, str]]:
    """Every stage that has begun, set-aside ones too, with its state; links are left out."""
    from c2f_utils.runs.run import PARENTS
    from c2f_utils.runs.stage import Stage

    for run in sorted(path for path in outputs.glob("*") if path.is_dir() and not path.is_symlink()):
        for folder in sorted(path for path in run.iterdir() if path.is_dir() and not path.is_symlink()):
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
    """The runs of each sweep of which a stage is not done; raises C2FError for a sweep that cannot be read."""
    from c2f_utils.files import read_json

    found: set[Path] = set()
    for path in outputs.glob("*/sweep.json"):
        try:
            runs = {outputs / run["run"]: run["notebooks"] for run in read_json(path)["runs"]}
            done = all(every.get(run / Path(name).stem) == "done" for run, names in runs.items() for name in names)
        except (LookupError, TypeError, AttributeError):
            raise C2FError(f"{path} is not what a sweep writes; delete it, and its runs are runs like others") from None
        found |= set() if done else set(runs)
    return found


def _parents(folder: Path, chosen: set[Path]) -> Iterator[Path]:
    """The stages that one was made from; where it does not say so any more, all that it may have been made from."""
    from c2f_utils.runs import records
    from c2f_utils.runs.run import PARENTS

    try:
        parents = records.read(folder / "provenance.json").get("parents", {})
        yield from [folder.parent.parent / run / name for name, run in parents.items()]
    except C2FError:
        yield from [other for other in chosen if other.name in PARENTS[_name(folder)]]
