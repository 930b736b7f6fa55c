"""`c2f` beyond `run`: runs are listed, shown, stopped, gone on with, repeated and cleaned, and each says the truth."""

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta

import pytest
from finished_runs import c2f
from test_runs import BASE, make, open_run

from c2f_utils import weights
from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, root, sha256
from c2f_utils.headless import again, clean, jobs, request
from c2f_utils.headless.kernel import Job
from c2f_utils.runs import index, locks, provenance, registry
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import run_folder
from c2f_utils.settings.load import load_settings

REWARD, COARSE = "02_reward_model", "03_coarse_rlhf"


@pytest.fixture
def said(capsys):
    """Run a command; its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


# The index


@pytest.fixture
def always(monkeypatch):
    """An index that is written at once and trusts files of any age."""
    monkeypatch.setattr(index, "WORTH", 1)
    monkeypatch.setattr(index, "_SETTLED", -(10**12))


def test_the_index_is_as_what_it_was_read_from(outputs, always):
    make(open_run("a"))
    make(open_run("b", **{"pretrain.tokens": 999}))
    read = registry.rows()
    assert (outputs / index.FILE).is_file() and [row["changed"] for row in read] == ["", "pretrain.tokens=999"]
    assert registry.rows() == read and registry.latest(BASE, "smoke", 0).run_id == "b"


def test_what_changes_is_noticed(outputs, always):
    made = make(open_run("a"))
    assert [row["status"] for row in registry.rows()] == ["done"]
    (made.dir / "status.json").write_text("{}")
    assert [row["status"] for row in registry.rows()] == ["damaged"] and registry.latest(BASE, "smoke", 0) is None
    shutil.rmtree(made.dir)
    assert registry.rows() == []
    make(open_run("a", **{"pretrain.tokens": 77}))
    assert [row["changed"] for row in registry.rows()] == ["pretrain.tokens=77"]


def test_a_file_too_young_for_its_time_to_tell_is_read_again(outputs, monkeypatch):
    monkeypatch.setattr(index, "WORTH", 1)
    made = make(open_run("a"))
    assert registry.rows()[0]["peak_mb"] > 1
    path, then = made.dir / "status.json", (made.dir / "status.json").stat()
    status = read_json(path)
    path.write_text(path.read_text().replace(f'"peak_mb": {status["peak_mb"]}', f'"peak_mb": {status["peak_mb"] + 1}'))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert path.stat().st_size == then.st_size and registry.rows()[0]["peak_mb"] == status["peak_mb"] + 1


@pytest.mark.parametrize("content", [b"", b"x", b"0 0\n{}", b"\xff\n[1]", None])
def test_a_damaged_index_is_made_anew(outputs, always, content):
    make(open_run("a"))
    before, path = registry.rows(), outputs / index.FILE
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"done"', b'"lost"') if content is None else content)
    assert registry.rows() == before and path.read_bytes() == whole


def test_two_writers_and_a_folder_that_cannot_be_written_do_no_harm(outputs, always, monkeypatch):
    make(open_run("a"))
    registry.rows()
    ours = (outputs / index.FILE).read_bytes()
    make(open_run("b"))
    both = registry.rows()
    (outputs / index.FILE).write_bytes(ours)  # the other writer knew of one run
    assert registry.rows() == both
    monkeypatch.setattr(index, "write_bytes", lambda *_: (_ for _ in ()).throw(index.CannotWrite("full")))
    (outputs / index.FILE).unlink()
    assert registry.rows() == both and not (outputs / index.FILE).exists()


def test_a_stage_that_could_not_be_read_once_is_read_again(outputs, always, monkeypatch):
    make(open_run("a"))
    with monkeypatch.context() as denied:
        denied.setattr(index.records, "whole", lambda folder: (_ for _ in ()).throw(C2FError("Stale file handle")))
        assert [row["status"] for row in registry.rows()] == ["damaged"]
    assert [row["status"] for row in registry.rows()] == ["done"] and registry.latest(BASE, "smoke", 0).run_id == "a"


def test_a_few_runs_need_no_index(outputs):
    make(open_run("a"))
    assert registry.rows() and not (outputs / index.FILE).exists()


# Lists


def test_runs_are_listed_by_stage_profile_and_state_and_as_json(outputs, said):
    make(open_run("a"))
    make(open_run("a"), REWARD)
    make(Run(load_settings("tiny", run_id="b")))
    failed = open_run("c").stage(BASE)
    failed.begin()
    failed.fail("cell 3 failed: ValueError: boom", exception="ValueError", cell=3)
    lines = lambda *arguments: [tuple(line.split()[:2]) for line in said("runs", *arguments)[1].splitlines()[1:]]  # noqa: E731
    assert lines() == [("a", BASE), ("a", REWARD), ("b", BASE), ("c", BASE)]
    assert lines("--stage", "02") == [("a", REWARD)] and lines("--profile", "tiny") == [("b", BASE)]
    assert lines("--status", "failed,lost") == [("c", BASE)] and lines("--run-id", "a") == [("a", BASE), ("a", REWARD)]
    assert "none of 4 stages" in said("runs", "--status", "running")[1]
    rows = json.loads(said("runs", "--json", "--stage", BASE)[1])
    assert [(row["run"], row["status"]) for row in rows] == [("a", "done"), ("b", "done"), ("c", "failed")]
    assert said("table") == said("runs")


def test_a_run_is_shown_with_its_reasons_parents_and_settings(outputs, said):
    make(open_run("a"))
    run = open_run("b", **{"reward.pairs": 40})
    made = run.stage(REWARD)
    made.begin(*run.inputs(REWARD)[:1], parents=run.inputs(REWARD)[1])
    made.note(alarms=["the reward is flat"])
    made.fail("kernel died in cell 7", "killed", exception="DeadKernelError", cell=7)
    code, text = said("show", "b")
    assert code == 0
    for part in (
        "02_reward_model: killed", "DeadKernelError (cell 7): kernel died in cell 7", "01_base_model of run a",
        "reward.pairs=40", "alarms: the reward is flat", "status.json",
    ):  # fmt: skip
        assert part in text, text
    assert "loss = 1" in said("show", "a", "01")[1]
    assert "02_reward_model has not begun in run 'a'; there are: 01_base_model" in said("show", "a", "02")[1]


# Resume


def test_what_a_run_was_asked_for_is_told_from_its_settings_where_it_is_not_recorded(outputs):
    laws = {"fixed_short": None, "mine": {"name": "fixed", "limit": 9}}
    overrides = {
        "pretrain.tokens": 999, "coarse.law": {"name": "fixed", "limit": 20}, "schedules.laws": laws,
        "data.operations": [2, 3], "models.gradient_checkpointing": True,
    }  # fmt: skip
    for name in ("01_base_model", "04_length_schedules"):
        run = Run(load_settings("tiny", 5, "old", overrides, study=name.startswith("04")))
        made = run.stage(name)
        made.begin()
        made.finish()
        values = request.parameters("old", name)
        again = load_settings(**values, run_id="old")
        assert again.for_stage(name) == made.config()["settings"], values
    assert values["study"] and values["overrides"]["schedules.laws"]["mine"]["limit"] == 9
    together = request.parameters("old", "07_evaluation")["overrides"]
    assert together["pretrain.tokens"] == 999 and "coarse.law" in together


def test_a_recorded_request_that_a_notebook_run_by_hand_has_overtaken_does_not_count(outputs, said):
    make(open_run("r", **{"pretrain.tokens": 5}))
    values = {"profile": "smoke", "seed": 0, "study": False, "run_id": "r", "overwrite": True}
    job = Job(root() / f"notebooks/{BASE}.ipynb", BASE, values | {"overrides": {"pretrain.tokens": 5}})
    request.record([job])
    assert "/" not in str(read_json(run_folder("r") / request.FILE)).replace(f"notebooks/{BASE}", "")
    assert request.parameters("r", BASE) == {k: job.values[k] for k in ("profile", "seed", "study", "overrides")}
    assert request.parameters("r", REWARD)["overrides"] == {"pretrain.tokens": 5}, "as the run was begun"
    by_hand = open_run("r", **{"pretrain.tokens": 6}).stage(BASE)
    by_hand.begin(overwrite=True)
    by_hand.finish()
    assert request.parameters("r", BASE)["overrides"] == {"pretrain.tokens": 6}
    (run_folder("r") / request.FILE).write_text("[1]")
    assert request.parameters("r", BASE)["overrides"] == {"pretrain.tokens": 6}
    assert "no command is recorded" in said("run", "--resume", "r")[1]


def test_a_stage_not_begun_takes_the_parameters_of_all_others_where_they_agree(outputs):
    values = {"profile": "smoke", "seed": 0, "study": False, "run_id": "r", "overwrite": False}

    def asked(name: str, **overrides) -> None:
        request.record([Job(root() / f"notebooks/{name}.ipynb", name, values | {"overrides": overrides})])

    asked(COARSE, **{"coarse.iterations": 5})
    asked("05_instruction_model")
    asked("08_report")
    assert request.parameters("r", "06_residue_merging")["overrides"] == {"coarse.iterations": 5}
    asked("04_length_schedules", **{"coarse.iterations": 7})
    with pytest.raises(C2FError, match=r"03_coarse_rlhf \(there\) was asked for otherwise(.|\n)*: 5 there, 7 here"):
        request.parameters("r", "06_residue_merging")
    assert request.parameters("r", "05_instruction_model")["overrides"] == {}, "which is recorded"


# Repeat


def made_by_notebook(run, name: str, results: dict) -> None:
    """A stage as a kernel leaves it, without the kernel."""
    made = run.stage(name)
    inputs, parents = run.inputs(name)
    made.begin(inputs, parents=parents, threads=2)
    made.log({"loss": 1, "seconds": time.perf_counter()})
    made.save_results(results)
    made.finish()
    shutil.copyfile(jobs.notebooks_folder() / f"{name}.ipynb", made.dir / "notebook.ipynb")


@pytest.fixture
def kernels(monkeypatch):
    """No kernel: what the jobs would make is made here, and differs in 02 alone. Returns the jobs that were run."""
    ran = []

    def run(found):
        for job in found:
            ran.append(job)
            values = {name: value for name, value in job.values.items() if name != "overwrite"}
            made_by_notebook(Run(load_settings(**values)), job.stage, {"a": {"b": [1, len(ran)]}, "same": 1})
        return jobs.DONE

    monkeypatch.setattr(jobs, "run", run)
    return ran


def test_a_rerun_says_what_is_identical_and_where_it_differs(outputs, said, kernels, monkeypatch):
    run = open_run("r", **{"pretrain.tokens": 5})
    made_by_notebook(run, BASE, {"a": {"b": [1, 1]}, "same": 1})
    made_by_notebook(run, REWARD, {"a": {"b": [1, 7]}, "same": 1})
    code, text = said("rerun", "r", "--as", "twin")
    assert code == jobs.FAILED and "code, packages and notebooks are the same" in text
    assert [(job.threads, job.values["overrides"]) for job in kernels] == [(2, {"pretrain.tokens": 5}), (2, {})]
    assert "01_base_model/results.json: identical\n" in text and "metrics.jsonl: identical but for its seconds" in text
    assert "02_reward_model/results.json: differs: a.b[1]\n" in text
    assert "there is a run 'twin' already" in said("rerun", "r", "--as", "twin")[1]
    (run_folder("r") / BASE / "notebook.ipynb").write_text('{"cells": [{"cell_type": "code", "source": "1"}]}')
    code, text = said("rerun", "r")
    assert code == jobs.BAD_INPUT and "are not those that 01_base_model ran" in text
    monkeypatch.setattr(provenance, "code_digest", lambda: "0" * 16)
    assert "c2f_utils: " in said("rerun", "r")[1] and not run_folder("r.again").exists()


def test_a_rerun_compares_models_and_names_data_and_weights_that_have_changed(outputs, kernels, tmp_path):
    made = make(open_run("r"))
    record = made.provenance()
    for run_id, digest in (("r", "1"), ("twin", "1"), ("other", "2")):
        folder = run_folder(run_id) / BASE
        folder.mkdir(parents=True, exist_ok=True)
        models = {"model": {"sha256": digest, "bytes": 1}}
        (folder / "provenance.json").write_text(json.dumps(record | {"models": models}))
    assert f"  {BASE}/model: identical" in again.compared(made.dir, run_folder("twin") / BASE)
    assert f"  {BASE}/model: differs in its weights" in again.compared(made.dir, run_folder("other") / BASE)

    for name in ("kept", "altered", "lost"):
        (tmp_path / name).write_text(name)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    inputs = {f"data:{tmp_path / name}": sha256(tmp_path / name) for name in ("kept", "altered", "lost")}
    inputs["weights:base"] = weights.identity(str(model))
    (made.dir / "provenance.json").write_text(json.dumps(record | {"inputs": inputs}))
    config = made.config()
    config["settings"]["models"] = config["settings"].get("models", {}) | {"base": str(model)}
    (made.dir / "config.json").write_text(json.dumps(config))
    assert [*again._changed_inputs(made)] == []
    (tmp_path / "altered").write_text("else")
    (tmp_path / "lost").unlink()
    (model / "model.safetensors").write_bytes(b"22")
    said = [*again._changed_inputs(made)]
    assert len(said) == 3 and "altered, which 01_base_model read, is another one now" in said[0]
    assert "lost, which 01_base_model read, is not there" in said[1] and said[2].startswith("weights:base, ")


def test_a_rerun_of_what_was_made_from_another_run_wants_the_same_parent(outputs, said, kernels):
    make(open_run("first"))
    made_by_notebook(open_run("r"), REWARD, {})
    make(open_run("second"), results={"loss": 2.0})
    code, text = said("rerun", "r")
    assert code == jobs.BAD_INPUT and "made from 01_base_model of run 'first'" in text and "of run 'second'" in text
    assert not kernels


@pytest.mark.slow
def test_a_rerun_of_all_notebooks_is_the_same_bit_for_bit(smoke_run, tmp_path):
    shutil.copytree(smoke_run, tmp_path / "smoke")
    done = c2f(tmp_path, "rerun", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "results.json" in line]
    assert len(lines) == 7 and all(line.endswith(": identical") for line in lines), done.stdout
    again = next(path for path in tmp_path.iterdir() if path.is_dir() and path.name != "smoke")
    for path in (*smoke_run.glob("*/samples.jsonl"), *smoke_run.glob("*/model/*.safetensors")):
        assert path.read_bytes() == (again / path.relative_to(smoke_run)).read_bytes(), path


# Clean


def old(folder, days: float, **fields) -> None:
    """Make a stage look as if its last sign of life were so long ago."""
    then = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="milliseconds")
    path = folder / "status.json"
    path.write_text(json.dumps(read_json(path) | {"heartbeat": then, "finished": then} | fields))


def test_clean_frees_old_stages_and_no_parent_of_what_stays(outputs, said):
    make(open_run("parent"))
    child = open_run("child")
    child_stage = child.stage(REWARD)
    child_stage.begin(*child.inputs(REWARD)[:1], parents=child.inputs(REWARD)[1])
    child_stage.finish()
    make(open_run("alone", **{"pretrain.tokens": 5}))
    for name in ("parent", "alone"):
        old(run_folder(name) / BASE, 40)
    shutil.copytree(run_folder("parent") / BASE, run_folder("parent") / f"{BASE}.old-1")
    before = {path for path in outputs.rglob("*")}
    code, text = said("clean", "--older-than", "30d", "--status", "done", "--dry-run")
    assert code == 0 and "alone/01_base_model" in text and "parent/01_base_model.old-1" in text
    assert "parent/01_base_model\n" not in text and {path for path in outputs.rglob("*")} == before
    assert "nothing in" in said("clean", "--older-than", "50d", "--status", "done", "--dry-run")[1]
    code, text = said("clean", "--older-than", "30d", "--status", "done")
    assert code == jobs.BAD_INPUT and "say --yes" in text and {path for path in outputs.rglob("*")} == before
    assert "MB freed" in said("clean", "--older-than", "30d", "--status", "done", "--yes")[1]
    assert sorted(path.name for path in outputs.iterdir()) == ["child", "parent"]
    assert open_run("child").stage(REWARD).begin(child.inputs(REWARD)[0]) == "load"
    old(child_stage.dir, 35)
    said("clean", "--older-than", "30d", "--status", "done", "--yes")
    assert not list(outputs.rglob("config.json")), "with its child a parent may go, too"


def test_clean_asks_and_leaves_what_is_at_work_in_a_sweep_linked_or_no_stage(outputs, said, monkeypatch):
    for name in ("working", "swept", "unfinished", "idle"):
        make(open_run(name, **{"pretrain.tokens": len(name)}))
        old(run_folder(name) / BASE, 40)
    (run_folder("working") / ".run.claim").write_text(json.dumps(locks.owner() | {"pid": os.getppid()}))
    monkeypatch.setattr(locks, "alive", lambda who, age: who["pid"] == os.getppid())
    (outputs / "sweep").mkdir()
    runs = [{"run": "swept", "notebooks": [BASE]}, {"run": "unfinished", "notebooks": [BASE, REWARD]}]
    (outputs / "sweep" / "sweep.json").write_text(json.dumps({"runs": runs}))
    (outputs / "link").symlink_to(run_folder("idle"))
    (run_folder("idle") / "notes").mkdir()
    text = said("clean", "--older-than", "1w", "--status", "done", "--dry-run")[1]
    assert "idle/01_base_model" in text and not {"working", "swept", "unfinished", "link", "notes"} & set(
        text.split("/")
    )
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert "nothing was deleted" in said("clean", "--older-than", "1w", "--status", "done")[1]
    monkeypatch.setattr("builtins.input", lambda _: "y")
    said("clean", "--older-than", "1w", "--status", "done")
    assert [path.name for path in run_folder("idle").iterdir() if path.is_dir()] == ["notes"]
    (outputs / "sweep" / "sweep.json").write_text("[]")
    assert "is not what a sweep writes" in said("clean", "--older-than", "1w")[1]


def test_a_damaged_stage_that_stays_keeps_everything_it_may_have_been_made_from(outputs):
    make(open_run("parent"))
    make(open_run("child"), REWARD)
    old(run_folder("parent") / BASE, 40)
    (run_folder("child") / REWARD / "provenance.json").write_text("{")
    assert clean.candidates(30, ["done"]) == []
    shutil.rmtree(run_folder("child"))
    assert [each.folder.parent.name for each in clean.candidates(30, ["done"])] == ["parent"]


# Stop


def test_a_sweep_at_work_is_stopped_by_its_claim(outputs, said, monkeypatch):
    (outputs / "sweep").mkdir()
    (outputs / "sweep" / ".sweep.claim").write_text(json.dumps(locks.owner() | {"pid": os.getppid(), "born": "1"}))
    assert "nothing is at work in 'sweep'" in said("stop", "sweep")[1], "another process has that number now"
    monkeypatch.setattr(locks, "alive", lambda who, age: True)
    code, text = said("stop", "sweep")
    assert code == 0 and f"process {os.getppid()}" in text and (outputs / "sweep" / "STOP").exists()


# Report and help


def test_the_report_of_one_run_and_of_runs_that_differ(outputs, said, monkeypatch):
    from fake_results import fake_run

    from c2f_utils.report import build

    built = []
    monkeypatch.setattr(build, "build", lambda run, out, runs=(): built.append((run, out, runs)) or out / "report.html")
    runs = [fake_run(outputs, f"s{seed}", seed) for seed in (1, 2)]
    assert said("report", "s1") == (0, f"{outputs}/s1/report/report.html\n")
    assert said("report", "s1", "s2", "--out", str(outputs / "both"))[0] == 0
    assert built == [(runs[0], runs[0] / "report", []), (runs[0], outputs / "both", runs[1:])]
    path = runs[1] / COARSE / "config.json"
    path.write_text(json.dumps(read_json(path) | {"settings": {"seed": 2, "coarse": {"iterations": 99}}}))
    assert "coarse.iterations" in said("report", "s1", "s2")[1]


def test_help_shows_a_notebooks_parameters_and_settings_at_once(said):
    began = time.perf_counter()
    code, text = said("run", "03", "--help")
    assert code == 0 and time.perf_counter() - began < 2
    for part in ("seed: int = 0  decides data", "own_law: bool = False  train under", "coarse.iterations = 17  rounds"):
        assert part in text, text
    assert "--resume" in said("run", "--help")[1]
    code, text = said("settings", "reward", "--profile", "smoke")
    assert code == 0 and "reward.pairs = " in text and "coarse." not in text
