"""The cells of docs/recipes.md, run in their notebooks on `smoke`: each recipe is at most two."""

import json
import re
import shutil
import subprocess
import threading

import pytest
from browser import wait
from finished_runs import ROOT, rows
from IPython.core.interactiveshell import InteractiveShell

from c2f_utils.__main__ import main
from c2f_utils.files import read_json
from c2f_utils.stages.evaluation import LABELS

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", PAGE))


def blocks(recipe: str) -> list[str]:
    return re.findall(r"(?s)```python\n(.*?)\n```", RECIPES[recipe])


@pytest.fixture(scope="module")
def outputs_of_all(smoke_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(smoke_run, folder / "lab")
    return folder


class Notebook:
    """A notebook of the project as a person runs it: cell by cell, in one session."""

    def __init__(self, shell: InteractiveShell, recipe: str) -> None:
        self.shell, self.codes = shell, []
        shell.system = lambda command: self.codes.append(subprocess.run(command, shell=True, cwd=ROOT).returncode)
        number = re.search(r"(?i)notebook (\d\d)", RECIPES[recipe])[1]
        (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        self.cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]

    def run(self, *cells: str) -> object:
        """What the last of these cells shows."""
        for cell in cells:
            done = self.shell.run_cell(cell)
            done.raise_error()
        return done.result

    def start(self, parameters: str = "") -> None:
        self.run(self.cells[0], f'profile = "smoke"\n{parameters}', self.cells[1])

    def run_all(self, parameters: str, law: str | None = None) -> None:
        self.start(parameters)
        self.run(*(law if law and "(Law):" in cell else cell for cell in self.cells[2:]))


@pytest.fixture
def opened(outputs_of_all, monkeypatch):
    monkeypatch.setenv("C2F_OUTPUTS", str(outputs_of_all))
    monkeypatch.chdir(ROOT / "notebooks")
    yield lambda recipe: Notebook(InteractiveShell.instance(colors="nocolor"), recipe)
    InteractiveShell.clear_instance()


def test_no_recipe_takes_more_than_two_cells():
    assert len(RECIPES) == 8 and all(1 <= len(blocks(recipe)) <= 2 for recipe in RECIPES)


@pytest.mark.parametrize("recipe", ["Change the law", "Write a law of your own"])
def test_a_law_is_changed_or_written(opened, outputs_of_all, recipe):
    notebook = opened(recipe)
    notebook.run_all(*blocks(recipe))
    stage = notebook.run("run.here.dir")
    assert read_json(stage / "status.json")["status"] == "done" and stage.parent.parent == outputs_of_all
    assert read_json(stage / "results.json")["law"] == ("useful" if stage.parent.name == "useful" else "patient")


def test_two_runs_are_compared(opened):
    recipe = "Compare two runs"
    training = opened("Change the law")
    training.run_all(*blocks("Change the law"))  # loaded, where the test above has made it
    notebook = opened(recipe)
    notebook.start()
    view, command = blocks(recipe)
    shown = notebook.run(view, "compare.view(run.dir, ['useful'])")
    assert len(shown) >= 2 and "coarse.law" in shown[0].to_string()
    notebook.run(command)
    assert notebook.codes == [0]


def test_three_seeds_are_swept(opened):
    command, view = blocks("Sweep three seeds")
    notebook = opened("Sweep three seeds")
    notebook.start()
    notebook.run(f"{command} --profile smoke --threads 1")
    assert notebook.codes == [0]
    notebook.run(view)
    figure, table = notebook.run("figures_sweep.view(run, 'three')")
    assert set(table["seeds"]) == {3} and len(figure.axes) >= 1


def test_a_prompt_is_followed(opened):
    notebook = opened("Follow one prompt through training")
    notebook.start()
    assert notebook.run(*blocks("Follow one prompt through training")).markup.count("iteration ") >= 2


def test_pupils_of_the_coarse_actor_are_kept_and_set_beside_the_merge(opened, outputs_of_all):
    recipe = "Let the Coarse Actor teach"
    notebook = opened(recipe)
    notebook.run_all(*blocks(recipe))
    place = outputs_of_all / "taught" / "06_residue_merging"
    said = read_json(place / "results.json")["controls"]
    for name in ("shortest_correct", "distilled"):
        assert (place / "controls" / name / "model.safetensors").exists() and said[name]["rollout_tokens"] > 0
    beside = Notebook(notebook.shell, "Vote blind")
    beside.run_all(*blocks(recipe))
    table = beside.run("tables_rivals.rivals_table(run.here)").set_index("model")
    assert {LABELS[name] for name in ("fine", "shortest_correct", "distilled")} <= {*table.index}


def test_training_is_stopped_and_resumed(opened, outputs_of_all):
    parameters, command = blocks("Stop and resume")
    notebook, place = opened("Stop and resume"), outputs_of_all / "slow" / "03_coarse_rlhf"
    metrics = place / "metrics.jsonl"
    stop = threading.Thread(
        target=lambda: wait(lambda: metrics.exists() and rows(metrics)) and main(command.removeprefix("c2f ").split())
    )
    stop.start()
    notebook.run_all(parameters)
    stop.join()
    assert read_json(place / "status.json")["status"] == "stopped" and 0 < len(rows(metrics)) < 40
    notebook.run_all(parameters)
    assert read_json(place / "status.json")["status"] == "done"
    assert [row["iteration"] for row in rows(metrics)] == [*range(1, 41)]


def test_votes_are_cast_blind_and_counted(opened):
    notebook = opened("Vote blind")
    notebook.start()
    vote, tally = blocks("Vote blind")
    assert "0 of" in notebook.run("notebook.vote(run)").text
    assert "1 of" in notebook.run(vote).text and "2 of" in notebook.run(vote).text
    assert "2 votes on 2 prompts" in notebook.run(tally).text
