"""A stage knows the code and the packages it ran: loaded under others it says so, half done it is not continued by
them unless that is asked for."""

import json
import re
import shutil

import pytest
from test_runs import BASE, make, open_run

from c2f_utils.errors import C2FError
from c2f_utils.notebook import cells
from c2f_utils.runs import provenance

pytestmark = pytest.mark.usefixtures("outputs")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that stands for the one at work; call it to change a file as an editor would."""
    copy = shutil.copytree(provenance.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", copy)
    provenance.code_digest.cache_clear()

    def change(name: str) -> None:
        path = copy / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + "\n# changed\n")
        provenance.code_digest.cache_clear()

    yield change
    provenance.code_digest.cache_clear()


def begun():
    """A stage that has begun and failed."""
    stage = open_run().stage(BASE)
    stage.begin()
    stage.fail("ValueError: boom")
    return stage


def opening(capsys) -> str:
    cells.start({"profile": "smoke", "run_id": "a"}, BASE)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["coarse/ppo.py", "settings/profiles/smoke.yaml", "new_room.py"])
def test_a_half_done_stage_is_not_continued_under_changed_code(package, monkeypatch, name):
    begun()
    before = provenance.code_digest()
    package(name)
    said = f"code of c2f_utils: {before} there, {provenance.code_digest()} here(.|\n)*{BASE}.old-1"
    with pytest.raises(C2FError, match=f"{said}; C2F_CONTINUE_ANYWAY=1 in the environment continues it all the same"):
        open_run().stage(BASE).begin()
    monkeypatch.setenv("C2F_CONTINUE_ANYWAY", "1")
    stage = open_run().stage(BASE)
    assert stage.begin() == "continue"
    stage.fail("again")
    monkeypatch.delenv("C2F_CONTINUE_ANYWAY")
    assert open_run().stage(BASE).plan() == "continue", "it has run under this code by now"
    digests = [session["code"]["digest"] for session in stage.provenance()["sessions"]]
    assert digests == [before, provenance.code_digest()]


def test_overwrite_begins_it_anew(package):
    begun()
    package("coarse/ppo.py")
    stage = open_run().stage(BASE)
    assert stage.begin(overwrite=True) == "replace"
    stage.finish()


@pytest.mark.parametrize("name", ["__pycache__/ppo.pyc", "coarse/notes.txt"])
def test_what_is_no_code_changes_nothing(package, name):
    begun()
    package(name)
    assert open_run().stage(BASE).plan() == "continue"


def test_another_torch_counts_and_another_matplotlib_does_not(monkeypatch):
    begun()
    usual = provenance.versions()
    monkeypatch.setattr(provenance, "versions", lambda: usual | {"matplotlib": "0.1"})
    assert open_run().stage(BASE).plan() == "continue"
    monkeypatch.setattr(provenance, "versions", lambda: usual | {"torch": "0.1"})
    with pytest.raises(C2FError, match=re.escape(f"torch: {usual['torch']} there, 0.1 here")):
        open_run().stage(BASE).plan()


def test_a_finished_stage_is_loaded_and_the_opening_cell_says_by_what_it_was_made(package, capsys):
    make(open_run())
    assert "made with: this code" in opening(capsys)
    before = provenance.code_digest()
    package("coarse/ppo.py")
    assert f"made with: code of c2f_utils: {before} there, {provenance.code_digest()} here" in opening(capsys)


def test_a_stage_made_before_code_was_recorded_is_loaded_and_continued_with_a_word(capsys):
    for half_done in (False, True):
        stage = begun() if half_done else make(open_run())
        record = stage.provenance()
        for session in record["sessions"]:
            del session["code"]["digest"]
        (stage.dir / "provenance.json").write_text(json.dumps(record))
        if half_done:
            assert open_run().stage(BASE).plan() == "continue"
        else:
            assert "made with: code that was not recorded" in opening(capsys)
            shutil.rmtree(stage.dir)


def test_a_changed_setting_is_what_is_said_first(package):
    begun()
    package("coarse/ppo.py")
    with pytest.raises(C2FError, match="pretrain.tokens") as caught:
        open_run(**{"pretrain.tokens": 7}).stage(BASE).plan()
    assert "C2F_CONTINUE_ANYWAY" not in str(caught.value)
