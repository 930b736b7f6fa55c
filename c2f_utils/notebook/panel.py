"""The live training panel: six small pictures that say whether coarse RLHF is going well, and alarms in words.

In JupyterLab one figure is redrawn in place; without a display, or with `C2F_HEADLESS=1`, one line of text appears
every ten seconds instead. `close()` draws the last state and keeps it as PNG, PDF and the CSV behind it. Drawing
needs no pyplot, so the notebook's own figures are left alone.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence

from c2f_utils.files import read_jsonl
from c2f_utils.runs.stage import Stage

REDRAW, LINE = 2.0, 10.0  # seconds between figures, between lines of text
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
    repetition (rep4, later quarter against the first) is called by its usual name, reward hacking. `dtype` of the
    weights decides how far sampler and trainer may be apart.
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
    return found


class LivePanel:
    """Shows the rows of a stage's metrics.jsonl as they come, with those of an interrupted run before them."""

    def __init__(self, stage: Stage, kl_limit: float = 0.5) -> None:
        self.stage = stage
        self.rows: list[dict] = read_jsonl(stage.dir / "metrics.jsonl")
        self.alarms: dict[str, str] = {}
        self.headless = os.environ.get("C2F_HEADLESS") == "1" or display_here() is None
        self._kl_limit = kl_limit
        self._dtype = ((stage.config() or {}).get("settings", {}).get("models", {})).get("dtype", "float32")
        self._handle = None
        self._shown = -math.inf

    def update(self, row: Mapping[str, float]) -> None:
        """Take one row (keys as in metrics.jsonl; missing ones leave a gap); draw if the last time is long ago."""
        # A run continued from its checkpoint repeats the iterations that were logged after it.
        self.rows = [old for old in self.rows if old.get("iteration") != row.get("iteration")] + [dict(row)]
        found = alarms(self.rows, self._kl_limit, dtype=self._dtype)
        new = [text for kind, text in found.items() if kind not in self.alarms]
        if found.items() - self.alarms.items():
            self.alarms |= found
            self.stage.note(alarms=list(self.alarms.values()))
        for text in new:
            print(f"ALARM: {text}", flush=True)
        now = time.monotonic()
        if now - self._shown < (LINE if self.headless else REDRAW):
            return
        self._shown = now
        if self.headless:
            print(line(row), flush=True)
        else:
            self._redraw()

    def close(self) -> None:
        """Show the last state and save figures/training_panel.png, .pdf and .csv; without rows, nothing."""
        if not self.rows:
            return
        from c2f_utils.report.figures_training import training_panel
        from c2f_utils.report.style import save_figure

        if self.headless:
            print(line(self.rows[-1]), flush=True)
        if self.alarms:
            print(f"{len(self.alarms)} kinds of alarm in this training: {'; '.join(self.alarms.values())}", flush=True)
        self._redraw()
        save_figure(training_panel(self.rows), self.stage, "training_panel")

    def _redraw(self) -> None:
        display = display_here()
        if display is None:
            return
        from c2f_utils.report.figures_training import training_panel

        figure = training_panel(self.rows)
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)


def line(row: Mapping[str, float]) -> str:
    """One row as a line of text, e.g. for a log."""
    parts = [f"iteration {row.get('iteration', '?')}"]
    parts += [f"reward {_number(row, 'reward')}", f"KL/token {_number(row, 'kl_per_token', 3)}"]
    parts += [f"tokens {_number(row, 'mean_tokens', 0)} of {_number(row, 'limit', 0)}"]
    if row.get("truncated_share") is not None:
        parts.append(f"{100 * row['truncated_share']:.0f} % cut")
    parts += [f"entropy {_number(row, 'entropy')}", f"rep4 {_number(row, 'rep4')}"]
    return "  ".join(parts)


def display_here():
    """IPython's display function inside a notebook kernel, else None."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return None
    shell = get_ipython()
    return display if shell is not None and hasattr(shell, "kernel") else None


def _broken(row: Mapping[str, float], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, float) and not math.isfinite(value)


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _number(row: Mapping[str, float], key: str, digits: int = 2) -> str:
    return "-" if row.get(key) is None else f"{row[key]:.{digits}f}"
