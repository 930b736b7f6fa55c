"""Figures of stage 07 that set models side by side, several seeds together, and the one picture of the README.

Every function takes the stage, its directory, the run's directory, or the data already read, and returns the figure.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from c2f_utils import stats
from c2f_utils.files import read_json, read_jsonl
from c2f_utils.report.labels import point_labels
from c2f_utils.report.results import (
    DECODINGS,
    LABELS,
    MAIN,
    bounds,
    column,
    errors,
    known,
    load,
    model_rows,
    quality,
    seed_frame,
)
from c2f_utils.report.sources import find_stages
from c2f_utils.report.style import (
    DOUBLE,
    INK,
    MUTED,
    ROLE_COLOURS,
    ROLE_MARKERS,
    law_colour,
    new_figure,
    note,
    say,
    styled,
)

STAGE = "07_evaluation"


LEAST_ANSWERS = 10  # a mean over the two longest answers of a concise model would say nothing about the model


@styled
def quality_length_frontier(source: object, decoding: str = "sampled_t1", metric: str = "accuracy_last") -> Figure:
    """Quality against mean length, one point per model (hollow: first-answer accuracy)."""
    return _frontier(source, decoding, metric, "mean_tokens", "Quality and length")


@styled
def quality_redundancy_frontier(source: object, decoding: str = "sampled_t1", metric: str = "accuracy_last") -> Figure:
    """Quality against the share of repeated 4-grams, one point per model (hollow: first-answer accuracy)."""
    return _frontier(source, decoding, metric, "rep4", "Quality and redundancy")


def _frontier(source: object, decoding: str, metric: str, across: str, title: str) -> Figure:
    results, place = load(source, STAGE)
    rows = model_rows(results, decoding)
    metric, why = quality(rows, metric)
    lines = f"{title}, {DECODINGS.get(decoding, decoding)}" + (f" ({why})" if why else "")
    fig, axes = new_figure(1, 1, DOUBLE, 3.7, lines, place)
    fig.data = pd.DataFrame(rows)
    _frontier_axes(axes[0, 0], rows, metric, across, decoding, results.get("intervals"))
    return fig


def _frontier_axes(
    ax: Axes, rows: list[dict], metric: str, across: str, decoding: str, recorded: dict | None, size: float = 7
) -> None:
    ax.set(xlabel=LABELS[across], ylabel=LABELS.get(metric, metric))
    rows = [row for row in rows if row.get(metric) is not None and row.get(across) is not None]
    if not rows:
        say(ax, f"no model was evaluated with {DECODINGS.get(decoding, decoding)}")
        return
    both = metric == "accuracy_last" and known(column(rows, "accuracy_first"))
    points, obstacles, owners = [], [], []
    for row in rows:
        x, y, role = row[across], row[metric], row["role"]
        colour, marker = ROLE_COLOURS.get(role, INK), ROLE_MARKERS.get(role, "o")
        if both and row.get("accuracy_first") is not None:
            first = row["accuracy_first"]
            ax.plot([x, x], [y, first], color=colour, linewidth=0.8, alpha=0.7, zorder=2)
            ax.scatter(x, first, 14, facecolors="white", edgecolors=colour, linewidths=0.8, zorder=3)
            obstacles += [(x, y + (first - y) * step / 5) for step in range(1, 6)]
            owners += [len(points)] * 5
        mine = (recorded or {}).get(row["model"], {}).get(decoding)
        for end in bounds(row, metric, mine) or ():
            ax.plot([x, x], [y, end], color=colour, linewidth=0.7, alpha=0.45, zorder=1)
            obstacles += [(x, y + (end - y) * step / 3) for step in range(1, 4)]
            owners += [len(points)] * 3
        for end in bounds(row, across, mine) or ():
            ax.plot([x, end], [y, y], color=colour, linewidth=0.7, alpha=0.45, zorder=1)
        ax.scatter(x, y, _SIZES.get(role, 18), color=colour, marker=marker, zorder=4, linewidths=0)
        points.append((x, y))
    ax.margins(0.12, 0.12)
    ax.set_xlim(left=min(0.0, min(x for x, _ in points)) - 0.1 * max(x for x, _ in points))
    if both:
        ax.set_ylabel("accuracy (filled: last answer, hollow: first)")
        ax.set_xlabel(f"{LABELS[across]}; thin lines: 95 % intervals")
    colours = [ROLE_COLOURS.get(row["role"], INK) for row in rows]
    bold = [row["role"] != "control" for row in rows]
    point_labels(ax, points, [row["label"] for row in rows], colours, obstacles, size, bold, owners)


_SIZES = {"fine": 90, "coarse": 45, "base": 32, "instruct": 40}


@styled
def prefix_redundancy(source: object) -> Figure:
    """Repeated 4-grams of the first k tokens, over the answers that long: redundancy grows with length for anyone."""
    results, place = load(source, STAGE)
    found, models = results.get("prefix_redundancy") or {}, results.get("models") or {}
    decoding = results.get("decoding_of_prefixes")
    title = "Redundancy at fixed prefixes" + (f", {DECODINGS.get(decoding, decoding)}" if decoding else "")
    fig, axes = new_figure(1, 1, DOUBLE, 2.8, title, place)
    ax, ends, obstacles = axes[0, 0], [], []
    fig.data = pd.DataFrame([{"model": name, **row} for name, rows in found.items() for row in rows])
    for name, rows in found.items():
        rows = [row for row in rows if row.get("rep4") is not None and row["n"] >= LEAST_ANSWERS]
        if not rows:
            continue
        role = models.get(name, {}).get("role", "control")
        x, y, colour = column(rows, "prefix"), column(rows, "rep4"), ROLE_COLOURS.get(role, INK)
        strong = role != "control"
        ax.plot(
            x, y, color=colour, linewidth=1.4 if strong else 0.7, marker=ROLE_MARKERS.get(role, "o"), zorder=3 + strong
        )
        fine = np.geomspace(x[0], x[-1], 12 * len(x))
        obstacles += zip(fine, np.interp(np.log(fine), np.log(x), y), strict=True)
        if strong:
            count = ", ".join(f"{row['n']}" for row in rows)
            ends.append((x[-1], y[-1], f"{models.get(name, {}).get('label', name)} (n {count})", colour))
    if not ax.lines:
        few = f"no prefix was reached by at least {LEAST_ANSWERS} answers of a model"
        say(ax, few if found else "no prefix redundancy recorded")
        return fig
    prefixes = sorted({row["prefix"] for rows in found.values() for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(prefixes, [str(prefix) for prefix in prefixes])
    ax.minorticks_off()
    ax.set(xlabel="first k tokens", ylabel=LABELS["rep4"], ylim=(0, None), xlim=(prefixes[0] * 0.9, prefixes[-1] * 1.9))
    note(
        ax, f"n: answers at least that long (fewer than {LEAST_ANSWERS}: left out)\nthin violet: controls", "upper left"
    )
    ax.set_ylim(-0.06 * ax.get_ylim()[1], 1.1 * ax.get_ylim()[1])
    point_labels(ax, [end[:2] for end in ends], [end[2] for end in ends], [end[3] for end in ends], obstacles, size=7)
    return fig


@styled
def seed_overview(runs: Sequence[dict], names: Sequence[str], decoding: str = "sampled_t1") -> Figure:
    """Every seed's value and the mean with its 95 % t-interval, per model, for accuracy, length and repetition."""
    rows = [row for results in runs for row in model_rows(results, decoding)]
    metric, why = quality(rows, "accuracy_last")
    metrics = (metric, *(("accuracy_first",) if metric == "accuracy_last" else ()), "mean_tokens", "rep4")
    frame = seed_frame(runs, names, decoding, metrics)
    labels = dict(zip(frame["model"], frame["label"], strict=True))
    title = f"{len(names)} runs, {DECODINGS.get(decoding, decoding)}" + (f" ({why})" if why else "")
    fig, axes = new_figure(1, len(metrics), DOUBLE, 1.1 + 0.2 * max(3, len(labels)), title, sharey=True)
    fig.data, fig.caption = frame, "runs " + ", ".join(names)
    for ax, key in zip(axes[0], metrics, strict=True):
        ax.set_title(LABELS[key].replace("accuracy, ", "accuracy,\n").replace(" (", "\n("), fontsize=7)
        for y, model in enumerate(labels):
            mine = frame[(frame["model"] == model) & (frame["metric"] == key)]
            values = mine["value"].dropna().to_numpy(dtype=float)
            if not len(values):
                continue
            colour, found = ROLE_COLOURS.get(mine["role"].iloc[0], INK), stats.seed_interval(values)
            ax.scatter(values, np.full(len(values), y), 10, color=colour, alpha=0.5, linewidths=0)
            ax.plot([found.value] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=1.6)
            if found.low is not None:
                ax.plot([found.low, found.high], [y, y], color=colour, linewidth=0.9)
        ax.margins(x=0.1)
    axes[0, 0].set_yticks(range(len(labels)), list(labels.values()))
    axes[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    fig.supxlabel("dots: runs; bar: mean; line: 95 % t-interval over runs", fontsize=7, color=MUTED)
    return fig


@styled
def hero(run_dir: object, decoding: str = "sampled_t1") -> Figure:
    """The whole story in one wide picture: the growing limit, accuracy of the four models, quality against length.

    Reads 03 (metrics.jsonl and the curve of results.json) and 07 of one run; a part whose stage is missing says so.
    `run_dir` may also map those stage names to directories, for stages that another run has lent.
    """
    lent = run_dir if isinstance(run_dir, dict) else {}
    run = Path(getattr(run_dir, "dir", run_dir)) if not lent else Path(next(iter(lent.values()))).parent
    coarse, judged = (Path(lent.get(name, run / name)) for name in ("03_coarse_rlhf", STAGE))
    fig, axes = new_figure(2, 2, DOUBLE, 4.9, "", run, width_ratios=(1, 1.45), height_ratios=(1, 1.25))
    fig.get_layout_engine().set(w_pad=0.08)
    (tokens, before), (curve, frontier) = axes
    fig.data = pd.concat(
        [_story(tokens, curve, coarse), _before_and_after(before, judged, decoding)], ignore_index=True
    )
    frontier.set_title("4  Quality against length")
    evaluation = judged / "results.json"
    if not evaluation.is_file():
        say(frontier, f"not run yet: notebooks/{STAGE}.ipynb")
        return fig
    results = read_json(evaluation)
    rows = model_rows(results, decoding)
    metric, _ = quality(rows, "accuracy_last")
    _frontier_axes(frontier, rows, metric, "mean_tokens", decoding, results.get("intervals"))
    if metric == "accuracy_last":
        frontier.set_ylabel("accuracy")  # panel 3 says which is which
    return fig


@styled
def two_curves(runs: Sequence[Path]) -> Figure:
    """The limit and the quality of several runs' 03 side by side: one colour per run."""
    fig, axes = new_figure(1, 2, DOUBLE, 2.4, "Coarse RLHF: " + " and ".join(run.name for run in runs))
    left, right = axes[0]
    names, drawn = [run.name for run in runs], []
    stages = [find_stages(run).get("03_coarse_rlhf", run / "03_coarse_rlhf") for run in runs]
    curves = [_curve(stage) for stage in stages]
    metric, _ = quality([row for rows in curves for row in rows], "accuracy_first")
    for number, (name, stage, curve) in enumerate(zip(names, stages, curves, strict=True)):
        look = {"color": law_colour(name, names), "linestyle": ("-", "--")[number % 2]}  # both are seen on one path
        rows = read_jsonl(stage / "metrics.jsonl")
        left.step(column(rows, "iteration"), column(rows, "limit"), where="post", **look)
        right.plot(column(curve, "rollout_tokens"), column(curve, metric), marker="o", label=name, **look)
        drawn += [{"run": name, **row} for row in curve]
    fig.data = pd.DataFrame(drawn)
    left.set(xlabel="iteration", ylabel="limit (tokens)", ylim=(0, None))
    right.set(xlabel="rollout tokens", ylabel=LABELS[metric])
    if drawn:
        right.legend()
    else:
        say(right, "no run has a curve in notebooks/03_coarse_rlhf.ipynb")
    return fig


def _curve(stage: Path) -> list[dict]:
    """Evaluations during training as 03 recorded them; none where it has not been run."""
    path = stage / "results.json"
    return (read_json(path).get("curve") or []) if path.is_file() else []


def _story(tokens: Axes, quality_of: Axes, stage: Path) -> pd.DataFrame:
    """Training: the limit and the mean length above, quality on validation problems below."""
    tokens.set_title("1  RLHF on the base: the limit grows")
    quality_of.set_title("2  ... and quality with it")
    rows = read_jsonl(stage / "metrics.jsonl")
    if not rows:
        for ax in (tokens, quality_of):
            say(ax, "not run yet: notebooks/03_coarse_rlhf.ipynb")
        return pd.DataFrame()
    x, colour = column(rows, "iteration"), ROLE_COLOURS["coarse"]
    limit, mean = column(rows, "limit"), column(rows, "mean_tokens")
    tokens.step(x, limit, where="post", color=INK, linewidth=1)
    tokens.plot(x, mean, color=colour)
    tokens.set(ylabel="tokens per answer", ylim=(0, None))
    middle = len(x) // 2
    offset = {"textcoords": "offset points", "fontsize": 7}
    tokens.annotate("limit", (x[middle], limit[middle]), xytext=(-4, 7), ha="right", color=INK, **offset)
    tokens.annotate("mean length", (x[middle], mean[middle]), xytext=(6, -9), ha="left", color=colour, **offset)
    curve = _curve(stage)
    metric, why = quality(curve, "accuracy_first")
    values, at = column(curve, metric), column(curve, "iteration")
    quality_of.set(xlabel="iteration", ylabel=LABELS[metric])
    for ax in (tokens, quality_of):
        ax.set_xlim(-0.04 * x[-1], 1.04 * x[-1])  # the curve begins before the first iteration
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not known(values):
        say(quality_of, why or "no evaluation during training")
        return pd.DataFrame(rows).assign(part="training")
    quality_of.errorbar(at, values, errors(curve, metric), fmt="o-", color=colour, elinewidth=0.8, markersize=3.5)
    if metric == "accuracy_first":
        quality_of.set_ylim(0, None)
    return pd.DataFrame(rows).assign(part="training")


def _before_and_after(ax: Axes, stage: Path, decoding: str) -> pd.DataFrame:
    """First- and last-answer accuracy of the four models with 95 % intervals (reward where no checker knows them)."""
    path = stage / "results.json"
    results = read_json(path) if path.is_file() else {}
    rows = [row for row in model_rows(results, decoding) if row["model"] in MAIN]
    rows.sort(key=lambda row: MAIN.index(row["model"]))
    metric, why = quality(rows, "accuracy_last")
    ax.set_title(f"3  {'Accuracy' if metric == 'accuracy_last' else 'Reward'} before and after the merge")
    if not rows:
        say(ax, f"not run yet: notebooks/{STAGE}.ipynb")
        return pd.DataFrame()
    shown = [(metric, 0.0)] if metric != "accuracy_last" else [("accuracy_first", -0.13), ("accuracy_last", 0.13)]
    recorded = results.get("intervals") or {}
    for key, shift in shown:
        for place, row in enumerate(rows):
            if row.get(key) is None:
                continue
            colour, marker = ROLE_COLOURS.get(row["role"], INK), ROLE_MARKERS.get(row["role"], "o")
            ends = bounds(row, key, recorded.get(row["model"], {}).get(decoding))
            if ends:
                ax.plot([place + shift] * 2, ends, color=colour, linewidth=1.1, zorder=2)
            face = "white" if key == "accuracy_first" else colour
            ax.plot([place + shift], [row[key]], marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)
            words = {"xytext": (5 if shift >= 0 else -5, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(f"{row[key]:.2f}", (place + shift, row[key]), ha="left" if shift >= 0 else "right", **words)
    ax.set_xlim(-0.6, len(rows) - 0.4)
    ax.set_xticks(range(len(rows)), [row["label"] for row in rows])
    ax.grid(False, axis="x")
    if metric == "accuracy_last":
        ax.set(ylabel=f"accuracy, {DECODINGS.get(decoding, decoding)}", ylim=(0, 1.12))
        note(ax, "hollow: first answer; filled: last; bars: 95 % intervals")
    else:
        ax.set_ylabel(LABELS[metric])
        ax.margins(y=0.2)
        note(ax, why)
    return pd.DataFrame(rows).assign(part="models")
