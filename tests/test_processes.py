"""A notebook that asks for two processes gets its rows, its results and a readable error, and can be stopped and
continued.
"""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finished_runs import finished
from safetensors.torch import load_file

from c2f_utils.coarse import checkpoints
from c2f_utils.errors import C2FError
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import processes, worker

OVERRIDES = {
    "coarse.processes": 2,
    "coarse.snapshots": False,
    "coarse.law": {"name": "clock", "shape": "linear", "start": 8, "maximum": 24, "duration": 4},
}


def test_a_run_file_gives_back_the_settings_it_was_made_from(tmp_path):
    for profile in ("smoke", "mistral_7b"):
        overrides = OVERRIDES | ({"data.preferences": "owner/pairs"} if profile == "mistral_7b" else {})
        overrides["schedules.laws.fixed_short"] = None
        settings = load_settings(profile, seed=3, run_id="here", overrides=overrides, study=True)
        processes.write_run(settings, tmp_path / "run.yaml")
        assert processes.read_run(tmp_path / "run.yaml") == settings


def test_a_run_file_with_unknown_or_missing_keys_is_refused_with_all_of_them(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("sed: 1\nruns: x\n")
    assert worker.main([str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("coarse: run file") and "'sed'" in said and "'runs'" in said and "no 'profile'" in said


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "Loading\ncoarse: training cannot start:\n  - one\n  - two\nE1120 12:00 torch/elastic\nTraceback\n",
            "ended with code 1: training cannot start:\n  - one\n  - two",
        ),
        ("Loading\nTraceback\nSegmentation fault\n", "Segmentation fault"),
    ],
)
def test_what_a_process_says_about_bad_input_is_found_in_the_log(tmp_path, monkeypatch, log, said):
    class Failing:
        returncode = 1

        def __init__(self, command, stdout, **_):
            stdout.write(log)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(processes.subprocess, "Popen", Failing)
    here = SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts), stop_requested=lambda: False)
    with pytest.raises(C2FError) as refused:
        list(
            processes.train(SimpleNamespace(here=here, threads=1, settings=load_settings("smoke", overrides=OVERRIDES)))
        )
    assert str(refused.value).endswith(said)


def test_every_launch_configuration_exists_and_names_its_kind():
    kinds = {spread: processes.configuration(spread).read_text() for spread in ("ddp", "fsdp2")}
    assert "distributed_type: MULTI_GPU" in kinds["ddp"] and "fsdp_version: 2" in kinds["fsdp2"]


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """A run with a finished 01 and 02."""
    folder = tmp_path_factory.mktemp("parents")
    finished(folder, "run", "01", "02", "--profile", "smoke", "--run-id", "lab")
    return folder / "lab"


@pytest.fixture
def run(request, parents, outputs, monkeypatch):
    """A begun stage 03 beside copies of a finished 01 and 02."""
    for name in ("01_base_model", "02_reward_model"):
        shutil.copytree(parents / name, outputs / "lab" / name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = Run(load_settings("smoke", overrides=OVERRIDES | getattr(request, "param", {})))
    run.here = run.stage("03_coarse_rlhf")
    run.here.begin(run.inputs("03_coarse_rlhf")[0])
    yield run
    run.here.release()


def children(folder: Path) -> list[int]:
    """Living processes that were started for this run."""
    return [
        int(p.parent.name)
        for p in Path("/proc").glob("[0-9]*/cmdline")
        if p.exists() and str(folder / "run.yaml").encode() in _read(p) and int(p.parent.name) != os.getpid()
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize("run", [{}, {"coarse.spread": "fsdp2"}], ids=["ddp", "fsdp2"], indirect=True)
def test_two_processes_leave_what_one_would(run):
    from c2f_utils.stages import coarse_rlhf

    rows = list(coarse_rlhf.train(run))
    here = run.here
    assert [row["iteration"] for row in rows] == [1, 2, 3] and [row["limit"] for row in rows] == [8, 12, 16]
    assert rows == [json.loads(line) for line in (here.dir / "metrics.jsonl").read_text().splitlines()]
    assert here.results()["iterations"] == 3 and here.results()["final"]["n"] == 12
    saved = load_file(here.dir / "model" / "model.safetensors")
    trained = load_file(checkpoints.latest(here.dir / "checkpoints") / "weights.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, trained[f"actor.{name}"]), name


@pytest.mark.slow
@pytest.mark.parametrize("run", [{"coarse.iterations": 40}], indirect=True)
def test_closing_the_iterator_ends_the_processes_and_the_next_call_continues(run):
    from c2f_utils.stages import coarse_rlhf

    rows = coarse_rlhf.train(run)
    assert next(rows)["iteration"] == 1
    rows.close()
    deadline = time.monotonic() + 20
    while children(run.here.dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not children(run.here.dir)
    done = checkpoints.last_iteration(run.here.dir / "checkpoints")
    assert 0 < done < 40
    again = coarse_rlhf.train(run)
    assert next(again)["iteration"] == done + 1
    again.close()


@pytest.mark.slow
@pytest.mark.parametrize("run", [{"coarse.spread": "fsdp2", "coarse.snapshots": True}], indirect=True)
def test_bad_input_is_said_in_one_message(run):
    with pytest.raises(C2FError, match="2 training processes ended with code 1: coarse.snapshots needs whole weights"):
        list(processes.train(run))
