"""Which stage was made from which: the lineage of a run, drawn from the records of its stages.

Inputs: run directories. Output: a figure with a box per stage. A parent lent by another run is dashed; one that has
changed since a later stage was made from it is named in red. Needs no torch.
"""

from datetime import datetime
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from c2f_utils.errors import C2FError
from c2f_utils.report import sources
from c2f_utils.report.results import folder
from c2f_utils.report.style import DOUBLE, INK, MUTED, new_figure, say, styled

_WRONG, _LENT, _MADE = "#c0392b", "#e07b00", "#9a9a9a"
_WIDE, _HIGH = 0.88, 0.78  # of a box, in steps of the grid
_TABLES = "08_report"


def stages_of(run: object) -> pd.DataFrame:
    """One row per stage with results, in order: run, stage, digest (of settings, results and models), state, started,
    minutes, the stages it was made from, which of them `changed` since, digests of data and models it read, and
    whether it was lent by another run."""
    place, rows = folder(run), []
    found = {name: path for name, path in sources.find_stages(place).items() if name[:2] != "00"}
    for name, path in found.items():
        try:
            rows.append(_row(name, path, place, found))
        except (C2FError, LookupError, ValueError, TypeError, AttributeError) as error:
            about = {"run": path.parent.name, "stage": name, "state": f"damaged: {error}", "lent": path.parent != place}
            rows.append(dict.fromkeys(_COLUMNS) | about | {"parents": [], "changed": [], "read": []})
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = ["run", "stage", "digest", "state", "started", "minutes", "parents", "changed", "read", "lent"]


def _row(name: str, path: Path, run: Path, found: dict[str, Path]) -> dict[str, object]:
    if wrong := sources.damaged(path):
        raise C2FError(", ".join(wrong))
    status, record = sources.read(path / "status.json"), sources.read(path / "provenance.json")
    inputs = record.get("inputs") or {}
    parents = [parent for parent in sources.STAGES if parent in (record.get("parents") or {})]
    now = {parent: sources.identity_of(found[parent]) for parent in parents if parent in found}
    read = [key.partition(":") for key in inputs]  # weights:base, data:FILE
    began, ended = (_time(status.get(key)) for key in ("started", "finished"))
    return {
        "run": path.parent.name,
        "stage": name,
        "digest": sources.identity_of(path),
        "state": status.get("status"),
        "started": began and f"{began:%Y-%m-%d %H:%M}",
        "minutes": max(0.0, round((ended - began).total_seconds() / 60, 1)) if began and ended else None,
        "parents": parents,
        "changed": [parent for parent, digest in now.items() if inputs.get(parent, digest) != digest],
        "read": [f"{Path(what).name} {_short(inputs[kind + of + what])}" for kind, of, what in read if of],
        "lent": path.parent != run,
    }


def _time(text: object) -> datetime | None:
    return datetime.fromisoformat(str(text)) if text else None


def _short(digest: object) -> str:
    return str(digest).rpartition(":")[2][:8]


@styled
def lineage(source: object) -> Figure:
    """The stages of a run as boxes with run, digest, date and duration, and arrows from what each was made from.

    An arrow that a longer way of arrows implies is left out, unless that parent has changed since.
    """
    place = folder(source)
    frame = stages_of(place)
    fig, axes = new_figure(1, 1, DOUBLE, 3.1, "What was made from what", place)
    fig.data, ax = frame, axes[0, 0]
    if frame.empty:
        say(ax, "no stage has results yet")
        return fig
    rows = {row["stage"]: row for row in frame.to_dict("records")}
    made_from = {name: [parent for parent in row["parents"] if parent in rows] for name, row in rows.items()}
    at = _places(made_from)
    leaves = [name for name in rows if not any(name in parents for parents in made_from.values())]
    made_from[_TABLES] = leaves
    at[_TABLES] = (1 + max(x for x, _ in at.values()), 0.0)
    changed = {(parent, name) for name, row in rows.items() for parent in row["changed"]}
    for parent, name in _arrows(made_from) | changed:
        _arrow(ax, at[parent], at[name], _WRONG if (parent, name) in changed else _MADE)
    stale = {parent: [name[:2] for before, name in sorted(changed) if before == parent] for parent, _ in changed}
    for name, row in rows.items():
        _box(ax, at[name], *_words(row, stale.get(name)), row["lent"])
    _box(ax, at[_TABLES], "08\nReport", ["figures and tables", _shorten(f"run {place.name}")], INK, False)
    ys = [y for _, y in at.values()]
    ax.set(xlim=(-0.5, max(x for x, _ in at.values()) + 0.5), ylim=(max(ys) + 0.5, min(ys) - 0.5))
    ax.axis("off")
    return fig


def _shorten(words: str, longest: int = 24) -> str:
    """Words that fit into a box."""
    return words if len(words) <= longest else words[: longest - 1] + "…"


def _words(row: dict, stale: list[str] | None) -> tuple[str, list[str], str]:
    """Title, lines and colour of a stage's box."""
    title = f"{row['stage'][:2]}\n{sources.STAGES[row['stage']][0]}"
    lines = [_shorten(f"{'from run' if row['lent'] is True else 'run'} {row['run']}")]
    if row["state"] not in (None, "done"):
        lines.append(_shorten(str(row["state"])))
    lines += [f"digest {row['digest'][:8]}"] if pd.notna(row["digest"]) else []
    lines += [row["started"]] if pd.notna(row["started"]) else []
    lines += [f"{row['minutes']:g} min"] if pd.notna(row["minutes"]) else []
    lines += [_shorten(each) for each in row["read"][:2]]
    lines += [f"changed since {', '.join(stale)}"] if stale else []
    wrong = stale or row["state"] not in (None, "done")
    return title, lines, _WRONG if wrong else _LENT if row["lent"] else INK


def _places(made_from: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Column and row of each stage: one column to the right of the last stage it was made from, side branches below."""
    columns: dict[str, int] = {}
    for name in made_from:  # in order, so that parents come first
        columns[name] = 1 + max((columns[parent] for parent in made_from[name]), default=-1)
    at: dict[str, tuple[float, float]] = {}
    for name, column in columns.items():
        at[name] = float(column), float(sum(x == column for x, _ in at.values()))
    return at


def _arrows(made_from: dict[str, list[str]]) -> set[tuple[str, str]]:
    """(parent, stage) without those that a longer way implies."""
    above: dict[str, set[str]] = {}
    for name, parents in made_from.items():
        above[name] = {*parents, *(more for parent in parents for more in above[parent])}
    implied = {(far, name) for name, parents in made_from.items() for parent in parents for far in above[parent]}
    return {(parent, name) for name, parents in made_from.items() for parent in parents} - implied


def _arrow(ax: object, begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Straight to a neighbour, over the boxes between, or with one corner into another row."""
    (x, y), (to_x, to_y) = begin, end
    right, left = (x + _WIDE / 2, y), (to_x - _WIDE / 2, to_y)
    if to_y > y:
        way, right = "angle,angleA=90,angleB=0,rad=3", (x, y + _HIGH / 2)
    elif to_y < y:
        way, left = "angle,angleA=0,angleB=90,rad=3", (to_x, to_y + _HIGH / 2)
    elif to_x - x > 1:
        way, right, left = "arc3,rad=-0.2", (x, y - _HIGH / 2), (to_x, to_y - _HIGH / 2)
    else:
        way = "arc3,rad=0"
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 0.9, "connectionstyle": way, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=left, xytext=right, arrowprops=style, annotation_clip=False)


def _box(ax: object, at: tuple[float, float], title: str, lines: list[str], colour: str, lent: bool) -> None:
    x, y = at
    top = y - _HIGH / 2
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": "white", "edgecolor": colour, "linewidth": 0.8}
    ax.add_patch(FancyBboxPatch((x - _WIDE / 2, top), _WIDE, _HIGH, linestyle="--" if lent else "-", **style))
    ax.text(x, top + 0.05, title, ha="center", va="top", fontsize=5.6, fontweight="bold", color=colour)
    ax.text(x, top + 0.24, "\n".join(lines), ha="center", va="top", fontsize=5.2, color=MUTED)
