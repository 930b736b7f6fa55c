"""How every figure looks, reads its results, names its lines and is saved.

Figures are made without pyplot: nothing global is touched, none leaks memory, and a notebook shows a returned figure
once. A figure carries the numbers behind it (`fig.data`), which `save_figure` writes beside it.
"""

import contextlib
import functools
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.transforms import Bbox

from c2f_utils.files import write_bytes
from c2f_utils.report.results import origin_of

SINGLE, DOUBLE = 3.3, 6.8  # inches: one and two columns of a paper
SMALLEST = 7.0  # points
STAMP = 0.13  # inches below a figure in which its run is named

ROLE_COLOURS = {"base": "#7f7f7f", "coarse": "#e07b00", "instruct": "#134f91", "fine": "#1b7837", "control": "#9a74bd"}

ROLE_MARKERS = {"base": "s", "coarse": "^", "instruct": "o", "fine": "*", "control": "D"}

# Laws have colours that no role has, so that a colour means one thing in all figures.
LAW_COLOURS = {"fixed_short": "#a8823f", "fixed_long": "#5a3d1e", "clock_linear": "#1b8f9b", "logistic": "#c2185b"}

# For what has no fixed colour; the distances that colour-blind readers see are tested.
_MORE_COLOURS = ("#0b6e4f", "#ef9a9a", "#3d5a80", "#b8a000", "#7bc8a4", "#301860", "#ff6f00")

INK, MUTED = "#222222", "#6b6b6b"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,  # nothing is smaller than SMALLEST: figures are printed at their own size
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=_MORE_COLOURS),
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "figure.titlesize": 9,
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # labels may come from data: a dollar sign is a dollar sign
}


class ResultFigure(Figure):
    """A matplotlib figure with the numbers behind it (`data`) and where they come from (`source`)."""

    data: pd.DataFrame
    source: Path | None = None
    caption: str = ""  # names the runs where there are several

    def _repr_png_(self) -> bytes:
        """For a notebook: a white card with round corners, on which colours are the paper's in a dark theme, too."""
        size = self.get_size_inches()
        card = FancyBboxPatch((0, 0), *size, "round,pad=0,rounding_size=0.1", transform=self.dpi_scale_trans,
                              facecolor="white", linewidth=0, zorder=-1)  # fmt: skip
        self.add_artist(card)
        try:
            return _rendered(self, "png", dpi=STYLE["figure.dpi"], facecolor="none")
        finally:
            card.remove()


def styled(function: Callable) -> Callable:
    """Draw under the house style whatever the notebook has set."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return function(*args, **kwargs)

    return wrapper


def new_figure(
    rows: int, columns: int, width: float, height: float, title: str, source: Path | None = None, **subplots
) -> tuple[ResultFigure, np.ndarray]:
    """A figure of `width` x `height` inches with axes [rows, columns], room for the caption below and a title above."""
    fig = ResultFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    fig.source, fig.data = source, pd.DataFrame()
    low = STAMP / height
    fig.get_layout_engine().set(rect=(0, low, 1, 1 - low), w_pad=0.05, h_pad=0.05)
    if title:
        fig.suptitle(textwrap.fill(title, int(13 * width)), x=0.01, ha="left", fontweight="bold")
    return fig, fig.subplots(rows, columns, squeeze=False, **subplots)


# Saying things in figures


def say(ax: Axes, words: str) -> None:
    """Put words where a picture would be, on otherwise empty axes."""
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    ax.text(
        0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=SMALLEST, wrap=False
    )


def note(ax: Axes, words: str, corner: str = "upper left") -> None:
    """A few muted words in a corner of the axes."""
    vertical, horizontal = corner.split()
    x, y = (0.02 if horizontal == "left" else 0.98), (0.98 if vertical == "upper" else 0.03)
    align = {"ha": horizontal, "va": "top" if vertical == "upper" else "bottom"}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    ax.text(x, y, words, transform=ax.transAxes, color=MUTED, fontsize=SMALLEST, bbox=box, zorder=5, **align)


def law_colour(name: str, names: Sequence[str]) -> str:
    """The fixed colour of a law; others take the cycle in the order of `names`."""
    others = [other for other in names if other not in LAW_COLOURS]
    return LAW_COLOURS.get(name) or _MORE_COLOURS[others.index(name) % len(_MORE_COLOURS)]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over `window` points (fewer at the ends), blind to NaN."""
    half = window // 2
    return np.array([_nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _nanmean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def line(ax: Axes, x: np.ndarray, y: np.ndarray, colour: str, **kwargs) -> None:
    """A line; with more than 60 points its moving mean over the faint raw values."""
    if len(x) <= 60:
        ax.plot(x, y, color=colour, marker="." if len(x) <= 30 else None, **kwargs)
        return
    ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
    ax.plot(x, smooth(y, max(3, len(x) // 25)), color=colour, **kwargs)


# Saving


@styled
def save_figure(fig: Figure, place: object, name: str, data: pd.DataFrame | None = None) -> Figure:
    """Write `name`.png (200 dpi), `name`.pdf for a paper and .csv (the numbers), and return the figure.

    `place` is a stage or its directory (the files go to its `figures/`), or any directory named `figures`. `data`
    defaults to what the figure was drawn from. The picture has its title, and names its run below; the PDF has neither,
    since a paper has a caption, and is to be printed at its own size. Metadata name the run in both. Each file is
    replaced atomically.
    """
    directory = Path(getattr(place, "dir", place))
    directory = directory if directory.name == "figures" else directory / "figures"
    source = getattr(fig, "source", None) or directory.parent
    for old in [text for text in fig.texts if text.get_gid() == "caption"]:
        old.remove()
    words = getattr(fig, "caption", "") or origin_of(source)
    fig.text(0.995, 0.006, words, ha="right", va="bottom", fontsize=5, color="#9a9a9a", gid="caption").set_in_layout(
        False
    )
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # settled: every format, and every later saving, shows the same places
    frame = data if data is not None else getattr(fig, "data", pd.DataFrame())
    write_bytes(directory / f"{name}.png", _rendered(fig, "png", dpi=200, words=words))
    with _without_title_and_stamp(fig) as box:
        write_bytes(directory / f"{name}.pdf", _rendered(fig, "pdf", words=words, bbox_inches=box))
    write_bytes(directory / f"{name}.csv", frame.to_csv(index=False).encode("utf-8"))
    return fig


@contextlib.contextmanager
def _without_title_and_stamp(fig: Figure) -> Iterator[Bbox]:
    """Hides both while the block runs; gives the box (inches) of what is left, as wide as the figure."""
    width, height = fig.get_size_inches()
    title, stamps = fig._suptitle, [text for text in fig.texts if text.get_gid() == "caption"]
    hidden = [*stamps, *([title] if title and title.get_text() else [])]
    top = title.get_window_extent().y0 / fig.dpi - 0.04 if title in hidden else height
    for text in hidden:
        text.set_visible(False)
    try:
        yield Bbox([[0, STAMP], [width, top]])
    finally:
        for text in hidden:
            text.set_visible(True)


def _rendered(fig: Figure, kind: str, dpi: float | None = None, words: str | None = None, **look: object) -> bytes:
    """File content without time stamps, so that the same results give the same bytes; `words` name its origin."""
    told = {"pdf": {"Subject": words, "CreationDate": None, "ModDate": None}}
    told["png"] = {"Software": None} | ({"Description": words} if words else {})
    with io.BytesIO() as memory:
        fig.savefig(memory, format=kind, dpi=dpi or STYLE["savefig.dpi"], metadata=told[kind], **look)
        return memory.getvalue()
