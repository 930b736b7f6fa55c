"""Figures of the study of laws (`law_study.py`), drawn from its results: {"runs": {condition: {law: {seed: run}}}}."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from c2f_utils.report import law_study
from c2f_utils.report.labels import end_labels
from c2f_utils.report.style import DOUBLE, INK, MUTED, ROLE_COLOURS, law_colour, new_figure, note, say, styled
from c2f_utils.report.tables_laws import arms_overall, arms_table, clocks_of, regret_table, worst_table

MOST_REGRET = 40  # percent: more is as dark
MOST_GAP = 1.0  # utility: more, either way, is as dark


@styled
def regret_map(study: dict) -> Figure:
    """Normalised regret in percent, laws down, conditions across; the last column is each law's worst."""
    frame = regret_table(study)
    worst = worst_table(study)
    fig, axes = new_figure(1, 1, DOUBLE, 0.9 + 0.2 * max(6, len(worst)), "How far from the best clock, where", None)
    fig.data, ax = frame, axes[0, 0]
    if frame.empty:
        say(ax, "no complete seed in this study yet")
        return fig
    laws, conditions = list(worst["law"]), list(dict.fromkeys(frame["condition"]))
    table = frame.pivot(index="law", columns="condition", values="regret").loc[laws, conditions]
    values = np.column_stack([table.to_numpy(), worst["worst regret"].to_numpy()]) * 100
    shown = ax.imshow(np.clip(values, 0, MOST_REGRET), cmap="OrRd", aspect="auto", vmin=0, vmax=1.35 * MOST_REGRET)
    ax.grid(False)
    scale = fig.colorbar(shown, ax=ax, shrink=0.6, aspect=22, pad=0.02, boundaries=np.arange(0, MOST_REGRET + 1, 2))
    scale.set_ticks([0, 10, 20, 30, MOST_REGRET], labels=["0", "10", "20", "30", f"{MOST_REGRET} or more"])
    scale.outline.set_linewidth(0)
    for (row, place), value in np.ndenumerate(values):
        bold = "bold" if place == len(conditions) else "normal"
        words = str(round(value)) if np.isfinite(value) else "not run"
        colour = INK if np.isfinite(value) else "#b5b5b5"
        ax.text(place, row, words, ha="center", va="center", fontsize=7, weight=bold, color=colour)
    ax.axvline(len(conditions) - 0.5, color="white", linewidth=4)
    ax.set_xticks(range(len(conditions) + 1), [*conditions, "worst"], rotation=30, ha="right")
    ax.set_yticks(range(len(laws)), laws)
    kinds = dict(zip(worst["law"], worst["kind"], strict=True))
    for label in ax.get_yticklabels():
        kind = kinds[label.get_text()]
        colours = {"law": ROLE_COLOURS["fine"], "averaged cut": ROLE_COLOURS["coarse"], "clock": INK}
        label.set_color(colours.get(kind, MUTED))
        label.set_fontweight("bold" if kind in ("law", "averaged cut") else "normal")
    count = sorted(set(frame["n"]))
    seeds = "one seed" if count == [1] else f"{'-'.join(map(str, dict.fromkeys((count[0], count[-1]))))} seeds"
    ax.set_xlabel(
        f"regret of mean utility, % of the best clock's gain (black and grey clocks); {seeds}\n"
        "green: a law; orange: with averaged cuts; grey: clocks blind to l_max"
    )
    return fig


@styled
def arms_map(study: dict, against: str = "grow 12 %") -> Figure:
    """Mean utility of each arm minus that of `against`, arms down, conditions across; the last column is the mean.

    Framed: the 95 % interval over seeds excludes 0, uncorrected.
    """
    frame, overall = arms_table(study, against), arms_overall(study, against)
    fig, axes = new_figure(1, 1, DOUBLE, 1.1 + 0.24 * max(4, len(overall)), f"Mean utility minus {against}", None)
    fig.data, ax = frame, axes[0, 0]
    if overall.empty:
        say(ax, "no two complete seeds in this study yet")
        return fig
    arms, conditions = list(overall["arm"]), list(dict.fromkeys(frame.loc[frame["arm"] != against, "condition"]))
    values, low, high = (
        np.column_stack([
            frame.pivot(index="arm", columns="condition", values=part).reindex(arms)[conditions].to_numpy(),
            overall[part].to_numpy(),
        ])
        for part in ("difference", "low", "high")
    )  # fmt: skip
    darkest = 1.6 * MOST_GAP  # never reached, so that black words can be read on every cell
    shown = ax.imshow(np.clip(values, -MOST_GAP, MOST_GAP), cmap="PuOr", aspect="auto", vmin=-darkest, vmax=darkest)
    ax.grid(False)
    scale = fig.colorbar(shown, ax=ax, shrink=0.7, aspect=18, pad=0.02, boundaries=np.linspace(-MOST_GAP, MOST_GAP, 41))
    scale.set_ticks([-MOST_GAP, 0, MOST_GAP], labels=[f"{-MOST_GAP:g} or less", "0", f"{MOST_GAP:g} or more"])
    scale.outline.set_linewidth(0)
    for (row, place), value in np.ndenumerate(values):
        words, colour = (f"{value:+.2f}", INK) if np.isfinite(value) else ("not run", "#b5b5b5")
        ax.text(place, row, words, ha="center", va="center", fontsize=7, color=colour)
        if low[row, place] > 0 or high[row, place] < 0:
            corner = (place - 0.47, row - 0.44)
            ax.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor=INK, linewidth=0.9))
    ax.axvline(len(conditions) - 0.5, color="white", linewidth=4)
    ax.set_xticks(range(len(conditions) + 1), [*conditions, "mean"], rotation=30, ha="right")
    ax.set_yticks(range(len(arms)), arms)
    seeds = "-".join(map(str, sorted({int(overall["seeds"].min()), int(overall["seeds"].max())})))
    ax.set_xlabel(f"framed: the 95 % interval over {seeds} seeds excludes 0 (uncorrected)")
    return fig


@styled
def limit_paths(study: dict, laws: tuple[str, ...], conditions: tuple[str, ...] = ()) -> Figure:
    """The limit over the iterations in every condition: the named laws seed by seed, the grid of clocks in grey."""
    chosen = [name for name in conditions or study["runs"] if name in study["runs"]]
    columns = min(4, max(1, len(chosen)))
    rows = -(-max(1, len(chosen)) // columns)
    fig, axes = new_figure(rows, columns, DOUBLE, 0.5 + 1.55 * rows, "Where each law takes the limit", None)
    data = []
    for ax in axes.ravel()[len(chosen) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.ravel(), chosen, strict=False):
        found = study["runs"][name]
        tied, free = clocks_of(found, name)
        for clock in [*tied, *free]:
            ax.plot(max((r["limits"] for r in found[clock].values()), key=len), color="#cccccc", linewidth=0.7)
        ends = []
        for law in laws:
            colour = law_colour(law, laws)
            for seed, run in found.get(law, {}).items():
                ax.plot(run["limits"], color=colour, alpha=0.6, linewidth=0.8)
                data.append({"condition": name, "law": law, "seed": seed, "last limit": run["limits"][-1]})
            if found.get(law):
                last = np.mean([run["limits"][-1] for run in found[law].values()])
                ends.append((0, last, law, colour))
        condition = law_study.ALL[name]
        if condition.right_length:
            ax.axhline(condition.right_length, color=INK, linestyle=":", linewidth=0.8)
        longest = max((len(run["limits"]) for law in laws for run in found.get(law, {}).values()), default=20)
        ax.set(title=name, ylim=(0, None), xlim=(0, longest))
        end_labels(ax, ends)
    for ax in axes[-1]:
        ax.set_xlabel("iteration")
    for ax in axes[:, 0]:
        ax.set_ylabel("limit (tokens)")
    note(axes[0, 0], "grey: clocks", "upper left")
    fig.data = pd.DataFrame(data)
    return fig
