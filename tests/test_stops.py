"""A stop in any long stage keeps what is finished, and the same command ends as an unbroken run does, bit for bit."""

import pytest
from test_kill_resume import begin, parents

from c2f_utils.errors import Stopped
from c2f_utils.files import write_text
from c2f_utils.models import course
from c2f_utils.runs.run import PARENTS, Run
from c2f_utils.stages import base_model, evaluation, residue_merging
from c2f_utils.stages.pieces import Pieces


def stopping_after(run: Run, looks: int) -> Run:
    """The run, whose stop is asked for when it has been looked for so many times."""
    seen, asked = [], run.here.stop_requested

    def stop_requested() -> bool:
        seen.append(1)
        return len(seen) > looks or asked()

    run.here.stop_requested = stop_requested
    return run


def in_sessions(name: str, make, looks: int) -> int:
    """Work on a stage in sessions that a stop ends after some looks; how many there were."""
    for session in range(1, 200):
        run = stopping_after(begin(name), looks)
        try:
            make(run)
        except Stopped:
            assert run.here.state() == "stopped" and not (run.here.dir / "results.json").exists()
        else:
            run.here.release()
            return session
    raise AssertionError("it never ends")


def same(run: Run, whole, *files: str) -> None:
    for file in files:
        assert (run.here.dir / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("looks", [1, 4])
def test_pretraining_continues_from_the_step_it_was_stopped_at(smoke_run, tmp_path, monkeypatch, looks):
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    sessions = in_sessions("01_base_model", base_model.make, looks)
    assert sessions > 2
    run = begin("01_base_model")
    same(run, smoke_run / "01_base_model", "model/model.safetensors", "samples.jsonl", "results.json")
    run.here.release()


def test_pretraining_killed_between_checkpoints_goes_back_to_the_last_whole_one(
    smoke_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(course, "EVERY", 0.0)

    class Killed(BaseException):
        pass

    def killed() -> bool:
        looks.append(1)
        if len(looks) == 5:
            raise Killed
        return False

    for damaged in (False, True):
        run, looks = begin("01_base_model"), []
        run.here.stop_requested = killed
        with pytest.raises(Killed):
            base_model.make(run)
        run.here.release()
        checkpoint = run.here.dir / "checkpoints" / "pretraining.safetensors"
        if damaged:
            checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    run = begin("01_base_model")
    base_model.make(run)
    run.here.finish()
    assert "is passed over" in capsys.readouterr().out and not checkpoint.exists()
    same(run, smoke_run / "01_base_model", "model/model.safetensors", "results.json")


@pytest.mark.parametrize(
    ("name", "make", "files", "looks"),
    [
        (
            "06_residue_merging", lambda run: residue_merging.Merging(run).finish(),
            ("model/model.safetensors", "controls/ppo_instruct/model.safetensors", "samples.jsonl"), 8,
        ),
        pytest.param("07_evaluation", evaluation.make, ("samples.jsonl",), 12, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_stage_of_many_pieces_keeps_those_that_are_finished(
    smoke_run, tmp_path, monkeypatch, name, make, files, looks
):
    parents(smoke_run, tmp_path, *PARENTS[name])
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    assert in_sessions(name, make, looks) > 2
    run = begin(name)
    same(run, smoke_run / name, "results.json", *files)
    assert not (run.here.dir / "pieces").exists()
    run.here.release()


def test_a_piece_is_made_once_and_again_only_where_it_is_damaged_or_another(outputs, capsys):
    run, made = begin("01_base_model"), []

    def make() -> dict:
        made.append(1)
        return {"value": 0.1 + 0.2, "pair": (1, 2)}

    pieces = Pieces(run.here)
    first = pieces(["a", 1], make)
    assert first == pieces(["a", 1], make) == {"value": 0.1 + 0.2, "pair": [1, 2]} and len(made) == 1
    pieces(["a", 2], make)
    assert len(made) == 2
    for file in pieces.folder.iterdir():
        write_text(file, file.read_text()[:-9])
    assert pieces(["a", 1], make) == first and len(made) == 3 and "made again" in capsys.readouterr().out
    (run.here.dir / "STOP").touch()
    assert pieces(["a", 1], make) == first, "what is there needs no work"
    with pytest.raises(Stopped, match="run again to continue"):
        pieces(["a", 3], make)
    pieces.clear()
    assert not pieces.folder.exists()
    run.here.release()
