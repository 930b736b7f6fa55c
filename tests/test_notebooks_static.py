"""What every committed notebook must look like, read from the files without running them."""

import ast
import json
import re
from pathlib import Path

import pytest

from c2f_utils.settings import parameters
from c2f_utils.settings.config import PROFILES, STAGES

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Absolute paths of the usual systems, at the start of a quoted text or after a space.
ABSOLUTE = re.compile(
    r"""(?:^|["'\s(=])(?:/(?:home|root|Users|work|tmp|mnt|data|opt|scratch|var|usr)\b|[A-Za-z]:\\|~/)"""
)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if kind in (None, cell["cell_type"])]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def test_it_is_named_after_a_stage(path):
    assert path.stem in STAGES


def test_it_begins_with_a_title_and_says_what_it_asks_reads_writes_and_takes(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and first["source"].startswith("# ")
    for word in ("question", "input", "output", "time"):
        assert word in first["source"].lower(), f"the first cell does not mention the {word}"


def test_one_parameters_cell_of_literals_with_the_standard_ones(path):
    assert sum("parameters" in tags(cell) for cell in cells(path)) == 1
    declared = parameters.of_notebook(path)
    for name, standard in parameters.STANDARD.items():
        assert (declared[name].type, declared[name].default) == (standard.type, standard.default)


def test_the_profiles_are_named_and_smoke_is_said_to_be_a_dry_run(path):
    first = next(cell["source"] for cell in cells(path) if "parameters" in tags(cell)).splitlines()[0]
    assert first.endswith("smoke (a dry run of the code: nothing is learnt)")
    assert all(profile in first.partition("#")[2] for profile in PROFILES)


def test_the_parameters_cell_is_readable_by_papermill(path):
    source = next(cell["source"] for cell in cells(path) if "parameters" in tags(cell))
    assert " | None" not in source, "papermill reads Optional[...] only"


def test_the_run_is_opened_right_after_the_parameters_and_finished_last(path):
    code = cells(path, "code")
    assert "parameters" in tags(code[0])
    assert re.search(
        rf"""^run = notebook\.start\(globals\(\), ["']{path.stem}["']\)""", code[1]["source"], re.MULTILINE
    )
    assert code[-1]["source"].strip().splitlines()[-1] == "notebook.finish(run)"


def test_later_cells_do_not_assign_to_parameters(path):
    declared = set(parameters.of_notebook(path))
    for cell in cells(path, "code")[1:]:
        names = [node for node in ast.walk(ast.parse(cell["source"])) if isinstance(node, ast.Name)]
        assert not {node.id for node in names if isinstance(node.ctx, ast.Store)} & declared


def test_it_is_committed_without_outputs(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None


def test_cells_have_ids_and_are_short(path):
    identities = [cell["id"] for cell in cells(path)]
    assert len(set(identities)) == len(identities)
    for cell in cells(path, "code"):
        assert len(cell["source"].splitlines()) <= 25, cell["source"][:200]


def test_it_installs_nothing_and_names_no_place_of_one_machine(path):
    for cell in cells(path):
        assert not re.search(r"[!%]\s*(pip|conda|apt)", cell["source"]), cell["source"][:200]
        assert not ABSOLUTE.search(cell["source"]), cell["source"][:200]


def test_it_runs_on_any_python_kernel(path):
    kernel = json.loads(path.read_text())["metadata"]["kernelspec"]
    assert kernel["name"] == "python3" and kernel["language"] == "python"
