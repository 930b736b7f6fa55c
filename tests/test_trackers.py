"""Trackers see every row, decide nothing, and cannot hold a stage up; metrics.jsonl is the truth."""

import importlib.metadata
import json
import time

import pytest
from test_runs import BASE, make, open_run

from c2f_utils.errors import C2FError
from c2f_utils.files import append_jsonl, read_json
from c2f_utils.runs import trackers
from c2f_utils.settings.config import STAGES
from c2f_utils.settings.load import load_settings

pytestmark = pytest.mark.usefixtures("outputs")

# A package as accelerate's tracker for trackio expects it.
STUB = """
import json, os, time

class Run:
    def log(self, values, step=None):
        if os.environ["STUB"] == "fails":
            raise ConnectionError("no network")
        if os.environ["STUB"] == "hangs":
            time.sleep(1000)
        self.file.write(json.dumps([step, values]) + "\\n")

    def finish(self):
        self.file.close()
        os.rename(os.environ["STUB_FILE"] + ".tmp", os.environ["STUB_FILE"])

def init(project, name=None, **_):
    run = Run()
    run.config = {}
    run.file = open(os.environ["STUB_FILE"] + ".tmp", "w")
    run.file.write(json.dumps([project, name]) + "\\n")
    return run
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A package `trackio` that writes down what it is told, raises, or never answers."""
    folder = tmp_path / "packages"
    (folder / "trackio-1.0.dist-info").mkdir(parents=True)
    (folder / "trackio-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n")
    (folder / "trackio.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(folder))
    return tmp_path


def wait(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_tracker_sees_every_row_and_one_that_fails_or_hangs_holds_nothing_up(stub, monkeypatch, capfd):
    monkeypatch.setattr(trackers, "LAST_WORDS", 1)
    started = []
    real = trackers.follow
    monkeypatch.setattr(trackers, "follow", lambda *given: started.append(real(*given)))
    for kind in ("records", "fails", "hangs"):
        monkeypatch.setenv("STUB", kind)
        monkeypatch.setenv("STUB_FILE", str(stub / kind))
        stage = open_run(kind, **{"tracking": {"to": ["trackio"], "project": "mine"}}).stage(BASE)
        began = time.monotonic()
        stage.begin()
        stage.log({"iteration": 1, "reward": 0.5, "reason": "words", "missing": None})
        stage.log({"iteration": 2, "reward": 0.75, "seed": 3, "law": "logistic"})
        stage.save_results({"loss": 1.0})
        assert stage.finish() == "done" and time.monotonic() - began < 2, "nobody waits for a tracker"
    wait((stub / "records").exists)
    said, *rows = [json.loads(line) for line in (stub / "records").read_text().splitlines()]
    assert said == ["mine", f"records-{BASE}"]
    assert rows == [[1, {"reward": 0.5}], [2, {"logistic/3/reward": 0.75}]]
    wait(lambda: started[0].poll() is not None and started[1].poll() is not None)
    said = capfd.readouterr().err
    assert said.count("tracking by trackio ended: no network") == 1 and "Traceback" not in said
    started[2].kill()
    for kind in ("fails", "hangs"):
        assert open_run(kind).stage(BASE).state() == "done"
    assert read_json(stage.dir / "config.json")["settings"].keys() == {"profile", "seed", "models", "data", "pretrain"}


class Fake:
    def __init__(self, name: str, fails_at: int | None = None) -> None:
        self.name, self.fails_at, self.rows, self.over = name, fails_at, [], False

    def log(self, values: dict, step: int) -> None:
        if step == self.fails_at:
            raise OSError("disk full")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.over = True


def test_of_two_trackers_one_that_fails_is_named_once_and_the_other_goes_on(capsys, monkeypatch):
    alarms = []
    monkeypatch.setattr(trackers.signal, "alarm", alarms.append)
    good, bad = Fake("good"), Fake("bad", fails_at=2)
    trackers.hand_on(((step, {"x": step}) for step in (1, 2, 3)), [bad, good])
    assert good.rows == [(1, {"x": 1}), (2, {"x": 2}), (3, {"x": 3})] and good.over
    assert bad.rows == [(1, {"x": 1})] and not bad.over
    assert capsys.readouterr().err.count("bad") == 1 and alarms == [trackers.LAST_WORDS]


def test_rows_of_a_continued_stage_are_shown_anew_from_where_it_dropped_them(monkeypatch):
    stage = open_run().stage(BASE)
    stage.begin()
    stage.log({"iteration": 1, "x": 1})
    stage.log({"iteration": 2, "x": 2})
    looks = iter([lambda: (stage.path("metrics.jsonl").write_text(""), stage.log({"iteration": 1, "x": 1}))])
    looks = iter([*looks, lambda: stage.log({"iteration": 2, "x": 5}), lambda: (stage.log({"x": 9}), stage.finish())])
    monkeypatch.setattr(trackers.time, "sleep", lambda _: next(looks)())
    found = list(trackers.rows(stage.dir))
    assert found == [(1, {"x": 1}), (2, {"x": 2}), (2, {"x": 5}), (3, {"x": 9})]


def test_following_ends_when_the_process_of_the_stage_is_gone(monkeypatch):
    stage = make(open_run())
    append_jsonl(stage.dir / "metrics.jsonl", {"x": 1})
    status = read_json(stage.dir / "status.json") | {"status": "running", "born": "another"}
    (stage.dir / "status.json").write_text(json.dumps(status))
    monkeypatch.setattr(trackers.time, "sleep", lambda _: pytest.fail("it would wait for ever"))
    assert list(trackers.rows(stage.dir)) == [(1, {"x": 1})]


def test_a_tracker_that_is_not_installed_is_refused_before_work(monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("wandb", "mlflow"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(C2FError, match="tracking.*not installed: wandb, mlflow; pip install wandb mlflow"):
        load_settings("smoke", overrides={"tracking.to": ["wandb", "mlflow"]})
    with pytest.raises(C2FError, match="tracking.to"):
        load_settings("smoke", overrides={"tracking.to": ["paper"]})
    with pytest.raises(C2FError, match="tracking.api_key"):
        load_settings("smoke", overrides={"tracking.api_key": "x"})


def test_a_tracker_decides_no_result_and_no_stage_is_made_anew_for_it(stub, monkeypatch):
    monkeypatch.setattr(trackers, "follow", lambda *_: None)
    make(open_run())
    tracked = open_run(**{"tracking.to": ["trackio"]})
    assert tracked.stage(BASE).plan() == "load"
    for stage in STAGES:
        assert tracked.settings.for_stage(stage) == open_run().settings.for_stage(stage)


@pytest.mark.parametrize("name", ["tensorboard"])
def test_a_real_tracker_shows_the_rows(name, monkeypatch):
    pytest.importorskip(name)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real, started = trackers.follow, []
    monkeypatch.setattr(trackers, "follow", lambda *given: started.append(real(*given)))
    stage = open_run(**{"tracking.to": [name]}).stage(BASE)
    stage.begin()
    for step in (1, 2, 3):
        stage.log({"iteration": step, "reward": step / 2})
    stage.finish()
    assert started[0].wait(120) == 0
    shown = EventAccumulator(str(stage.dir / "tracking" / "c2f"))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("reward")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
