"""A user's own law, reward and operator: the ready cells of notebooks 03 and 06 are switched on and run to the end."""

import json
import linecache
import re
import shutil

import pytest
from finished_runs import ROOT, c2f, check_metrics, finished

from c2f_utils import notebook
from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings

STAGE, MERGING = "03_coarse_rlhf", "06_residue_merging"


def cell(stage: str, word: str, kind: str = "code") -> str:
    """The source of the notebook's cell that holds `word`."""
    cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = ["".join(each["source"]) for each in cells if each["cell_type"] == kind and word in "".join(each["source"])]
    assert len(found) == 1, f"{len(found)} cells of {stage} hold {word!r}"
    return found[0]


OWN = {
    "law": (STAGE, "class Doubling"),
    "reward": (STAGE, "def short_and_varied"),
    "operator": (MERGING, "def clipped"),
}


@pytest.fixture
def project(smoke_run, tmp_path, monkeypatch):
    """A private copy of the finished parents."""
    for name in ("01_base_model", "02_reward_model"):
        shutil.copytree(smoke_run / name, tmp_path / "r" / name)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))


def begin(run_id: str = "r", overwrite: bool = False) -> Run:
    run = Run(load_settings("smoke", run_id=run_id))
    run.here = run.stage(STAGE)
    run.here.begin(run.inputs(STAGE)[0], overwrite)
    notebook.seed_everything(0)
    return run


def usual(run_id: str = "usual") -> list[dict]:
    from c2f_utils.stages import coarse_rlhf

    run = begin(run_id)
    rows = list(coarse_rlhf.train(run))
    run.here.finish()
    return rows


@pytest.mark.parametrize("kind", OWN)
def test_each_takes_at_most_ten_lines(kind):
    lines = [line for line in cell(*OWN[kind]).splitlines() if line.strip()]
    assert len(lines) <= 10, f"{len(lines)} lines"


@pytest.mark.slow
def test_the_law_and_the_reward_of_notebook_03_run_to_its_last_cell_and_the_table_names_them(project, tmp_path, capsys):
    flags = ("-p", "own_law=True", "-p", "own_reward=True")
    finished(tmp_path, "run", "03", "--profile", "smoke", "--run-id", "r", *flags)
    folder = tmp_path / "r" / STAGE
    found = json.loads((folder / "results.json").read_text())
    check_metrics(found["final"])
    assert found["law"] == "doubling" and found["limits"] == [8, 16, 32], "the visible iteration moves a copy"
    assert (folder / "figures" / "training_panel.png").is_file()
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["reason"] == "doubled"
    assert [row["reward"] for row in logged] != [row["reward"] for row in usual()], "paid by another function"
    assert main(["table", "--run-id", "r"]) == 0
    said = capsys.readouterr().out
    assert "own law Doubling(limit=8" in said and "own reward short_and_varied" in said


def test_the_visible_iteration_leaves_the_training_what_it_is(project, smoke_run):
    """What it draws, trains and moves is thrown away: neither seeds nor the law of the training feel it."""
    import torch

    from c2f_utils import limits
    from c2f_utils.stages import coarse_rlhf
    from c2f_utils.stages.inputs import Inputs

    run, law = begin("r"), limits.Fixed(9)
    small = coarse_rlhf.small_trainer(Inputs(run), law, prompts=4)
    small.step()
    torch.rand(7)
    assert small.iteration == 1 and law == limits.Fixed(9) and law.reason == "start"
    assert not list(run.here.dir.rglob("checkpoints"))
    list(coarse_rlhf.train(run))
    run.here.finish()
    assert (run.here.dir / "results.json").read_bytes() == (smoke_run / STAGE / "results.json").read_bytes()


@pytest.mark.slow
def test_the_operator_of_notebook_06_is_swept_chosen_and_merged(smoke_run, tmp_path):
    from safetensors.torch import load_file

    numbers = {"base": "01", "coarse": "03", "instruct": "05", "fine": "06"}
    for stage in sorted(smoke_run.glob("0[1-5]_*")):
        shutil.copytree(stage, tmp_path / "r" / stage.name)
    finished(tmp_path, "run", "06", "--profile", "smoke", "--run-id", "r", "-p", "own_operator=True")
    run = tmp_path / "r"
    chosen = json.loads((run / MERGING / "results.json").read_text())["chosen"]
    assert chosen["operator"] == {"name": "clipped"}
    theta = {k: load_file(next(run.glob(f"{n}_*/model/model.safetensors"))) for k, n in numbers.items()}
    for name, merged in theta["fine"].items():
        residue = theta["coarse"][name] - theta["base"][name]
        expected = theta["instruct"][name] + chosen["coefficient"] * residue.clamp(-0.01, 0.01)
        assert (merged - expected).abs().max() < 1e-6, name
    refused = c2f(tmp_path, "run", "06", "--profile", "smoke", "--run-id", "r")
    assert refused.returncode == 1 and "begun with another operator" in refused.stderr


def test_a_merge_made_with_another_operator_is_not_shown_as_ones_own(smoke_run, tmp_path, monkeypatch):
    """A stage of a time when no operator was recorded."""
    from c2f_utils.stages.residue_merging import Merging

    shutil.copytree(smoke_run, tmp_path / "r")
    path = tmp_path / "r" / MERGING / "provenance.json"
    record = json.loads(path.read_text())
    del record["inputs"]["operator"]
    path.write_text(json.dumps(record))
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    run = Run(load_settings("smoke", run_id="r"))
    run.here = run.stage(MERGING)
    assert run.here.begin(run.inputs(MERGING)[0]) == "load"
    space = {}
    exec(cell(*OWN["operator"]), space)
    with pytest.raises(C2FError, match="was made with operator 'residue', not 'clipped'"):
        Merging(run, space["own"])
    assert Merging(run).finish() == run.here.results(), "loaded"


def test_the_recipe_of_notebook_06_is_planned_without_a_folder_and_merges_with_one(smoke_run, tmp_path, capsys):
    recipe = re.search(r"```yaml\n(.*?)```", cell(MERGING, "# recipe.yaml", "markdown"), flags=re.DOTALL)[1]
    (tmp_path / "recipe.yaml").write_text(recipe.replace("outputs/lab", str(smoke_run)))
    assert main(["merge", str(tmp_path / "recipe.yaml"), "--plan"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "recipe.yaml")]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "fine"), "--verify"]) == 0
    assert "verified: " in capsys.readouterr().out and (tmp_path / "fine" / "model.safetensors").is_file()


def test_own_laws_and_rewards_are_recorded_and_never_mixed(project):
    from c2f_utils import limits
    from c2f_utils.stages import coarse_rlhf

    usual("r")
    for own in ({"law": limits.Fixed(9)}, {"reward": lambda samples: [0.0] * len(samples)}):
        with pytest.raises(C2FError, match=f"begun with another {next(iter(own))}"):
            list(coarse_rlhf.train(begin(), **own))
    assert list(coarse_rlhf.train(begin())) == [], "the same again is loaded"
    run = begin("other")
    list(coarse_rlhf.train(run, law=limits.Fixed(9)))
    run.here.finish()
    inputs = json.loads((run.here.dir / "provenance.json").read_text())["inputs"]
    assert {"law", "reward"} <= set(inputs)
    with pytest.raises(C2FError, match="begun with another law") as caught:
        list(coarse_rlhf.train(begin("other"), law=limits.Fixed(10)))
    for part in ("Fixed(limit=9", "then, Fixed(limit=10", "overwrite=True", "03_coarse_rlhf.old-1"):
        assert part in str(caught.value), caught.value
    assert list(coarse_rlhf.train(begin("other"), law=limits.Fixed(9))) == []


def test_overwrite_sets_a_run_under_another_law_aside_whether_done_or_not(project, tmp_path):
    from c2f_utils import limits
    from c2f_utils.stages import coarse_rlhf

    def paid(samples):
        return [0.0] * len(samples)

    for limit, reward in ((9, None), (10, None), (10, paid), (11, paid)):
        run = begin(overwrite=True)
        assert [row["limit"] for row in coarse_rlhf.train(run, law=limits.Fixed(limit), reward=reward)] == [limit] * 3
        if limit != 10 or reward:  # the second is left unfinished
            run.here.finish()
        else:
            run.here.release()
        inputs = run.here.provenance()["inputs"]
        assert {"01_base_model", "02_reward_model", "law", "reward"} <= set(inputs)
    assert list(coarse_rlhf.train(begin(overwrite=True), law=limits.Fixed(11), reward=paid)) == [], "the same is loaded"
    kept = [json.loads((tmp_path / "r" / f"{STAGE}.old-{k}" / "results.json").read_text())["limits"] for k in (1, 2, 3)]
    assert kept == [[9] * 3, [10] * 3, [10] * 3]
    assert run.here.results()["limits"] == [11] * 3


def test_04_calls_an_actor_of_03_by_the_law_it_was_trained_under(project, monkeypatch):
    from c2f_utils.stages import coarse_rlhf, length_schedules

    run = begin()
    list(coarse_rlhf.train(run, law=typed(LAW, "Mine")(8)))
    run.here.finish()
    later = Run(load_settings("smoke", run_id="r", study=True))
    later.here = later.stage("04_length_schedules")
    later.here.begin(later.inputs("04_length_schedules")[0])
    # Private seams, for time: what is promised is which laws are asked for, and training them would take a minute.
    monkeypatch.setattr(length_schedules, "_one", lambda *_: run.here.results())
    monkeypatch.setattr(length_schedules, "_baseline", lambda *_: None)
    laws = length_schedules.make(later)["laws"]
    assert laws["logistic"]["label"] == "own law mine" and laws["logistic"]["law"] == {"name": "mine"}
    assert list(laws["logistic"]["seeds"]) == ["0"], "the settings' law under other seeds is another law"
    assert list(laws["fixed_long"]["seeds"]) == ["0", "1", "2"] and laws["fixed_long"]["label"] == "fixed 32"


def typed(cell: str, name: str) -> type:
    """A class as a notebook cell makes it: in `__main__`, without a file, its lines where IPython keeps them."""
    file = f"<cell {hash(cell)}>"
    linecache.cache[file] = (len(cell), None, cell.splitlines(keepends=True), file)
    space = {"__name__": "__main__"}
    exec(compile(cell, file, "exec"), space)
    return space[name]


LAW = """
from c2f_utils.limits import Law
class Mine(Law):
    maximum = 32
    def update(self, signals):
        self.limit = min(self.maximum, 2 * self.limit)
        return self.limit
"""
REWARD = """
class Mine:
    per_word = 0.1
    def __init__(self, price):
        self.price = price
    def __call__(self, samples):
        return [self.per_word - self.price * s.tokens for s in samples]
"""


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        (LAW, ("2 * self.limit", "3 * self.limit")),
        (LAW, ("maximum = 32", "maximum = 64")),
        (REWARD, ("s.tokens", "len(s.ids)")),
        (REWARD, ("per_word = 0.1", "per_word = 0.2")),
    ],
)
def test_an_edited_class_typed_in_a_notebook_is_another_one(cell, change):
    from c2f_utils.stages.own_parts import identity

    made = [typed(text, "Mine")(8) for text in (cell, cell, cell.replace(*change))]
    first, again, edited = (identity(own) for own in made)
    assert first == again and first != edited


def test_what_an_object_was_made_with_and_what_its_class_inherits_belong_to_it():
    from c2f_utils.stages.own_parts import identity

    assert identity(typed(REWARD, "Mine")(1)) != identity(typed(REWARD, "Mine")(2))
    below = "\nclass Below(Mine):\n    pass\n"
    former, later = (typed(text + below, "Below")(8) for text in (LAW, LAW.replace("2 *", "3 *")))
    assert identity(former) != identity(later)
    without_lines = {}
    exec(REWARD, without_lines)
    assert "0x" not in str(identity(without_lines["Mine"](1))), "equal in the next session"
