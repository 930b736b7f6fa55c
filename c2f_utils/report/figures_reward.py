"""Figures that set reward models beside each other: the length bias of each, and what a policy makes of one model and
of an average of several (`benchmarks/overoptimisation.py`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from c2f_utils.files import read_json
from c2f_utils.report.labels import end_labels
from c2f_utils.report.results import LABELS, column, load
from c2f_utils.report.style import DOUBLE, INK, MUTED, ROLE_COLOURS, new_figure, note, say, smooth, styled

WINDOW = 5  # iterations of the moving mean on which peaks are looked for: the answers of one iteration are few
ARM_COLOURS = {"single": ROLE_COLOURS["control"], "warm": ROLE_COLOURS["coarse"]}
ARM_NAMES = {"single": "one reward model", "warm": "average of three (WARM)"}
_PANELS = (
    (
        "reward per 10 tokens (z-score)",
        (("slope_per_10_tokens", "as it is"), ("slope_given_utility", "at equal utility")),
    ),
    ("longer answer preferred (share)", (("longer_preferred", "model"), ("longer_labelled", "labels"))),
    ("ranked right (share)", (("accuracy_longer", "longer better"), ("accuracy_shorter", "shorter better"))),
)


@styled
def pair_scores(rows: list[dict]) -> Figure:
    """Reward of every prefix of a preferred and of a rejected answer; rows hold `answer`, `position` and `reward`."""
    fig, axes = new_figure(1, 1, DOUBLE, 2.3, "One pair: the reward after every token")
    fig.data, ax = pd.DataFrame(rows), axes[0, 0]
    ends = []
    for answer, colour in (("chosen", ROLE_COLOURS["fine"]), ("rejected", MUTED)):
        mine = [row for row in rows if row["answer"] == answer]
        x, y = column(mine, "position"), column(mine, "reward")
        ax.plot(x, y, color=colour)
        ax.plot(x[-1:], y[-1:], "o", color=colour)
        ends.append((x[-1], y[-1], f"{answer} {y[-1]:+.2f}", colour))
    ax.set(
        xlabel="tokens of the answer read so far; the last point is its reward", ylabel=LABELS["reward"], xlim=(0, None)
    )
    end_labels(ax, ends)
    return fig


@styled
def length_bias_models(source: object) -> Figure:
    """Length bias of every reward model of 02 on held-out pairs: slopes, longer answers preferred, accuracy by which
    answer is better; bars are bootstrap intervals over pairs."""
    results, place = load(source, "02_reward_model")
    rows = results.get("length_bias_models") or []
    fig, axes = new_figure(
        1, 3, DOUBLE, 1.5 + 0.22 * max(2, len(rows)), "Length bias by reward model", place, sharey=True
    )
    fig.data = pd.DataFrame(
        [
            {"model": row["model"], "figure": name, **(row.get(name) or {"value": None, "low": None, "high": None})}
            for row in rows
            for _, pair in _PANELS
            for name, _ in pair
        ]
    )
    for ax, (title, pair) in zip(axes[0], _PANELS, strict=True):
        if not rows:
            say(ax, "no length bias recorded:\nno held-out pairs were scored")
            continue
        ax.set_title(title)
        drawn = [_whiskers(ax, rows, name, words, place) for place, (name, words) in enumerate(pair)]
        ax.set_yticks(range(len(rows)), [row["model"] for row in rows])
        ax.set_ylim(len(rows) - 0.1, -0.5)
        ax.legend(loc="lower left", ncols=2, handletextpad=0.1, columnspacing=0.8, borderaxespad=0.1)
        if not all(drawn) and title == _PANELS[0][0]:
            ax.set_xlabel("at equal utility: no exact checker here", color=MUTED)
    if rows:
        axes[0, 0].axvline(0, color=MUTED, linewidth=0.8, linestyle="--")
        axes[0, 1].axvline(0.5, color=MUTED, linewidth=0.8, linestyle="--")
        by = {"utility": "true utility", "label": "the label"}[rows[0]["better_by"]]
        axes[0, 2].set_xlabel(f"better by {by}", color=MUTED)
    return fig


def _whiskers(ax: Axes, rows: list[dict], name: str, words: str, place: int) -> bool:
    """One dot with its interval per model, the second series below the first; False if no model has this figure."""
    colour = (ROLE_COLOURS["control"], INK)[place]
    known = [(at, row[name]) for at, row in enumerate(rows) if row.get(name)]
    for at, found in known:
        y = at + (-0.12, 0.12)[place]
        label = words if at == known[0][0] else None
        low, high = (found[side] if found[side] is not None else found["value"] for side in ("low", "high"))
        ax.plot([low, high], [y, y], color=colour, linewidth=1)
        ax.plot([found["value"]], [y], "os"[place], color=colour, label=label)
    return bool(known)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Moving mean of one value per iteration, as peaks are looked for on it."""
    return smooth(np.asarray(values, float), WINDOW)


def root_kl(curve: dict[str, list[float]]) -> np.ndarray:
    """sqrt of the smoothed KL per answer; an estimate below zero counts as zero."""
    return np.sqrt(np.maximum(smoothed(curve["kl_per_answer"]), 0.0))


@styled
def overoptimisation(source: object) -> Figure:
    """Training reward, held-out reward and utility against sqrt(KL per answer), one row per condition; thin lines
    are seeds (moving means), bold ones their mean.

    `source` is the JSON file of `benchmarks/overoptimisation.py` or its content.
    """
    content = source
    if isinstance(source, str | Path):
        content = read_json(Path(source)) if Path(source).is_file() else {}
    runs = content.get("runs") or {}
    conditions = [name for name in content.get("conditions") or {} if any(name in run for run in runs.values())]
    metrics = {"training": "training reward (z-score)", "held_out": "held-out reward (z-score)"}
    metrics["utility"] = f"true {LABELS['utility']}"
    count = max(1, len(conditions))
    fig, axes = new_figure(
        count, 3, DOUBLE, 0.7 + 1.9 * count, "Over-optimisation of the reward", None, sharex="all", sharey="col"
    )
    fig.caption = "runs " + ", ".join(runs)
    frames = []
    for row, condition in enumerate(conditions):
        axes[row, 0].set_ylabel(condition)
        for arm, colour in ARM_COLOURS.items():
            arms = {run: each[condition]["arms"] for run, each in runs.items() if condition in each}
            curves = {run: found[arm]["curve"] for run, found in arms.items() if arm in found}
            for ax, metric in zip(axes[row], metrics, strict=True):
                _curves(ax, list(curves.values()), metric, colour, ARM_NAMES[arm])
            frames += [pd.DataFrame({"run": r, "condition": condition, "arm": arm, **c}) for r, c in curves.items()]
    for ax, label in zip(axes[0], metrics.values(), strict=True):
        ax.set_title(label)
    if not conditions:
        for ax in axes.flat:
            say(ax, "no study on disk: make it with\nbenchmarks/overoptimisation.py")
        return fig
    for ax in axes[-1]:
        ax.set_xlabel("sqrt(KL to the base per answer)")
    fig.data = pd.concat(frames, ignore_index=True)
    axes[0, 0].legend(loc="lower right")
    note(axes[0, 1], f"thin: {len(runs)} seeds; bold: mean" if len(runs) > 1 else "one seed", "lower right")
    return fig


def _curves(ax: Axes, curves: list[dict], metric: str, colour: str, label: str) -> None:
    points = [(root_kl(curve), smoothed(curve[metric])) for curve in curves]
    for x, y in points if len(points) > 1 else ():
        ax.plot(x, y, color=colour, alpha=0.35, linewidth=0.7)
    if points:
        shortest = min(len(x) for x, _ in points)
        mean = np.array([(x[:shortest], y[:shortest]) for x, y in points]).mean(axis=0)
        ax.plot(*mean, color=colour, linewidth=1.8, label=label)
