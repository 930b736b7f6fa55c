"""One line that says how far a cell is and how long it will still take, redrawn in place where there is a display."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from c2f_utils.notebook.show import Html
from c2f_utils.report.letters import in_html

REDRAW, LINE = 2.0, 10.0  # seconds between pictures, between lines of text


def display_here():
    """IPython's display function inside a notebook kernel, else None."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return None
    shell = get_ipython()
    return display if shell is not None and hasattr(shell, "kernel") else None


def unattended() -> bool:
    """Whether nobody is reading: a run from the command line."""
    return os.environ.get("C2F_HEADLESS") == "1"


def headless() -> bool:
    """Whether lines of text are wanted instead of something that is redrawn."""
    return unattended() or display_here() is None


class Pace:
    """How long work will still take, reckoned from where this session began: resumed work starts later."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> str:
        """`, about 40 s left`; empty as long as nothing is known, and at the end."""
        now = time.monotonic()
        began, first = self._began = self._began or (now, done)
        if done <= first or done >= total:
            return ""
        return f", about {in_words((now - began) / (done - first) * (total - done))} left"


class Progress:
    """Call it with the steps done and all steps; at most one line every ten seconds without a display."""

    def __init__(self, what: str, unit: str = "step") -> None:
        self.what, self.unit = what, unit
        self._display = None if headless() else display_here()
        self._pace = Pace()
        self._shown = -math.inf
        self._handle = None
        self._counted: tuple[int, int] | None = None  # steps done and expected inside of `counting`

    def __call__(self, done: int, total: int) -> None:
        now, left = time.monotonic(), self._pace.left(done, total)
        if now - self._shown < (REDRAW if self._display else LINE) and done < total:
            return
        self._shown = now
        text = f"{self.what}: {self.unit} {done:,} of {total:,}{left}"
        if not self._display:
            print(text, flush=True)
        elif self._handle is None:
            self._handle = self._display(Html(in_html(text), text), display_id=True)
        else:
            self._handle.update(Html(in_html(text), text))

    @contextmanager
    def counting(self, expected: int) -> Iterator[None]:
        """Inside the block every `step()` is one of `expected`, a guess that the last line puts right."""
        self._counted, self._pace = (0, expected), Pace()
        self._handle, self._shown = None, -math.inf  # another cell has a line of its own
        self._pace.left(0, expected)
        try:
            yield
            if done := self._counted[0]:
                self(done, done)
        finally:
            self._counted = None

    def step(self, *_: object) -> None:
        """One more step of the block that counts them; outside of one nothing."""
        if self._counted:
            done, expected = self._counted[0] + 1, self._counted[1]
            self._counted = done, expected
            if done < expected:
                self(done, expected)


def in_words(seconds: float) -> str:
    """A duration as a person would say it: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for size, unit, digits in ((86_400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{max(1, seconds):.0f} s"
