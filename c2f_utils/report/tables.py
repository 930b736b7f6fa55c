"""Tables as functions of results on disk, written as CSV (full precision), Markdown and LaTeX (rounded).

A table keeps the keys of the results as its columns; the readable headings and the rounding come when it is written.
Nulls are shown as a dash. Nothing but pandas is needed.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd

from c2f_utils import stats
from c2f_utils.files import read_json, write_text
from c2f_utils.private import Private
from c2f_utils.report.letters import in_html, in_markdown
from c2f_utils.report.results import METRICS, laws_of, load, model_rows, operator_name, origin_of, rows_of, seed_frame

# Columns of every table of models.
MEASURED = (
    "accuracy_last", "accuracy_first", "correct_steps", "mean_tokens", "rep4", "duplicate_sentences", "eos_rate",
    "utility", "reward", "n",
)  # fmt: skip
DASH = "–"


def heading(column: str) -> str:
    """Readable name of a column."""
    return METRICS[column].column if column in METRICS else str(column).replace("_", " ")


def cell(column: str, value: object) -> str:
    """A value as shown: rounded by column, integers whole, nulls as a dash."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if column in ("coefficient", "share", "level"):
            return f"{value:g}"
        if column in ("n", "seed", "threads", "layer"):
            return f"{value:.0f}"
        return f"{value:.{METRICS[column].digits if column in METRICS else 3}f}"
    return str(value)


def _numeric(frame: pd.DataFrame, column: str) -> bool:
    return pd.api.types.is_numeric_dtype(frame[column]) and not pd.api.types.is_bool_dtype(frame[column])


def _cells(frame: pd.DataFrame) -> list[list[str]]:
    rows = frame.astype(object).itertuples(index=False, name=None)
    return [[cell(name, value) for name, value in zip(frame.columns, row, strict=True)] for row in rows]


def markdown(frame: pd.DataFrame) -> str:
    """A pipe table; a pipe or a line break inside a cell cannot break it."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    names = list(frame.columns)
    rule = ["---:" if _numeric(frame, name) else "---" for name in names]
    lines = [row([in_markdown(heading(name)) for name in names]), row(rule)]
    lines += [row([in_markdown(text) for text in cells]) for cells in _cells(frame)]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", DASH: "--", "“": "``", "”": "''", "α": r"$\alpha$", "±": r"$\pm$",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(str(text).split()))


def latex(frame: pd.DataFrame, caption: str = "", label: str = "") -> str:
    """A `table` environment that needs no package: numbers right, words left."""
    names = list(frame.columns)
    align = "".join("r" if _numeric(frame, name) else "l" for name in names)
    body = [" & ".join(escape_latex(text) for text in cells) + r" \\" for cells in _cells(frame)]
    head = " & ".join(escape_latex(heading(name)) for name in names) + r" \\"
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{align}}}", r"\hline", head, r"\hline", *body]
    lines += [r"\hline", r"\end{tabular}"]
    lines += [rf"\caption{{{escape_latex(caption)}}}"] if caption else []
    lines += [rf"\label{{tab:{label}}}"] if label else []
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def html(frame: pd.DataFrame) -> str:
    """An HTML table with every cell escaped."""

    def row(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="number"' if _numeric(frame, name) else "" for name in frame.columns]
        inner = (f"<{tag}{mark}>{in_html(text)}</{tag}>" for mark, text in zip(marks, cells, strict=True))
        return "<tr>" + "".join(inner) + "</tr>"

    head = row("th", [heading(name) for name in frame.columns])
    return (
        "<table>\n<thead>"
        + head
        + "</thead>\n<tbody>\n"
        + "\n".join(row("td", c) for c in _cells(frame))
        + "\n</tbody></table>\n"
    )


def save_table(frame: pd.DataFrame, place: object, name: str, caption: str = "", origin: str = "") -> pd.DataFrame:
    """Write `name`.csv, .md and .tex to the `tables/` of a stage (or a directory of that name); return the frame.

    `origin` names the run in a comment of the last two; a CSV has no comments, and `manifest.json` names its run.
    What is returned and written tells no folder of this machine.
    """
    directory = Path(getattr(place, "dir", place))
    directory = directory if directory.name == "tables" else directory / "tables"
    frame, said = _without_folders(frame), " ".join((origin or origin_of(directory.parent)).split()).replace(">", "›")
    write_text(directory / f"{name}.csv", frame.to_csv(index=False))
    write_text(directory / f"{name}.md", f"{markdown(frame)}\n<!-- {said} -->\n")
    write_text(directory / f"{name}.tex", f"% {said}\n" + latex(frame, caption, name.replace("_", "-")))
    return frame


def _without_folders(frame: pd.DataFrame) -> pd.DataFrame:
    hidden, frame = Private(), frame.copy()
    for number, name in enumerate(frame.columns):
        if not _numeric(frame, name):
            values = list(frame.iloc[:, number])
            told = {value: hidden.taken_out(value) for value in values if isinstance(value, str)}
            if any(value != said for value, said in told.items()):
                frame.isetitem(number, [told[value] if isinstance(value, str) else value for value in values])
    return frame


# What the tables hold


def _frame(rows: list[dict], columns: Sequence[str]) -> pd.DataFrame:
    """Rows with exactly these columns; whole-number columns stay whole where nothing is missing."""
    return pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], columns=list(columns))


def model_table(source: object, decoding: str = "sampled_t1") -> pd.DataFrame:
    """One row per model of stage 07 evaluated with this decoding: label, role and all metrics."""
    results, _ = load(source, "07_evaluation")
    return _frame(model_rows(results, decoding), ("label", "role", *MEASURED)).rename(columns={"label": "model"})


def paired_table(source: object) -> pd.DataFrame:
    """Paired differences over prompts of stage 07 with intervals; Holm's correction per metric and decoding.

    `detectable` is the smallest true difference that so many prompts would show (power 80 %), by the interval's width.
    """
    results, _ = load(source, "07_evaluation")
    rows = [
        row | {"detectable": stats.detectable_within(row["low"], row["high"])} if _bounded(row) else dict(row)
        for row in results.get("paired") or []
    ]
    for group in {(row["metric"], row["decoding"]) for row in rows}:
        mine = [row for row in rows if (row["metric"], row["decoding"]) == group and row.get("p") is not None]
        for row, p in zip(mine, stats.holm([row["p"] for row in mine]), strict=True):
            row["p_holm"] = p
    columns = ("a", "b", "metric", "decoding", "difference", "low", "high", "p", "p_holm", "detectable")
    return _frame(rows, columns)


def _bounded(row: dict) -> bool:
    return None not in (row.get("low"), row.get("high"))


def prefix_table(source: object) -> pd.DataFrame:
    """Repeated 4-grams at fixed prefixes per model of stage 07, with the number of answers long enough."""
    results, _ = load(source, "07_evaluation")
    labels = {name: model.get("label") or name for name, model in (results.get("models") or {}).items()}
    found = (results.get("prefix_redundancy") or {}).items()
    return _frame(
        [{"model": labels.get(k, k), **row} for k, rows in found for row in rows], ("model", "prefix", "rep4", "n")
    )


def length_bias_table(source: object) -> pd.DataFrame:
    """The length bias of every reward model of stage 02 on held-out pairs, figure by figure, with its interval."""
    results, _ = load(source, "02_reward_model")
    rows = [
        {"model": row["model"], "figure": name.replace("_", " "), **value}
        for row in results.get("length_bias_models") or []
        for name, value in row.items()
        if isinstance(value, dict)
    ]
    return _frame(rows, ("model", "figure", "value", "low", "high"))


def law_table(source: object) -> pd.DataFrame:
    """One row per law and seed of stage 04, and a mean per law with more than one seed; tokens also as a ratio."""
    results, _ = load(source, "04_length_schedules")
    laws = laws_of(results)
    columns = ("law", "seed", "agnostic", "rollout_tokens", "of_fixed_long", *MEASURED)
    rows = []
    for name, law in laws.items():
        mine = []
        for seed, run in law["seeds"].items():
            reference = laws.get("fixed_long", {}).get("seeds", {}).get(seed, {}).get("rollout_tokens")
            ratio = run["rollout_tokens"] / reference if reference else None
            shared = {"law": law.get("label") or name, "agnostic": agnostic(law)}
            tokens = {"rollout_tokens": run["rollout_tokens"], "of_fixed_long": ratio}
            mine.append(shared | {"seed": str(seed)} | tokens | (run.get("final") or {}))
        rows += mine
        if len(mine) > 1:
            means = _frame(mine, columns).drop(columns=["law", "seed", "agnostic"]).apply(pd.to_numeric).mean()
            rows.append(shared | {"seed": f"mean of {len(mine)}"} | means.to_dict())
    return _frame(rows, columns)


def agnostic(law: dict) -> bool | None:
    """Whether a law of 04 reads no signal of the training; None when its results do not say."""
    if law.get("agnostic") is not None:
        return law["agnostic"]
    name = (law.get("law") or {}).get("name")
    return None if name is None else name in ("fixed", "clock")


def sweep_table(source: object) -> pd.DataFrame:
    """The coefficient sweep of stage 06; `chosen` marks the one that was taken."""
    results, _ = load(source, "06_residue_merging")
    chosen = (results.get("chosen") or {}).get("coefficient")
    rows = [{**row, "chosen": row["coefficient"] == chosen} for row in rows_of(results, "sweep")]
    return _frame(rows, ("coefficient", "chosen", *MEASURED, "score"))


def layer_table(source: object) -> pd.DataFrame:
    """The layer recipes of stage 06."""
    results, _ = load(source, "06_residue_merging")
    return _frame(rows_of(results, "layers"), ("name", *MEASURED, "score"))


def operator_table(source: object) -> pd.DataFrame:
    """The merge operators of stage 06; `chosen` marks the one that was taken."""
    results, _ = load(source, "06_residue_merging")
    chosen = operator_name((results.get("chosen") or {}).get("operator"))
    rows = [{**row, "chosen": row["operator"] == chosen} for row in rows_of(results, "operators")]
    return _frame(rows, ("operator", "chosen", *MEASURED, "score"))


def timings_table(run_dir: object) -> pd.DataFrame:
    """Wall time (s), peak memory (MiB) and named timers (s) of every stage in a run directory."""
    rows = []
    for stage in sorted(path for path in Path(getattr(run_dir, "dir", run_dir)).glob("[0-9][0-9]_*") if path.is_dir()):
        if ".old-" in stage.name:
            continue
        status, timings = (_json(stage / f"{name}.json") for name in ("status", "timings"))
        parts = "; ".join(f"{name} {value:.1f}" for name, value in timings.items() if isinstance(value, int | float))
        peak = status.get("peak_mb")
        wall = seconds(status.get("started"), status.get("finished"))
        rows.append({"stage": stage.name, "wall_s": wall, "peak_mb": peak, "timers (s)": parts or DASH})
    return _frame(rows, ("stage", "wall_s", "peak_mb", "timers (s)"))


def seconds(start: str | None, end: str | None) -> float | None:
    """Seconds between two ISO times; None when either is missing."""
    if not start or not end:
        return None
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def seed_table(
    runs: Sequence[dict], names: Sequence[str], decoding: str, metrics: Sequence[str] = MEASURED[:-1]
) -> pd.DataFrame:
    """Per model and metric over several 07 results: each run's value, the mean and its 95 % t-interval over runs."""
    frame = seed_frame(runs, names, decoding, metrics)
    rows = []
    for (model, metric), group in frame.groupby(["label", "metric"], sort=False):
        values = group["value"].dropna().to_numpy(dtype=float)
        if not len(values):
            continue
        found = stats.seed_interval(values)
        each = dict(zip(group["run"], group["value"].astype(float), strict=True))
        rows.append(
            {
                "model": model,
                "metric": heading(metric),
                **each,
                "mean": found.value,
                "low": found.low,
                "high": found.high,
            }
        )
    return _frame(rows, ("model", "metric", *names, "mean", "low", "high"))


def _json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
