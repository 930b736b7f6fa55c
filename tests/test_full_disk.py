"""A disk that fills up while something is written: one sentence, nothing half written, and afterwards as if nothing had
happened. A limit on the size of files stands for the disk."""

import contextlib
import json
import resource
from types import SimpleNamespace

import pytest
import torch
from notebooks_for_tests import RESULT, write
from safetensors.torch import load_file
from test_runs import open_run
from tiny_models import TOKENIZER, causal, trainer

from c2f_utils.__main__ import main
from c2f_utils.coarse import checkpoints
from c2f_utils.errors import CannotWrite
from c2f_utils.files import append_jsonl, read_json, read_jsonl, write_json
from c2f_utils.headless import jobs
from c2f_utils.models import loading
from c2f_utils.runs.stage import Stage, run_folder
from c2f_utils.stages import coarse_rlhf

SENTENCE = "cannot write .*File too large; free space or choose another C2F_OUTPUTS; the same command then continues"


@contextlib.contextmanager
def full_disk(room: int = 4096):
    """No file of this process grows beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _json(folder, size):
    write_json(folder / "one.json", ["x" * size])


def _model(folder, size):
    loading.save_model(causal(size), TOKENIZER, folder / "model")


def _snapshot(folder, size):
    process = SimpleNamespace(iteration=1, curve=[{"iteration": 1}], policy=SimpleNamespace(actor=causal()))
    run = open_run(**{"coarse.snapshots": True})
    run.here = Stage(folder)
    coarse_rlhf._snapshot(run, process)


@pytest.mark.parametrize("writer", [_json, _model, _snapshot], ids=lambda writer: writer.__name__)
def test_what_was_there_stays_and_nothing_half_written_is_left(tmp_path, outputs, writer):
    folder = tmp_path / "there"
    if writer is not _snapshot:  # which is never written twice
        writer(folder, 10)
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with full_disk(), pytest.raises(CannotWrite, match=SENTENCE):
        writer(folder, 10_000)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    writer(folder, 10_000)
    assert {name for name in files(folder) if "partial" in name} == set() and files(folder) >= set(before)
    assert {name: (folder / name).read_bytes() for name in files(folder)} != before


def test_a_row_that_did_not_fit_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"iteration": 1})
    with full_disk(), pytest.raises(CannotWrite, match=SENTENCE):
        append_jsonl(path, {"iteration": 2, "text": "x" * 10_000})
    append_jsonl(path, {"iteration": 2})
    assert read_jsonl(path) == [{"iteration": 1}, {"iteration": 2}]


def test_a_checkpoint_that_did_not_fit_leaves_the_one_before(tmp_path):
    process = trainer("fixed", tmp_path)
    process.step()
    with full_disk(), pytest.raises(CannotWrite, match=SENTENCE):
        process.step()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000", "step-00001"]
    again, undisturbed = trainer("fixed", tmp_path), trainer("fixed", tmp_path / "other")
    assert again.iteration == 1
    again.step()
    for _ in range(2):
        undisturbed.step()
    ours, theirs = (load_file(checkpoints.latest(at) / "weights.safetensors") for at in (tmp_path, tmp_path / "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimiser.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("kind", ["four bytes", "cut", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, capsys, file, kind):
    process = trainer("fixed", tmp_path)
    for _ in range(2):
        process.step()
    path = tmp_path / "step-00002" / file
    content = path.read_bytes()
    altered = {"four bytes": content[:-9] + b"abcd" + content[-5:], "cut": content[: len(content) // 2]}
    path.write_bytes(altered.get(kind, b""))
    if kind == "missing":
        path.unlink()
    whole = (file, kind) == ("digests.json", "missing")  # as checkpoints were before they had digests
    assert trainer("fixed", tmp_path).iteration == (2 if whole else 1)
    printed = capsys.readouterr().out
    assert whole or f"checkpoint {tmp_path / 'step-00002'} is passed over: " in printed
    assert checkpoints.last_iteration(tmp_path) == (2 if whole else 1)


def test_without_a_whole_checkpoint_training_begins_anew(tmp_path, capsys):
    trainer("fixed", tmp_path).step()
    for path in tmp_path.rglob("state.json"):
        path.write_text("{")
    assert trainer("fixed", tmp_path).iteration == 0
    assert capsys.readouterr().out.count("is passed over") == 2


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"


@pytest.mark.slow
def test_the_command_says_it_in_one_sentence_and_continues_when_there_is_room(outputs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(jobs, "notebooks_folder", lambda: folder)
    write(folder, "01_base_model", LIMIT.format(4096), "run.here.save_results({'text': 'x' * 10_000})")
    assert main(["run", "01", "--run-id", "r"]) == jobs.FAILED
    message = capsys.readouterr().err
    assert "failed: cannot write " in message and "CannotWrite" not in message and "Traceback" not in message
    stage = Stage(run_folder("r") / "01_base_model")
    assert stage.state() == "failed" and not list(outputs.rglob("*.partial"))
    write(folder, "01_base_model", RESULT)
    assert main(["run", "01", "--run-id", "r"]) == jobs.DONE
    assert len(read_json(stage.dir / "provenance.json")["sessions"]) == 2, "continued"


@pytest.mark.slow
def test_a_disk_too_full_for_the_executed_notebook_is_one_sentence_too(outputs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(jobs, "notebooks_folder", lambda: folder)
    write(folder, "01_base_model", "print('x' * 50_000)", RESULT)
    with full_disk(20_000):
        assert main(["run", "01", "--run-id", "r"]) == jobs.BAD_INPUT
    message = capsys.readouterr().err
    assert message.startswith("c2f: cannot write ") and "Traceback" not in message
    assert main(["run", "01", "--run-id", "r"]) == jobs.DONE
    assert json.loads((run_folder("r") / "01_base_model" / "notebook.ipynb").read_text())["cells"]
