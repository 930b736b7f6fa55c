"""Whatever disturbs a stage, the same command ends it as if nothing had happened: a few of each fault of
`benchmarks/faults.py`, which does the same a hundred times over."""

import random

import faults
import pytest
from fake_results import fake_run
from test_damaged_runs import KINDS

from c2f_utils.__main__ import main
from c2f_utils.report import lineage

# By size: those of the models' stages are covered by the script.
SOON = ("00_environment_and_data", "01_base_model", "02_reward_model", "03_coarse_rlhf")


@pytest.fixture(scope="module")
def bench(smoke_run, tmp_path_factory):
    return faults.Bench(smoke_run, tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("who", faults.KILLED)
def test_a_kill_at_a_random_moment_loses_nothing(bench, who):
    rng = random.Random(who)
    trial = faults.killed(bench, rng.choice(faults.NINE), who, rng)
    assert trial.good, trial


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["signals", "disk", "writers", "clock"])
def test_another_fault_loses_nothing(bench, kind):
    rng, fault = random.Random(kind), faults.FAULTS[kind]
    stage = rng.choice([stage for stage in fault.stages if stage in SOON])
    trial = fault.disturb(bench, stage, rng.choice(fault.forms), rng)
    assert trial.good, trial


def test_a_trial_that_goes_wrong_is_seen(tmp_path):
    """The judge of all others: a loss, another number, half a file and a traceback are each told apart."""
    stage = "01_base_model"
    bench = faults.Bench(fake_run(tmp_path / "whole", faults.RUN), tmp_path)
    outputs = fake_run(tmp_path / "there", faults.RUN).parent
    results = outputs / faults.RUN / stage / "results.json"
    assert bench.same(stage, outputs) and not faults.half(bench, stage, outputs)
    results.write_text(results.read_text().replace("1", "2", 1))
    assert not bench.same(stage, outputs) and faults.half(bench, stage, outputs) == ["results.json"]
    results.write_text("{")
    assert faults.half(bench, stage, outputs) == ["results.json", "results.json"]
    results.unlink()
    assert not bench.same(stage, outputs) and not faults.half(bench, stage, outputs)
    trials = [faults.Trial("a", stage, lost=True), faults.Trial("a", stage), faults.Trial("b", stage, traceback=True)]
    table = faults.table(trials).set_index("fault")
    assert list(table["lost"]) == [1, 0] and list(table["traceback"]) == [0, 1] and list(table["trials"]) == [2, 1]
    assert [trial.good for trial in trials] == [False, True, False]


@pytest.mark.slow
def test_two_hundred_damaged_files_end_in_no_traceback_and_stop_no_other_run(outputs, tmp_path, capsys):
    stages = {"01_base_model", "02_reward_model", "03_coarse_rlhf", "07_evaluation"}
    skip = {path.name for path in (fake_run(tmp_path, "all")).iterdir()} - stages
    for run_id in ("sound", "a"):
        fake_run(outputs, run_id, skip=tuple(skip))
    damaged = 0
    for path in sorted((outputs / "a").rglob("*.json*")):
        whole = path.read_bytes()
        for kind, content in KINDS.items():
            path.unlink() if content is None else path.write_bytes(content)
            damaged += 1
            assert main(["table"]) == 0, (path, kind)
            assert "sound" in capsys.readouterr().out
            for command in (["diff", "a", "sound"], ["pack", "a", "--out", str(tmp_path / "a.zip")]):
                assert main(command) in (0, 2), (path, kind)
                assert "Traceback" not in capsys.readouterr().err
            assert len(lineage.stages_of(outputs / "a")) >= 3, (path, kind)
            assert main(["pack", "sound", "--out", str(tmp_path / "s.zip")]) == 0, (path, kind)
            path.write_bytes(whole)
    assert damaged >= 200
