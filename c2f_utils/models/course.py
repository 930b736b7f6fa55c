"""The course of a library trainer's run: checkpoints, stops on request, progress. A kill costs a minute."""

from collections.abc import Callable
from pathlib import Path
from time import monotonic

from transformers import TrainerCallback

from c2f_utils.errors import Stopped
from c2f_utils.files import write_json
from c2f_utils.models.library_trainers import fit

WHOLE = "whole.json"  # in every checkpoint folder, written last: a checkpoint that has it is whole
EVERY = 60.0  # seconds between checkpoints


class Course(TrainerCallback):
    """Saves (to the trainer's `output_dir`, if `saves`), stops and reports at the end of optimiser steps."""

    def __init__(self, saves: bool, stop: Callable[[], bool], progress: Callable[[int, int], None]):
        self.saves, self.stop, self.progress = saves, stop, progress

    def on_train_begin(self, args, state, control, **_):
        self.saved = monotonic()

    def on_step_end(self, args, state, control, **_):
        self.progress(state.global_step, state.max_steps)
        stop = self.stop()
        control.should_training_stop |= stop
        control.should_save = self.saves and (stop or monotonic() - self.saved >= EVERY)

    def on_save(self, args, state, control, **_):
        write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE, {"step": state.global_step})
        self.saved = monotonic()


def run(
    trainer,
    what: str,
    log: Callable[[dict], None],
    folder: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train, from the newest whole checkpoint in `folder`, the trainer's output folder, on (None keeps none).

    `log` receives {"step", "loss"} rows, `progress` the steps done and all steps. Raises Stopped, with a checkpoint
    written, when `stop` says so before the last step.
    """
    trainer.add_callback(Course(folder is not None, stop, progress))
    found = latest(folder) if folder else None
    fit(trainer, log, str(found) if found else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise Stopped(f"{what}: stopped after step {state.global_step} of {state.max_steps}; run again to continue")


def latest(folder: Path, last: str = WHOLE) -> Path | None:
    """The newest whole checkpoint of a library trainer, one with the file `last` in it; None without one."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{last}")]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
