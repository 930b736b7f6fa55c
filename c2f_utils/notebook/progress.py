"""One line that says how far a cell is and how long it will still take, redrawn in place where there is a display."""

import math
import os
import time

from c2f_utils.notebook.panel import LINE, REDRAW, display_here
from c2f_utils.notebook.show import Html
from c2f_utils.report.letters import in_html


class Progress:
    """Call it with the steps done and all steps; at most one line every ten seconds without a display."""

    def __init__(self, what: str, unit: str = "step") -> None:
        self.what, self.unit = what, unit
        self._display = None if os.environ.get("C2F_HEADLESS") == "1" else display_here()
        self._began: tuple[float, int] | None = None  # time and steps of the first call: a resumed run starts later
        self._shown = -math.inf
        self._handle = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._began = self._began or (now, done)
        if now - self._shown < (REDRAW if self._display else LINE) and done < total:
            return
        self._shown = now
        text = f"{self.what}: {self.unit} {done} of {total}{self._left(now, done, total)}"
        if not self._display:
            print(text, flush=True)
        elif self._handle is None:
            self._handle = self._display(Html(in_html(text), text), display_id=True)
        else:
            self._handle.update(Html(in_html(text), text))

    def _left(self, now: float, done: int, total: int) -> str:
        began, first = self._began
        if done == first or done >= total:
            return ""
        return f", about {in_words((now - began) / (done - first) * (total - done))} left"


def in_words(seconds: float) -> str:
    """A duration as a person would say it: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for size, unit, digits in ((86_400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{max(1, seconds):.0f} s"
