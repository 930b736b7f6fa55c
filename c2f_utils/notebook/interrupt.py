"""The stop button of a notebook: the first interrupt asks the work to stop where it can be continued."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from c2f_utils.runs.stage import Stage


def hear(stage: Stage) -> None:
    """Let SIGTERM and SIGUSR1 leave a STOP file instead of killing this kernel: Slurm sends them to every process of a
    job, not to its runner alone. Outside the main thread nothing changes."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), lambda _number, _frame: stage.path("STOP").touch())


@contextmanager
def stopping(stage: Stage) -> Iterator[None]:
    """Inside the block a first interrupt leaves a STOP file, as `c2f run` does on a signal; a second one interrupts at
    once. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        stage.path("STOP").touch()
        print("stopping at the next step that can be continued from; interrupt again to stop at once", flush=True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
