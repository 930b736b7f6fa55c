"""What a model, a data set or a file name wrote is shown letter by letter: no markup, no mathematics, no reordering."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from browser import CHROMIUM, chromium, lab, wait
from bs4 import BeautifulSoup  # comes with nbconvert, as nbconvert with jupyterlab
from notebooks_for_tests import RESULT, write

from c2f_utils.files import root
from c2f_utils.report import letters
from c2f_utils.report.document import Document, to_html, to_markdown

PRICES = "A shirt costs $5 and a hat $10"
FORMULAS = (PRICES, r"\(x^2\) stays", "so does $$y$$", r"\[z\] too", r"\begin{equation}a\end{equation}", "<b>&amp;")
TURNED = "wire \u202e01$ to\u202c me\u0007"  # shown as "to $10" by whatever obeys it
SHOWN = "wire ⟨U+202E⟩01$ to⟨U+202C⟩ me⟨U+0007⟩"


def text(markup: str) -> str:
    return BeautifulSoup(markup, "html.parser").get_text()


def read(markup: str) -> list[str]:
    """The pieces of a page in which MathJax looks for mathematics."""
    pieces = BeautifulSoup(markup, "html.parser").find_all(string=True)
    return [str(piece) for piece in pieces if not any(map(_left_alone, piece.parents))]


def _left_alone(element) -> bool:
    return element.name in ("pre", "code", "script", "style") or set(letters.NO_MATHEMATICS.split()) <= set(
        element.get("class") or ()
    )


def test_letters_that_are_not_seen_are_named_and_the_others_left_as_they_are():
    assert letters.visible(TURNED) == SHOWN
    assert letters.visible("a\r\nb\tc\n") == "a\nb\tc\n" and letters.visible("a\rb") == "a⟨U+000D⟩b"
    kept = "naïve 数学 שלום ‏".rstrip("\u200f") + " नमस्ते क्\u200dष 👩\u200d🚀 $x$ \\(y\\)"
    assert letters.visible(kept) == kept and text(letters.in_html(kept)) == kept
    assert letters.visible("\ud800\u2028\ufeff\u00ad") == "⟨U+D800⟩⟨U+2028⟩⟨U+FEFF⟩⟨U+00AD⟩"
    assert "title='RIGHT-TO-LEFT OVERRIDE'>⟨U+202E⟩</span>" in letters.in_html(TURNED)


@pytest.mark.parametrize("written", FORMULAS)
def test_the_text_of_the_html_is_the_text(written):
    page = letters.without_mathematics(letters.in_html(written))
    assert text(page) == written and not read(page)


def document() -> Document:
    found = Document("$1 and $2")
    for each in (*FORMULAS, TURNED):
        found.text(each)
        found.bullets([each])
        found.code(each)
        found.answers(each, [(each, [(word, False) for word in each.split()])])
    return found


def test_a_report_shows_every_letter_in_both_of_its_forms(tmp_path):
    page = to_html(document(), tmp_path)
    assert "<title>$1 and $2</title>" in page
    for each in (*FORMULAS, SHOWN):
        assert text(page).count(each) == 6, each
    for form in (page, to_markdown(document())):
        assert not re.search("[\u0000-\u0008\u202a-\u202e]", form)


STORY = f"""import pandas as pd
from c2f_utils.notebook.opening import opening
texts = {(*FORMULAS, TURNED)!r}
rows = [{{"prompt": text, "text": text, "model": text, "stop": text}} for text in texts]
display(notebook.sample_browser(rows), notebook.side_by_side({{text: rows for text in texts}}, limit=9, blind=True))
display(opening({{text: text for text in texts}}, [(text, text, text, text) for text in texts], {{}}))
display(pd.DataFrame({{text: [text] for text in texts}}, index=[texts[0]]))"""
MARKDOWN = """from test_letters import document
from c2f_utils.report.document import to_markdown
from IPython.display import Markdown
display(Markdown(to_markdown(document())))"""
FORMULA = "display(Markdown('$x^2$'))"  # says that mathematics is typeset on this page


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook whose cells have shown such text in every way that ours do."""
    folder = tmp_path_factory.mktemp("notebooks")
    path = write(folder, "01_base_model", STORY, MARKDOWN, FORMULA, RESULT)
    environment = os.environ | {
        "C2F_OUTPUTS": str(folder / "outputs"), "PYTHONPATH": f"{root()}{os.pathsep}{root() / 'tests'}"
    }  # fmt: skip
    command = [sys.executable, "-m", "papermill", str(path), str(folder / "executed.ipynb")]
    done = subprocess.run(command, cwd=root(), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "executed.ipynb"


def test_an_exported_notebook_leaves_mathjax_nothing_to_typeset(executed):
    from nbconvert import HTMLExporter

    found = nbformat.read(executed, as_version=4)
    export = HTMLExporter(exclude_input=True)
    delimited = re.compile(r"\$.*\$|\\[(\[]|\\begin", re.DOTALL)
    page = export.from_notebook_node(found)[0]
    assert [piece for piece in read(page) if delimited.search(piece)] == ["$x^2$"], "the formula of the last cell"
    assert all(each in text(page) for each in (*FORMULAS, SHOWN)) and "\u202e" not in page


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)")
def test_jupyterlab_shows_every_letter(executed, tmp_path):
    with lab(executed.parent, tmp_path / "lab") as address, chromium(tmp_path / "profile") as page:
        page.ask("Page.navigate", url=address(executed.name))
        outputs = "[...document.querySelectorAll('.jp-OutputArea-output')]"
        typeset = f"{outputs}.flatMap(output => [...output.querySelectorAll('mjx-container')]).length"
        wait(lambda: page.evaluate(typeset))  # the formula comes last
        assert page.evaluate(typeset) == 1
        views = [view for view in page.evaluate(f"{outputs}.map(output => output.textContent)") if "shirt" in view]
        assert len(views) == 5
        for each in (*FORMULAS, SHOWN):
            assert all(each in view for view in views), each
