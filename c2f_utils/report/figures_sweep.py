"""The figure of a sweep: every point with its interval over seeds, drawn from the results of its runs."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from c2f_utils import stats
from c2f_utils.files import outputs
from c2f_utils.report import sweep_results
from c2f_utils.report.results import LABELS, known
from c2f_utils.report.style import DOUBLE, INK, MUTED, ROLE_COLOURS, new_figure, save_figure, say, styled

_QUALITY = ("accuracy_last", "reward", "pair_accuracy")  # the first that was measured
_MOST = 40  # points drawn; more are named in the table


@styled
def sweep_figure(name: str, stage: str | None = None) -> Figure:
    """Quality and length of every point of a sweep: seeds as faint dots, mean and 95 % t-interval over them.

    Points stand in the order of the grid. `stage` as in `sweep_results`; raises C2FError as it does.
    """
    frame = sweep_results.sweep_results(name, stage)
    metrics = [metric for metric in sweep_results.metrics_of(frame) if known(frame[metric])]
    drawn = [next((metric for metric in _QUALITY if metric in metrics), None), "mean_tokens"]
    drawn = [metric for metric in drawn if metric in metrics]
    frame = frame.assign(label=sweep_results.labels(frame))
    points = list(dict.fromkeys(frame["label"]))[:_MOST]
    seeds = frame["seed"].nunique()
    what = f"Sweep {name}, stage {frame['stage'].iloc[0]}: " if len(drawn) else f"Sweep {name}: "
    title = what + (f"mean and 95 % t-interval over {seeds} seeds" if seeds > 1 else "one seed, no interval")
    height = 0.75 + 0.2 * max(4, len(points))
    fig, axes = new_figure(1, max(1, len(drawn)), DOUBLE, height, title, Path(outputs() / name), sharey=True)
    fig.data, fig.caption = sweep_results.summary(frame.drop(columns="label")), f"sweep {name}"
    if not drawn:
        say(axes[0, 0], "no run of this sweep has results with\none set of numbers yet")
        return fig
    for ax, metric in zip(axes[0], drawn, strict=True):
        _panel(ax, frame, metric, points)
    axes[0, 0].set_yticks(range(len(points)), points)
    axes[0, 0].set_ylim(len(points) - 0.4, -0.6)
    return fig


def _panel(ax: Axes, frame: pd.DataFrame, metric: str, points: list[str]) -> None:
    colour = ROLE_COLOURS["instruct" if metric == "mean_tokens" else "coarse"]
    for place, point in enumerate(points):
        values = frame.loc[frame["label"] == point, metric].dropna().to_numpy(dtype=float)
        if not len(values):
            ax.text(
                0.02, place, "not done yet", transform=ax.get_yaxis_transform(), va="center", color=MUTED, fontsize=6
            )
            continue
        found = stats.seed_interval(values)
        ax.plot(values, np.full(len(values), place + 0.25), ".", color=colour, alpha=0.5, markersize=3)
        if found.low is not None:
            ax.plot([found.low, found.high], [place, place], color=colour, linewidth=1.2, zorder=3)
        ax.plot(found.value, place, "o", color=colour, zorder=4)
        above = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 6, "color": INK}
        ax.annotate(_number(found.value), (found.value, place), (0, 3), **above)
    ax.set_xlabel(LABELS.get(metric, metric.replace("_", " ")))


def view(run: object, sweep: str = "") -> list:
    """For notebook 08: figure and table of the sweep that is named, else of the one that this run belongs to, saved to
    the run's report; nothing without one. Raises C2FError for an unknown sweep."""
    name = sweep or sweep_results.of_run(run.id)
    if not name:
        return []
    figure = save_figure(sweep_figure(name), run.report, "sweep")
    return [figure, sweep_results.summary(sweep_results.sweep_results(name))]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
