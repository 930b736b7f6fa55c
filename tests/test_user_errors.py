"""What a person gets wrong in a notebook is answered by one block of words, never by a way through our code."""

import shutil

import pytest
from IPython.core.interactiveshell import InteractiveShell
from notebooks_for_tests import PARAMETERS, START

from c2f_utils.errors import C2FError

LAW = "from c2f_utils.limits import Law\n"


def start(stage: str = "00_environment_and_data", **parameters: object) -> str:
    lines = PARAMETERS + "".join(f"{name} = {value!r}\n" for name, value in parameters.items())
    return f"{lines}{START.format(stage=stage)}"


def overrides(**values: object) -> str:
    return start(overrides={name.replace("__", "."): value for name, value in values.items()})


AT_THE_START = {
    "unknown profile": (start(profile="nano"), "nano"),
    "profile of another type": (start(profile=3), "profile"),
    "seed in words": (start(seed="one"), "seed"),
    "negative seed": (start(seed=-1), "seed"),
    "run id with a slash": (start(run_id="a/b"), "a/b"),
    "empty run id": (start(run_id=""), "run_id"),
    "study in words": (start(study="yes"), "study"),
    "overrides as a list": (start(overrides=["coarse.iterations"]), "overrides"),
    "misspelt setting": (overrides(coarse__iteration=3), "did you mean iterations"),
    "setting without its section": (overrides(iterations=3), "iterations"),
    "setting in words": (overrides(coarse__iterations="many"), "coarse.iterations"),
    "no iterations": (overrides(coarse__iterations=0), "coarse.iterations"),
    "unknown law": (overrides(coarse__law={"name": "magic"}), "magic"),
    "law that shrinks": (overrides(coarse__law={"name": "useful", "start": 90, "maximum": 20}), "start"),
    "law as a number": (overrides(coarse__law=7), "coarse.law"),
    "unknown source of data": (overrides(data__source="web"), "data.source"),
    "unknown output type": (overrides(merge__out_dtype="int4"), "merge.out_dtype"),
    "no coefficients": (overrides(merge__coefficients=[]), "merge.coefficients"),
    "unknown decoding": (overrides(evaluation__decodings=["beam"]), "beam"),
    "unknown judge": (overrides(judge__name="oracle"), "oracle"),
    "model that is not there": (overrides(models__base="./nowhere"), "models.base"),
    "unknown stage": (start("03_coarse"), "03_coarse"),
    "reward model before the base": (start("02_reward_model", run_id="b"), "01_base_model"),
    "training before its models": (start("03_coarse_rlhf", run_id="b"), "02_reward_model"),
    "merging before training": (start("06_residue_merging", run_id="b"), "03_coarse_rlhf"),
    "evaluation before merging": (start("07_evaluation", run_id="b"), "06_residue_merging"),
    "seed with a fraction": (start(seed=1.5), "seed"),
}

TRAIN = "from c2f_utils.stages import coarse_rlhf\nlist(coarse_rlhf.train(run, law=law, reward=reward))"
NONE = "law, reward = None, None\n"
IN_THE_RUN = {
    "reward that is a number": ("reward = 3", "reward"),
    "reward that gives one number": ("def reward(samples): return 1.0", "one reward for each"),
    "reward of a wrong shape": (
        "import torch\ndef reward(samples): return torch.zeros(len(samples), 2)",
        "one reward for",
    ),
    "reward for too few": ("def reward(samples): return [0.0]", "one reward for each"),
    "reward in words": ("def reward(samples): return ['good' for _ in samples]", "one reward for each"),
    "reward of nothing": ("def reward(samples): return None", "one reward for each"),
    "reward that is NaN": ("def reward(samples): return [float('nan') for _ in samples]", "finite"),
    "law that is a number": ("law = 8", "law"),
    "law that is a class": (f"{LAW}class law(Law):\n    maximum = 8", "law"),
    "law beyond the model": (f"{LAW}class L(Law):\n    maximum = 10**6\nlaw = L(8)", "positions"),
    "law that says words": (
        f"{LAW}class L(Law):\n    maximum = 8\n    def update(self, s): return 'more'\nlaw = L(8)",
        "limit",
    ),
}
LOOKING = {
    "question that is not there": ("reading.follow(run, 99)", "99"),
    "words that are not known": ("reading.ask(run, 'question : zorg')", "zorg"),
    "model that is none": ("reading.ask(run, 'hana', models=['gpt'])", "gpt"),
    "choice that is none": ("notebook.vote(run, 'C')", "expected one of A, B, tie"),
    "choice before a look": ("notebook.vote(run, 'A')", "look first"),
    "operator of words": ("from c2f_utils import merge\nmerge.register_operator('mine', 'c * r')", "mine"),
}


@pytest.fixture
def shell():
    yield InteractiveShell.instance(colors="nocolor")
    InteractiveShell.clear_instance()


def said(shell, capsys, code: str) -> str:
    """What a cell shows that a person got wrong."""
    capsys.readouterr()
    found = shell.run_cell(code)
    out = "".join(capsys.readouterr())
    assert isinstance(found.error_in_exec, C2FError), (found.error_in_exec, out)
    assert str(found.error_in_exec) in out and "Traceback" not in out and "File " not in out and "---" not in out
    return str(found.error_in_exec)


@pytest.mark.parametrize("case", AT_THE_START)
def test_a_wrong_beginning_is_answered_by_a_sentence(case, outputs, shell, capsys):
    code, words = AT_THE_START[case]
    assert words in said(shell, capsys, code)


@pytest.fixture(scope="module")
def copied(smoke_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    for stage in (path.name for path in smoke_run.glob("0[1-7]_*") if path.is_dir()):
        shutil.copytree(smoke_run / stage, folder / "smoke" / stage)
    return folder


@pytest.mark.parametrize("case", IN_THE_RUN)
@pytest.mark.slow
def test_a_wrong_law_or_reward_is_answered_by_a_sentence(case, copied, shell, capsys, monkeypatch):
    monkeypatch.setenv("C2F_OUTPUTS", str(copied))
    code, words = IN_THE_RUN[case]
    assert shell.run_cell(start("03_coarse_rlhf", run_id=f"case {case}".replace(" ", "-"))).success
    assert shell.run_cell(NONE + code).success
    assert words in said(shell, capsys, TRAIN)
    shell.run_cell("run.here.release()")


@pytest.mark.parametrize("case", LOOKING)
@pytest.mark.slow
def test_a_wrong_look_is_answered_by_a_sentence(case, copied, shell, capsys, monkeypatch):
    monkeypatch.setenv("C2F_OUTPUTS", str(copied))
    code, words = LOOKING[case]
    assert shell.run_cell(start("07_evaluation", run_id="smoke")).success
    assert words in said(shell, capsys, f"from c2f_utils.stages import reading\n{code}")
