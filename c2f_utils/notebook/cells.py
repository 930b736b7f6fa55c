"""The first and the last cell of every notebook.

`run = notebook.start(globals(), "03_coarse_rlhf")` checks the parameters, finds the inputs, claims the run directory,
seeds, and shows what the notebook runs on; nothing heavy is imported before everything cheap has been checked.
`notebook.finish(run)` marks the stage as done. Views for the cells between are here under one name: `sample_browser`,
`side_by_side`, `LivePanel`.
"""

import os
import random
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from c2f_utils import threads
from c2f_utils.errors import problems
from c2f_utils.files import root
from c2f_utils.notebook.interrupt import hear
from c2f_utils.notebook.opening import deciding, opening
from c2f_utils.notebook.progress import in_words
from c2f_utils.notebook.show import Html
from c2f_utils.report.letters import in_html
from c2f_utils.runs import disk, provenance, registry, work
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.settings import parameters
from c2f_utils.settings.load import load_settings

_SAYS = {
    "fresh": "starting",
    "continue": "continuing where it was interrupted",
    "load": "done before: results are loaded, nothing is computed again",
    "redo": "done anew, as always",
    "replace": "starting; the earlier one is kept beside it",
}
_here: Stage | None = None  # what this kernel works on


def start(namespace: dict[str, object], stage: str) -> Run:
    """Open the run a notebook asks for, with its stage begun (or loaded) as `run.here`.

    `namespace` is the notebook's `globals()`. Raises C2FError, before torch is imported, for unknown or mistyped
    parameters and settings, missing earlier stages, a stage that exists with another configuration or is being
    worked on, and a run folder that cannot be written.
    """
    global _here
    _commands()
    warnings.filterwarnings("ignore", message="IProgress not found")  # library bars fall back to text: no error
    values, wrong = parameters.of_session(namespace)
    if wrong:
        raise problems("the notebook's parameters cannot be used:", wrong)
    wanted = {name: values[name] for name in ("profile", "seed", "run_id", "overrides", "study")}
    run = Run(load_settings(**wanted))
    here = run.stage(stage)
    if _here and _here.dir != here.dir:
        _here.stop()  # the first cell was run again with another run_id
    registry.refuse_unknown(values.get("runs", ()), besides=run.id)
    if name := values.get("sweep"):
        from c2f_utils.report import sweep_results

        sweep_results.read(name)
    if not values["overwrite"]:
        run.refuse_mixture(stage)
    inputs, origins = run.inputs(stage)
    if here.plan(inputs, values["overwrite"]) in ("continue", "load"):
        count = here.config()["threads"]
    else:
        count = threads.requested() or registry.threads_of(run.id) or threads.probe()
    run.device = provenance.device_name()
    action = here.begin(inputs, values["overwrite"], threads=count, device=run.device, parents=origins)
    _here = run.here = here
    if "C2F_BATCH" in os.environ:
        hear(here)
    run.threads = threads.apply(here.threads)
    seed_everything(run.settings.seed)
    _format_tables()
    _show(_table(run, _SAYS[action], origins))
    return run


def finish(run: Run) -> None:
    """Mark the stage as done (or as stopped, when a stop was asked for and seen) and say where its results are."""
    state = run.here.finish()
    again = "; run the notebook again to continue" if state == "stopped" else ""
    print(f"{run.here.name}: {'loaded' if run.here.loaded else state}{again}; results in {_near(run.here.dir)}")


def say(words: Iterable[str]) -> None:
    """Show sentences as paragraphs, whose lines break between words."""
    words = list(words)
    _show(Html("".join(f"<p>{in_html(each)}</p>" for each in words), "\n".join(words)))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _table(run: Run, state: str, origins: dict[str, str]) -> Html:
    settings = run.settings
    rows = {
        "stage": f"{run.here.name}: {state}",
        "run": f"{run.id} (profile {settings.profile}, seed {settings.seed}{', study' if settings.study else ''})",
        "folder": _near(run.here.dir),
        "device": f"{run.device}; {run.threads} of {threads.available()} CPU threads",
    }
    if run.here.loaded:
        made = provenance.code_changes(run.here.provenance())
        rows["made with"] = "code that was not recorded" if made is None else "; ".join(made) or "this code"
    if not run.here.loaded and (needed := run.here.disk_needed()) >= 1e9:
        rows["disk"] = f"about {needed / 1e9:.0f} GB will be written, {disk.free(run.dir) / 1e9:.0f} GB are free"
    if not run.here.loaded and (longest := _longest(run, origins)):
        rows["time"] = longest
    if origins:
        rows["inputs"] = ", ".join(f"{name} of run {origin}" for name, origin in origins.items())
    versions = {"python": provenance.machine()["python"], **provenance.versions()}
    return opening(rows, deciding(settings, run.here.name), versions)


def _longest(run: Run, origins: dict[str, str]) -> str | None:
    base = "01_base_model"
    speeds = work.known(run_folder(origins[base]) / base) if base in origins else None
    found = work.of_stage(run.here.name, run.settings, speeds) if speeds else None
    if not found:
        return None
    return f"at most {in_words(found.seconds(speeds))}, were every answer as long as it may be (speeds as 01 met them)"


def _near(folder: object) -> str:
    """A path as seen from the project, where it lies inside: shorter, and free of this machine's folders."""
    text, base = str(folder), f"{root()}/"
    return text.removeprefix(base)


def _commands() -> None:
    """Have commands that messages name run as they are written in a cell (`c2f table`), or after `!`."""
    folder, known = str(Path(sys.executable).parent), os.environ.get("PATH", "").split(os.pathsep)
    if folder not in known:
        os.environ["PATH"] = os.pathsep.join([folder, *known])
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if shell := get_ipython():
        command = f"{shlex.quote(sys.executable)} -m c2f_utils "
        shell.register_magic_function(lambda line: shell.system(command + line), magic_name="c2f")


def _show(html: Html) -> None:
    try:
        from IPython.display import display
    except ImportError:
        print(html.text)
    else:
        display(html)


def _format_tables() -> None:
    """Have every DataFrame that a later cell shows displayed as `frames` says."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if shell := get_ipython():
        import pandas as pd

        from c2f_utils.notebook.frames import frame

        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, frame)
