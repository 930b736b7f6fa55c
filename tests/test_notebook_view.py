"""What JupyterLab shows of tables, figures and files, and what git sees of a notebook that was run."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.image import imread

from c2f_utils.files import root
from c2f_utils.notebook import cells, links, say
from c2f_utils.notebook.frames import frame
from c2f_utils.notebook.git_filter import clean
from c2f_utils.report.style import new_figure

NOTEBOOKS = sorted((root() / "notebooks").glob("*.ipynb"))


def shown(table: pd.DataFrame) -> list[list[str]]:
    """The words of a table as a notebook shows it, the head first."""
    rows = BeautifulSoup(frame(table), "html.parser").find_all("tr")
    return [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in rows]


def test_three_digits_whole_numbers_whole_and_nothing_where_nothing_is_known():
    table = pd.DataFrame({
        "share": [0.69123, 0.5], "n": [128.0, np.nan], "tokens": [1234.567, 8e6], "step": [3, 12_345],
        "ok": [True, False], "said": [None, "x" * 300], "mixed": [0.00012345, "a"], "empty": [None, np.nan],
        "end": [-0.0, np.inf],
    })  # fmt: skip
    assert shown(table) == [
        ["share", "n", "tokens", "step", "ok", "said", "mixed", "end"],
        ["0.691", "128", "1235", "3", "True", "", "0.000123", "0"],
        ["0.5", "", "8000000", "12345", "False", "x" * 300, "a", "inf"],
    ]
    assert table["share"][0] == 0.69123, "the table itself keeps its digits"


def test_bounds_that_stand_beside_their_value_become_its_interval():
    table = pd.DataFrame({
        "value": [0.69, 0.1], "low": [0.63, None], "high": [0.7512, None],
        "tokens": [0.5, 1.5], "tokens low": [0.4, 1.1], "tokens high": [0.6, 1.9],
        "raw": [1, 2], "raw, low": [0, 1], "raw, high": [3, 4],
    })  # fmt: skip
    assert shown(table) == [
        ["value", "tokens", "raw"],
        ["0.69 [0.63, 0.751]", "0.5 [0.4, 0.6]", "1 [0, 3]"],
        ["0.1", "1.5 [1.1, 1.9]", "2 [1, 4]"],
    ]
    words = pd.DataFrame({"name": ["a"], "low": [1.0], "high": [2.0]})
    assert shown(words)[0] == ["name", "low", "high"], "words have no interval"


def test_small_p_values_are_below_a_thousandth_and_other_small_numbers_are_not():
    table = pd.DataFrame({"p": [1e-9, 0.2], "p_holm": [0.00099, 0.001], "power": [1e-9, 1.0]})
    assert shown(table)[1:] == [["<0.001", "<0.001", "1e-09"], ["0.2", "0.001", "1"]]


def test_an_index_with_a_name_or_words_is_a_column_and_a_plain_one_is_not():
    assert shown(pd.DataFrame({"a": [1]})) == [["a"], ["1"]]
    assert shown(pd.DataFrame({"a": [1]}, index=["x"])) == [["", "a"], ["x", "1"]]
    assert shown(pd.DataFrame({"a": [1]}, index=pd.Index([4], name="iteration"))) == [["iteration", "a"], ["4", "1"]]
    assert shown(pd.DataFrame({"a": []})) == [["a"]] and frame(pd.DataFrame()) is None
    assert frame(pd.DataFrame({"a": [1]}, index=pd.MultiIndex.from_tuples([(1, 2)]))) is None, "pandas shows that"
    assert len(shown(pd.DataFrame({"a": range(900)}))) == 502


def test_a_figure_in_a_notebook_is_a_white_card_with_round_corners_and_a_saved_one_is_not():
    figure, _ = new_figure(1, 1, 3.3, 2.0, "a title")
    pixels = imread(io.BytesIO(figure._repr_png_()))
    height, width = pixels.shape[:2]
    assert pixels.shape[2] == 4 and pixels[0, 0, 3] == pixels[-1, -1, 3] == 0, "transparent outside of the card"
    assert tuple(pixels[2, width // 2]) == tuple(pixels[height // 2, 2]) == (1, 1, 1, 1)
    again = io.BytesIO()
    figure.savefig(again, format="png")
    assert imread(io.BytesIO(again.getvalue()))[0, 0, 3] == 1 and not figure.artists


def test_links_are_relative_to_the_notebook(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    page = BeautifulSoup(links(tmp_path / "outputs" / "a b<" / "report.html").markup, "html.parser")
    assert page.a["href"] == "../outputs/a%20b%3C/report.html" and page.a.get_text().endswith("a b</report.html")
    many = BeautifulSoup(links(*(tmp_path / f"{number}.png" for number in range(9))).markup, "html.parser")
    assert len(many.find_all("a")) == 9 and len(many.details.find_all("a")) == 7, "a long list is folded"


def test_sentences_are_paragraphs_shown_letter_by_letter(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    say(sentence for sentence in ("<b> beats $a$.", "So does $c$."))
    page = BeautifulSoup(shown[0]._repr_html_(), "html.parser")
    assert [each.get_text() for each in page.find_all("p")] == ["<b> beats $a$.", "So does $c$."]
    assert shown[0].text == "<b> beats $a$.\nSo does $c$." and "mathjax_ignore" in page.div["class"]


def test_a_command_runs_in_a_cell_as_messages_name_it(outputs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    shell = InteractiveShell.instance()
    try:
        said = []
        monkeypatch.setattr(shell, "system", lambda command: said.append(subprocess.run(
            command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root())}
        )))  # fmt: skip
        cells._commands()
        assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        assert shell.run_cell("c2f table").success
        assert said[0].returncode == 0 and "no runs" in said[0].stdout.lower(), said
    finally:
        InteractiveShell.clear_instance()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_that_was_run_and_saved_is_for_git_the_one_that_was_committed(path):
    committed = path.read_text(encoding="utf-8")
    notebook = json.loads(committed)
    notebook["metadata"] |= {"widgets": {}, "language_info": {"name": "python", "version": "3.11.9"}}
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"] |= {"scrolled": True, "execution": {"iopub.execute_input": "now"}}
        if cell["cell_type"] == "code":
            cell |= {"execution_count": number, "outputs": [{"output_type": "stream", "name": "stdout", "text": "é"}]}
    assert clean(json.dumps(notebook)) == committed
    assert clean("<<<<<<< a conflict") == "<<<<<<< a conflict"


def test_git_sees_no_change_after_a_notebook_was_run(tmp_path):
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    recipe = (root() / "Makefile").read_text().partition("\nlab:")[2].splitlines()[1].partition("git config")[2]
    name, command = recipe.partition("; fi")[0].replace("'", "").split(maxsplit=1)
    git("config", name, command)
    for file in (".gitattributes", "c2f_utils/notebook/git_filter.py", "notebooks/08_report.ipynb"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((root() / file).read_bytes())
    git("add", "-A")
    path = tmp_path / "notebooks/08_report.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][1]["execution_count"] = 7
    path.write_text(json.dumps(notebook))
    git("add", "-N", ".")
    assert git("diff", "--stat") == ""
    notebook["cells"][0]["source"] = "# other"
    path.write_text(json.dumps(notebook))
    assert "notebooks/08_report.ipynb" in git("diff", "--stat")
