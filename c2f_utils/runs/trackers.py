"""A stage's metrics shown by a tracker (trackio, W&B, MLflow, TensorBoard) while it works.

`metrics.jsonl` is the truth: a process of its own follows that file and hands its rows to accelerate's trackers. So a
tracker that fails, hangs or is slow cannot reach the stage, nor its random numbers; it is said once, in the stage's
log, and the rows stay where they are. A continued stage shows all its rows anew.

    python -m c2f_utils.runs.trackers STAGE_FOLDER PROJECT TRACKER...
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils.errors import C2FError
from c2f_utils.files import read_jsonl, root
from c2f_utils.runs import locks, records

if TYPE_CHECKING:
    from c2f_utils.settings.tracking import Tracking

EVERY = 1.0  # seconds between two looks at the file
LAST_WORDS = 120  # seconds after the end of a stage that a tracker has for what it still holds
_APART = ("law", "control", "seed")  # of rows of several trainings in one stage


def follow(folder: Path, tracking: "Tracking") -> subprocess.Popen | None:
    """Start the process that follows a stage, if any tracker is asked for; it ends by itself after the stage."""
    if not tracking.to:
        return None
    command = [sys.executable, "-m", "c2f_utils.runs.trackers", str(folder), tracking.project, *tracking.to]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        command, cwd=root(), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        start_new_session=True,  # a kernel that ends takes its own group with it
    )  # fmt: skip


def rows(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows of a stage as they come, each with its step, until the stage has ended or its process is gone."""
    seen, over = 0, False
    while not over:
        over = not _at_work(folder)  # asked before the file is read: no row comes after
        found = read_jsonl(folder / "metrics.jsonl")
        seen = min(seen, len(found))  # a continued stage drops the rows after its checkpoint
        yield from (shown(row, number) for number, row in enumerate(found[seen:], start=seen + 1))
        seen = len(found)
        if not over:
            time.sleep(EVERY)


def shown(row: dict, number: int) -> tuple[int, dict[str, float]]:
    """A row's step and its numbers, named after the training they belong to where a stage has several."""
    place = "/".join(str(row[key]) for key in _APART if key in row)
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in (*_APART, "iteration")}
    return row.get("iteration", number), {f"{place}/{key}" if place else key: v for key, v in numbers.items()}


def _at_work(folder: Path) -> bool:
    status = records.read(folder / "status.json")
    return status.get("status") == "running" and locks.alive(status, locks.age(status.get("heartbeat")))


def hand_on(found: Iterator[tuple[int, dict[str, float]]], trackers: Sequence[object]) -> None:
    """Hand every row to every tracker; one that fails is named once and not asked again."""
    working = list(trackers)
    for step, numbers in found:
        working = [tracker for tracker in working if _tried(tracker, lambda it: it.log(numbers, step=step))]  # noqa: B023
        if not working:
            return
    signal.alarm(LAST_WORDS)
    for tracker in working:
        _tried(tracker, lambda it: it.finish())


def _tried(tracker: object, what: object) -> bool:
    try:
        what(tracker)
        return True
    except Exception as error:  # whatever a tracker raises, from its network or its disk
        print(f"tracking by {tracker.name} ended: {error}; metrics.jsonl has every row", file=sys.stderr, flush=True)
        return False


def trackers(folder: Path, project: str, names: Sequence[str]) -> list:
    """accelerate's trackers, each with a run named after this run and stage; those that cannot start are named."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # which they ask whether they are the main process
    name, own = f"{folder.parent.name}-{folder.name}", folder / "tracking"
    given = {
        "tensorboard": {"run_name": project, "logging_dir": own},
        "mlflow": {"experiment_name": project, "run_name": name, "logging_dir": own},
        "wandb": {"run_name": project, "name": name, "dir": str(own)},
        "trackio": {"run_name": project, "name": name},
    }
    own.mkdir(exist_ok=True)
    made = [LOGGER_TYPE_TO_CLASS[each](**given[each]) for each in names]
    return [tracker for tracker in made if _tried(tracker, lambda it: it.start())]


def main(folder: str, project: str, *names: str) -> None:
    """Follow one stage to its end."""
    place = Path(folder)
    try:
        hand_on(rows(place), trackers(place, project, names))
    except C2FError as error:
        print(f"tracking ended: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
