"""Bad input is refused before any work starts: exit code 2, one message with thing, value, expectation and next step.

Each case goes through the command as a user types it. No kernel may start, nothing may look finished afterwards.
"""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import offline_mistral
import pytest
from finished_runs import ROOT, c2f, surroundings

from c2f_utils import files
from c2f_utils.__main__ import main
from c2f_utils.headless import jobs


def refuse(capsys, monkeypatch, *arguments: str) -> str:
    """The message of a refused command; no kernel was started and no stage exists."""
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    capsys.readouterr()  # what making the models printed
    assert main(["run", "--profile", "smoke", *arguments]) == jobs.BAD_INPUT
    message = capsys.readouterr().err
    assert message.startswith("c2f: ") and "Traceback" not in message
    outputs = files.outputs()
    assert not outputs.is_dir() or not [path for path in outputs.rglob("*") if path.is_file()], (
        "something was left behind"
    )
    return message


# Parameters and settings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "huge"], ["unknown profile 'huge'", "expected one of smoke, tiny"]),
        (["-p", "sede=1"], ["there is no parameter 'sede'", "did you mean 'seed'", "known: profile"]),
        (["-p", "coarse.law.name=useful"], ["missing: start, maximum", "a law is named whole", "{'name': 'useful', "]),
        (["-p", "merge.operator=residu"], ["no operator 'residu'", "did you mean 'residue'"]),
        (["-p", "merge.other_operators=[{'name': 'trimm'}]"], ["other_operators.0", "did you mean 'trim'"]),
        (["-p", "merge.other_operators=[{'density': 1}]"], ["{'density': 1} has no name"]),
        (["-p", "merge.other_operators=[{'name': 'trim', 'densty': 1}]"], ["densty: trim has no such key", "density"]),
        (["-p", "merge.other_operators=[{'name': 'trim', 'density': 3.0}]"], ["density: 3.0 must lie within 0 and 1"]),
        (["-p", "pretrain.heads=3"], ["pretrain.heads = 3 does not divide pretrain.hidden_size = 32", "e.g. 2"]),
        (["-p", "iterations=5"], ["no parameter 'iterations'", "written with its section: coarse.iterations=5"]),
        (["-p", "seed='1'"], ["seed = '1' is text", "expected int", "write 1, without quotes"]),
        (["-p", "study='false'"], ["study = 'false' is text", "write False, without quotes"]),
        (["-p", "coarse.iteration=5"], ["coarse.iteration = 5", "no such setting", "iterations"]),
        (["-p", "reward.learning_rate='1e-6'"], ["reward.learning_rate = '1e-6' is text", "without quotes"]),
        (["-p", "models.gradient_checkpointing=false"], ["gradient_checkpointing = 'false' is text", "True or False"]),
        (["-p", "coarse.law={'name': 'clock', 'start': 8}"], ["coarse.law", "missing: maximum, duration, shape"]),
        (["-p", "coarse.law={'name': 'fixed', 'limit': 8, 'growth': 0.1}"], ["not used by it: growth", "takes limit"]),
        (["-p", "data.operations=[1, 9]"], ["data.operations = [1, 9]", "from 2 to 5", "write [3, 5]"]),
        (["-p", "data.vocabulary=wide", "-p", "data.operations=[3, 7]"], ["data.operations = [3, 7]", "from 2 to 6"]),
    ],
)
def test_wrong_parameters_and_settings(outputs, capsys, monkeypatch, arguments, said):
    message = refuse(capsys, monkeypatch, "all", *arguments)
    for part in said:
        assert part in message, message


def test_quoted_numbers_and_flags_in_an_overrides_file(outputs, capsys, monkeypatch, tmp_path):
    (tmp_path / "o.yaml").write_text("reward: {learning_rate: '1e-6'}\nmodels: {gradient_checkpointing: 'false'}\n")
    message = refuse(capsys, monkeypatch, "all", "--overrides", str(tmp_path / "o.yaml"))
    assert "learning_rate = '1e-6' is text" in message and "gradient_checkpointing = 'false' is text" in message


def test_a_limit_beyond_the_models_positions(outputs, capsys, monkeypatch):
    law = "coarse.law={'name': 'logistic', 'start': 12, 'maximum': 400, 'step': 8}"
    message = refuse(capsys, monkeypatch, "all", "-p", law, "-p", "evaluation.max_tokens=300")
    for part in (
        "coarse.law, largest limit = 400",
        "evaluation.max_tokens = 300",
        "256 positions",
        "lower the limit or raise",
    ):
        assert part in message, message


def test_a_law_of_the_comparison_beyond_the_models_positions(outputs, capsys, monkeypatch):
    message = refuse(capsys, monkeypatch, "04", "-p", "schedules.laws.fixed_long={'name': 'fixed', 'limit': 999}")
    assert "schedules.laws.fixed_long, largest limit = 999" in message


# Earlier stages and existing ones


@pytest.mark.parametrize(
    ("notebook", "missing"),
    [("02", ["01"]), ("03", ["01", "02"]), ("06", ["01", "02", "03", "04", "05"]), ("07", ["03", "06"])],
)
def test_a_missing_earlier_stage(outputs, capsys, monkeypatch, notebook, missing):
    message = refuse(capsys, monkeypatch, notebook, "--run-id", "r", "--seed", "4")
    for number in missing:
        assert f"c2f run {number} --profile smoke --seed 4 --run-id r" in message, message


def test_an_earlier_stage_of_another_profile_or_seed_does_not_count(smoke_run, monkeypatch, capsys):
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    for other in (["--seed", "1"], ["--profile", "tiny"]):
        assert main(["run", "03", "--run-id", "elsewhere", *other]) == jobs.BAD_INPUT
        assert "no finished 01_base_model" in capsys.readouterr().err


def test_a_stage_that_exists_with_another_configuration(smoke_run, monkeypatch, capsys):
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    before = (smoke_run / "03_coarse_rlhf" / "results.json").stat().st_mtime_ns
    assert (
        main(["run", "03", "--profile", "smoke", "--run-id", smoke_run.name, "-p", "coarse.iterations=9"])
        == jobs.BAD_INPUT
    )
    message = capsys.readouterr().err
    for part in (
        "03_coarse_rlhf exists",
        "coarse.iterations: 3 there, 9 here",
        "another run_id",
        "--overwrite",
        ".old-1",
    ):
        assert part in message, message
    assert (smoke_run / "03_coarse_rlhf" / "results.json").stat().st_mtime_ns == before


def test_a_stage_of_another_profile_or_seed_than_the_runs(smoke_run, monkeypatch, capsys):
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    for other, advice in ((["--seed", "1"], "add --seed 0 "), (["--profile", "tiny"], "add --profile smoke ")):
        assert main(["run", "01", "--profile", "smoke", "--run-id", smoke_run.name, *other]) == jobs.BAD_INPUT
        message = capsys.readouterr().err
        assert f"run '{smoke_run.name}' holds profile smoke, seed 0" in message and advice in message, message


def test_a_stage_whose_inputs_have_changed(smoke_run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "outputs" / "copy"
    copy.mkdir(parents=True)
    for name in ("01_base_model", "02_reward_model"):
        shutil.copytree(smoke_run / name, copy / name)
    found = json.loads((copy / "01_base_model" / "results.json").read_text())
    found["behaviour"]["n"] += 1
    (copy / "01_base_model" / "results.json").write_text(json.dumps(found))
    monkeypatch.setenv("C2F_OUTPUTS", str(copy.parent))
    assert main(["run", "02", "--profile", "smoke", "--run-id", "copy"]) == jobs.BAD_INPUT
    assert "input 01_base_model: its settings or results have changed" in capsys.readouterr().err


# Models


def overrides_for(offline: Path, tmp_path: Path, **changes: str) -> list[str]:
    settings = offline_mistral.settings(offline, "float32")
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        settings[section][key] = value
    (tmp_path / "o.yaml").write_text(json.dumps(settings))
    return ["all", "--profile", "mistral_7b", "--overrides", str(tmp_path / "o.yaml")]


def _folder(offline: Path, tmp_path: Path, kind: str) -> str:
    folder = tmp_path / "candidate"
    if kind == "missing":
        return str(folder)
    if kind == "a file":
        folder.write_text("no model")
        return str(folder)
    shutil.copytree(offline / "base", folder)
    weights = folder / "model.safetensors"
    if kind == "without configuration":
        (folder / "config.json").unlink()
    elif kind == "configuration of something else":
        (folder / "config.json").write_text("[]")
    elif kind == "without weights":
        weights.unlink()
    elif kind == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "half copied":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "does not exist; expected a model folder or a hub id"),
        ("a file", "is not a model: no config.json in it"),
        ("without configuration", "no config.json in it"),
        ("configuration of something else", "names no model_type"),
        ("without weights", "no *.safetensors file"),
        ("pickled", "pickled checkpoints are not loaded"),
        ("half copied", "damaged or half copied"),
    ],
)
@pytest.mark.parametrize("key", ["base", "instruct"])
def test_a_path_that_is_not_a_model(outputs, offline, tmp_path, capsys, monkeypatch, key, kind, said):
    source = _folder(offline, tmp_path, kind)
    message = refuse(capsys, monkeypatch, *overrides_for(offline, tmp_path, **{f"models__{key}": source}))
    assert said in message and f"models.{key} = {source!r}" in message, message


def test_an_instruction_model_of_another_shape(outputs, offline, tmp_path, capsys, monkeypatch):
    offline_mistral.model(410, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    message = refuse(capsys, monkeypatch, *overrides_for(offline, tmp_path, models__instruct=str(tmp_path / "other")))
    assert "num_hidden_layers 3, models.base has 2" in message and "fine-tuned from the same base" in message


def test_a_limit_beyond_a_local_models_positions(outputs, offline, tmp_path, capsys, monkeypatch):
    message = refuse(
        capsys, monkeypatch, *overrides_for(offline, tmp_path, evaluation__max_tokens=200, reward__max_tokens=999)
    )
    assert (
        "evaluation.max_tokens = 200 tokens: with a prompt of up to 96 tokens" in message and "256 positions" in message
    )
    assert "reward.max_tokens = 999" in message


# Data


PAIR = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([PAIR, {"chosen": PAIR["chosen"]}], ["line 2", "rejected missing", "expected one JSON object per line"]),
        ([PAIR, {"chosen": 5, "rejected": None}], ["line 2", "chosen, rejected missing"]),
        ([PAIR, "text"], ["line 2", "chosen, rejected missing"]),
        ([], ["no usable pair among 0 rows", "choose another file"]),
        ([{"chosen": "b", "rejected": "c"}], ["no usable pair among 1 rows", "share all but the last answer"]),
        ([PAIR] * 9, ["holds 1 different prompts", "at least 4", "add more pairs"]),
    ],
)
def test_a_preference_file_that_cannot_be_used(outputs, offline, tmp_path, capsys, monkeypatch, rows, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refuse(capsys, monkeypatch, *overrides_for(offline, tmp_path, data__preferences=str(path)))
    for part in [*said, str(path)]:
        assert part in message, message


@pytest.mark.parametrize("kind", ["missing", "broken JSON", "no gzip", "half a gzip", "a folder"])
def test_a_preference_file_that_cannot_be_read(outputs, offline, tmp_path, capsys, monkeypatch, kind):
    path = tmp_path / ("pairs.jsonl.gz" if "gzip" in kind else "pairs.jsonl")
    if kind == "broken JSON":
        path.write_text('{"chosen": ')
    elif kind == "no gzip":
        path.write_text("plain")
    elif kind == "half a gzip":
        path.write_bytes(gzip.compress(json.dumps(PAIR).encode() * 500)[:-40])
    elif kind == "a folder":
        path.mkdir()
    message = refuse(capsys, monkeypatch, *overrides_for(offline, tmp_path, data__preferences=str(path)))
    assert str(path) in message and "expected" in message


# Disk


def test_an_unwritable_run_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path / "file" / "outputs"))
    message = refuse(capsys, monkeypatch, "all")
    assert "cannot be written" in message and "set C2F_OUTPUTS to a folder that can" in message


def test_a_full_run_folder(outputs, capsys, monkeypatch):
    monkeypatch.setenv("C2F_MIN_FREE_MB", "1e12")
    message = refuse(capsys, monkeypatch, "all")
    assert "MB free" in message and "are needed" in message and "free some or set C2F_OUTPUTS" in message


# The same without `c2f`: plain papermill, refused by the first code cell, and the real command line


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (["-p", "sede", "1"], "there is no parameter 'sede'"),
        pytest.param(["-p", "study", "false"], "write False, without quotes", marks=pytest.mark.slow),
        pytest.param(["-y", "overrides: {reward.learning_rate: 1e-6}"], "'1e-6' is text", marks=pytest.mark.slow),
        pytest.param(["-p", "profile", "huge"], "unknown profile 'huge'", marks=pytest.mark.slow),
        pytest.param([], "c2f run 01 --profile tiny --seed 0 --run-id lab", marks=pytest.mark.slow),
    ],
)
def test_plain_papermill_is_refused_by_the_first_code_cell(tmp_path, parameters, said):
    outputs = tmp_path / "outputs"
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/03_coarse_rlhf.ipynb",
        str(tmp_path / "o.ipynb"),
        *parameters,
    ]
    done = subprocess.run(command, cwd=ROOT, env=surroundings(outputs), capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    cells = [cell for cell in json.loads((tmp_path / "o.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    ran = [cell["execution_count"] for cell in cells]
    assert ran[-1] is None, "the story was not told"
    assert not list(outputs.rglob("status.json")) and not list(outputs.rglob("results.json"))


def test_the_command_itself_exits_with_2_and_no_traceback(tmp_path):
    done = c2f(tmp_path / "outputs", "run", "all", "--profile", "huge")
    assert done.returncode == 2 and done.stderr.startswith("c2f: unknown profile") and not done.stdout
