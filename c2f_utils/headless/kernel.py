"""One notebook in one kernel: run by papermill, ended in words, and kept in its stage's folder.

Whether a stage is done is read from its own status.json: papermill's notebook metadata says `completed` even for a
kernel that was killed.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from c2f_utils.errors import C2FError, CannotWrite, Stopped
from c2f_utils.files import UNPARSABLE, outputs, root
from c2f_utils.runs import registry
from c2f_utils.runs.stage import Stage

_NOISE = re.compile(
    r"Kernel is running over TCP without encryption|IProgress not found|TqdmWarning|notebook_tqdm|it/s\]|s/it\]"
)


@dataclass(frozen=True)
class Job:
    """A notebook to run and the parameter values for it; `threads` where they are not the run's."""

    notebook: Path
    stage: str
    values: dict[str, object]
    threads: int | None = None


@dataclass
class Outcome:
    """How a notebook ended: done, stopped, failed or killed; seconds, the kernel's peak memory in MiB, the error with
    the name of its class and the number of the cell."""

    state: str
    seconds: float = 0.0
    peak_mb: float | None = None
    error: str = ""
    exception: str = ""
    cell: int | None = None

    def __str__(self) -> str:
        memory = f"{self.peak_mb:6.0f} MB" if self.peak_mb else ""
        return f"{self.state:8}{self.seconds:8.1f} s  {memory}".rstrip()


def execute(job: Job, folder: Path, count: int) -> Outcome:
    """Run a notebook to its end, whatever that is, in the run's `folder` on `count` threads; its stage's status then
    says how it ended. Raises C2FError where the folder cannot be written."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    live, log = folder / f"{job.stage}.running.ipynb", folder / f"{job.stage}.running.log"
    seen: dict[str, float] = {}
    began, start = datetime.now(UTC), time.perf_counter()
    outcome = Outcome("done")
    with open(log, "w", encoding="utf-8") as handle, _papermill_log(handle):
        try:
            papermill.execute_notebook(
                str(job.notebook).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                str(live).replace("{", "{{").replace("}", "}}"),
                job.values,
                kernel_name="python3",
                progress_bar=False,
                stdout_file=handle,
                stderr_file=handle,
                start_timeout=300,
                iopub_timeout=120,
                cwd=str(root()),
                kernel_manager_class=_kernel_manager(_environment(count), handle, seen),
            )
        except PapermillExecutionError as error:
            sentence = error.ename in (C2FError.__name__, CannotWrite.__name__)
            what = str(error.evalue) if sentence else f"{error.ename}: {error.evalue}"
            state = "stopped" if error.ename == Stopped.__name__ else "failed"
            words = f"cell {error.exec_count} failed: {what}"
            outcome = Outcome(state, error=words, exception=error.ename, cell=error.exec_count)
        except DeadKernelError as error:
            died = "kernel died (out of memory?)"
            outcome = Outcome("killed", error=died, exception=type(error).__name__, cell=_cell_at_work(live))
        except RuntimeError as error:
            if not str(error).startswith("Kernel "):  # what the client says of one that never answered
                raise
            why = "killed while it started (out of memory?); the same command tries again"
            outcome = Outcome("killed", error=f"the notebook's kernel was {why}. {error}")
        except KeyboardInterrupt:
            outcome = Outcome(
                "killed", error="killed on request", exception="KeyboardInterrupt", cell=_cell_at_work(live)
            )
    outcome.seconds = time.perf_counter() - start
    stage = Stage(folder / job.stage)
    status = {} if stage.damage() else stage.status()
    # A stage that another process began meanwhile is not this kernel's to end, nor is its notebook.
    begun = registry.began_since(stage, began) and status["pid"] == seen.get("pid")
    ours = outcome.state == "done" or begun
    if outcome.state == "done" and status.get("status") == "stopped":
        outcome.state = "stopped"
    elif outcome.state == "done" and status.get("status") != "done":
        outcome.state, outcome.error = "failed", f"{job.stage} ended without finish(): its status is {stage.state()}"
    if begun and outcome.state != "done":
        stage.fail(outcome.error, outcome.state, exception=outcome.exception, cell=outcome.cell)
    outcome.peak_mb = seen.get("peak_mb") or (status.get("peak_mb") if ours else None)
    _keep(live, log, stage.dir if ours and stage.dir.is_dir() else None)
    return outcome


def _cell_at_work(live: Path) -> int | None:
    """The number of the cell after the last one that the kernel answered for, as the client timed it; papermill's own
    notes on cells are not asked."""
    with contextlib.suppress(OSError, KeyError, TypeError, *UNPARSABLE):
        cells = json.loads(live.read_text(encoding="utf-8"))["cells"]
        return 1 + sum("shell.execute_reply" in cell["metadata"].get("execution", {}) for cell in cells)


def _keep(live: Path, log: Path, folder: Path | None) -> None:
    """Move the executed notebook and its log into the stage's folder; without one they stay as `.refused`."""
    text = "".join(
        line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if not _NOISE.search(line)
    )
    log.unlink()
    target = folder / "log.txt" if folder else log.with_name(log.name.replace(".running.", ".refused."))
    with open(target, "a" if folder else "w", encoding="utf-8") as handle:
        handle.write(text)
    if live.exists():
        refused = live.with_name(live.name.replace(".running.", ".refused."))
        live.replace(folder / "notebook.ipynb" if folder else refused)


def _environment(count: int) -> dict[str, str]:
    return os.environ | {
        "C2F_BATCH": "1",
        "C2F_HEADLESS": "1",
        "C2F_OUTPUTS": str(outputs()),
        "C2F_THREADS": str(count),
        "OMP_NUM_THREADS": str(count),
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's python3 kernel, not one registered in the home folder
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "TQDM_DISABLE": "1",
    }


def _kernel_manager(environment: dict[str, str], log: IO[str], seen: dict[str, float]) -> type:
    """A kernel manager class that gives the kernel its environment, keeps its messages, and notes its process and peak
    memory."""
    from jupyter_client import AsyncKernelManager

    class Manager(AsyncKernelManager):
        async def start_kernel(self, **kwargs: object) -> None:
            await super().start_kernel(**kwargs | {"env": environment, "stdout": log, "stderr": log})
            seen["pid"] = getattr(self.provisioner, "pid", None)

        async def shutdown_kernel(self, **kwargs: object) -> None:
            process = getattr(self.provisioner, "process", None)
            with contextlib.suppress(OSError, IndexError, AttributeError):  # only Linux tells
                status = Path(f"/proc/{process.pid}/status").read_text()
                seen["peak_mb"] = int(status.split("VmHWM:")[1].split()[0]) / 1024
            await super().shutdown_kernel(**kwargs)

    return Manager


@contextlib.contextmanager
def _papermill_log(handle: IO[str]) -> Iterator[None]:
    logger, handler = logging.getLogger("papermill"), logging.StreamHandler(handle)
    handler.handleError = lambda record: None  # a full disk is said once, by the notebook that cannot be written
    before, logger.handlers, logger.propagate = logger.handlers, [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, True
