"""Figures of stage 06: how much residue, in which layers, by which operator, and what the residue is made of.

Every function takes the stage, its directory, the run's directory, or the data already read, and returns the figure.
"""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from c2f_utils.report.labels import end_labels
from c2f_utils.report.results import (
    LABELS,
    NO_CHECKER,
    PARENTS_OF_06,
    column,
    errors,
    known,
    load,
    operator_name,
    parents_of,
    quality,
    rows_of,
)
from c2f_utils.report.style import DOUBLE, INK, MUTED, ROLE_COLOURS, new_figure, say, styled

STAGE = "06_residue_merging"

_VARIANTS = {
    "part": "layers", "depth": "depths", "operator": "operators", "average": "averages", "decoding": "proxies",
    "dtype": "roundings",
}  # fmt: skip

_PANELS = ("mean_tokens", "rep4", "score")


@styled
def coefficient_sweep(source: object, parents: dict[str, dict] | None = None) -> Figure:
    """Accuracy, length, repetition and score against the residue coefficient; the chosen one and both parents marked.

    `parents` maps instruct and coarse to their metrics; by default those that stage 06 measured on the same problems,
    else those of stages 05 and 03 of the same run.
    """
    results, place = load(source, STAGE)
    parents = parents or results.get("parents") or parents_of(place)
    parents = {role: row for role, row in parents.items() if role in PARENTS_OF_06 and row}
    rows = sorted(rows_of(results, "sweep"), key=lambda row: row["coefficient"])
    first_metric, why = quality(rows, "accuracy_last")
    title = "Residue coefficient: quality against length and repetition" + (f" ({why})" if why else "")
    fig, axes = new_figure(2, 2, DOUBLE, 4.3, title, place)
    fig.data = pd.DataFrame(rows)
    x, chosen = column(rows, "coefficient"), (results.get("chosen") or {}).get("coefficient")
    for ax, metric in zip(axes.flat, (first_metric, *_PANELS), strict=True):
        ax.set(ylabel=LABELS[metric], xlabel="residue coefficient" if ax in axes[1] else "")
        values = column(rows, metric)
        if not known(values):
            say(ax, f"{LABELS[metric]}\n{NO_CHECKER}" if rows else "no coefficient was tried")
            continue
        ends = []
        if metric == "accuracy_last":
            ax.set_ylabel("accuracy")
            first = column(rows, "accuracy_first")
            look = {"color": ROLE_COLOURS["fine"], "marker": "o", "linewidth": 0.9, "linestyle": "--"}
            ax.errorbar(x, first, errors(rows, "accuracy_first"), elinewidth=0.7, markerfacecolor="white", **look)
            ends.append((x[-1], first[-1], "first answer", ROLE_COLOURS["fine"]))
        ends.append((x[-1], values[-1], "last answer" if metric == "accuracy_last" else "merge", ROLE_COLOURS["fine"]))
        ax.errorbar(x, values, errors(rows, metric), color=ROLE_COLOURS["fine"], marker="o", elinewidth=0.8)
        for role, row in parents.items():
            if row.get(metric) is not None:
                ax.axhline(row[metric], color=ROLE_COLOURS[role], linewidth=0.9, linestyle=":")
                ends.append((x[-1], row[metric], role, ROLE_COLOURS[role]))
            first = row.get("accuracy_first")
            if metric == "accuracy_last" and first is not None and abs(first - (row[metric] or 0)) > 0.01:
                ax.axhline(first, color=ROLE_COLOURS[role], linewidth=0.7, linestyle=(0, (1, 3)))
                ends.append((x[-1], first, f"{role}, first", ROLE_COLOURS[role]))
        if chosen is not None:
            ax.axvline(chosen, color=INK, linewidth=0.7)
            if metric == "accuracy_last":
                above = {"xytext": (2, 2), "textcoords": "offset points", "annotation_clip": False}
                ax.annotate(f"chosen {chosen:g}", (chosen, 1), xycoords=("data", "axes fraction"), fontsize=7, **above)
        end_labels(ax, ends, size=7)
    if known(column(rows, "score")):
        axes[1, 1].set_title(textwrap.fill(f"score = {results.get('score') or 'not described'}", 52), fontsize=7)
    return fig


@styled
def layer_sweep(source: object) -> Figure:
    """What each choice of layers or modules for the residue gives."""
    results, place = load(source, STAGE)
    rows, empty = rows_of(results, "layers"), "no layer recipe was tried"
    return _rows_figure(rows, "name", "Where the residue is added", place, empty, _chosen(results))


@styled
def operator_table(source: object) -> Figure:
    """What each merge operator gives, one row per operator."""
    results, place = load(source, STAGE)
    chosen = operator_name((results.get("chosen") or {}).get("operator"))
    rows = rows_of(results, "operators")
    empty = "no other operator was tried"
    return _rows_figure(rows, "operator", "Merge operators", place, empty, _chosen(results), chosen)


def _chosen(results: dict) -> dict:
    """The row of the sweep whose coefficient was chosen: one coefficient for all tensors."""
    coefficient = (results.get("chosen") or {}).get("coefficient")
    return next((row for row in rows_of(results, "sweep") if row.get("coefficient") == coefficient), {})


@styled
def variant_differences(source: object) -> Figure:
    """Every variant against one coefficient for all tensors: paired difference in score, 95 % interval over
    problems."""
    results, place = load(source, STAGE)
    rows = [
        {"group": group, "name": str(row.get("name") or row.get("operator") or row.get("out_dtype")), **row}
        for group, key in _VARIANTS.items()
        for row in rows_of(results, key)
        if row.get("difference") is not None
    ]
    title = "Variants of the merge against one coefficient: difference in score"
    fig, axes = new_figure(1, 1, DOUBLE, 0.9 + 0.17 * max(3, len(rows)), title, place)
    fig.data = pd.DataFrame(rows)
    ax = axes[0, 0]
    if not rows:
        say(ax, "no variant was compared")
        return fig
    y = np.arange(len(rows))
    low, middle, high = (column(rows, key) for key in ("low", "difference", "high"))
    better, worse = ROLE_COLOURS["fine"], ROLE_COLOURS["coarse"]
    colours = [better if lo > 0 else worse if hi < 0 else MUTED for lo, hi in zip(low, high, strict=True)]
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.hlines(y, low, high, color=colours, linewidth=1.2)
    ax.scatter(middle, y, 18, color=colours, zorder=3)
    ax.set_yticks(y, [f"{row['name']}  ({row['group']})" for row in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(
        "difference in score, 95 % interval over validation problems\ngreen: better, orange: worse, grey: cannot tell"
    )
    return fig


def _rows_figure(
    rows: list[dict], key: str, title: str, place: Path | None, empty: str, reference: dict, chosen: str | None = None
) -> Figure:
    """Small multiples with one row per recipe: accuracy (last filled, first hollow), length, repetition, score; dashed:
    the reference, one coefficient for all tensors."""
    first_metric, why = quality(rows, "accuracy_last")
    title += f" ({why})" if why else ""
    fig, axes = new_figure(1, 4, DOUBLE, 1.0 + 0.24 * max(3, len(rows)), title, place, sharey=True)
    fig.data = pd.DataFrame(rows)
    names = [str(row[key]).replace("_", " ") for row in rows]
    y = np.arange(len(rows))
    colours = [ROLE_COLOURS["fine"] if chosen in (None, row[key]) else ROLE_COLOURS["control"] for row in rows]
    for ax, metric in zip(axes[0], (first_metric, *_PANELS), strict=True):
        ax.set_title({"accuracy_last": "accuracy"}.get(metric, LABELS[metric].split(" (")[0]))
        values = column(rows, metric)
        if not rows:
            say(ax, empty)
            continue
        ax.set_yticks(y, names)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        if not known(values):
            ax.set_xticks([])
            ax.text(0.5, 0.5, NO_CHECKER, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=7)
            continue
        if reference.get(metric) is not None:
            ax.axvline(reference[metric], color=INK, linewidth=0.8, linestyle="--", zorder=1)
        low, high = _ends(rows, metric)
        ax.hlines(y, low, high, color=colours, linewidth=0.8)
        ax.scatter(values, y, 20, color=colours, zorder=3)
        if metric == "accuracy_last":
            first = column(rows, "accuracy_first")
            ax.scatter(first, y, 20, facecolors="white", edgecolors=colours, zorder=2)
            ax.set_xlabel("filled: last answer\nhollow: first answer")
        ax.margins(x=0.2)
        if metric in ("mean_tokens", "rep4"):
            ax.set_xlim(left=min(0.0, float(np.nanmin(values))))
            ax.set_xlabel(LABELS[metric].rsplit("(")[-1].rstrip(")"))
    if rows:
        fig.supxlabel("dashed: one coefficient for all tensors; lines: 95 % intervals", fontsize=7, color=MUTED)
    return fig


def _ends(rows: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """95 % bounds of every row: of accuracy Wilson's, of the score that of the paired difference from the reference."""
    values = column(rows, metric)
    if metric == "score":
        shift = values - column(rows, "difference")
        return shift + column(rows, "low"), shift + column(rows, "high")
    away = errors(rows, metric)
    return (values - away[0], values + away[1]) if away is not None else (values, values)


@styled
def residue_anatomy(source: object) -> Figure:
    """Norm of the coarse and the instruct residue per tensor, and their cosine, as layer x module heat maps."""
    results, place = load(source, STAGE)
    frame = pd.DataFrame(results.get("anatomy") or [])
    title = "Residues by layer and module: size, and direction against the instruction residue"
    if frame.empty:
        fig, axes = new_figure(1, 1, DOUBLE, 1.6, title, place)
        say(axes[0, 0], "no anatomy recorded in this run")
        return fig
    frame["module"] = frame["module"].astype(str).str.removesuffix(".weight").str.split(".").str[-1]
    layers = sorted(frame["layer"].dropna().unique())
    frame["place"] = ["outside" if pd.isna(layer) else f"{int(layer)}" for layer in frame["layer"]]
    columns = [f"{int(layer)}" for layer in layers] + (["outside"] if frame["layer"].isna().any() else [])
    modules = list(dict.fromkeys(frame["module"]))
    fig, axes = new_figure(1, 3, DOUBLE, 1.25 + 0.17 * len(modules), title, place, sharey=True)
    fig.data = frame.drop(columns="place")
    top = float(np.nanmax(frame[["norm_coarse", "norm_instruct"]].to_numpy(dtype=float)))
    side = float(np.nanmax(np.abs(frame["cosine"].to_numpy(dtype=float)))) if known(frame["cosine"]) else 1.0
    scales = {
        "norm_coarse": ("|coarse - base|", "viridis", Normalize(0, top or 1)),
        "norm_instruct": ("|instruct - base|", "viridis", Normalize(0, top or 1)),
        "cosine": ("cosine of the two", "RdBu_r", Normalize(-side or -1, side or 1)),
    }
    for ax, (key, (name, colours, scale)) in zip(axes[0], scales.items(), strict=True):
        grid = frame.pivot_table(index="module", columns="place", values=key, dropna=False, aggfunc="mean")
        grid = grid.reindex(index=modules, columns=columns).to_numpy(dtype=float)
        shown = ax.imshow(grid, aspect="auto", cmap=colours, norm=scale)
        ax.grid(False)
        ax.set_title(name)
        step = max(1, len(columns) // 8)
        ticks = [k for k, label in enumerate(columns) if label == "outside" or int(label) % step == 0]
        ax.set_xticks(ticks, [columns[k] if columns[k] != "outside" else "none" for k in ticks])
        ax.set_yticks(range(len(modules)), modules)
        ax.set_xlabel("layer (none: outside the layers)" if ax is axes[0, 1] else "layer")
        if key != "norm_coarse":  # the two norms share one scale
            fig.colorbar(shown, ax=ax, shrink=0.9, aspect=25, pad=0.02).outline.set_linewidth(0)
        if len(columns) <= 5:
            _cell_values(ax, grid, scale, key == "cosine")
    return fig


def _cell_values(ax: Axes, grid: np.ndarray, scale: Normalize, diverging: bool) -> None:
    for (row, col), value in np.ndenumerate(grid):
        if np.isfinite(value):
            share = float(scale(value))
            dark = abs(share - 0.5) > 0.35 if diverging else share < 0.6
            words = f"{value:+.2f}" if diverging else f"{value:.2f}"
            ax.text(col, row, words, ha="center", va="center", fontsize=7, color="white" if dark else INK)
