"""A damaged file of one run concerns its stage alone: that is listed, is nobody's parent, and stops no other run."""

import json
import socket

import pytest
from test_runs import BASE, make, open_run

from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json
from c2f_utils.headless import jobs
from c2f_utils.runs import locks, registry
from c2f_utils.runs.stage import run_folder

pytestmark = pytest.mark.usefixtures("outputs")

REWARD = "02_reward_model"
KINDS = {
    "empty": b"",
    "cut": b'{"status": "do',
    "not UTF-8": b'{"status": "\xff\xfe"}',
    "null": b"null",
    "a list": b"[1, 2]",
    "deep": b'{"settings": ' + b"[" * 100_000,
    "deep and whole": b'{"settings": ' + b"[" * 300 + b"]" * 300 + b"}",
    "a long number": b'{"threads": ' + b"9" * 5000 + b"}",
    "of another shape": b'{"settings": 1, "status": 2, "inputs": 3}',
    "missing": None,
}


def damage(name: str, kind: str, run_id: str = "a"):
    """Damage one file of a run's base model, which is finished."""
    make(open_run(run_id))
    path = run_folder(run_id) / BASE / name
    path.unlink()
    if KINDS[kind] is not None:
        path.write_bytes(KINDS[kind])
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "status.json", "provenance.json"])
def test_a_damaged_record_is_listed_with_its_reason_and_stops_no_other_run(capsys, name, kind):
    make(open_run("sound"))
    path = damage(name, kind)
    assert main(["table"]) == jobs.DONE
    printed = capsys.readouterr().out
    assert "damaged" in printed and "a/01_base_model" in printed and name in printed
    table = registry.table().set_index("run")
    assert list(table["status"]) == ["damaged", "done"] and str(path) in table.loc["a", "alarms"]
    other = open_run("new")
    assert other.parent(BASE).run_id == "sound" and registry.threads_of("a") is None
    stage = other.stage(REWARD)
    stage.begin(other.inputs(REWARD)[0])
    assert stage.finish() == "done"


@pytest.mark.parametrize("name", ["config.json", "status.json", "provenance.json"])
def test_a_damaged_stage_is_no_parent_and_is_refused_or_set_aside(name):
    path = damage(name, "cut")
    with pytest.raises(C2FError, match="no finished 01_base_model .*it is damaged in run 'a'"):
        open_run().inputs(REWARD)
    with pytest.raises(C2FError, match=f"01_base_model in run 'a' is damaged:\n.*{name}(.|\n)*01_base_model.old-1"):
        open_run().stage(BASE).begin()
    assert path.read_bytes() == KINDS["cut"], "what is left of it is for the user to judge"
    stage = open_run().stage(BASE)
    assert stage.begin(overwrite=True) == "replace" and stage.finish() == "done"
    assert (run_folder("a") / f"{BASE}.old-1" / name).read_bytes() == KINDS["cut"]


def test_damaged_results_make_no_parent_either():
    make(open_run("sound"))
    damage("results.json", "cut")
    assert open_run("new").parent(BASE).run_id == "sound"


def test_a_start_that_was_killed_between_two_files_is_begun_anew():
    path = damage("config.json", "missing")
    status = path.with_name("status.json")
    status.write_text(json.dumps(read_json(status) | {"status": "running"}))
    assert registry.table().empty and open_run().stage(BASE).begin() == "fresh"


def test_the_report_is_redone_over_a_damaged_one():
    make(open_run(), "08_report")
    (run_folder("a") / "08_report" / "status.json").write_bytes(b"")
    stage = open_run().stage("08_report")
    assert stage.begin() == "redo" and stage.finish() == "done"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "missing"])
def test_a_damaged_claim_holds_nobody_up(tmp_path, kind):
    path = tmp_path / "claim"
    path.write_bytes(KINDS[kind])
    assert locks.holder(path, heartbeat_age=0.0) is None and locks.take(path, heartbeat_age=0.0) is None
    assert json.loads(path.read_text()) == locks.owner()


@pytest.mark.parametrize("pid", [10**30, -1, 0])
def test_a_claim_of_no_process_holds_nobody_up(tmp_path, pid):
    (tmp_path / "claim").write_text(json.dumps({"pid": pid, "born": "1", "host": socket.gethostname()}))
    assert locks.take(tmp_path / "claim", heartbeat_age=0.0) is None


@pytest.mark.parametrize(
    "rows", [b"null", b"[1]", b'"text"', b'{"reward": \xff}\n{"reward": 1}', b"[" * 99_999 + b"\n{}"]
)
def test_damaged_metrics_are_an_alarm_and_the_stage_is_as_it_was(rows):
    stage = make(open_run())
    (stage.dir / "metrics.jsonl").write_bytes(rows)
    found = registry.table().iloc[0]
    assert found["status"] == "done" and found["alarms"].startswith("metrics.jsonl is damaged")
