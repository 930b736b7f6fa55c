"""A DataFrame as a notebook shows it: three digits, an interval beside its value, nothing where nothing is known.

Files keep every digit and every column; this is for reading. Columns `x`, `low`, `high` (or `x low`, `x_low`,
`x, low`, ...) that stand side by side become one: `0.69 [0.63, 0.75]`.
"""

import numbers
import re
from collections.abc import Sequence

import pandas as pd

from c2f_utils.report.letters import in_html, without_mathematics
from c2f_utils.report.typeset import is_number, missing, spans

ROWS = 500  # more are left out in the middle
WIDE = 12  # columns beyond which letters are smaller
_BOX = "max-width:1000px;max-height:640px;overflow:auto"
_PAD = "padding:4px 3px"
_WORDS = f"{_PAD};text-align:left;white-space:pre-wrap;overflow-wrap:break-word"
_HEAD = _PAD + ";text-align:{side};vertical-align:bottom;overflow-wrap:break-word"


def frame(table: pd.DataFrame) -> str | None:
    """The table as HTML, every word letter by letter; None (pandas' own) where rows or columns have several levels."""
    if table.index.nlevels > 1 or table.columns.nlevels > 1 or not len(table.columns):
        return None
    names, columns = list(table.columns), [table.iloc[:, i].tolist() for i in range(table.shape[1])]
    if not isinstance(table.index, pd.RangeIndex) or table.index.name is not None:
        names, columns = [table.index.name or "", *names], [table.index.tolist(), *columns]
    names = [str(name) for name in names]
    shown = [_column(names[span.start], columns[span]) for span in spans(names, columns)]
    filled = [(name, cells, numeric) for name, cells, numeric in shown if any(cells)]
    filled = filled if table.size else shown
    head = "".join(_cell("th", _breakable(name), numeric) for name, _, numeric in filled)
    lines = list(zip(*(cells for _, cells, _ in filled), strict=True))
    body = ["".join(_cell("td", text, numeric) for text, (*_, numeric) in zip(line, filled, strict=True))
            for line in lines]  # fmt: skip
    if len(body) > ROWS:
        gone = f"<td colspan='{len(filled)}'>{len(body) - ROWS} rows are not shown</td>"
        body = [*body[: ROWS // 2], gone, *body[-ROWS // 2 :]]
    rows = "".join(f"<tr>{line}</tr>" for line in body)
    size = "font-size:10.5px" if len(filled) > WIDE else ""
    markup = f"<table class='dataframe' style='{size}'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return without_mathematics(f"<div style='{_BOX}'>{markup}</div>")


def number(value: float) -> str:
    """Three significant digits; a whole number, and what is beyond a thousand, without a fraction."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value or 0:.0f}"  # zero has no sign
    return f"{value:.3g}"


def _column(name: str, columns: Sequence[list]) -> tuple[str, list[str], bool]:
    """Name, cells as HTML and whether they are numbers, of one column or of one with its bounds."""
    numeric = all(missing(value) or is_number(value) for value in columns[0])
    return name, [_between(name, *row) for row in zip(*columns, strict=True)], numeric


def _between(name: str, value: object, *bounds: object) -> str:
    if all(missing(bound) for bound in bounds):
        return _text(value, name)
    low, high = (_text(bound, name) for bound in bounds)
    return f"{_text(value, name)} <span style='white-space:nowrap'>[{low}, {high}]</span>"


def _text(value: object, name: str) -> str:
    """A cell as HTML; empty for what is not known."""
    if not is_number(value):
        return "" if missing(value) and str(value).lstrip("-") != "inf" else in_html(value)
    if re.fullmatch(r"p([\s,_].*)?", name) and 0 <= value < 0.001:
        return "&lt;0.001"
    return in_html(value if isinstance(value, numbers.Integral) else number(float(value)))


def _breakable(name: str) -> str:
    """A name that may be broken after an underscore."""
    return in_html(name).replace("_", "_<wbr>")


def _cell(kind: str, markup: str, numeric: bool) -> str:
    if kind == "th":
        return f"<th style='{_HEAD.format(side='right' if numeric else 'left')}'>{markup}</th>"
    return f"<td style='{_PAD}'>{markup}</td>" if numeric else f"<td style='{_WORDS}'>{markup}</td>"
