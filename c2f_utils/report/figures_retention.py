"""Figures of 07 that set what a model has gained against what it has lost, and what it can find in many answers.

Every function takes the stage, its directory, the run's directory, or the data already read, and returns the figure; a
run without these parts gives a figure that says so.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from c2f_utils.report.labels import end_labels, point_labels
from c2f_utils.report.results import GAINED, LABELS, column, load
from c2f_utils.report.style import DOUBLE, INK, MUTED, ROLE_COLOURS, ROLE_MARKERS, new_figure, note, say, styled
from c2f_utils.report.tables_retention import STAGE, label

NOT_RUN = "not measured in this run"


@styled
def gain_against_loss(source: object, loss: str = "forward_kl", metric: str | None = None) -> Figure:
    """What every model has gained over instruct against what it has lost, one point per model with 95 % intervals.

    `loss` is "forward_kl", or a kind of document ("corpus", "chosen", "text") whose perplexity has grown; the gain is
    accuracy where a checker knows it, else the reward.
    """
    results, place = load(source, STAGE)
    rows = _gain_rows(results, loss, metric)
    title = "What is gained over instruct, and what is lost"
    fig, axes = new_figure(1, 1, DOUBLE, 3.7, title, place)
    ax, fig.data = axes[0, 0], pd.DataFrame(rows)
    if not rows:
        say(ax, NOT_RUN)
        return fig
    across = "forward KL from instruct on its own answers (nats per token)"
    if loss != "forward_kl":
        across = f"perplexity of {results['retention']['kinds'][loss]['label']}, as a multiple of instruct's"
    ax.set(xlabel=across, ylabel=f"gain in {LABELS[rows[0]['metric']]}")
    origin = (0 if loss == "forward_kl" else 1, 0)
    _crosses(ax, rows, origin, "up: more gained; right: more lost\nthin lines: 95 % intervals")
    return fig


@styled
def reward_trade_off(source: object) -> Figure:
    """What every model has gained over instruct in the reward of the run, and in that of `safety.reward` on requests
    that should be refused, one point per model with 95 % intervals over prompts."""
    results, place = load(source, STAGE)
    fig, axes = new_figure(1, 1, DOUBLE, 3.7, "Helpful and harmless, in two rewards", place)
    ax, found = axes[0, 0], results.get("requests") or {}
    harmless = {
        name: {"value": compared["difference"], "low": compared["low"], "high": compared["high"]}
        for name, row in found.get("models", {}).items()
        if (compared := row.get("reward_minus_instruct"))
    }
    rows = _gained_beside(results, harmless, "reward")
    fig.data = pd.DataFrame(rows)
    if not rows:
        say(ax, NOT_RUN)
        return fig
    ax.set_xlabel(f"gain in the reward of {found['reward']} on {found['n']} requests")
    ax.set_ylabel(f"gain in {LABELS['reward']}")
    _crosses(ax, rows, (0, 0), "gains over instruct; thin lines: 95 % intervals")
    return fig


def _crosses(ax: Axes, rows: list[dict], origin: tuple[float, float], remark: str) -> None:
    """One named point per row at (loss, gain) with its intervals, beside two lines through what instruct has."""
    points, obstacles = [], []
    for row in rows:
        x, y, role = row["loss"], row["gain"], row["role"]
        colour = ROLE_COLOURS.get(role, INK)
        ends = [(row["loss_low"], y), (row["loss_high"], y)], [(x, row["gain_low"]), (x, row["gain_high"])]
        for a, b in (pair for pair in ends if None not in (*pair[0], *pair[1])):
            ax.plot([a[0], b[0]], [a[1], b[1]], color=colour, linewidth=0.8, alpha=0.55, zorder=2)
            obstacles += [(a[0] + (b[0] - a[0]) * s / 8, a[1] + (b[1] - a[1]) * s / 8) for s in range(9)]
        ax.scatter(x, y, _SIZES.get(role, 18), color=colour, marker=ROLE_MARKERS.get(role, "o"), zorder=4, linewidths=0)
        points.append((x, y))
    ax.margins(0.1, 0.14)
    ax.axvline(origin[0], color=MUTED, linewidth=0.6, zorder=1)
    ax.axhline(origin[1], color=MUTED, linewidth=0.6, zorder=1)
    obstacles += [(x, origin[1]) for x in np.linspace(*ax.get_xlim(), 60)]  # names do not stand on the two lines
    obstacles += [(origin[0], y) for y in np.linspace(*ax.get_ylim(), 40)]
    note(ax, remark, "lower right")
    colours = [ROLE_COLOURS.get(row["role"], INK) for row in rows]
    bold = [row["role"] != "control" for row in rows]
    point_labels(ax, points, [row["label"] for row in rows], colours, obstacles, 7, bold)


_SIZES = {"fine": 90, "coarse": 45, "base": 32, "instruct": 40}


def _gain_rows(results: dict, loss: str, metric: str | None) -> list[dict]:
    """One row per model that has both: its gain over instruct and its loss, with intervals."""
    models = (results.get("retention") or {}).get("models", {})
    kl = loss == "forward_kl"
    lost = {name: found.get(loss) if kl else found["ratio"].get(loss) for name, found in models.items()}
    measured = {gain["metric"] for gain in results.get("gains") or []}
    return _gained_beside(results, lost, metric or next((name for name in GAINED if name in measured), None))


def _gained_beside(results: dict, others: dict[str, dict | None], metric: str | None) -> list[dict]:
    """One row per model: its gain over instruct in a metric, and its interval of `others`, called its loss."""
    by_name = {gain["a"]: gain for gain in results.get("gains") or [] if gain["metric"] == metric}
    by_name["instruct"] = {"difference": 0.0, "low": None, "high": None}  # against itself
    rows = []
    for name, lost in others.items():
        if metric is None or lost is None or name not in by_name:
            continue
        role = (results.get("models") or {}).get(name, {}).get("role") or "control"
        row = {"model": name, "label": label(results, name), "role": role, "metric": metric}
        row |= {"loss": lost["value"], "loss_low": lost["low"], "loss_high": lost["high"]}
        gain = by_name[name]
        rows.append(row | {"gain": gain["difference"], "gain_low": gain["low"], "gain_high": gain["high"]})
    return rows


@styled
def pass_at_k(source: object) -> Figure:
    """pass@k of base, instruct, coarse and fine: of right answers beside blind guessing, of answers with every step
    right, and a majority of k votes by the tokens it costs."""
    results, place = load(source, STAGE)
    found = results.get("sampling") or {}
    fig, axes = new_figure(1, 3, DOUBLE, 2.6, "What many answers to one problem find", place)
    models = found.get("models") or {}
    fig.data = pd.DataFrame(
        [
            {"model": name, "k": row["k"], "mean_tokens": model["mean_tokens"]}
            | {f"{what}_{key}": value for what in _CURVES for key, value in row[what].items()}
            for name, model in models.items()
            for row in model["rows"]
        ]
    )
    for ax, (what, title) in zip(axes[0], _CURVES.items(), strict=True):
        ax.set_title(title)
        if not models:
            say(ax, NOT_RUN)
            continue
        _curves(ax, results, models, what)
        ax.set(ylim=(-0.02, 1.04))
        if what == "majority":
            ax.set(xlabel="tokens per problem (k answers)")
        else:
            ks = [row["k"] for row in next(iter(models.values()))["rows"]]
            ax.set_xticks(ks, [str(k) for k in ks])
            ax.set(xlabel="k answers")
    if models:
        _guesses(axes[0, 0], found)
        axes[0, 0].set_ylabel(f"share of {found['problems']} problems")
    return fig


_CURVES = {
    "answer": "a right answer among k",
    "worked": "... with every step right",
    "majority": "the majority of k is right",
}


def _curves(ax: Axes, results: dict, models: dict, what: str) -> None:
    ends = []
    for name, model in models.items():
        rows, colour = model["rows"], ROLE_COLOURS.get(name, INK)
        x = column(rows, "k") * (model["mean_tokens"] if what == "majority" else 1)
        found = [row[what] for row in rows]
        ax.fill_between(x, column(found, "low"), column(found, "high"), color=colour, alpha=0.12, linewidth=0)
        marker = ROLE_MARKERS.get(name, "o")
        size = 7 if marker == "*" else 3.5
        ax.plot(x, column(found, "value"), color=colour, marker=marker, markersize=size)
        ends.append((x[-1], found[-1]["value"], label(results, name), colour))
    ax.set_xscale("log", base=10 if what == "majority" else 2)
    ax.minorticks_off()
    if what == "majority":
        ax.xaxis.set_major_formatter("{x:g}")
        end_labels(ax, ends)  # beside the last panel there is room


def _guesses(ax: Axes, found: dict) -> None:
    """The line that blind guesses among all possible results would draw."""
    rows = next(iter(found["models"].values()))["rows"]
    ax.plot(column(rows, "k"), column(rows, "guessing"), color=MUTED, linestyle="--", linewidth=1)
    note(ax, f"dashed: blind guesses\namong {found['choices']} results", "lower right")


@styled
def wordlist_by_layer(source: object) -> Figure:
    """Probability of the user's words as the first of an answer, after every layer, with 95 % intervals."""
    results, place = load(source, STAGE)
    found = results.get("wordlist") or {}
    fig, axes = new_figure(1, 1, DOUBLE, 2.8, "Words of the list, layer by layer", place)
    ax, ends = axes[0, 0], []
    fig.data = pd.DataFrame(
        [
            {"model": name, "layer": layer, **row}
            for name, rows in (found.get("models") or {}).items()
            for layer, row in enumerate(rows, start=1)
        ]
    )
    if fig.data.empty:
        say(ax, NOT_RUN)
        return fig
    for name, rows in found["models"].items():
        role = (results.get("models") or {}).get(name, {}).get("role") or "control"
        colour, strong = ROLE_COLOURS.get(role, INK), role != "control"
        layers, likely = np.arange(1, len(rows) + 1), column(rows, "value")
        if strong:
            ax.fill_between(layers, column(rows, "low"), column(rows, "high"), color=colour, alpha=0.12, linewidth=0)
            ends.append((layers[-1], likely[-1], label(results, name), colour))
        marker = ROLE_MARKERS.get(role, "o")
        width, size = (1.4, 4) if strong else (0.7, 2.5)
        ax.plot(layers, likely, color=colour, marker=marker, markersize=size, linewidth=width, zorder=3 + strong)
    ax.set(xlabel="layer whose state is read", ylabel="probability of a listed word")
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    note(ax, f"{found['tokens']} tokens of the list; thin violet: controls")
    end_labels(ax, ends)
    return fig


def of_report(place: object, results: dict) -> list[tuple[str, Callable[[], Figure], str]]:
    """Key, drawing and caption of the figures that this run's 07 has something for."""
    found = [("pass_at_k", lambda: pass_at_k(place), "What many answers to one problem find.")]
    drawn = found if results.get("sampling") else []
    if results.get("wordlist"):
        drawn.append(("wordlist", lambda: wordlist_by_layer(place), "Probability of the list's words by layer."))
    if (results.get("requests") or {}).get("reward"):
        caption = "Gain over instruct in the run's reward, and in that of harmlessness."
        drawn.append(("rewards", lambda: reward_trade_off(place), caption))
    kinds = (results.get("retention") or {}).get("kinds", {})
    for loss in ("forward_kl", *kinds):
        if _gain_rows(results, loss, None):
            lost = "forward KL from it" if loss == "forward_kl" else f"perplexity of {kinds[loss]['label']}"
            caption = f"Gain over instruct against what is lost: {lost}."
            drawn.append((f"gain_{loss}", lambda loss=loss: gain_against_loss(place, loss), caption))
    return drawn
