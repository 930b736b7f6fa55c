"""The notebooks of a finished run as a person sees them: a real JupyterLab, a real Chromium, light and dark.

`C2F_FINISHED_RUN` may name the folder of another finished run, say one of `make demo`, to be looked at as well.
"""

import base64
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, chromium, lab, wait
from finished_runs import ROOT, rows, surroundings
from notebooks_for_tests import PARAMETERS, write

from c2f_utils.files import read_json

pytestmark = [
    pytest.mark.slow, pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)"),
]  # fmt: skip
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
GIVEN = os.environ.get("C2F_FINISHED_RUN")
FINISHED = pytest.mark.skipif(not GIVEN, reason="C2F_FINISHED_RUN names no finished run: `make demo` makes one")
WIDTH, TALLEST = 1280, 14_000
FIGURES = {"02_reward_model": 4, "03_coarse_rlhf": 2, "04_length_schedules": 2, "06_residue_merging": 3,
           "07_evaluation": 3, "08_report": 1}  # at least  # fmt: skip
PANEL = "[...(window.jupyterapp?.shell?.widgets('main') ?? [])].find(each => each.content?.widgets)"
CELLS = f"(({PANEL})?.content?.widgets ?? [])"
CODE = f"{CELLS}.filter(cell => cell.model.type == 'code')"
OUTPUTS = f"{CODE}.flatMap(cell => cell.model.outputs.toJSON())"
# Elements of outputs, and the boxes in them, that are wider than the room they have.
WIDE = (
    "[...document.querySelectorAll('.jp-OutputArea-output, .jp-OutputArea-output div, .jp-RenderedMarkdown')]"
    ".filter(box => box.clientWidth && box.scrollWidth > box.clientWidth + 1)"
    ".map(box => box.scrollWidth + ' > ' + box.clientWidth + ': ' + box.textContent.slice(0, 80))"
)


class Lab:
    """One JupyterLab on a project of its own, with its notebooks, and a tab of a browser in it."""

    def __init__(self, folder: Path, page: Page, address) -> None:
        self.folder, self.page, self.address = folder, page, address

    def open(self, name: str, run_id: str = "smoke", **parameters: object) -> None:
        """A working copy of a notebook with these parameters, profile and seed those of the run, if it is there."""
        notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
        cell = next(cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
        made = self.folder / "outputs" / run_id / "01_base_model" / "config.json"
        settings = read_json(made)["settings"] if made.is_file() else {"profile": "smoke", "seed": 0}
        values = {"profile": settings["profile"], "seed": settings["seed"], "run_id": run_id, **parameters}
        source = "".join(cell["source"])
        for key, value in values.items():  # as a person would: in place
            source = re.sub(rf"(?m)^({key}: .*?) = .*$", rf"\1 = {value!r}", source)
        cell["source"] = source
        (self.folder / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        self.look_at(name)

    def look_at(self, name: str) -> None:
        """Open a notebook of the project, and wait for its kernel."""
        self.page.ask("Page.navigate", url=self.address(f"notebooks/{name}.ipynb") + "&reset")
        session = f"({PANEL})?.sessionContext"
        connected = f"({CELLS}).length && {session}?.session?.kernel?.connectionStatus"
        wait(lambda: self.page.evaluate(connected) == "connected")
        self.page.evaluate(f"window.jupyterapp.shell.activateById(({PANEL}).id)")

    def do(self, command: str, **arguments: object) -> None:
        self.page.evaluate(f"void window.jupyterapp.commands.execute('{command}', {json.dumps(arguments)})")

    def run(self) -> None:
        self.do("notebook:run-all-cells")

    def counts(self) -> list[int | None]:
        return self.page.evaluate(f"{CODE}.map(cell => cell.model.executionCount)")

    def finished(self) -> list[dict]:
        """The outputs, when all cells have been run; at once when one has failed."""
        wait(lambda: self.failures() or self.counts()[-1], 120)
        assert not self.failures()
        return self.outputs()

    def outputs(self) -> list[dict]:
        return self.page.evaluate(OUTPUTS)

    def failures(self) -> list[str]:
        """Errors, and whatever is shown on red."""
        bad = [out for out in self.outputs() if out["output_type"] == "error" or out.get("name") == "stderr"]
        return [str(out)[:2000] for out in bad]

    def text(self) -> str:
        return self.page.evaluate("document.querySelector('.jp-Notebook').innerText")

    def shot(self, name: str) -> None:
        """The whole notebook as pictures, none of them taller than a browser can draw."""
        tall = self.page.evaluate("document.querySelector('.jp-Notebook .jp-WindowedPanel-inner').scrollHeight") + 200
        self.page.ask("Emulation.setDeviceMetricsOverride", width=WIDTH, height=int(min(tall, TALLEST)),
                      deviceScaleFactor=1, mobile=False)  # fmt: skip
        for part, top in enumerate(range(0, tall, TALLEST)):
            self.page.evaluate(f"document.querySelector('.jp-WindowedPanel-outer').scrollTo(0, {top})")
            time.sleep(0.5)  # until everything has been drawn
            found = self.page.ask("Page.captureScreenshot", format="png")
            (self.folder / "shots" / f"{name}{f'_{part}' * bool(part)}.png").write_bytes(
                base64.b64decode(found["data"])
            )
        self.page.ask("Emulation.clearDeviceMetricsOverride")

    def close(self) -> None:
        self.page.evaluate(f"({PANEL}).context.save().then(() => null)")
        self.page.evaluate("window.jupyterapp.serviceManager.sessions.shutdownAll()")


@pytest.fixture(scope="module")
def here(smoke_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "project"
    for each in ("notebooks", "shots"):
        (folder / each).mkdir(parents=True)
    for run_id, run in {"smoke": smoke_run, "finished": GIVEN}.items():
        if run:
            shutil.copytree(run, folder / "outputs" / run_id)
    settings = folder.parent / "own" / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab"
    tracker = settings / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # cells out of sight are there, too
    news = settings / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    environment = surroundings(folder / "outputs")
    environment = {key: value for key, value in environment.items() if key != "C2F_HEADLESS"}
    print(f"screenshots: {folder / 'shots'}")
    started = lab(folder, folder.parent / "own", environment, "--LabApp.expose_app_in_browser=True")
    with started as address, chromium(folder.parent / "profile", WIDTH, 1600) as page:
        yield Lab(folder, page, address)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run_id", ["smoke", pytest.param("finished", marks=FINISHED)])
def test_a_notebook_of_a_finished_run_is_fit_to_be_read(here, run_id, name):
    here.open(name, run_id)
    here.do("application:toggle-left-area")
    here.run()
    outputs = here.finished()
    figures = sum("image/png" in out.get("data", {}) for out in outputs)
    assert figures >= FIGURES.get(name, 0)
    for theme in ("Light", "Dark"):
        here.do("apputils:change-theme", theme=f"JupyterLab {theme}")
        wait(
            lambda theme=theme: (
                here.page.evaluate("document.body.dataset.jpThemeLight") == str(theme == "Light").lower()
            )
        )
        here.shot(f"{run_id}_{name}_{theme.lower()}")
        assert here.page.evaluate(WIDE) == []
    here.close()


def test_03_is_interrupted_and_resumed_and_what_follows_can_be_run(here):
    here.open("03_coarse_rlhf", "stopped", overrides={"coarse.iterations": 40})
    here.run()
    wait(lambda: re.search(r"iteration \d+ of 40", here.text()), 120)
    here.do("notebook:interrupt-kernel")
    here.finished()
    assert "; run again to continue" in here.text() and "of 40; run again" in here.text()
    place = here.folder / "outputs" / "stopped" / "03_coarse_rlhf"
    assert read_json(place / "status.json")["status"] == "stopped"
    here.shot("03_interrupted")
    here.do("notebook:clear-all-cell-outputs")
    here.run()
    wait(lambda: here.failures() or read_json(place / "status.json")["status"] == "done", 120)
    assert here.failures() == [] and read_json(place / "results.json")["iterations"] == 40
    here.close()


def test_the_recipes_of_an_own_law_and_reward_train_to_the_last_cell_with_the_panel(here):
    here.open("03_coarse_rlhf", "own", own_law=True, own_reward=True)
    here.run()
    outputs = here.finished()
    place = here.folder / "outputs" / "own" / "03_coarse_rlhf"
    assert (
        read_json(place / "status.json")["status"] == "done" and read_json(place / "results.json")["law"] == "doubling"
    )
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3 and os.path.exists(place / "figures")
    here.shot("03_own")
    here.close()


DO = "window.pwned = 1"
HOSTILE = (
    f"<script>{DO}</script>", f"<img src=x onerror='{DO}'>", f'"><svg onload="{DO}">', f"[a](javascript:{DO})",
    "A shirt costs $5 and a hat $10", r"\(x^2\) and \[y\]", "$$z$$ `code` **bold** | cell",
    "wire \u202e01$ to\u202c me\u0007",
)  # fmt: skip
TEXT = "\n".join(HOSTILE)
SHOWN = " ".join(re.sub("[\u202e\u202c\u0007]", lambda found: f"⟨U+{ord(found[0]):04X}⟩", TEXT).split())
FOLDER = "<img src=x onerror=window.pwned=1> $5 and a hat $10"  # a name that a folder may have
IMPORTS = """import pandas as pd
from IPython.display import HTML, Markdown
from c2f_utils.files import outputs, read_jsonl
from c2f_utils.report import build
from c2f_utils.report.letters import in_markdown
from c2f_utils.runs.stage import Stage
from c2f_utils.stages import reading
rows = read_jsonl(run.dir / '07_evaluation' / 'samples.jsonl')
text = rows[0]['text']"""
VIEWS = (  # a cell each, which shows the whole text
    "notebook.side_by_side({name: [row for row in rows if row['model'] == name] for name in ('fine', 'base')})",
    "notebook.sample_browser(rows)", "notebook.vote(run)",
    "notebook.vote(run, 'tie', note=text) and notebook.tally(run)", "reading.follow(run, 0)",
    "notebook.say([text])", "pd.DataFrame([{text: text}])",
    "notebook.Progress(text)(1, 9)", "Markdown(in_markdown(text))",
)  # fmt: skip
OTHERS = (
    f"notebook.LivePanel(Stage(outputs() / {FOLDER!r} / '03_coarse_rlhf')).update({{'iteration': 1, 'reward': 0.5}})",
    "try:\n    reading.ask(run, text)\nexcept Exception:\n    get_ipython().showtraceback()",  # refused, in words
    "build.build(run.dir, run.report)\nMarkdown(build.overview(run.dir))",
    "HTML('<img src=y onerror=\"window.executed = 1\">')",  # here what it says is done
)


def test_what_models_and_data_wrote_is_shown_letter_by_letter_and_never_executed(here):
    run = here.folder / "outputs" / "hostile"
    shutil.copytree(here.folder / "outputs" / "smoke", run)
    shutil.rmtree(run / "03_coarse_rlhf" / "snapshots")  # probes are followed instead, and they are text
    kept, found = run / "07_evaluation" / "samples.jsonl", run / "03_coarse_rlhf" / "results.json"
    samples, results = rows(kept), read_json(found)
    asked = list(dict.fromkeys(row["prompt"] for row in [*samples, *results["probes"]]))
    for row in (*samples, *results["probes"]):
        row |= {"text": TEXT, "prompt": f"{asked.index(row['prompt'])} {TEXT}"}
    kept.write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    found.write_text(json.dumps(results), encoding="utf-8")
    (run.with_name(FOLDER) / found.parent.name).mkdir(parents=True)
    shutil.copy(found.with_name("config.json"), run.with_name(FOLDER) / found.parent.name)

    parameters = PARAMETERS.replace('"lab"', '"hostile"')
    write(here.folder / "notebooks", "08_report", IMPORTS, *VIEWS, *OTHERS, parameters=parameters)
    here.look_at("08_report")
    here.run()
    failures = lambda: [out for out in here.failures() if "no words of the embedded domain" not in out]  # noqa: E731
    wait(lambda: here.counts()[-1] or failures(), 120)
    assert failures() == []
    wait(lambda: here.page.evaluate("window.executed"))
    shown = here.page.evaluate(f"{CODE}.map(cell => cell.outputArea.node.textContent.replace(/\\s+/g, ' '))")
    for view, seen in zip((*VIEWS, OTHERS[0]), shown[3:], strict=False):
        assert (FOLDER if view == OTHERS[0] else SHOWN) in seen, view
    made = ("script", "img[src=x]", "svg[onload]", "a[href^=javascript]", "mjx-container")
    inside = ", ".join(f".jp-OutputArea-output {each}" for each in made)
    assert here.page.evaluate(f"document.querySelectorAll('{inside}').length") == 0
    assert here.page.evaluate("typeof window.pwned") == "undefined"
    here.shot("hostile")
    here.close()
    here.page.ask("Page.navigate", url=(run / "report" / "report.html").as_uri())
    wait(lambda: here.page.evaluate("document.readyState == 'complete' && !!document.querySelector('.answers')"))
    assert SHOWN in here.page.evaluate("document.body.textContent.replace(/\\s+/g, ' ')")
    assert here.page.evaluate("typeof window.pwned") == "undefined"
