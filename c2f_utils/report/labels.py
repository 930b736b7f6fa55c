"""Names written beside lines and points instead of in a legend, without overlaps.

Geometry is in points (1/72 inch), so that a figure reads the same at any resolution.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

# Where a label may stand: 24 directions at 8 distances (points) from its point, flattened to [192].
_ANGLES, _REACHES = (
    grid.ravel() for grid in np.meshgrid(np.arange(24) * math.pi / 12, (1.0, 5.0, 11.0, 18.0, 27.0, 38.0, 52.0, 70.0))
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
    obstacles: Sequence[tuple[float, float]] = (), size: float = 6.5, bold: Sequence[bool] = (),
) -> list:  # fmt: skip
    """Name points directly, beside them where there is room, else further off with a thin line; no two overlap.

    The layout is settled first and kept. Each label takes the cheapest of 24 directions x 8 distances; four rounds let
    early ones make way for late ones. Returns the annotations.
    """
    fig = ax.figure
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    scale = 72 / fig.dpi  # all geometry in points
    where = ax.transData.transform(np.array([*points, *obstacles], dtype=float).reshape(-1, 2)) * scale
    frame = np.array(ax.get_window_extent().extents) * scale
    sizes = [_text_size(ax, text, size, bool(bold) and bold[k]) for k, text in enumerate(texts)]
    offsets, fixed = [], []  # per label: where it may go [192, 2], and what each place costs whatever the others do
    for k, extent in enumerate(sizes):
        offsets.append(_DIRECTIONS * (_REACHES[:, None] + 3 + np.array(extent) / 2))
        boxes = _boxes(where[k] + offsets[k], extent)
        fixed.append(_fixed_cost(boxes, where, frame) + _REACHES + 2 * np.abs(_DIRECTIONS[:, 1]))
    chosen: list[np.ndarray | None] = [None] * len(points)
    places: list[tuple[float, float]] = [(0.0, 0.0)] * len(points)
    for _ in range(4):
        for k, extent in enumerate(sizes):
            boxes, cost = _boxes(where[k] + offsets[k], extent), fixed[k].copy()
            for j, other in enumerate(chosen):
                if other is not None and j != k:
                    shared = np.minimum(boxes[:, 2:], other[2:]) - np.maximum(boxes[:, :2], other[:2])
                    cost += np.where((shared > 0).all(axis=1), 500 + shared.prod(axis=1), 0)
            best = int(cost.argmin())
            chosen[k], places[k] = boxes[best], tuple(offsets[k][best])
    drawn = []
    for k, ((x, y), text, colour) in enumerate(zip(points, texts, colours, strict=True)):
        dx, dy = places[k]
        far = math.hypot(max(0, abs(dx) - sizes[k][0] / 2), max(0, abs(dy) - sizes[k][1] / 2)) > 9
        arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": colour, "shrinkA": 0, "shrinkB": 2} if far else None
        drawn.append(
            ax.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha="center", va="center", color=colour,
                fontsize=size, arrowprops=arrow, zorder=6, fontweight="bold" if bold and bold[k] else "normal",
            )
        )  # fmt: skip
    return drawn


def _text_size(ax: Axes, text: str, size: float, bold: bool) -> tuple[float, float]:
    artist = ax.text(0, 0, text, fontsize=size, fontweight="bold" if bold else "normal")
    extent = artist.get_window_extent()
    artist.remove()
    return extent.width * 72 / ax.figure.dpi + 2, extent.height * 72 / ax.figure.dpi + 1


def _boxes(centres: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """Rectangles [n, 4] as x0, y0, x1, y1 around centres [n, 2]."""
    half = np.array(extent) / 2
    return np.hstack([centres - half, centres + half])


def _fixed_cost(boxes: np.ndarray, points: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Cost [n] of rectangles for leaving the frame and for covering points."""
    outside = np.maximum(0, frame[:2] - boxes[:, :2]).sum(axis=1) + np.maximum(0, boxes[:, 2:] - frame[2:]).sum(axis=1)
    inside = (points[None] > boxes[:, None, :2] - 2.5) & (points[None] < boxes[:, None, 2:] + 2.5)
    return 30 * outside + 150 * inside.all(axis=2).sum(axis=1)
