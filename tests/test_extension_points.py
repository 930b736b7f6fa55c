"""A user's own law, reward and operator: the README's own words are run, each at most ten lines long."""

import json
import linecache
import re
import shutil
from types import SimpleNamespace

import pytest
from finished_runs import ROOT, check_metrics

from c2f_utils import notebook
from c2f_utils.errors import C2FError
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings

STAGE = "03_coarse_rlhf"


def snippet(kind: str) -> str:
    """The README's code block behind `<!-- tested: own KIND -->`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- tested: own {kind} -->\s*\n```python\n(.*?)```", text, flags=re.DOTALL)
    if not found:
        pytest.skip(f"README.md has no code block marked '<!-- tested: own {kind} -->' yet")
    return found[1]


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


@pytest.mark.parametrize("kind", ["law", "reward", "operator"])
def test_the_readme_needs_at_most_ten_lines(kind):
    lines = [line for line in snippet(kind).splitlines() if line.strip()]
    assert len(lines) <= 10, f"{len(lines)} lines"


def test_a_law_of_ones_own_moves_the_limit(project):
    run = begin()
    space = {"run": run}
    exec(snippet("law"), space)
    run.here.finish()
    assert [row["limit"] for row in space["rows"]] == [8, 16, 32] and space["rows"][0]["reason"] == "doubled"
    found = run.here.results()
    check_metrics(found["final"])
    assert found["law"] == "doubling" and found["limits"] == [8, 16, 32]


def test_a_reward_of_ones_own_is_what_the_policy_is_paid_for(project):
    run = begin()
    space = {"run": run}
    exec(snippet("reward"), space)
    run.here.finish()
    own = [row["reward"] for row in space["rows"]]
    assert own != [row["reward"] for row in usual()]
    check_metrics(run.here.results()["final"])


def test_an_operator_of_ones_own_merges(smoke_run, tmp_path):
    from safetensors.torch import load_file

    from c2f_utils import merge

    folders = {
        name: str(next(smoke_run.glob(f"{number}_*/model")))
        for name, number in (("base", "01"), ("coarse", "03"), ("instruct", "05"))
    }
    space = dict(folders)
    exec(snippet("operator"), space)
    merge.run_merge(merge.plan_merge(space["recipe"]), tmp_path / "fine")
    c = space["recipe"].coefficient.default
    theta = {name: load_file(f"{folder}/model.safetensors") for name, folder in folders.items()}
    for name, merged in load_file(tmp_path / "fine" / "model.safetensors").items():
        residue = theta["coarse"][name] - theta["base"][name]
        expected = theta["instruct"][name] + c * residue.clamp(-0.01, 0.01)
        assert (merged - expected).abs().max() < 1e-6, name


def test_the_recipe_of_the_readme_is_planned_without_a_folder_and_merges_with_one(smoke_run, tmp_path, capsys):
    from c2f_utils.__main__ import main

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = re.search(r"<!-- tested: recipe -->\s*\n```yaml\n(.*?)```", text, flags=re.DOTALL)[1]
    (tmp_path / "recipe.yaml").write_text(recipe.replace("outputs/demo", str(smoke_run)))
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


def remembered(own: object) -> str:
    """What notebook 03 writes down of a law or reward to know it again."""
    from c2f_utils.stages import coarse_rlhf

    found = {}
    here = SimpleNamespace(loaded=True, add_input=lambda name, mark, words: found.update({name: mark}))
    assert list(coarse_rlhf.train(SimpleNamespace(here=here, settings=load_settings("smoke")), law=own)) == []
    return found["law"]


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
    made = [typed(text, "Mine")(8) for text in (cell, cell, cell.replace(*change))]
    first, again, edited = (remembered(own) for own in made)
    assert first == again and first != edited


def test_what_an_object_was_made_with_and_what_its_class_inherits_belong_to_it():
    assert remembered(typed(REWARD, "Mine")(1)) != remembered(typed(REWARD, "Mine")(2))
    below = "\nclass Below(Mine):\n    pass\n"
    former, later = (typed(text + below, "Below")(8) for text in (LAW, LAW.replace("2 *", "3 *")))
    assert remembered(former) != remembered(later)
    sessions = {}, {}
    for space in sessions:  # without lines to read, and each at another address
        exec(REWARD, space)
    first, next_one = (remembered(space["Mine"](1)) for space in sessions)
    assert first == next_one, "equal in the next session"
