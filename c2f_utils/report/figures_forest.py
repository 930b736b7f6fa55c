"""The first figure of 07 and 08: fine minus every other model, with intervals, in one picture.

Filled: different after Holm's correction, which is that of the sentences (`against`) for the metrics that they are
about, and over the comparisons of a panel for others; hollow: the two cannot be told apart.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.report import against
from c2f_utils.report.results import DECODINGS, LABELS, folder, load, model_rows
from c2f_utils.report.style import DOUBLE, INK, MUTED, ROLE_COLOURS, ROLE_MARKERS, new_figure, say, styled

STAGE = "07_evaluation"
# What is drawn where the checker knows the answers, and where only a reward model judges.
_CHECKED, _REWARDED = ("accuracy_last", "utility", "tokens", "rep4"), ("reward", "tokens", "rep4")
_WORDS = {"tokens": LABELS["mean_tokens"]} | {m: LABELS[m] for m in ("accuracy_last", "utility", "rep4", "reward")}
_FEWER = ("tokens", "rep4")  # less is better


@styled
def forest(source: object, decoding: str | None = None) -> Figure:
    """Fine minus every other model on the same prompts: paired differences with 95 % intervals over prompts.

    `decoding` is 07's first by default.
    """
    try:
        results, place = load(source, STAGE)
    except C2FError:  # notebook 08 shows what there is
        results, place = {}, folder(source)
    paired = results.get("paired") or []
    decoding = decoding or next((row["decoding"] for row in paired), "sampled_t1")
    rows = [
        dict(row) for row in paired if row["decoding"] == decoding and row["a"] == "fine" and row.get("low") is not None
    ]
    for metric in {row["metric"] for row in rows}:
        _mark([row for row in rows if row["metric"] == metric])
    told = {(each.other, each.metric): each.p_holm for each in against.comparisons(results, decoding)}
    for row in rows:
        if (p := told.get((row["b"], row["metric"]))) is not None:
            row["clear"] = p <= 0.05
    return _forest(rows, model_rows(results, decoding), f"Fine minus ..., {DECODINGS.get(decoding, decoding)}", place)


@styled
def seed_forest(
    runs: Sequence[dict], names: Sequence[str], decoding: str = "sampled_t1", metrics: Sequence[str] = _CHECKED
) -> Figure:
    """Fine minus every other model over several runs: the mean of the runs' differences with its 95 % t-interval, and
    every run as a small dot; one panel for each of `metrics` that the runs have (else the reward's)."""
    tables = [{row["model"]: row for row in model_rows(results, decoding)} for results in runs]
    shared = [row for row in tables[0].values() if row["model"] != "fine" and all(row["model"] in t for t in tables)]
    rows = []
    for metric in dict.fromkeys((*metrics, "reward")):
        key = "mean_tokens" if metric == "tokens" else metric
        mine = []
        for other in shared:
            pairs = [(table["fine"].get(key), table[other["model"]].get(key)) for table in tables if "fine" in table]
            each = [a - b for a, b in pairs if None not in (a, b)]
            if len(each) == len(runs) > 1:
                found = stats.seed_interval(each)
                mine.append({"b": other["model"], "metric": metric, "difference": found.value, "each": each}
                            | {"low": found.low, "high": found.high, "p": stats.t_test(each)})  # fmt: skip
        _mark(mine)
        rows += mine
    fig = _forest(rows, shared, f"Fine minus ..., {len(runs)} runs, {DECODINGS.get(decoding, decoding)}", None, metrics)
    fig.caption = "runs " + ", ".join(names)
    return fig


def _mark(rows: list[dict]) -> None:
    for row, p in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["clear"] = p <= 0.05


def _forest(
    rows: list[dict], models: list[dict], title: str, place: object, wanted: Sequence[str] = _CHECKED
) -> Figure:
    metrics = [m for m in wanted if any(row["metric"] == m for row in rows)]
    if not any(metric.startswith("accuracy_last") for metric in metrics):
        metrics = [m for m in _REWARDED if any(row["metric"] == m for row in rows)]
    others = [model for model in models if model["model"] != "fine" and any(r["b"] == model["model"] for r in rows)]
    fig, axes = new_figure(1, max(1, len(metrics)), DOUBLE, 1.15 + 0.2 * max(3, len(others)), title, place, sharey=True)
    kept = ("b", "metric", "difference", "low", "high", "p", "clear")
    fig.data = pd.DataFrame([{key: row.get(key) for key in kept} for row in rows if row["metric"] in metrics])
    if not rows:
        say(axes[0, 0], f"nothing to compare: notebooks/{STAGE}.ipynb has not been run, or recorded no interval")
        return fig
    for ax, metric in zip(axes[0], metrics, strict=True):
        _panel(ax, [row for row in rows if row["metric"] == metric], others, metric)
    first = axes[0, 0]
    first.set_yticks(range(len(others)), [model["label"] for model in others])
    for words, model in zip(first.get_yticklabels(), others, strict=True):
        words.set_color(ROLE_COLOURS.get(model["role"], INK))
    first.set_ylim(len(others) - 0.5, -0.5)
    fig.supxlabel("filled: a difference after Holm's correction; hollow: cannot be told apart", fontsize=7, color=MUTED)
    return fig


def _panel(ax: Axes, rows: list[dict], others: list[dict], metric: str) -> None:
    ax.axvline(0, color=INK, linewidth=0.8)
    places = {model["model"]: (place, model["role"]) for place, model in enumerate(others)}
    for row in rows:
        y, role = places[row["b"]]
        colour = ROLE_COLOURS.get(role, INK)
        ax.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.1)
        for value in row.get("each", ()):
            ax.plot([value], [y + 0.25], ".", color=colour, markersize=2.5, alpha=0.6)
        face = colour if row["clear"] else "white"
        marker = ROLE_MARKERS.get(role, "o")
        ax.plot([row["difference"]], [y], marker, color=colour, markerfacecolor=face, markersize=5, zorder=3)
    reach = 1.08 * max(max(abs(row["low"]), abs(row["high"])) for row in rows) or 1.0  # nothing differs in a dry run
    ax.set_xlim(-reach, reach)
    name, _, kind = metric.partition(", ")
    ax.set_title(", ".join(filter(None, (_WORDS[name], kind))).replace(", ", ",\n").replace(" (", "\n("), fontsize=7.5)
    ax.set_xlabel("← fine is less" if metric in _FEWER else "fine is better →", fontsize=7, color=MUTED)
    ax.tick_params(axis="x", labelsize=7)
    ax.locator_params(axis="x", nbins=4, steps=[1, 2, 5, 10])
