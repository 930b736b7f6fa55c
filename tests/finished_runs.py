"""Runs of the real notebooks for tests: one command in a process of its own, and what a finished run must hold."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
METRICS = (
    "accuracy_last", "accuracy_first", "correct_steps", "mean_tokens", "rep4", "duplicate_sentences", "eos_rate",
    "utility", "reward", "n",
)  # fmt: skip
NEED_CHECKER = ("accuracy_last", "accuracy_first", "correct_steps", "utility")
SHARES = ("accuracy_last", "accuracy_first", "rep4", "duplicate_sentences", "eos_rate")
DECODINGS = ("sampled_t1", "sampled_t07", "greedy")
SAMPLE = {
    "model", "decoding", "prompt", "text", "tokens", "stop", "reward", "utility", "correct_steps", "first_answer",
    "last_answer", "gold",
}  # fmt: skip


def c2f(outputs: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `c2f` on one thread with this outputs folder."""
    return subprocess.run(
        [sys.executable, "-m", "c2f_utils", *arguments], cwd=ROOT, env=surroundings(outputs) | environment,
        capture_output=True, text=True,
    )  # fmt: skip


def surroundings(outputs: Path) -> dict[str, str]:
    """Environment of a run on one thread, without network."""
    return os.environ | {
        "C2F_OUTPUTS": str(outputs), "C2F_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1", "C2F_MIN_FREE_MB": "1",
    }  # fmt: skip


def finished(outputs: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `c2f`, which must succeed; once more where no kernel started: two may pick one port on a busy machine."""
    done = c2f(outputs, *arguments)
    if done.returncode and "Kernel died before replying to kernel_info" in done.stdout + done.stderr:
        done = c2f(outputs, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def results(run: Path, stage: str) -> dict:
    """results.json of a stage, read strictly: NaN and infinity are not JSON."""
    found = list(run.glob(f"{stage}*/results.json"))
    assert len(found) == 1, f"{stage} in {run}: {found}"
    return json.loads(found[0].read_text(), parse_constant=_refuse)


def rows(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]


def _refuse(constant: str):
    raise AssertionError(f"{constant} in a results file")


def check_metrics(found: dict, checker: bool = True, reward: bool = True, longest: int = 10_000) -> None:
    """All metrics are there and in range; those that need the exact checker are null exactly where there is none."""
    assert set(METRICS) <= set(found), set(METRICS) - set(found)
    for name in METRICS:
        value = found[name]
        if name in NEED_CHECKER and not checker or name == "reward" and not reward:
            assert value is None, name
        else:
            assert value is not None and math.isfinite(value), (name, value)
            assert name not in SHARES or 0 <= value <= 1, (name, value)
    assert isinstance(found["n"], int) and found["n"] > 0 and 1 <= found["mean_tokens"] <= longest
    if checker:
        assert 0 <= found["correct_steps"] <= 5 and -1.5 <= found["utility"] <= 4.9


def check_samples(path: Path, models: set[str], checker: bool = True) -> list[dict]:
    """Every answer has every field; a stop is named; tokens are counted."""
    table = rows(path)
    assert table and {row["model"] for row in table} == models
    for row in table:
        assert set(row) == SAMPLE, set(row) ^ SAMPLE
        assert row["decoding"] in DECODINGS and row["stop"] in ("eos", "limit", "string") and row["tokens"] >= 1
        assert isinstance(row["text"], str) and row["prompt"]
        assert (row["gold"] is not None) == (row["utility"] is not None) == checker
    return table


def timestamps(run: Path) -> dict[str, int]:
    """When each result was last written, ns."""
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.glob("*/results.json")}


def evaluation_beside(finished: Path, tmp_path: Path, monkeypatch):
    """A function that begins stage 07 of a run of its own beside a finished one, under changed settings, and returns
    the run and its inputs."""
    from c2f_utils.runs.run import Run
    from c2f_utils.settings.load import load_settings
    from c2f_utils.stages.inputs import Inputs

    (tmp_path / "runs").mkdir()
    shutil.copytree(finished, tmp_path / "runs" / "smoke")
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path / "runs"))

    def begun(overrides: dict) -> tuple:
        run = Run(load_settings("smoke", overrides=overrides, run_id="mine"))
        run.here = run.stage("07_evaluation")
        run.here.begin(run.inputs("07_evaluation")[0], overwrite=True)
        return run, Inputs(run)

    return begun
