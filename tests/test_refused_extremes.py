"""Values and files that no run could end well with are refused like any bad input: at once, in one line, with nothing
written."""

import gzip
import json
import time

import pytest
from test_refused_before_work import overrides_for, refuse
from test_runs import make, open_run

from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.headless import jobs
from c2f_utils.runs import registry
from c2f_utils.settings import parameters
from c2f_utils.settings.load import load_settings

DIGITS = "9" * 5000


@pytest.fixture(autouse=True, scope="module")
def _imported():
    """What is loaded on the way is not what is timed."""
    import papermill  # noqa: F401


def at_once(capsys, monkeypatch, *arguments: str) -> str:
    """The one line of a refused command."""
    began = time.perf_counter()
    message = refuse(capsys, monkeypatch, *arguments)
    assert time.perf_counter() - began < 2
    assert message.count("\n") == 1 and len(message) < 1000, message
    return message


# Values


def test_overrides_are_left_as_they_were():
    overrides = {"pretrain": {"layers": 1}, "pretrain.tokens": 7}
    assert load_settings("tiny", overrides=overrides).pretrain.tokens == 7
    assert overrides == {"pretrain": {"layers": 1}, "pretrain.tokens": 7}


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (f"seed={10**20}", "seed = 100000000000000000000: expected less than or equal to 2147483647"),
        (f"seed={DIGITS}", "is text; expected int"),
        (f"seed=0x{'f' * 5000}", "seed = (of type int, too long to show): expected less than"),
        (f"schedules.study_seeds=[{2**40}]", "schedules.study_seeds.0 = 1099511627776: expected less than"),
        ("schedules.study_seeds=[]", "schedules.study_seeds = []"),
        (f"pretrain.hidden_size={10**12}", "pretrain.hidden_size"),
        ("pretrain.layers=1000000", "a model of 9.2e+09 weights; expected at most 1e+09"),
        (f"pretrain.max_positions={10**9}", "expected less than or equal to 131072"),
        (f"data.test_prompts={10**12}", "data.test_prompts"),
        (f"reward.pairs={10**15}", "reward.pairs"),
        (f"reward.members={10**6}", "expected less than or equal to 1024"),
        (f"coarse.iterations={DIGITS}", "coarse.iterations"),
        (f"coarse.prompts={10**12}", "coarse.prompts"),
        ("reward.held_out_pairs=1", "reward.held_out_pairs = 1: expected greater than or equal to 2"),
        ("coarse.temperature=1e-300", "coarse.temperature = 1e-300: expected greater than or equal to 0.01"),
        ("data.stop_strings=['']", "data.stop_strings.0 = ''"),
        ("evaluation.decodings=[]", "evaluation.decodings = []"),
        ("merge.operator=frobnicate", "no merge operator 'frobnicate', and "),
        ("merge.other_operators=[{'name': 'frobnicate'}]", "no merge operator 'frobnicate'"),
        ("merge.other_operators=[{'name': ''}]", "has no name"),
        ("merge.other_operators=[{'name': 'trim', 'density': -0.1}]", "density: -0.1 must lie within 0 and 1"),
        ("merge.other_operators=[{'name': 'dare', 'density': 0.0}]", "density: 0.0 must be above 0"),
        ("merge.other_operators=[{'name': 'dare', 'seed': -1}]", "seed: -1 must lie within 0 and 2**63 - 1"),
        ("coarse.minibatches=9", "minibatches 9 is above prompts 8"),
        ("coarse.evaluation_prompts=9", "coarse.evaluation_prompts = 9 is above data.validation_prompts = 8"),
        ("overrides={'data.operations': [2, 2], 'data.validation_prompts': 30000}", "there are about 26000"),
        (f"coarse.law={'[' * 150}{']' * 150}", "nested more than 64 levels deep"),
        (f"coarse.law={'[' * 5000}{']' * 5000}", "coarse.law"),
    ],
    ids=lambda text: text[:50],
)  # fmt: skip
def test_a_value_that_no_run_could_end_well_with(outputs, capsys, monkeypatch, assignment, said):
    assert said in at_once(capsys, monkeypatch, "all", "-p", assignment)


@pytest.mark.parametrize("name", ["../../../x", "a/b", "..", "", ".hidden", "a" * 65, "a b", "x\n"])
@pytest.mark.parametrize("where", ["laws", "study_laws", "critic_free"])
def test_a_name_of_a_law_that_is_no_safe_folder_name(outputs, capsys, monkeypatch, where, name):
    law = {"name": "fixed", "limit": 8}
    entry = {"trainer": "grpo", "law": law} if where == "critic_free" else law
    message = at_once(capsys, monkeypatch, "all", "-p", f"schedules.{where}={ {name: entry} }")
    assert f"a name in schedules.{where} is {name!r}: expected 1 to 64 letters" in message


@pytest.mark.parametrize("hidden", [None, ""])
def test_a_gpu_that_is_not_there(outputs, capsys, monkeypatch, hidden):
    monkeypatch.setattr("os.path.exists", lambda path: hidden is not None and str(path).startswith("/dev/nvidia"))
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    message = at_once(capsys, monkeypatch, "all", "-p", "models.device=cuda")
    assert "models.device = 'cuda': this machine shows no GPU" in message


def test_a_gpu_that_is_there_passes(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.path.exists", lambda path: str(path).startswith("/dev/nvidia"))
    assert load_settings("smoke", overrides={"models.device": "cuda"}).models.device == "cuda"


@pytest.mark.parametrize("threads", ["1025", str(10**12)])
def test_more_threads_than_any_machine_has(outputs, capsys, monkeypatch, threads):
    assert f"--threads {threads}; expected a whole number" in at_once(capsys, monkeypatch, "01", "--threads", threads)
    monkeypatch.setenv("C2F_THREADS", threads)
    assert main(["run", "01", "--profile", "smoke"]) == jobs.BAD_INPUT
    assert "C2F_THREADS" in capsys.readouterr().err


@pytest.mark.parametrize("runs", ["[1]", "['nope']", "['../../etc']", "[['a']]", "['']"])
def test_a_report_over_runs_that_are_not_there(outputs, capsys, monkeypatch, runs):
    message = at_once(capsys, monkeypatch, "08", "-p", f"runs={runs}")
    assert f"runs = {runs}: there is no run " in message and "there are: none" in message


def test_a_report_over_runs_that_are_there_passes(outputs):
    make(open_run("there"))
    registry.refuse_unknown(["there", "mine"], besides="mine")
    with pytest.raises(C2FError, match="no run 'mine' .*there are: there"):
        registry.refuse_unknown(["there", "mine"])


# What is given twice


@pytest.mark.parametrize("name", ["profile", "seed", "run_id", "study"])
def test_a_parameter_of_the_run_among_the_overrides(outputs, capsys, monkeypatch, tmp_path, name):
    said = f"{name} is no setting but a parameter: give it as --{name.replace('_', '-')}"
    assert said in at_once(capsys, monkeypatch, "01", "-p", f"overrides={{'{name}': 1}}")
    (tmp_path / "o.yaml").write_text(f"{name}: 1\n")
    assert said in at_once(capsys, monkeypatch, "01", "--overrides", str(tmp_path / "o.yaml"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("seed=1", "seed=1"),
        ("coarse.iterations=5", "coarse.iterations=6"),
        ("coarse.law.start=5", "coarse.law={'name': 'fixed', 'limit': 8}"),
        ("overrides={'coarse.iterations': 5}", "coarse.iterations=6"),
        ("overrides={'coarse': {'iterations': 5}}", "overrides={'coarse.iterations': 6}"),
    ],
)
def test_a_setting_given_twice(outputs, capsys, monkeypatch, tmp_path, first, second):
    for one, other in ((first, second), (second, first)):
        message = at_once(capsys, monkeypatch, "01", "-p", one, "-p", other)
        assert "is given by another -p, too; keep one" in message
    if first != second:
        (tmp_path / "o.yaml").write_text("coarse: {iterations: 6, law: {start: 5}}\n")
        message = at_once(capsys, monkeypatch, "01", "-p", second, "--overrides", str(tmp_path / "o.yaml"))
        assert "is given by --overrides, too; keep one" in message


# Files

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("o.yaml", b"coarse: {iterations: 6}\ncoarse: {prompts: 8}\n", "'coarse' is given twice"),
        ("o.yaml", b"coarse:\n  prompts: 6\n  prompts: 8\n", "'prompts' is given twice"),
        ("o.json", b'{"coarse": {"prompts": 6, "prompts": 8}}', "'prompts' is given twice"),
        ("o.yaml", BOMB.encode(), "stands for more than 10000 values"),
        ("o.yaml", b"coarse: &c {x: *c}\n", "levels deep"),
        ("o.yaml", b"coarse: " + b"[" * 5000 + b"]" * 5000, "levels deep"),
        ("o.json", b'{"coarse": ' + b"[" * 900 + b"]" * 900 + b"}", "levels deep"),
        ("o.json", b'{"coarse": ' + b"[" * 100_000, "cannot be parsed"),
        ("o.yaml", "coarse: {é: 1}".encode("latin-1"), "is not UTF-8 text"),
        ("o.yaml", "coarse: {iterations: 6}".encode("utf-16"), "is not UTF-8 text"),
        ("o.yaml", f"seed: {DIGITS}".encode(), "cannot be parsed"),
        ("o.json", f'{{"seed": {DIGITS}}}'.encode(), "cannot be parsed"),
        ("o.yaml", b"seed: 2024-99-99", "cannot be parsed"),
        ("o.yaml", b"a: 1\n" * 100_000, "is longer than 262144 bytes"),
    ],
)
def test_an_overrides_file_that_means_nothing_sensible(outputs, capsys, monkeypatch, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    message = at_once(capsys, monkeypatch, "01", "--overrides", str(tmp_path / name))
    assert said in message and str(tmp_path / name) in message


def test_an_alias_that_says_once_what_is_meant_twice_is_taken(tmp_path):
    (tmp_path / "o.yaml").write_text("coarse: {law: &law {name: fixed, limit: 8}}\nschedules: {laws: {same: *law}}\n")
    from c2f_utils.files import read_mapping

    settings = load_settings("smoke", overrides=read_mapping(tmp_path / "o.yaml"))
    assert settings.coarse.law == settings.schedules.laws["same"]


def _damaged(content: bytes) -> bytes:
    """A gzip file whose middle is of no block type that there is."""
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[10] |= 0b110
    return bytes(packed)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b"[" * 990 + b"]" * 990, "line 1"),
        ("p.jsonl", b'{"chosen": ' + b"[" * 100_000, "line 1: not valid JSON"),
        ("p.jsonl", b'{"chosen": ' + DIGITS.encode() + b"}", "line 1: not valid JSON"),
        ("p.jsonl", '{"chosen": "é"}'.encode("latin-1"), "cannot be read"),
        ("p.jsonl", '{"chosen": "a"}'.encode("utf-16"), "cannot be read"),
        ("p.jsonl.gz", _damaged(b"{}" * 1000), "cannot be read"),
        ("p.jsonl.gz", gzip.compress(b"\n" * 1000) * 100_000, "more than 10000 empty lines"),
        ("p.jsonl.gz", gzip.compress(b" " * 20_000_000), "over 16777216 characters"),
    ],
    ids=["nested", "endless", "long number", "Latin-1", "UTF-16", "damaged gzip", "newlines", "one line"],
)
def test_a_preference_file_that_means_nothing_sensible(
    outputs, offline, tmp_path, capsys, monkeypatch, name, content, said
):
    path = tmp_path / name
    path.write_bytes(content)
    message = at_once(capsys, monkeypatch, *overrides_for(offline, tmp_path, data__preferences=str(path)))
    assert said in message and str(path) in message


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe", b"[1]", b'{"cells": 5}', b'{"cells": [1]}', b'{"cells": [{"source": "x"}]}', b"[" * 100_000,
        b'{"cells": [{"metadata": {"tags": 5}}]}', b'{"cells": ' + DIGITS.encode() + b"}",
        json.dumps({"cells": [{"metadata": {"tags": ["parameters"]}, "source": 5}]}).encode(),
        json.dumps({"cells": [{"metadata": {"tags": ["parameters"]}, "source": "seed: int ="}]}).encode(),
        json.dumps({"cells": [{"metadata": {"tags": ["parameters"]}, "source": "seed: int = \0"}]}).encode(),
    ],
)  # fmt: skip
def test_a_notebook_that_cannot_be_read(outputs, capsys, monkeypatch, tmp_path, content):
    path = tmp_path / "01_base_model.ipynb"
    path.write_bytes(content)
    assert str(path) in at_once(capsys, monkeypatch, str(path))


# Refused in a kernel as well: a notebook may be run by papermill itself or by hand


def test_the_first_cell_refuses_a_report_over_runs_that_are_not_there(outputs):
    from c2f_utils import notebook

    parameter_cell = "".join(f"{item.name}: {item.type} = {item.default!r}\n" for item in parameters.STANDARD.values())
    space = {"In": [parameter_cell + "runs: list = []", "# Parameters\nruns = ['../../etc']"], "runs": ["../../etc"]}
    with pytest.raises(C2FError, match="there is no run '../../etc'"):
        notebook.start(space | {"profile": "smoke"}, "08_report")
