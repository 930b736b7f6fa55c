"""The house: wings may use what lies below them, no room has two names, and nothing heavy stands in the doorway."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
ROOMS = sorted((ROOT / "c2f_utils").rglob("*.py"))


def test_wings_import_only_what_lies_below_them_and_no_two_rooms_each_other(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0, capsys.readouterr().out


def test_no_two_rooms_have_one_name():
    names = Counter(path.name for path in ROOMS if not path.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_is_a_room(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("code", ["import c2f_utils", "import c2f_utils.__main__", "import c2f_utils.report.build"])
def test_nothing_heavy_stands_in_the_doorway(code):
    said = f"{code}; import sys; print([m for m in ('torch', 'transformers', 'papermill') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
