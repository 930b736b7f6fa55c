"""`c2f clean` deletes nothing that something kept was made from, or needs by now, and no file of the user's."""

import json
import shutil

import pytest
from test_command_line import old
from test_runs import make, open_run

from c2f_utils.files import read_json
from c2f_utils.headless import clean, sweeps
from c2f_utils.runs.stage import run_folder

BASE, REWARD = "01_base_model", "02_reward_model"


@pytest.fixture
def parent(outputs):
    """The folder of a finished stage without a sign of life for forty days."""
    make(open_run("parent"))
    old(run_folder("parent") / BASE, 40)
    return run_folder("parent") / BASE


def named(days: float = 30) -> list[str]:
    return [f"{each.folder.parent.name}/{each.folder.name}" for each in clean.candidates(days, ["done"])]


def test_what_has_found_a_child_between_question_and_answer_stays(parent):
    make(open_run("other", **{"pretrain.tokens": 5}))
    old(run_folder("other") / BASE, 40)
    found = clean.candidates(30, ["done"])
    assert len(found) == 2
    make(open_run("parent"), REWARD)
    freed, stayed = clean.delete(found, 30, ["done"])
    assert freed > 0 and not run_folder("other").exists()
    assert parent.is_dir() and any("something needs it by now" in line for line in stayed)


@pytest.mark.parametrize("linked", ["child", f"child/{REWARD}"])
def test_a_run_or_stage_behind_a_link_keeps_its_parents_and_is_no_candidate(parent, tmp_path, linked):
    make(open_run("child"), REWARD)
    old(run_folder("child") / REWARD, 40)
    shutil.move(parent.parents[1] / linked, tmp_path / "scratch")
    (parent.parents[1] / linked).symlink_to(tmp_path / "scratch")
    assert named() == []


def test_a_stage_that_stays_without_its_provenance_keeps_all_it_may_have_been_made_from(parent):
    make(open_run("child"), REWARD)
    (run_folder("child") / REWARD / "provenance.json").unlink()
    assert named() == []


def test_a_stage_that_was_set_aside_stays_while_what_was_made_from_it_does(parent):
    child = make(open_run("child"), REWARD)
    aside = parent.rename(parent.with_name(f"{BASE}.old-1"))
    make(open_run("parent"), results={"loss": 2.0})
    old(parent, 40)
    assert named() == []
    old(child.dir, 40)
    assert f"parent/{aside.name}" in named()


def test_the_folder_of_a_run_goes_only_when_nothing_of_the_users_is_in_it(parent):
    run = parent.parent
    for name in ("notes.md", "run.json", f"{BASE}.refused.log", "STOP"):
        (run / name).write_text("{}")
    clean.delete(clean.candidates(30, ["done"]), 30, ["done"])
    assert [path.name for path in run.iterdir()] == ["notes.md"]


def test_a_stage_of_another_run_that_a_waiting_sweep_builds_on_stays(parent):
    make(open_run("parent"), REWARD)
    old(run_folder("parent") / REWARD, 40)
    grid = {"coarse.iterations": [3, 5]}
    sweeps.prepare(sweeps.Wanted("s", ("03_coarse_rlhf",), grid, (0,), "smoke", {}))
    assert named() == []
    record = read_json(run_folder("s") / "sweep.json")
    done = record | {"runs": [run | {"notebooks": []} for run in record["runs"]]}
    (run_folder("s") / "sweep.json").write_text(json.dumps(done))
    assert named() == [f"parent/{BASE}", f"parent/{REWARD}"]
