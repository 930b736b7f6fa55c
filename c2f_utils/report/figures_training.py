"""Figures of the training stages 01 to 05, each a function of results on disk.

Every function takes a stage, its directory, the run's directory, or the data already read, and returns the figure.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from c2f_utils import stats
from c2f_utils.report.labels import end_labels, point_labels
from c2f_utils.report.results import LABELS, NO_CHECKER, column, folder, known, laws_of, load, quality, target_tokens
from c2f_utils.report.style import (
    DOUBLE,
    INK,
    MUTED,
    ROLE_COLOURS,
    SINGLE,
    law_colour,
    line,
    new_figure,
    note,
    say,
    styled,
)

_LOSSES = {
    "01_base_model": ("Base model: pretraining loss", "base", "loss (nats per token)"),
    "02_reward_model": ("Reward model: preference loss", "control", "loss (nats per pair)"),
    "05_instruction_model": ("Instruction model: fine-tuning loss", "instruct", "loss (nats per token)"),
}


@styled
def loss_curve(source: object, stage: str = "01_base_model") -> Figure:
    """Training loss of stage 01, 02 or 05 against tokens, or steps where tokens are not recorded."""
    place = folder(source)
    if place is not None and place.name in _LOSSES:
        stage = place.name
    results, place = load(source, stage)
    title, role, label = _LOSSES.get(stage, (f"{stage}: training loss", "control", "loss"))
    fig, axes = new_figure(1, 1, SINGLE, 2.3, title, place)
    ax, rows = axes[0, 0], results.get("loss") or []
    fig.data = pd.DataFrame(rows)
    if not known(column(rows, "loss")):
        say(ax, "no loss curve: this model was loaded,\nnot trained, in this stage")
        return fig
    tokens = column(rows, "tokens")
    x, name = (tokens / 1e6, "tokens seen (millions)") if known(tokens) else (column(rows, "step"), "optimiser steps")
    line(ax, x, column(rows, "loss"), ROLE_COLOURS[role])
    ax.set(xlabel=name, ylabel=label)
    if len(rows) > 60:
        note(ax, "faint: raw; line: moving mean", "upper right")
    return fig


@styled
def reward_calibration(source: object) -> Figure:
    """How often the preferred answer scores higher, against what the reward margin predicts, with Wilson intervals."""
    results, place = load(source, "02_reward_model")
    fig, axes = new_figure(1, 1, SINGLE, 2.9, "Reward model: calibration of preference", place)
    ax, rows = axes[0, 0], [row for row in results.get("calibration") or [] if row.get("n")]
    fig.data = pd.DataFrame(rows)
    if not rows:
        say(ax, "no calibration recorded:\nthe reward model was not scored on held-out pairs")
        return fig
    predicted, observed, n = (column(rows, key) for key in ("predicted", "observed", "n"))
    bounds = [stats.wilson(share * count, int(count)) for share, count in zip(observed, n, strict=True)]
    low, high = (np.array([getattr(bound, side) for bound in bounds]) for side in ("low", "high"))
    fig.data = fig.data.assign(low=low, high=high)
    start = min(0.5, float(predicted.min()), float(low.min()))
    ax.plot([start, 1], [start, 1], color=MUTED, linewidth=0.8, linestyle="--")
    ax.errorbar(
        predicted, observed, [np.maximum(0, observed - low), np.maximum(0, high - observed)],
        fmt="none", ecolor=INK, elinewidth=0.8,
    )  # fmt: skip
    ax.scatter(predicted, observed, 8 + 60 * n / n.max(), color=ROLE_COLOURS["control"], zorder=3)
    accuracy = results.get("pair_accuracy")
    if accuracy is not None:
        pairs = results.get("held_out_pairs", results.get("n_pairs"))
        note(ax, f"pair accuracy {accuracy:.3f}" + (f"\non {pairs} held-out pairs" if pairs else ""))
    key = "area: pairs; bars: 95 % Wilson; dashed: perfect"
    ax.set(xlabel=f"predicted probability\n{key}", ylabel="observed share")
    return fig


@styled
def length_bias(source: object) -> Figure:
    """Reward against answer length (points, binned mean, slope) and against true utility, which has no length in it."""
    results, place = load(source, "02_reward_model")
    fig, axes = new_figure(1, 2, DOUBLE, 2.6, "Reward model: length bias", place, sharey=True)
    (left, right), rows = axes[0], results.get("points") or []
    fig.data = pd.DataFrame(rows)
    bias = results.get("length_bias") or {}
    left.set(xlabel="answer length (tokens)", ylabel=LABELS["reward"])
    right.set(xlabel=f"{LABELS['utility']}\npale: answers; black: means of deciles, 95 % t-intervals")
    tokens, reward, utility = (column(rows, key) for key in ("tokens", "reward", "utility"))
    if not known(reward):
        say(left, "no scored answers recorded")
        say(right, "no scored answers recorded")
        return fig
    _scatter(left, tokens, reward)
    parts = [("Pearson", "pearson"), ("Spearman", "spearman"), ("slope per 100 tokens", "slope_per_100_tokens")]
    words = [f"{name} {bias[key]:+.2f}" for name, key in parts if bias.get(key) is not None]
    if bias.get("partial_given_utility") is not None:
        words.append(f"partial, utility held fixed {bias['partial_given_utility']:+.2f}")
    note(left, "\n".join(words))
    _room_above(left)
    if known(utility):
        _scatter(right, utility, reward)
        if results.get("utility_correlation") is not None:
            note(right, f"correlation {results['utility_correlation']:+.2f}")
    else:
        right.tick_params(labelleft=False)
        right.set_xticks([])
        right.grid(False)
        right.text(0.5, 0.5, f"utility {NO_CHECKER}", transform=right.transAxes, ha="center", va="center", color=MUTED)
    return fig


def _scatter(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Faint points, the mean per decile with its 95 % t-interval, and the least-squares line."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    ax.scatter(x, y, 5, color=ROLE_COLOURS["control"], alpha=0.35, linewidths=0)
    if len(x) < 20 or x.min() == x.max():
        return
    # Deciles, fewer where many answers share one length (those cut at the limit): each bin is one place on the axis.
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 11)))
    bins = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 1)
    order = [np.flatnonzero(bins == k) for k in range(len(edges)) if (bins == k).sum() >= 3]
    slope, offset = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, offset + slope * ends, color=MUTED, linewidth=0.8, linestyle="--")
    for part in order:
        found, at = stats.seed_interval(y[part]), x[part].mean()
        ax.plot([at, at], [found.low, found.high], color=INK, linewidth=1, zorder=3)
        ax.plot([at], [found.value], "o", color=INK, markersize=3.5, zorder=3)


def _room_above(ax: Axes, share: float = 0.3) -> None:
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + share * (high - low))


@styled
def prefix_reward(source: object) -> Figure:
    """Mean reward of an answer cut after k tokens, with its standard error: what more length is worth to the model."""
    results, place = load(source, "02_reward_model")
    fig, axes = new_figure(1, 1, SINGLE, 2.3, "Reward of an answer cut after k tokens", place)
    ax, rows = axes[0, 0], results.get("prefix_reward") or []
    fig.data = pd.DataFrame(rows)
    if not known(column(rows, "reward_mean")):
        say(ax, "no prefix rewards recorded")
        return fig
    x, mean, error = (column(rows, key) for key in ("tokens", "reward_mean", "reward_se"))
    error = np.nan_to_num(error)
    colour = ROLE_COLOURS["control"]
    ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    line(ax, x, mean, colour)
    ax.set(xlabel="prefix length k (tokens)", ylabel=LABELS["reward"])
    note(ax, "band: ± 1 standard error", "lower right")
    return fig


@styled
def credit_of_one_answer(rows: list[dict], stopped: str = "") -> Figure:
    """One answer token by token: what each token is paid, what the critic expected and was taught, the advantage.

    `rows` as `coarse.experience.token_rows` gives them; `stopped` says in words how the answer ended.
    """
    fig, axes = new_figure(
        3, 1, DOUBLE, 4.6, "Credit for one answer" + (f", {stopped}" if stopped else ""), sharex=True
    )
    fig.data = pd.DataFrame(rows)
    x, price, value, target, advantage = (
        column(rows, key) for key in ("position", "kl_price", "value", "return", "advantage")
    )
    paid, critic, policy = axes[:, 0]
    paid.bar(x, price, color=ROLE_COLOURS["control"])
    paid.set(ylabel="paid for KL")
    paid.margins(y=0.35)
    final = rows[-1]["reward"] - rows[-1]["kl_price"]
    note(paid, f"what each token is paid for KL to the base; the last one also earns the answer's reward, {final:+.2f}")
    line(critic, x, value, ROLE_COLOURS["instruct"])
    line(critic, x, target, ROLE_COLOURS["coarse"])
    critic.set(ylabel="reward still to come", xlim=(0.2, x[-1] + 0.8))
    ends = [(x[-1], value[-1], "critic's value", ROLE_COLOURS["instruct"])]
    end_labels(critic, [*ends, (x[-1], target[-1], "its target", ROLE_COLOURS["coarse"])])
    policy.bar(x, advantage, color=np.where(advantage < 0, MUTED, ROLE_COLOURS["fine"]))
    policy.axhline(0, color=INK, linewidth=0.6)
    policy.set(ylabel="advantage")
    policy.margins(y=0.25)
    note(policy, "above 0 (green): made more likely; below (grey): less")
    if len(rows) <= 60:
        policy.set_xticks(x, [row["token"] for row in rows], rotation=90, fontsize=7 if len(rows) <= 40 else 5)
    else:
        policy.set_xlabel("token of the answer")
    return fig


@styled
def training_panel(source: object, title: str = "Coarse RLHF: training") -> Figure:
    """Eight views of a coarse run by iteration: reward, KL, length under the moving limit, cut answers; entropy, the
    critic's loss and what it explains, repetition.

    `source` may also be the rows of metrics.jsonl, so that a live panel can draw while the run goes on.
    """
    rows, place = load(source, "03_coarse_rlhf", "metrics.jsonl")
    fig, axes = new_figure(2, 4, DOUBLE, 3.7, title, place, sharex=True)
    fig.data = pd.DataFrame(rows)
    x, main = column(rows, "iteration"), ROLE_COLOURS["coarse"]
    if len(rows) == 0:
        for ax in axes.flat:
            say(ax, "no iteration yet")
        return fig
    for ax, (key, words) in zip(axes.flat, _TRAINING.items(), strict=True):
        _panel(ax, x, column(rows, key), words, main)
    reward, _, length, cut = axes[0]
    spread, mean = np.nan_to_num(column(rows, "reward_sd")), column(rows, "reward")
    reward.fill_between(x, mean - spread, mean + spread, color=main, alpha=0.15, linewidth=0)
    limit = column(rows, "limit")
    length.step(x, limit, where="post", color=INK, linewidth=1)
    length.plot(x, column(rows, "p95_tokens"), color=main, linewidth=0.8, linestyle=":")
    length.set_ylim(0, 1.1 * float(np.nanmax(limit)) if known(limit) else 1.0)
    for ax in (cut, axes[1, 3]):
        ax.set_ylim(-0.03, 1.03)
    explained = axes[1, 2]
    low = column(rows, "explained_variance")
    explained.set_ylim(max(-1.0, min(0.0, float(np.nanmin(low)))) - 0.05 if known(low) else 0.0, 1.05)
    for ax in axes[1]:
        ax.set_xlabel("iteration")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return fig


_TRAINING = {
    "reward": "reward\n(mean ± 1 sd)",
    "kl_per_token": "KL to the base\n(nats per token)",
    "mean_tokens": "tokens: mean (line),\np95 (dotted), limit (step)",
    "truncated_share": "cut by the limit\n(share of answers)",
    "entropy": "entropy\n(nats per token)",
    "value_loss": "value loss\n",
    "explained_variance": "variance explained\nby the critic (from -1)",
    "rep4": "repeated 4-grams\n(share)",
}


def _panel(ax: Axes, x: np.ndarray, y: np.ndarray, title: str, colour: str) -> None:
    ax.set_title(title)
    if not known(y):
        say(ax, "not recorded in this run")
        return
    line(ax, x, y, colour)


@styled
def schedule_comparison(source: object, metric: str = "utility") -> Figure:
    """The limit over iterations, and `metric` against cumulative rollout tokens, for each law; every seed faint."""
    results, place = load(source, "04_length_schedules")
    laws = laws_of(results)
    curves = [row for law in laws.values() for run in law["seeds"].values() for row in run["curve"]]
    metric, why = quality(curves, metric)
    title = "Length laws: the limit, and quality per generated token" + (f" ({why})" if why else "")
    fig, axes = new_figure(1, 2, DOUBLE, 2.8, title, place)
    left, right = axes[0]
    fig.data = pd.DataFrame([
        {"law": name, "label": law["label"], "seed": seed, **{key: row.get(key) for key in
         ("iteration", "rollout_tokens", "limit", metric, "mean_tokens", "accuracy_last", "accuracy_first")}}
        for name, law in laws.items() for seed, run in law["seeds"].items() for row in run["curve"]
    ])  # fmt: skip
    if not laws:
        say(left, "no law was run")
        say(right, "no law was run")
        return fig
    limits, ends, drawn = [], [], []
    for name, law in laws.items():
        colour = law_colour(name, list(laws))
        seeds = list(law["seeds"].values())
        steps = _stacked([np.asarray(run["limits"], dtype=float) for run in seeds])
        for row in steps if len(seeds) > 1 else ():
            left.plot(row, color=colour, alpha=0.35, linewidth=0.7)
        mean = steps.mean(axis=0)
        left.plot(mean, color=colour)
        limits.append((len(mean) - 1, mean[-1], law["label"], colour))
        tokens = _stacked([column(run["curve"], "rollout_tokens") / 1e3 for run in seeds])
        values = _stacked([column(run["curve"], metric) for run in seeds])
        for seed_tokens, seed_values in zip(tokens, values, strict=True) if len(seeds) > 1 else ():
            right.plot(seed_tokens, seed_values, color=colour, alpha=0.35, linewidth=0.7)
        if known(values):
            right.plot(tokens.mean(axis=0), values.mean(axis=0), color=colour)
            ends.append((tokens.mean(axis=0)[-1], values.mean(axis=0)[-1], law["label"], colour))
            for curve in zip(tokens, values, strict=True):  # along the lines, not at their corners alone
                along = np.linspace(0, len(curve[0]) - 1, 6 * len(curve[0]))
                drawn += zip(*(np.interp(along, np.arange(len(each)), each) for each in curve), strict=True)
    left.set(xlabel="iteration", ylabel="length limit (tokens)", ylim=(0, None))
    right.set(xlabel="rollout tokens so far (thousands)", ylabel=LABELS[metric])
    if not ends:
        say(right, f"{LABELS[metric]} {NO_CHECKER}")
    count = {len(law["seeds"]) for law in laws.values()}
    seeds = f"{min(count)}" if len(count) == 1 else f"{min(count)} to {max(count)}"
    note(right, f"faint: each of {seeds} seeds; line: mean" if max(count) > 1 else "one seed", "lower right")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    end_labels(left, limits)
    if ends:
        right.margins(0.14, 0.1)
        places, colours = [end[:2] for end in ends], [end[3] for end in ends]
        point_labels(right, places, [end[2] for end in ends], colours, obstacles=drawn, size=7)
    return fig


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Seeds as rows [seed, point], cut to the shortest, so that a mean over seeds is over all of them."""
    shortest = min(len(row) for row in rows)
    return np.array([row[:shortest] for row in rows])


@styled
def tokens_to_target(source: object, metric: str = "utility", shares: tuple[float, ...] = (0.85, 0.95)) -> Figure:
    """Rollout tokens each law needs to reach shares of fixed-long's gain in `metric`; small dots are seeds, and seeds
    that never get there are counted as missed."""
    results, place = load(source, "04_length_schedules")
    laws = laws_of(results)
    curves = [row for law in laws.values() for run in law["seeds"].values() for row in run["curve"]]
    metric, _ = quality(curves, metric)
    title = f"Tokens to reach a share of fixed-long's gain in {LABELS[metric].split(' (')[0]}"
    fig, axes = new_figure(1, len(shares), DOUBLE, 0.95 + 0.27 * max(3, len(laws)), title, place, sharey=True)
    frames = [target_tokens(laws, metric, share) for share in shares]
    fig.data = pd.concat(frames, ignore_index=True)
    for ax, share, frame in zip(axes[0], shares, frames, strict=True):
        if not known(frame["target"].to_numpy(dtype=float)):
            say(ax, "no target: fixed-long was not run,\nor did not improve" if laws else "no law was run")
            continue
        reach = max(run["rollout_tokens"] for law in laws.values() for run in law["seeds"].values()) / 1e3
        for row, name in enumerate(laws):
            colour, mine = law_colour(name, list(laws)), frame[frame["law"] == name]
            found = mine["tokens"].dropna().to_numpy() / 1e3
            ax.scatter(found, np.full(len(found), row), 14, color=colour, alpha=0.45, linewidths=0)
            if len(found):
                ax.scatter(found.mean(), row, 42, color=colour, marker="|", linewidths=2)
            missed = len(mine) - len(found)
            if missed:
                low = len(found) and found.min() > 1.05 * reach - found.max()  # more room before than behind
                at, side = (found.min(), "right") if low else (found.max() if len(found) else 0, "left")
                words = f"{missed} of {len(mine)} missed" if len(mine) > 1 else "missed"
                gap = {"xytext": (-6 if low else 6, 0), "textcoords": "offset points"}
                ax.annotate(words, (at, row), ha=side, va="center", fontsize=7, color=MUTED, **gap)
        ax.set(xlabel="rollout tokens (thousands)", ylim=(len(laws) - 0.5, -0.5))
        ax.set_yticks(range(len(laws)), [law["label"] for law in laws.values()])
        ax.set_title(f"{share:.0%} of the gain".replace("%", " %"))
        ax.set_xlim(0, 1.05 * reach)
    return fig
