"""Names written beside lines and points instead of in a legend, without overlaps.

Geometry is in points (1/72 inch), so that a figure reads the same at any resolution.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

# Where a label may stand: 24 directions at 10 distances (points) from its point, flattened to [240].
_ANGLES, _REACHES = (
    grid.ravel()
    for grid in np.meshgrid(np.arange(24) * math.pi / 12, (1.0, 5.0, 11.0, 18.0, 27.0, 38.0, 52.0, 70.0, 95.0, 125.0))
)
_DIRECTIONS = np.column_stack([np.cos(_ANGLES), np.sin(_ANGLES)])


def end_labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 7) -> None:
    """Name lines at the right edge, (x, y, text, colour) of each, moved apart vertically where they would overlap."""
    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    if not ends:
        return
    ax.figure.draw_without_rendering()
    points = [ax.transData.transform((x, y))[1] * 72 / ax.figure.dpi for x, y, *_ in ends]
    for (_, y, text, colour), at, place in zip(ends, points, spread(points, size * 1.25), strict=True):
        ax.annotate(
            text, (1, y), xycoords=("axes fraction", "data"), xytext=(3, place - at), textcoords="offset points",
            va="center", color=colour, fontsize=size, annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted positions moved as little as needed so that neighbours are at least `gap` apart."""
    blocks: list[list[float]] = []  # [mean of (place - k * gap), count]: pool adjacent violators
    for index, place in enumerate(places):
        blocks.append([place - index * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            blocks[-1] = [
                (blocks[-1][0] * blocks[-1][1] + mean * count) / (blocks[-1][1] + count),
                blocks[-1][1] + count,
            ]
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [value + index * gap for index, value in enumerate(flat)]


def point_labels(
    ax: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colours: Sequence[str],
    obstacles: Sequence[tuple[float, float]] = (), size: float = 7, bold: Sequence[bool] = (),
    owners: Sequence[int | None] = (),
) -> list:  # fmt: skip
    """Name points directly, beside them where there is room, else further off with a thin line; no two names overlap,
    and none stands nearer to another point than to its own unless a line leads to its own.

    The layout is settled first and kept. Each label takes the cheapest of 24 directions x 10 distances; a few rounds
    let early ones make way for late ones. `owners` says for each obstacle which point it belongs to (None: to none, it
    is only not to be covered). Returns the annotations.
    """
    fig = ax.figure
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    scale = 72 / fig.dpi  # all geometry in points
    where = ax.transData.transform(np.array([*points, *obstacles], dtype=float).reshape(-1, 2)) * scale
    frame = np.array(ax.get_window_extent().extents) * scale
    belongs = [*range(len(points)), *(owners or [None] * len(obstacles))]
    places = []
    for k, text in enumerate(texts):
        others = where[[owner not in (None, k) for owner in belongs]]
        places.append(_Places(where[k], _text_size(ax, text, size, bool(bold) and bold[k]), where, others, frame))
    chosen: list[int | None] = [None] * len(points)
    for _ in range(6):
        before = list(chosen)
        for k, mine in enumerate(places):
            taken = [(places[j], best) for j, best in enumerate(chosen) if best is not None and j != k]
            chosen[k] = int((mine.cost + sum(mine.conflict(other, best) for other, best in taken)).argmin())
        if chosen == before:
            break
    drawn = []
    for k, ((x, y), text, colour) in enumerate(zip(points, texts, colours, strict=True)):
        mine, best = places[k], chosen[k]
        arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": colour, "shrinkA": 0, "shrinkB": 2}
        arrow["relpos"] = (mine.starts[best] - mine.boxes[best, :2]) / mine.extent
        drawn.append(
            ax.annotate(
                text, (x, y), xytext=mine.offsets[best], textcoords="offset points", ha="center", va="center",
                color=colour, fontsize=size, arrowprops=arrow if mine.led[best] else None, zorder=6,
                fontweight="bold" if bold and bold[k] else "normal",
            )
        )  # fmt: skip
    return drawn


class _Places:
    """Where one label may stand: 240 places, and what each costs whatever the other labels do."""

    def __init__(
        self, point: np.ndarray, extent: np.ndarray, covered: np.ndarray, others: np.ndarray, frame: np.ndarray
    ) -> None:
        """`covered` are points that no label should hide, `others` those that belong to another label."""
        self.point, self.extent = point, extent
        self.offsets = _DIRECTIONS * (_REACHES[:, None] + 3 + extent / 2)
        self.boxes = np.hstack([point + self.offsets - extent / 2, point + self.offsets + extent / 2])
        self.starts = np.clip(point, self.boxes[:, :2], self.boxes[:, 2:])  # where a line to the point would begin
        near = np.hypot(*(self.starts - point).T)
        between = _gaps(self.boxes, others)
        self.led = (near > 9) | (near + 3 > between)  # beside it no line is needed, unless another point is as near
        passes = _passes(self.starts, point, others)
        unclear = self.led & ((near < 8) | (passes < 4))  # too short to be seen, or past another point
        self.cost = _outside_or_covering(self.boxes, covered, frame) + _REACHES + 2 * np.abs(_DIRECTIONS[:, 1])
        self.cost += 12 * self.led + 40 * (near > between) + 600 * unclear

    def conflict(self, other: "_Places", best: int) -> np.ndarray:
        """What each place costs [n] beside another label at its place `best`: overlaps, and lines through names."""
        box = other.boxes[best]
        shared = np.minimum(self.boxes[:, 2:], box[2:]) - np.maximum(self.boxes[:, :2], box[:2])
        cost = np.where((shared > 0).all(axis=1), 2000 + shared.prod(axis=1), 0)
        steps = np.linspace(0, 1, 9)[:, None, None]
        lines = self.starts + steps * (self.point - self.starts)  # [9, n, 2]
        cost += 300 * (self.led & ((lines > box[:2]) & (lines < box[2:])).all(axis=2).any(axis=0))
        if other.led[best]:
            line = other.starts[best] + steps * (other.point - other.starts[best])  # [9, 1, 2]
            cost += 300 * ((line > self.boxes[:, :2]) & (line < self.boxes[:, 2:])).all(axis=2).any(axis=0)
        return cost


def _text_size(ax: Axes, text: str, size: float, bold: bool) -> np.ndarray:
    artist = ax.text(0, 0, text, fontsize=size, fontweight="bold" if bold else "normal")
    extent = artist.get_window_extent()
    artist.remove()
    return np.array([extent.width * 72 / ax.figure.dpi + 2, extent.height * 72 / ax.figure.dpi + 1])


def _gaps(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance [n] of rectangles [n, 4] to the nearest of points [m, 2]; infinite without points."""
    apart = np.maximum(0, np.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:]))
    return np.hypot(*np.moveaxis(apart, 2, 0)).min(axis=1, initial=np.inf)


def _passes(starts: np.ndarray, end: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance [n] at which lines from `starts` [n, 2] to `end` pass the nearest of points [m, 2]."""
    points = points[np.hypot(*(points - end).T) > 4]  # markers on one spot cannot be told apart by a line
    along = end - starts
    share = np.einsum("nmd,nd->nm", points - starts[:, None], along) / np.maximum(1e-9, (along**2).sum(axis=1))[:, None]
    feet = starts[:, None] + np.clip(share, 0, 1)[..., None] * along[:, None]
    return np.hypot(*np.moveaxis(points - feet, 2, 0)).min(axis=1, initial=np.inf)


def _outside_or_covering(boxes: np.ndarray, points: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Cost [n] of rectangles for leaving the frame and for covering points."""
    outside = np.maximum(0, frame[:2] - boxes[:, :2]).sum(axis=1) + np.maximum(0, boxes[:, 2:] - frame[2:]).sum(axis=1)
    inside = (points[None] > boxes[:, None, :2] - 2.5) & (points[None] < boxes[:, None, 2:] + 2.5)
    return 30 * outside + 2000 * (outside > 2) + 150 * inside.all(axis=2).sum(axis=1)
