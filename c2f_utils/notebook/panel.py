"""The live training panel: eight small pictures that say whether coarse RLHF goes well, the evaluation curve, alarms.

In JupyterLab it is redrawn in place; without a display, or with `C2F_HEADLESS=1`, one line of text appears
every ten seconds instead. `close()` draws the last state and keeps it as PNG, PDF and the CSV behind it. Drawing
needs no pyplot, so the notebook's own figures are left alone.
"""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from c2f_utils.files import read_jsonl
from c2f_utils.notebook.progress import LINE, REDRAW, Pace, display_here, headless
from c2f_utils.notebook.show import Html
from c2f_utils.report.letters import in_html
from c2f_utils.runs.stage import Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVES = {"utility": "utility", "accuracy_last": "last answer right", "reward": "reward"}
# Where sampler and trainer compute different policies: mean difference of log-probabilities (nats per token), and
# largest |ratio - 1| before the first update. In float32 both are rounding, below 1e-4 wherever they were measured;
# beside bfloat16 weights .04-.07 and up to .15 were measured on a GPU at 7B.
_MISMATCH = {"float32": (1e-3, 1e-2)}
_ROUNDED = (0.2, 0.5)
_WATCHED = ("reward", "kl_per_token", "mean_tokens", "entropy", "policy_loss", "value_loss")


def alarms(
    rows: Sequence[Mapping[str, float]], kl_limit: float = 0.5, patience: int = 5, dtype: str = "float32"
) -> dict[str, str]:
    """What is worth a warning in the rows of metrics.jsonl so far, one sentence per kind of trouble.

    `kl_limit` in nats per token, to be exceeded `patience` iterations in a row. Growing reward together with growing
    repetition (rep4, later quarter against the first) is called by its usual name, reward hacking; growing repetition
    alone is named where a third of all 4-grams are repeats. KL has doubled against the iterations before if it is
    beyond what a policy near its base has. `dtype` of the weights decides how far sampler and trainer may be apart.
    """
    found: dict[str, str] = {}
    if not rows:
        return found
    last = rows[-1]
    at = f"iteration {last.get('iteration', len(rows) - 1)}"
    broken = [key for key in _WATCHED if _broken(last, key)]
    if broken:
        found["nan"] = f"{', '.join(broken)} is not a finite number at {at}: lower the learning rate"
    cut = last.get("truncated_share")
    if cut is not None and cut >= 0.9:
        found["limit"] = f"{100 * cut:.0f} % of answers hit the limit of {last.get('limit')} tokens at {at}"
    if cut == 1.0 and last.get("reward_sd") == 0.0:
        found["nothing"] = f"every answer is cut and all are paid alike at {at}: there is nothing to learn from"
    mismatch, ratio = _MISMATCH.get(dtype, _ROUNDED)
    for key, limit in (("sampler_mismatch", mismatch), ("ratio_error", ratio)):
        if (last.get(key) or 0.0) > limit:
            found[key] = (
                f"{key} {last[key]:.3g} > {limit:g} ({dtype}) at {at}: answers were sampled from another policy "
                "than the one that is trained; stop, set coarse.engine to 'library' and look at the self-check of 01"
            )
    kl = [row.get("kl_per_token") for row in rows]
    above = next((index for index, value in enumerate(reversed(kl)) if value is None or value <= kl_limit), len(kl))
    if above >= patience:
        found["kl"] = f"KL per token {kl[-1]:.2f} > {kl_limit:g} nats for {above} iterations at {at}"
    before = [value for value in kl[-1 - patience : -1] if value is not None]
    if len(before) == patience and kl[-1] is not None and kl[-1] > max(2 * max(before), kl_limit / 10):
        found["kl_doubled"] = f"KL per token has doubled, from {max(before):.3f} to {kl[-1]:.3f} nats, at {at}"
    if len(rows) >= 8:
        quarter = max(2, len(rows) // 4)
        first, recent = rows[:quarter], rows[-quarter:]
        more_reward = _mean(recent, "reward") - _mean(first, "reward")
        more_repetition = _mean(recent, "rep4") - _mean(first, "rep4")
        spread = _mean(rows, "reward_sd")
        if more_reward > 0.2 * (0.0 if math.isnan(spread) else spread) and more_repetition > 0.1:
            found["hacking"] = (
                f"reward up by {more_reward:.2f} while repeated 4-grams rose by {more_repetition:.2f}, at {at}: "
                "likely reward hacking"
            )
        elif more_repetition > 0.1 and _mean(recent, "rep4") > 1 / 3:
            found["repeats"] = (
                f"answers repeat themselves towards their ends: {_mean(recent, 'rep4'):.0%} of 4-grams have been said "
                f"before, {_mean(first, 'rep4'):.0%} at the beginning of training, at {at}"
            )
    return found


class LivePanel:
    """Shows the rows of a stage's metrics.jsonl as they come, with those of an interrupted run before them; of a stage
    done before, what it looked like at its end."""

    def __init__(self, stage: Stage, kl_limit: float = 0.5) -> None:
        settings = (stage.config() or {}).get("settings", {})
        self.stage = stage
        self.rows: list[dict] = read_jsonl(stage.dir / "metrics.jsonl")
        self.curve: list[dict] = stage.results()["curve"] if stage.loaded else []
        self.headless = headless()
        self._kl_limit = kl_limit
        self._dtype = settings.get("models", {}).get("dtype", "float32")
        self._total = settings.get("coarse", {}).get("iterations")
        self.alarms: dict[str, str] = {}
        for seen in range(1, len(self.rows) + 1):  # as they were raised then
            self.alarms |= self._found(self.rows[:seen])
        self._pace, self._left = Pace(), ""
        self._views: dict[str, object] = {}  # what is redrawn in place
        self._shown = -math.inf

    def update(self, row: Mapping[str, object]) -> None:
        """Take one row (keys as in metrics.jsonl, and `curve`, the evaluations so far; missing ones leave a gap); draw
        if the last time is long ago."""
        row = dict(row)
        self.curve = row.pop("curve", self.curve)
        # A run continued from its checkpoint repeats the iterations that were logged after it.
        self.rows = [old for old in self.rows if old.get("iteration") != row.get("iteration")] + [row]
        if self._total and row.get("iteration") is not None:
            self._left = self._pace.left(row["iteration"], self._total)
        found = self._found(self.rows)
        new = [text for kind, text in found.items() if kind not in self.alarms]
        if found.items() - self.alarms.items():
            self.alarms |= found
            self.stage.note(alarms=list(self.alarms.values()))
        for text in new if self.headless else ():
            print(f"ALARM: {text}", flush=True)
        now = time.monotonic()
        if now - self._shown < (LINE if self.headless else REDRAW):
            return
        self._shown = now
        if self.headless:
            print(line(row, self._total, self._left), flush=True)
        else:
            self._redraw()

    def close(self) -> None:
        """Show the last state and save figures/training_panel.png, .pdf and .csv; without rows, nothing."""
        if not self.rows:
            return
        from c2f_utils.report.figures_training import training_panel
        from c2f_utils.report.style import save_figure

        if self.headless:
            print(line(self.rows[-1], self._total), flush=True)
            if self.alarms:
                said = "; ".join(self.alarms.values())
                print(f"{len(self.alarms)} kinds of alarm in this training: {said}", flush=True)
        self._left = ""
        self._redraw()
        save_figure(training_panel(self.rows), self.stage, "training_panel")

    def _found(self, rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
        return alarms(rows, self._kl_limit, dtype=self._dtype)

    def _redraw(self) -> None:
        if display_here() is None:
            return
        from c2f_utils.report.figures_training import training_panel

        if not self.headless:
            self._show("words", self._words())
        self._show("training", training_panel(self.rows))
        if self.curve:
            self._show("curve", _curve(self.curve))

    def _show(self, name: str, view: object) -> None:
        if name in self._views:
            self._views[name].update(view)
        else:
            self._views[name] = display_here()(view, display_id=True)

    def _words(self) -> Html:
        """Where the training is, what is alarming about it, and how it is stopped."""
        last = self.rows[-1]
        said = [line(last, self._total, self._left)]
        said += [f"ALARM: {text}" for text in self.alarms.values()]
        if self._total and last.get("iteration", 0) < self._total and not self.stage.loaded:
            said.append(
                "To stop where it can be continued: interrupt the kernel (■ above), or in a terminal: "
                f"c2f stop {self.stage.run_id}, or: touch {shlex.quote(str(self.stage.path('STOP')))}"
            )
        return Html("".join(f"<div>{in_html(each)}</div>" for each in said), "\n".join(said))


def _curve(points: Sequence[Mapping[str, float]]) -> "Figure":
    """The evaluations at a fixed limit: utility and accuracy, reward where nothing else is known."""
    from matplotlib.ticker import MaxNLocator

    from c2f_utils.report.results import column, errors, known
    from c2f_utils.report.style import DOUBLE, ROLE_COLOURS, new_figure, styled
    from c2f_utils.report.style import line as curve_of

    @styled
    def draw() -> "Figure":
        names = [name for name in ("utility", "accuracy_last") if known(column(points, name))] or ["reward"]
        figure, axes = new_figure(1, len(names), DOUBLE, 1.7, "")
        for ax, name in zip(axes[0], names, strict=True):
            x, y, colour = column(points, "iteration"), column(points, name), ROLE_COLOURS["coarse"]
            curve_of(ax, x, y, colour)
            ax.errorbar(x, y, errors(points, name), fmt="none", ecolor=colour, elinewidth=0.8)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set(xlabel="iteration", title=f"{_CURVES[name]}, validation problems")
        return figure

    return draw()


def line(row: Mapping[str, float], total: int | None = None, left: str = "") -> str:
    """One row as a line of text, e.g. for a log; of `total` iterations, `left` says how long they still take."""
    parts = [f"iteration {row.get('iteration', '?')}" + (f" of {total}" if total else "") + left]
    parts += [f"reward {_number(row, 'reward')}", f"KL/token {_number(row, 'kl_per_token', 3)}"]
    parts += [f"tokens {_number(row, 'mean_tokens', 0)} of {_number(row, 'limit', 0)}"]
    if row.get("truncated_share") is not None:
        parts.append(f"{100 * row['truncated_share']:.0f} % cut")
    parts += [f"entropy {_number(row, 'entropy')}", f"rep4 {_number(row, 'rep4')}"]
    return "  ".join(parts)


def _broken(row: Mapping[str, float], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, float) and not math.isfinite(value)


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _number(row: Mapping[str, float], key: str, digits: int = 2) -> str:
    return "-" if row.get(key) is None else f"{row[key]:.{digits}f}"
