"""One figure of the bias panel: how often a judge prefers the longer of two answers, the longer it is."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from c2f_utils.report.style import DOUBLE, INK, law_colour, new_figure, say, styled

_TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 30, 100, 300, 1000)


def of_report(results: dict) -> list[tuple[str, Callable[[], Figure], str]]:
    """Key, drawing and caption of the figures about judges, where any judged."""
    panel = (results.get("dialogue") or {}).get("panel") or {}
    if not any(row["by_ratio"] for row in panel.get("judges") or []):
        return []
    return [("longer_wins", lambda: longer_wins_by_ratio(panel), "How often the judge prefers the longer answer.")]


@styled
def longer_wins_by_ratio(panel: dict) -> Figure:
    """Share of pairs that the longer answer wins, by quintile of the length ratio, one line per judge.

    Input: what `bias_panel.panel` found. Points stand at the quintile's median ratio; bars are 95 % intervals over
    questions.
    """
    judges = [row for row in panel.get("judges") or [] if row["by_ratio"]]
    fig, axes = new_figure(1, 1, DOUBLE, 3.0, "How often a judge prefers the longer answer")
    ax = axes[0, 0]
    fig.data = pd.DataFrame([{"judge": row["judge"], **bin_} for row in judges for bin_ in row["by_ratio"]])
    if not judges:
        say(ax, "no two answers of different length were judged")
        return fig
    names = [row["judge"] for row in judges]
    spread = fig.data["ratio"].max() / fig.data["ratio"].min()
    for place, row in enumerate(judges):
        ratio, value, low, high = (
            np.array([each[key] for each in row["by_ratio"]], float) for key in ("ratio", "value", "low", "high")
        )
        # Judges see the same pairs: bars at one ratio stand side by side.
        beside = ratio * spread ** (0.008 * (place - (len(judges) - 1) / 2))
        colour = law_colour(row["judge"], names)
        bars = np.maximum(0, [value - low, high - value])  # a share of 1 may lie a rounding above its bound
        ax.errorbar(beside, value, bars, fmt="o-", color=colour, capsize=2, label=row["judge"])
    ax.axhline(0.5, color=INK, linewidth=0.7, linestyle=":")
    ax.set(xscale="log", ylim=(-0.02, 1.02), ylabel="longer answer wins (share)")
    ax.set_xlabel("length of the longer answer over that of the shorter one (quintiles of pairs)")
    low, high = ax.get_xlim()
    ax.set_xlim(low / 1.01, high * 1.01)
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high] or [low, high]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.3g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(loc="best")
    return fig
