"""Sets tables with a real TeX, in two columns of 3.3 in, and reads its log."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_PAGE = r"""\documentclass[10pt,twocolumn]{article}
\usepackage{booktabs}
\textwidth=6.8in \columnsep=0.2in \textheight=9in
\begin{document}
"""


def check(folder: Path) -> None:
    """Every .tex of a folder is set without an error and without a box, or a float, larger than its room."""
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex; install texlive-latex-recommended")
    tables = sorted(folder.glob("*.tex"))
    assert tables
    parts = [f"\\typeout{{TABLE {path.stem}}}\n{path.read_text(encoding='utf-8')}\\clearpage\n" for path in tables]
    room = folder.parent / "tex"
    room.mkdir(exist_ok=True)
    (room / "all.tex").write_text(_PAGE + "".join(parts) + "\\end{document}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"]
    done = subprocess.run(command, cwd=room, capture_output=True)
    log = (room / "all.log").read_text(encoding="utf-8", errors="replace")
    said = re.findall(r"^(?:TABLE|!|Overfull|LaTeX Warning: Float).*", log, re.MULTILINE)
    assert done.returncode == 0, "\n".join(said[-3:])
    assert sum(line.startswith("TABLE") for line in said) == len(tables)
    wide = [points for points in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt", log) if float(points) > 1]
    assert not wide and "Float too large" not in log, "\n".join(line for line in said)
