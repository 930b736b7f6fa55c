"""The tests notice errors: every planted one makes the tests fail that are named beside it."""

import ast
import json
import os
import subprocess
import sys

import pytest
from planted_errors import PLANTED
from planting import ROOT

ROOMS = (
    "coarse/",
    "rollout/",
    # Of the evaluation those whose figures are formulas; suites, judges and their files are held by other tests.
    "measure/answers.py",
    "measure/length_bias.py",
    "measure/sampling.py",
    "measure/retention.py",
    "measure/win_rates.py",
    "measure/judge_summary.py",
    "domain/problems.py",
    "domain/samples.py",
    "limits.py",
    "positions.py",
    "stats.py",
    "redundancy.py",
)
# Rooms without a formula: what they do is waiting, writing, asking and refusing.
WITHOUT = {"__init__.py", "__main__.py", "anatomy.py", "checkpoints.py", "refusals.py"}


@pytest.mark.parametrize("planted", PLANTED, ids=range(len(PLANTED)))
def test_every_error_can_still_be_planted_and_its_tests_exist(planted):
    text = (ROOT / "c2f_utils" / planted.file).read_text(encoding="utf-8")
    assert text.count(planted.original) == 1 and planted.mutated != planted.original
    ast.parse(text.replace(planted.original, planted.mutated))
    for test in planted.tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_errors_are_planted_in_every_room_with_a_formula():
    assert len({planted[:3] for planted in PLANTED}) == len(PLANTED) >= 40
    folder = ROOT / "c2f_utils"
    files = {path for room in ROOMS for path in [*folder.glob(room), *folder.glob(f"{room}*.py")] if path.is_file()}
    rooms = {path.relative_to(folder).as_posix() for path in files if path.name not in WITHOUT}
    assert {planted.file for planted in PLANTED} == rooms


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[tuple[int, str]]:
    """Exit status and output of the tests: without an error, then for every planted one."""
    out = tmp_path_factory.mktemp("planted") / "said.json"
    command = [sys.executable, str(ROOT / "tests" / "planting.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_without_an_error_the_tests_pass(said):
    status, output = said[0]
    assert status == pytest.ExitCode.OK, output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_every_planted_error_is_caught(said, number):
    status, output = said[number + 1]
    assert status == pytest.ExitCode.TESTS_FAILED, f"{PLANTED[number]}\n{output[-2000:]}"
