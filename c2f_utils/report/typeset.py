"""How a table is shown: words for names, three significant digits, a value and its interval in one cell.

A column followed by its bounds (`... low`, `... high`) is shown with them as `0.691 [0.632, 0.745]`. Cells in
`frame.attrs["best"]`, a set of (row number, column), are bold. The LaTeX needs the package booktabs; it is set for
columns of 3.3 in (`table`) and two of them (`table*`, 6.8 in), by widths measured here.
"""

import math
import numbers
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from c2f_utils.report.letters import in_html, in_markdown, visible
from c2f_utils.report.results import DECODINGS, METRICS

DASH = "–"
BRACKETS = "In brackets: 95 % interval."
COLUMN, PAGE = 3.3 * 72.27, 6.8 * 72.27  # points
_SCREEN = 0.85 * PAGE  # what a page of the report shows
_SIZE, _GAP, _WORDS = 8.5, 6.0, 110.0  # points per em of cmr10 at 8 pt, between columns, longest line of words

_HEADINGS = {
    "p_holm": "p (Holm)", "of_fixed_long": "of fixed-long's tokens", "agnostic": "reads no signal", "rep2": "rep-2",
    "rep3": "rep-3", "distinct1": "distinct-1", "self_bleu": "self-BLEU", "sentence_bleu": "sentence BLEU",
    "length_ratio": "length ratio", "detectable": "smallest detectable", "rl_tokens": "RL tokens",
    "sft_tokens": "SFT tokens", "search_tokens": "search tokens",
}  # fmt: skip
_AS_THEY_ARE = ("coefficient", "share", "level")
_WHOLE = ("n", "seed", "seeds", "threads", "layer", "prefix", "k")


def heading(column: str) -> str:
    """Readable name of a column."""
    return METRICS[column].column if column in METRICS else _HEADINGS.get(column, str(column).replace("_", " "))


def cell(column: str, value: object) -> str:
    """A value as shown: three significant digits, whole numbers whole, thousands apart, nulls as a dash."""
    if missing(value):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        known = {"metric": lambda: heading(value), "decoding": lambda: DECODINGS.get(value, value)}
        return known.get(column, lambda: value)()
    if isinstance(value, int | float):
        if column in _AS_THEY_ARE:
            return f"{value:g}"
        if isinstance(value, int) or column in _WHOLE:
            return f"{value:.0f}" if column in _WHOLE else _number(value, 0)
        if column in ("p", "p_holm"):
            return "<0.001" if value < 0.001 else f"{value:.3f}"
        return _number(value, _decimals(value))
    return str(value)


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A value and its bounds with as many decimals as show three digits of the largest of them."""
    if missing(value):
        return DASH
    bounds = [] if missing(low) or missing(high) else [low, high]
    decimals = _decimals(value, *bounds)
    shown = [_number(number, decimals) for number in (value, *bounds)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if bounds else shown[0]


def missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, numbers.Real) and not math.isfinite(value))


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def spans(names: Sequence[str], columns: Sequence[Sequence]) -> list[slice]:
    """The columns that are shown as one: three where the second and third are bounds of the first (`x`, `x low`,
    `x high`, or with `_` or a comma), else one."""
    found: list[slice] = []
    while (at := found[-1].stop if found else 0) < len(names):
        low, high = (*names[at + 1 : at + 3], "", "")[:2]
        bounded = low.endswith("low") and high == f"{low[:-3]}high"
        bounded = bounded and all(missing(v) or is_number(v) for column in columns[at : at + 3] for v in column)
        found.append(slice(at, at + (3 if bounded else 1)))
    return found


def _decimals(*values: float) -> int:
    largest = max(abs(value) for value in values)
    return max(0, 2 - math.floor(math.log10(largest))) if largest > 1e-9 else 0


def _number(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−" if text.strip("-0.,") else "")


class Shown(NamedTuple):
    """A table as its reader sees it."""

    headings: list[str]
    numeric: list[bool]
    cells: list[list[str]]
    best: set[tuple[int, int]]  # (row, column) in bold
    intervals: bool


def shown(frame: pd.DataFrame) -> Shown:
    """The headings and cells of a table, with the bounds in the cells of their values."""
    names = [str(name) for name in frame.columns]
    rows = list(frame.astype(object).itertuples(index=False, name=None))
    columns = spans(names, list(zip(*rows, strict=True)) or [()] * len(names))
    cells = [
        [interval(*row[c]) if c.stop - c.start == 3 else cell(names[c.start], row[c.start]) for c in columns]
        for row in rows
    ]
    numeric = [_numeric([row[c.start] for row in rows]) for c in columns]
    place = {names[c.start]: number for number, c in enumerate(columns)}
    best = {(row, place[name]) for row, name in frame.attrs.get("best", ())}
    intervals = any(c.stop - c.start == 3 for c in columns)
    return Shown([heading(names[c.start]) for c in columns], numeric, cells, best, intervals)


def _numeric(values: Sequence[object]) -> bool:
    known = [value for value in values if not missing(value)]
    return bool(known) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)


def note(frame: pd.DataFrame) -> str:
    """What a reader must know to read the cells, for the caption."""
    parts = [BRACKETS] if shown(frame).intervals else []
    return " ".join([*parts, *([frame.attrs["note"]] if frame.attrs.get("note") else [])])


# Markdown and HTML


def markdown(frame: pd.DataFrame) -> str:
    """A pipe table; a pipe or a line break inside a cell cannot break it."""
    table = shown(frame)

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [row([in_markdown(name) for name in table.headings]), row(rule)]
    for number, cells in enumerate(table.cells):
        texts = [in_markdown(text) for text in cells]
        lines.append(row([f"**{t}**" if (number, column) in table.best else t for column, t in enumerate(texts)]))
    return "\n".join(lines) + "\n"


def html(frame: pd.DataFrame) -> str:
    """An HTML table with every cell escaped; intervals stand below their values where it is too wide for a page."""
    table = shown(frame)
    columns = zip(table.numeric, zip(table.headings, *table.cells, strict=True), strict=True)
    widths = [_column_width(list(column), numeric) for numeric, column in columns]
    stacked = _total(widths, range(len(widths))) > _SCREEN
    marks = [' class="number"' if numeric else "" for numeric in table.numeric]

    def row(tag: str, cells: Sequence[str], number: int = -1) -> str:
        inner = [in_html(text) for text in cells]
        if stacked and number >= 0:
            inner = [
                t.replace(" [", "<br><small>[") + "</small>" if right and " [" in t else t
                for t, right in zip(inner, table.numeric, strict=True)
            ]
        inner = [f"<strong>{t}</strong>" if (number, c) in table.best else t for c, t in enumerate(inner)]
        return "<tr>" + "".join(f"<{tag}{mark}>{t}</{tag}>" for mark, t in zip(marks, inner, strict=True)) + "</tr>"

    body = "\n".join(row("td", cells, number) for number, cells in enumerate(table.cells))
    return f"<table>\n<thead>{row('th', table.headings)}</thead>\n<tbody>\n{body}\n</tbody></table>\n"


# LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", DASH: r"\textendash{}", "—": r"\textemdash{}", "“": "``", "”": "''",
    "‘": "`", "’": "'", "…": r"\ldots{}", "−": r"$-$", "·": r"$\cdot$", "×": r"$\times$", "±": r"$\pm$",
    "≤": r"$\leq$", "≥": r"$\geq$", "→": r"$\rightarrow$", "⟨": r"$\langle$", "⟩": r"$\rangle$", "α": r"$\alpha$",
    "β": r"$\beta$", "δ": r"$\delta$", "λ": r"$\lambda$", "κ": r"$\kappa$",
}  # fmt: skip

_ACCENTS = "\u0300\u0301\u0302\u0303\u0308\u030a\u030c\u0327"  # those of OT1: grave, acute, ..., cedilla


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is; a letter that its usual fonts lack is named by its code point."""
    return "".join(_letter(letter) for letter in " ".join(visible(text).split())).replace("--", "-{}-")


def _letter(letter: str) -> str:
    if letter in _LATEX:
        return _LATEX[letter]
    plain = unicodedata.normalize("NFD", letter)
    accented = len(plain) == 2 and plain[0].isascii() and plain[1] in _ACCENTS
    return letter if letter.isascii() or accented else f"[U+{ord(letter):04X}]"


# Widths of cmr10 in thousandths of an em, rounded up in groups; anything else counts as a full em.
_EM = {
    letter: width
    for width, letters in {
        306: ".,;:!'`|[]ilfj", 340: " -", 394: "rst()", 500: '0123456789acegoz/?–I"', 556: "bdhknpquvxyS",
        750: "ABCDEFHJKLNPRTUVXYZ", 780: "GOQ+=<>−&", 833: "mw%#",
    }.items()
    for letter in letters
}  # fmt: skip


def width(text: str) -> float:
    """Points that a text takes on one line of a table."""
    return _SIZE * sum(_EM.get(letter, 1100) for letter in text) / 1000


def latex(frame: pd.DataFrame, caption: str = "", label: str = "") -> str:
    """A `table`, or a `table*` where it is wider than a column; below one another what is wider than two.

    A column that says the same in every row goes to the caption.
    """
    table = shown(frame)
    kept, said = _varying(table)
    texts = [[table.headings[c], *(cells[c] for cells in table.cells)] for c in kept]
    widths = [_column_width(column, table.numeric[c]) for column, c in zip(texts, kept, strict=True)]
    panels = _panels(widths, 1 if len(set(texts[0])) == len(texts[0]) else min(2, len(texts)))
    lines = []
    for panel in panels:
        bold = [{row for row, column in table.best if column == kept[k]} for k in panel]
        lines += [r"\par\medskip"] if lines else []
        numeric = [table.numeric[kept[k]] for k in panel]
        lines += _tabular([texts[k] for k in panel], [widths[k] for k in panel], numeric, bold)
    whole = len(panels) > 1 or _total(widths, panels[0]) > COLUMN
    kind = "table*" if whole else "table"
    words = " ".join(part for part in (caption, said, note(frame)) if part)
    start = [rf"\begin{{{kind}}}[t]", r"\centering\footnotesize", rf"\setlength{{\tabcolsep}}{{{_GAP / 2:g}pt}}"]
    start += [r"\setlength{\belowcaptionskip}{4pt}"]
    start += [rf"\caption{{{_breakable(words, _WORDS)}}}"] if words else []
    start += [rf"\label{{tab:{label}}}"] if label else []
    return "\n".join([*start, *lines, rf"\end{{{kind}}}"]) + "\n"


def _varying(table: Shown) -> tuple[list[int], str]:
    """The columns in which rows differ, and a sentence with those in which they do not."""
    values = [{cells[column] for cells in table.cells} for column in range(len(table.headings))]
    same = [c for c, found in enumerate(values) if c and len(table.cells) > 2 and len(found) == 1]
    empty = [table.headings[c] for c in same if values[c] == {DASH}]
    told = [f"{table.headings[c]} {next(iter(values[c]))}" for c in same if values[c] != {DASH}]
    words = [f"In every row: {'; '.join(told)}."] if told else []
    words += [f"Not known: {'; '.join(empty)}."] if empty else []
    return [c for c in range(len(values)) if c not in same], " ".join(words)


def _column_width(column: list[str], numeric: bool) -> float:
    """What the cells of a column take, the heading first, which may be broken between words."""
    head, *cells = column
    widest = max((width(text) for text in cells), default=0)
    if not numeric:
        widest = min(widest, _WORDS)
    return max(widest, *(width(word) for word in head.split()), 12.0)


def _total(widths: list[float], columns: Sequence[int]) -> float:
    return sum(widths[k] for k in columns) + _GAP * (len(columns) - 1)


def _panels(widths: list[float], keys: int) -> list[list[int]]:
    """Columns that fit beside one another; every panel begins with the same first columns."""
    first = list(range(keys))
    panels = [first]
    for column in range(keys, len(widths)):
        if len(panels[-1]) > keys and _total(widths, [*panels[-1], column]) > PAGE:
            panels.append(first)
        panels[-1] = [*panels[-1], column]
    return panels


def _tabular(columns: list[list[str]], widths: list[float], numeric: list[bool], bold: list[set[int]]) -> list[str]:
    heads = [_head(column[0], points, right) for column, points, right in zip(columns, widths, numeric, strict=True)]
    rows = [
        [
            rf"\textbf{{{escape_latex(column[row])}}}" if row - 1 in best else _body(column[row], points)
            for column, points, best in zip(columns, widths, bold, strict=True)
        ]
        for row in range(1, len(columns[0]))
    ]
    align = "".join("r" if right else "l" for right in numeric)
    head, *body = [" & ".join(cells) + r" \\" for cells in (heads, *rows)]
    start = [rf"\begin{{tabular}}{{@{{}}{align}@{{}}}}", r"\toprule", head, r"\midrule"]
    return [*start, *body, r"\bottomrule", r"\end{tabular}"]


def _head(text: str, points: float, right: bool) -> str:
    """A heading on as many lines as its column's width asks for."""
    lines: list[str] = []
    for word in text.split():
        if lines and width(f"{lines[-1]} {word}") <= points:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    stacked = r"\\".join(escape_latex(line) for line in lines)
    return rf"\shortstack[{'r' if right else 'l'}]{{{stacked}}}" if len(lines) > 1 else stacked


def _body(text: str, points: float) -> str:
    if width(text) <= points:
        return escape_latex(text)
    return rf"\parbox[t]{{{points:.0f}pt}}{{\raggedright {_breakable(text, points)}\strut}}"


def _breakable(text: str, points: float) -> str:
    """Text whose words can be broken where one alone is wider than that: somebody else may have written it."""
    words = [re.sub(r"(.{8})(?=.)", "\\1\0", word) if width(word) > points else word for word in text.split()]
    return r"\allowbreak{}".join(escape_latex(part) for part in " ".join(words).split("\0"))
